"""What an API server would refuse of pods and objects: Pod Security, resource quotas, sizes and names.

Pod Security follows the ``restricted`` standard of the Kubernetes documentation, for Linux pods.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from loomvideo.platform.cluster.operator_pods import OperatorPod

VOLUME_KINDS = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""Volumes that the restricted standard allows."""
ENFORCE = "pod-security.kubernetes.io/enforce"
ANNOTATIONS_BYTES = 256 * 1024
"""All annotations of an object; ``kubectl apply`` keeps a copy of the whole object in one."""
OBJECT_BYTES = 1024 * 1024
"""The data of a ConfigMap or Secret."""
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
DATA_KEY = re.compile(r"[-._a-zA-Z0-9]+")
QUOTA_PREFIX = re.compile(r"(requests|limits)\.(.+)")


def restricted_problems(pod: OperatorPod) -> Iterator[str]:
    """Where a pod breaks the restricted Pod Security standard."""
    spec = pod.spec
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} is not allowed by the restricted Pod Security standard"
    for volume in spec.get("volumes", []):
        for kind in volume.keys() - {"name"} - VOLUME_KINDS:
            yield f"volume {volume['name']}: {kind} is not allowed by the restricted Pod Security standard"
    of_pod = spec.get("securityContext") or {}
    for container in pod.containers:
        context = container.get("securityContext") or {}
        where = f"container {container['name']}"
        for problem in _container_problems(of_pod, context):
            yield f"{where}: {problem}, as the restricted Pod Security standard demands"
        for port in container.get("ports", []):
            if port.get("hostPort"):
                yield f"{where}: hostPort {port['hostPort']} is not allowed by the restricted Pod Security standard"


def _container_problems(of_pod: dict[str, Any], context: dict[str, Any]) -> Iterator[str]:
    if context.get("privileged"):
        yield "must not be privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "needs securityContext.allowPrivilegeEscalation: false"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in capabilities.get("drop", []):
        yield "needs securityContext.capabilities.drop: [ALL]"
    for name in capabilities.get("add", []):
        if name != "NET_BIND_SERVICE":
            yield f"must not add the capability {name}"
    if context.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
        yield "needs runAsNonRoot: true"
    if context.get("runAsUser", of_pod.get("runAsUser")) == 0:
        yield "must not run as user 0"
    profile = (context.get("seccompProfile") or of_pod.get("seccompProfile") or {}).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield "needs seccompProfile.type: RuntimeDefault"


def quota_problems(pod: OperatorPod, quota: dict[str, Any]) -> Iterator[str]:
    """Containers that a ResourceQuota refuses because they do not say how much they need."""
    for name in (quota.get("spec") or {}).get("hard") or {}:
        matched = QUOTA_PREFIX.fullmatch(name)
        kind, resource = matched.groups() if matched else ("requests", name)
        if resource not in ("cpu", "memory", "ephemeral-storage"):
            continue
        for container in pod.containers:
            stated = container.get("resources") or {}
            # A request that is left out is the limit.
            amounts = stated.get("limits", {}) | (stated.get("requests", {}) if kind == "requests" else {})
            if resource not in amounts:
                demanded = f"which ResourceQuota {quota['metadata']['name']} demands"
                yield f"container {container['name']}: states no {kind}.{resource}, {demanded}"


def object_problems(manifest: dict[str, Any]) -> Iterator[str]:
    """Names, labels, keys and sizes that the API server refuses for any kind."""
    metadata = manifest.get("metadata") or {}
    name = metadata.get("name", "")
    if len(name) > 253 or not SUBDOMAIN.fullmatch(name):
        yield f"metadata.name {name[:80]!r}: lower-case letters, digits, '-' and '.', at most 253 characters"
    yield from _label_problems(manifest, "")
    kept = json.dumps(manifest, separators=(",", ":"))
    annotations = sum(len(key) + len(str(value)) for key, value in (metadata.get("annotations") or {}).items())
    if len(kept.encode()) + annotations > ANNOTATIONS_BYTES:
        yield (
            f"{len(kept.encode()):,} bytes: kubectl apply keeps a copy in an annotation, and annotations may have "
            f"{ANNOTATIONS_BYTES:,} bytes in all; split it, or apply with --server-side"
        )
    if manifest.get("kind") in ("ConfigMap", "Secret"):
        data = {**(manifest.get("data") or {}), **(manifest.get("stringData") or {})}
        size = sum(len(key) + len(str(value).encode()) for key, value in data.items())
        if size > OBJECT_BYTES:
            yield f"{size:,} bytes of data: a {manifest['kind']} holds at most {OBJECT_BYTES:,}"
        for key in data:
            if not DATA_KEY.fullmatch(key) or len(key) > 253:
                yield f"data key {key[:80]!r}: letters, digits, '-', '_' and '.', at most 253 characters"


def _label_problems(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            if key in ("labels", "matchLabels") and isinstance(value, dict):
                for label, text in value.items():
                    if len(label.rpartition("/")[2]) > 63 or len(str(text)) > 63 or not LABEL.fullmatch(str(text)):
                        yield f"{where}.{label}: {str(text)[:80]!r}: at most 63 letters, digits, '-', '_' and '.'"
            else:
                yield from _label_problems(value, where)
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _label_problems(child, f"{path}[{position}]")
