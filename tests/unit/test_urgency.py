"""Which Services must not wait for the others."""

import pytest

from kubeproxy_py import urgency
from kubeproxy_py.model import (
    Endpoint,
    PortKey,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)

KEY = PortKey("", "tcp")
ONE, OTHER = Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80)
UNREADY = Endpoint("10.0.0.1", 80, ready=False, serving=False)
LEAVING = Endpoint("10.0.0.1", 80, ready=False, terminating=True)


def state(*endpoints, port=80):
    name = ServicePortName("ns", "svc", *KEY)
    return ServiceState(
        {KEY: ServicePort(name=name, cluster_ip="172.30.0.1", port=port)}, {KEY: endpoints}
    )


@pytest.mark.parametrize(
    ("name", "port", "is_essential"),
    [
        pytest.param("default/kubernetes", 443, True, id="the API server"),
        pytest.param("kube-system/kube-dns", 53, True, id="DNS by its usual name"),
        pytest.param("dns/coredns", 5353, True, id="DNS in a namespace of its own"),
        pytest.param("kube-system/rke2-coredns", 53, True, id="port 53 among the system's"),
        pytest.param("team/resolver", 53, False, id="port 53 of somebody"),
        pytest.param("kube-system/metrics", 443, False, id="another of the system's"),
        pytest.param("team/kubernetes", 443, False, id="the API server's name elsewhere"),
    ],
)
def test_everything_needs_the_api_and_dns(name, port, is_essential):
    service = ServiceName(*name.split("/"))

    assert urgency.is_essential(service, state(port=port)) is is_essential


def test_service_of_the_system_that_went_is_not_essential():
    assert not urgency.is_essential(ServiceName("kube-system", "resolver"), None)


@pytest.mark.parametrize(
    ("before", "after", "loses"),
    [
        pytest.param([ONE, OTHER], [OTHER], True, id="one of two went"),
        pytest.param([ONE], [], True, id="the last went"),
        pytest.param([ONE], [OTHER], True, id="another in its place"),
        pytest.param([ONE, OTHER], [UNREADY, OTHER], True, id="is not ready any more"),
        pytest.param([ONE], [LEAVING], False, id="the only one terminates and still serves"),
        pytest.param([LEAVING], [], True, id="the terminating one that served went"),
        pytest.param([UNREADY], [], False, id="one that was not used went"),
        pytest.param([ONE], [ONE, OTHER], False, id="one more"),
        pytest.param([], [ONE], False, id="the first"),
    ],
)
def test_a_service_loses_an_endpoint_that_connections_go_to(before, after, loses):
    assert urgency.loses_endpoints(state(*before), state(*after)) is loses


def test_a_service_that_comes_or_goes_loses_none():
    assert not urgency.loses_endpoints(None, state(ONE))
    assert not urgency.loses_endpoints(state(ONE), None)
