"""The pods that KubeRay makes of a RayCluster or RayJob: what is written, plus what the operator puts beside it.

The API server admits or refuses these pods, not the manifest, so checks read them. They follow KubeRay 1.7's ``pod.go``
and ``job.go``.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

AUTOSCALER_RESOURCES = {"cpu": "500m", "memory": "512Mi"}
WAIT_RESOURCES = {"cpu": "200m", "memory": "256Mi"}
PORTS = {"gcs-server": 6379, "dashboard": 8265}


@dataclass(frozen=True)
class OperatorPod:
    """A pod as it will reach the API server.

    Attributes:
        role: ``head``, ``worker group NAME``, ``submitter``, or the kind of another workload.
        labels: Its labels, those of the operator included.
        annotations: Its annotations.
        spec: Its pod spec.
    """

    role: str
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All containers, those that run before the others included."""
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]


def pods_of(manifest: dict[str, Any]) -> Iterator[OperatorPod]:
    """Every pod that an object leads to, in its final form."""
    kind, spec = manifest.get("kind"), manifest.get("spec") or {}
    if kind == "RayCluster":
        yield from _cluster_pods(spec, manifest["metadata"]["name"])
    elif kind in ("RayJob", "RayService"):
        key = "rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"
        cluster = spec.get(key)
        if cluster:
            yield from _cluster_pods(cluster, manifest["metadata"]["name"])
        if kind == "RayJob" and spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
            yield _submitter(spec, cluster)
    else:
        for template in _templates(spec):
            yield _pod(kind or "?", template, {})


def _cluster_pods(spec: dict[str, Any], cluster: str) -> Iterator[OperatorPod]:
    token = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": _token(spec), "key": "auth_token"}}}
    scales = bool(spec.get("enableInTreeAutoscaling"))
    head = copy.deepcopy(spec["headGroupSpec"]["template"])
    ray = head["spec"]["containers"][0]
    ray.setdefault("env", []).append(token)
    _mount(head["spec"], ray, "shared-mem", "/dev/shm")
    if scales:
        options = spec.get("autoscalerOptions") or {}
        sidecar = _autoscaler(ray, options) | {"env": [token, *options.get("env", [])]}
        _mount(head["spec"], ray, "ray-logs", "/tmp/ray")
        _mount(head["spec"], sidecar, "ray-logs", "/tmp/ray")
        head["spec"]["containers"].append(sidecar)
        head["spec"].setdefault("serviceAccountName", cluster)
    yield _pod("head", head, _labels(cluster, "head", "headgroup"))
    for group in spec.get("workerGroupSpecs") or []:
        template = copy.deepcopy(group["template"])
        ray = template["spec"]["containers"][0]
        ray.setdefault("env", []).append(token)
        waiting = {
            "name": "wait-gcs-ready",
            "image": ray["image"],
            "env": list(ray["env"]),
            "volumeMounts": list(ray.get("volumeMounts", [])),
            "resources": {"requests": dict(WAIT_RESOURCES), "limits": dict(WAIT_RESOURCES)},
        }
        if "securityContext" in ray:
            waiting["securityContext"] = copy.deepcopy(ray["securityContext"])
        _mount(template["spec"], ray, "shared-mem", "/dev/shm")
        template["spec"].setdefault("initContainers", []).append(waiting)
        yield _pod(f"worker group {group['groupName']}", template, _labels(cluster, "worker", group["groupName"]))


def _autoscaler(ray: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    default = {"requests": dict(AUTOSCALER_RESOURCES), "limits": dict(AUTOSCALER_RESOURCES)}
    sidecar: dict[str, Any] = {
        "name": "autoscaler",
        "image": options.get("image") or ray["image"],
        "resources": options.get("resources") or default,
        "volumeMounts": list(options.get("volumeMounts", [])),
    }
    for key in ("securityContext", "envFrom"):
        if options.get(key):
            sidecar[key] = copy.deepcopy(options[key])
    return sidecar


def _submitter(spec: dict[str, Any], cluster: dict[str, Any] | None) -> OperatorPod:
    template = copy.deepcopy(spec.get("submitterPodTemplate"))
    if template is None:
        image = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] if cluster else ""
        limits = {"cpu": "1", "memory": "1Gi"}
        requests = {"cpu": "500m", "memory": "200Mi"}
        container = {"name": "ray-job-submitter", "image": image}
        container |= {"resources": {"limits": limits, "requests": requests}}
        template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return _pod("submitter", template, {})


def _mount(pod: dict[str, Any], container: dict[str, Any], volume: str, path: str) -> None:
    mounts = container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == path for mount in mounts):
        return
    volumes = pod.setdefault("volumes", [])
    if all(known["name"] != volume for known in volumes):
        volumes.append({"name": volume, "emptyDir": {}})
    mounts.append({"name": volume, "mountPath": path})


def _token(spec: dict[str, Any]) -> str:
    return (spec.get("authOptions") or {}).get("secretName", "")


def _labels(cluster: str, node_type: str, group: str) -> dict[str, str]:
    ray = {"cluster": cluster, "is-ray-node": "yes", "node-type": node_type, "group": group}
    return {f"ray.io/{key}": value for key, value in ray.items()}


def _pod(role: str, template: dict[str, Any], labels: dict[str, str]) -> OperatorPod:
    metadata = template.get("metadata") or {}
    return OperatorPod(
        role, (metadata.get("labels") or {}) | labels, metadata.get("annotations") or {}, template["spec"]
    )


def _templates(node: Any) -> Iterator[dict[str, Any]]:
    """Pod templates however deep: Deployments, Jobs, CronJobs."""
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and isinstance(node["spec"].get("containers"), list):
            yield node
            return
        for child in node.values():
            yield from _templates(child)
    elif isinstance(node, list):
        for child in node:
            yield from _templates(child)
