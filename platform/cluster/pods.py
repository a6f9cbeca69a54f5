"""Pod templates of Ray nodes: non-root, shared memory, node-local caches, credentials from secrets."""

from typing import Any

from loomvideo.platform.cluster.profile import ClusterProfile, Head, NodeGroup
from loomvideo.platform.time_limits import IDLE_NODES

USER_ID = 1000
LOCAL = "/local"
SUBMITTER_LABEL = "loomvideo.io/submitter"
# Compile caches are per machine: on a shared volume a killed writer or a node of another architecture breaks everyone.
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "LOOMVIDEO_KERNEL_CACHE": "kernels",
}
HEAD_DISK_GIB = 20
NODE_ACCOUNT, HEAD_ACCOUNT = "loomvideo-node", "loomvideo-head"
# What doctor holds the measured bandwidth of a group against.
MIN_BUS_VARIABLE = "LOOMVIDEO_MIN_BUS_GB_PER_S"
TOKEN_VOLUME = "autoscaler-token"
# Kubernetes puts its own certificate into every namespace under this name.
ROOT_CERTIFICATE = "kube-root-ca.crt"
# All pods of the group within one value of a node label.
TOPOLOGY_ANNOTATION = "kueue.x-k8s.io/podset-required-topology"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
# How long Ray waits between asking a stopped job to end and killing it.
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"


def head_template(profile: ClusterProfile, autoscaler: bool) -> dict[str, Any]:
    """The head's pod template.

    Args:
        profile: The cluster.
        autoscaler: The head runs the autoscaler, which talks to the Kubernetes API.
    """
    head: Head = profile.head
    container = _container(profile, "ray-head", profile.image, head.cpus, head.memory_gib, HEAD_DISK_GIB)
    container["ports"] = [{"name": name, "containerPort": port} for name, port in PORTS.items()]
    spec = _pod(profile, container, shared_memory_gib=max(1, head.memory_gib // 8), local_disk_gib=HEAD_DISK_GIB)
    if autoscaler:
        # KubeRay lets this account patch pods. Only the autoscaler's container gets its token: jobs run beside it.
        spec["serviceAccountName"] = HEAD_ACCOUNT
        spec["volumes"].append({"name": TOKEN_VOLUME, "projected": {"sources": _token_sources()}})
    if head.node_selector:
        spec["nodeSelector"] = dict(head.node_selector)
    if head.priority_class:
        spec["priorityClassName"] = head.priority_class
    return {"metadata": {"labels": _labels(profile, "head")}, "spec": spec}


def worker_template(profile: ClusterProfile, group: NodeGroup) -> dict[str, Any]:
    """A worker group's pod template."""
    image = group.image or profile.image
    container = _container(profile, "ray-worker", image, group.cpus, group.memory_gib, group.local_disk_gib)
    container["ports"] = [{"name": "metrics", "containerPort": PORTS["metrics"]}]
    extra = {group.gpu_resource: str(group.gpus)} if group.gpus else {}
    for kind in ("requests", "limits"):
        container["resources"][kind] |= extra | group.resources
    container["env"] += _variables(group.environment)
    if group.min_bus_gb_per_s:
        container["env"] += _variables({MIN_BUS_VARIABLE: str(group.min_bus_gb_per_s)})
    if group.capabilities:
        container["securityContext"]["capabilities"]["add"] = list(group.capabilities)
    container["lifecycle"] = {"preStop": {"exec": {"command": _drain_command(profile)}}}
    spec = _pod(profile, container, group.shared_memory_gib, group.local_disk_gib)
    spec["terminationGracePeriodSeconds"] = profile.preemption_grace_s
    tolerations = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in group.tolerations]
    if group.spot:
        tolerations.append({"key": "loomvideo.io/spot", "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        spec["tolerations"] = tolerations
    if group.node_selector:
        spec["nodeSelector"] = dict(group.node_selector)
    if group.runtime_class:
        spec["runtimeClassName"] = group.runtime_class
    if group.host_network:
        # The node's resolver does not know the head's service.
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    metadata: dict[str, Any] = {"labels": _labels(profile, group.name)}
    if group.topology:
        metadata["annotations"] = {TOPOLOGY_ANNOTATION: group.topology}
    return {"metadata": metadata, "spec": spec}


def autoscaler_options() -> dict[str, Any]:
    """The autoscaler that KubeRay puts beside the head, as the restricted standard and resource quotas admit it.

    Without a security context of its own the API server refuses the whole head pod. Its logs belong where the head
    reads them: KubeRay would give it an empty folder of its own, because the head's ``/tmp/ray`` is mounted already.
    """
    return {
        "version": "v2",
        "idleTimeoutSeconds": int(IDLE_NODES.here()),
        "resources": _resources(1, 1, 1),
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "local", "mountPath": "/tmp/ray", "subPath": "ray"},
            {"name": TOKEN_VOLUME, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True},
        ],
    }


def _token_sources() -> list[dict[str, Any]]:
    """What the API server would mount by itself, into every container."""
    namespace = {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"configMap": {"name": ROOT_CERTIFICATE, "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [namespace]}},
    ]


def submitter_template(profile: ClusterProfile) -> dict[str, Any]:
    """The pod that runs ``ray job submit`` for a RayJob; KubeRay fills in its command."""
    container = {
        "name": "ray-job-submitter",
        "image": profile.image,
        "resources": _resources(1, 1, 1),
        "securityContext": _container_security(),
    }
    spec = _security(profile) | {"restartPolicy": "Never", "containers": [container]}
    return {"metadata": {"labels": _labels(profile, "submitter") | {SUBMITTER_LABEL: "true"}}, "spec": spec}


def schedule_template(profile: ClusterProfile, command: str) -> dict[str, Any]:
    """The pod of a schedule: runs a shell command that submits to the long-lived cluster, with its token."""
    template = submitter_template(profile)
    token = {"name": profile.token_secret, "key": "auth_token"}
    container = template["spec"]["containers"][0]
    container |= {
        "name": "submit",
        "command": ["bash", "-c", command],
        "env": [
            *_variables({"RAY_AUTH_MODE": "token", "HOME": "/tmp"}),
            {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": token}},
        ],
    }
    return template


def _drain_command(profile: ClusterProfile) -> list[str]:
    # Leave a margin so that the drain ends before the kubelet's kill.
    deadline = str(max(profile.preemption_grace_s - 10, 1))
    return ["python", "-m", "loomvideo.platform.cluster.drain", deadline]


def _pod(
    profile: ClusterProfile, container: dict[str, Any], shared_memory_gib: int, local_disk_gib: int
) -> dict[str, Any]:
    container["volumeMounts"] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "local", "mountPath": LOCAL},
        {"name": "local", "mountPath": "/tmp/ray", "subPath": "ray"},
        {"name": "shared", "mountPath": profile.storage.mount},
    ]
    return _security(profile) | {
        "containers": [container],
        "volumes": [
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_memory_gib}Gi"}},
            {"name": "local", "emptyDir": {"sizeLimit": f"{local_disk_gib}Gi"}},
            {"name": "shared", "persistentVolumeClaim": {"claimName": profile.storage.claim}},
        ],
    }


