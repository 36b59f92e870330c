"""End-to-end tests on a cluster: named as Kubernetes' own (test/e2e/network), written anew."""
