"""The overlay for kind, made to fit one cluster. Pure: objects in, objects out."""

import copy
from typing import Any

Json = dict[str, Any]


def fitted(objects: list[Json], *, image: str, api_host: str, api_port: int = 6443) -> list[Json]:
    """Return the overlay's objects with this image, and this address of the API server.

    Raises ValueError if there is no DaemonSet that asks for both.
    """
    changed = copy.deepcopy(objects)
    wanted = {"KUBERNETES_SERVICE_HOST": api_host, "KUBERNETES_SERVICE_PORT": str(api_port)}
    replaced = 0
    for obj in changed:
        if obj["kind"] != "DaemonSet":
            continue
        pod = obj["spec"]["template"]["spec"]
        for container in [*pod["initContainers"], *pod["containers"]]:
            container["image"] = image
            # What was loaded into the nodes is nowhere else.
            container["imagePullPolicy"] = "Never"
            for variable in container["env"]:
                if variable["name"] in wanted:
                    variable["value"] = wanted[variable["name"]]
                    replaced += 1
    if not replaced:
        raise ValueError("cannot find where the manifests name the API server")
    return changed