def _container(
    profile: ClusterProfile, name: str, image: str, cpus: int, memory_gib: int, local_disk_gib: int
) -> dict[str, Any]:
    environment = {
        "MLFLOW_TRACKING_URI": profile.tracking.uri,
        "LOOMVIDEO_RUNS": f"{profile.storage.mount}/runs",
        "HF_HOME": f"{profile.storage.mount}/huggingface",
        "HOME": LOCAL,
        STOP_VARIABLE: str(profile.stop_grace_s),
        "LOOMVIDEO_KERNEL_SHARED": f"{profile.storage.mount}/kernels",
        **{variable: f"{LOCAL}/cache/{folder}" for variable, folder in CACHES.items()},
    }
    if profile.storage.object_store_endpoint:
        environment["AWS_ENDPOINT_URL"] = profile.storage.object_store_endpoint
    environment |= profile.environment
    secrets = [profile.tracking.secret, profile.storage.object_store_secret]
    return {
        "name": name,
        "image": image,
        "env": _variables(environment),
        "envFrom": [{"secretRef": {"name": secret}} for secret in secrets if secret],
        "resources": _resources(cpus, memory_gib, local_disk_gib),
        "securityContext": _container_security(),
    }


def _variables(environment: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": key, "value": value} for key, value in environment.items()]


def _resources(cpus: int, memory_gib: int, disk_gib: int) -> dict[str, Any]:
    amounts = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", "ephemeral-storage": f"{disk_gib}Gi"}
    # Equal requests and limits: Ray sizes a node by the limits and must be able to use what it counts on.
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _security(profile: ClusterProfile) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "serviceAccountName": NODE_ACCOUNT,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if profile.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": profile.image_pull_secret}]
    return spec


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _labels(profile: ClusterProfile, component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/part-of": "loomvideo",
        "app.kubernetes.io/instance": profile.name,
        "app.kubernetes.io/component": component,
    }
