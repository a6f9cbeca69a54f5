"""Least privilege between pods: which of them may hold which secret, cloud role and image.

``infra/kubernetes/given.yaml`` names, for a secret that not every pod may read, the pods that may (``only``).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from loomvideo.platform.cluster.operator_pods import OperatorPod, pods_of
from loomvideo.platform.cluster.profile import GOOGLE_ROLE
from loomvideo.platform.cluster.references import Given

NAME_LABEL = "app.kubernetes.io/name"
MLFLOW = "mlflow"
# How clouds are told which role the pods of a service account have.
CLOUD_ROLES = ("eks.amazonaws.com/role-arn", GOOGLE_ROLE, "azure.workload.identity/client-id")


def privilege_problems(manifests: list[dict[str, Any]], given: Given) -> Iterator[tuple[dict[str, Any], str]]:
    """``(object, problem)`` for pods that hold more than they need."""
    roles = {m["metadata"]["name"]: _roles(m) for m in manifests if m.get("kind") == "ServiceAccount"}
    made = [(manifest, pod) for manifest in manifests for pod in pods_of(manifest)]
    servers = [pod for _, pod in made if pod.labels.get(NAME_LABEL) == MLFLOW]
    server_images = {container["image"] for pod in servers for container in pod.containers}
    server_roles = {role for pod in servers for role in roles.get(pod.spec.get("serviceAccountName", ""), ())}
    for manifest, pod in made:
        name = pod.labels.get(NAME_LABEL)
        for secret in sorted(_secrets(pod) & given.readers.keys()):
            readers = given.readers[secret]
            if name not in readers:
                yield manifest, f"{pod.role}: holds secret {secret!r}, which is for {', '.join(sorted(readers))} alone"
        if manifest["kind"].startswith("Ray"):
            for image in sorted({container["image"] for container in pod.containers} & server_images):
                yield (
                    manifest,
                    f"{pod.role}: MLflow's server runs the same image {image}; give it its own, tracking.image",
                )
            for role in roles.get(pod.spec.get("serviceAccountName", ""), ()):
                if role in server_roles:
                    yield (
                        manifest,
                        f"{pod.role}: has MLflow's cloud role {role}, which writes artifacts; use another in "
                        "identity.nodes",
                    )


def _roles(account: dict[str, Any]) -> list[str]:
    annotations = account["metadata"].get("annotations") or {}
    return [annotations[key] for key in CLOUD_ROLES if key in annotations]


def _secrets(pod: OperatorPod) -> set[str]:
    """Names of the secrets that a pod reads."""
    found = {volume["secret"]["secretName"] for volume in pod.spec.get("volumes", []) if "secret" in volume}
    for volume in pod.spec.get("volumes", []):
        sources: Iterable[dict[str, Any]] = volume.get("projected", {}).get("sources", [])
        found |= {source["secret"]["name"] for source in sources if "secret" in source}
    for container in pod.containers:
        found |= {source["secretRef"]["name"] for source in container.get("envFrom", []) if "secretRef" in source}
        references = (variable.get("valueFrom", {}).get("secretKeyRef") for variable in container.get("env", []))
        found |= {reference["name"] for reference in references if reference}
    return found
