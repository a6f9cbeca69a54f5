"""Cross references between Kubernetes objects: what an object names must be rendered too, or declared as given."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PROVIDED_SERVICE_ACCOUNTS = {"default"}


@dataclass(frozen=True)
class Given:
    """Objects that are made outside of the manifests (``infra/kubernetes/given.yaml``).

    Attributes:
        secrets: Secret name to its keys.
        names: ``(kind, name)`` of other objects.
        readers: Secret name to the ``app.kubernetes.io/name`` of the pods that may hold it, where not all may.
    """

    secrets: dict[str, set[str]] = field(default_factory=dict)
    names: set[tuple[str, str]] = field(default_factory=set)
    readers: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Given":
        """Read the declaration file."""
        values = yaml.safe_load(path.read_text())
        secrets = {secret["name"]: set(secret["keys"]) for secret in values.get("secrets", [])}
        readers = {secret["name"]: set(secret["only"]) for secret in values.get("secrets", []) if "only" in secret}
        return cls(secrets, {(item["kind"], item["name"]) for item in values.get("objects", [])}, readers)


def reference_problems(manifests: list[dict[str, Any]], given: Given) -> Iterator[tuple[dict[str, Any], str]]:
    """``(object, problem)`` for every name that leads nowhere."""
    index = _Index(manifests, given)
    for manifest in manifests:
        for pod in _pods(manifest):
            for problem in index.pod_problems(pod):
                yield manifest, problem
        for problem in index.object_problems(manifest):
            yield manifest, problem


class _Index:
    def __init__(self, manifests: list[dict[str, Any]], given: Given):
        self.manifests = manifests
        self.names = {(m["kind"], m["metadata"]["name"]) for m in manifests} | given.names
        self.names |= {("Secret", name) for name in given.secrets}
        # KubeRay makes the service of a RayService's page.
        services = [m["metadata"]["name"] for m in manifests if m["kind"] == "RayService"]
        self.names |= {("Service", f"{name}-serve-svc") for name in services}
        self.keys = {("Secret", name): keys for name, keys in given.secrets.items()}
        for manifest in manifests:
            if manifest["kind"] in ("ConfigMap", "Secret"):
                fields = ("data", "stringData", "binaryData")
                keys = {key for part in fields for key in manifest.get(part) or {}}
                self.keys[manifest["kind"], manifest["metadata"]["name"]] = keys

    def missing(self, kind: str, name: str, where: str) -> Iterator[str]:
        if (kind, name) not in self.names:
            yield f"{where}: {kind} {name!r} is neither rendered nor declared in given.yaml"

    def missing_key(self, kind: str, reference: dict[str, Any], where: str) -> Iterator[str]:
        if reference.get("optional"):
            return
        name = reference.get("name", "")
        if (kind, name) not in self.names:
            yield from self.missing(kind, name, where)
        elif "key" in reference and reference["key"] not in self.keys.get((kind, name), set()):
            yield f"{where}: {kind} {name!r} has no key {reference['key']!r}"

    def pod_problems(self, pod: dict[str, Any]) -> Iterator[str]:
        account = pod.get("serviceAccountName")
        if account and account not in PROVIDED_SERVICE_ACCOUNTS:
            yield from self.missing("ServiceAccount", account, "serviceAccountName")
        if pod.get("priorityClassName"):
            yield from self.missing("PriorityClass", pod["priorityClassName"], "priorityClassName")
        for secret in pod.get("imagePullSecrets", []):
            yield from self.missing("Secret", secret["name"], "imagePullSecrets")
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for volume in pod.get("volumes", []):
            where = f"volume {volume['name']}"
            if "persistentVolumeClaim" in volume:
                yield from self.missing("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], where)
            if "configMap" in volume:
                yield from self.missing_key("ConfigMap", volume["configMap"], where)
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                yield from self.missing("Secret", name, where)
                for item in volume["secret"].get("items", []):
                    yield from self.missing_key("Secret", {"name": name, "key": item["key"]}, where)
        for container in pod.get("containers", []) + pod.get("initContainers", []):
            yield from self._container_problems(container, volumes)

    def _container_problems(self, container: dict[str, Any], volumes: set[str]) -> Iterator[str]:
        name = container["name"]
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            for field_name, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if field_name in source:
                    yield from self.missing_key(kind, source[field_name], f"container {name}, env {variable['name']}")
        for source in container.get("envFrom", []):
            for field_name, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                if field_name in source:
                    yield from self.missing_key(kind, source[field_name], f"container {name}, envFrom")
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"container {name}, mount {mount['mountPath']}: the pod has no volume {mount['name']!r}"
        ports = {port.get("name") for port in container.get("ports", [])}
        for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if isinstance(port, str) and port not in ports:
                yield f"container {name}, {probe}: no port named {port!r}"

    def object_problems(self, manifest: dict[str, Any]) -> Iterator[str]:
        kind, spec = manifest["kind"], manifest.get("spec", {})
        if kind == "Service":
            yield from self._service_problems(spec)
        elif kind in ("RayCluster", "RayJob", "RayService"):
            cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
            secret = cluster.get("authOptions", {}).get("secretName")
            if secret:
                yield from self.missing_key("Secret", {"name": secret, "key": "auth_token"}, "authOptions.secretName")
            yield from self._shared_claim_problems(manifest)
            yield from self._queue_problems(manifest)
        elif kind == "LocalQueue":
            yield from self.missing("ClusterQueue", spec["clusterQueue"], "spec.clusterQueue")
        elif kind == "ClusterQueue":
            for group in spec.get("resourceGroups", []):
                for flavor in group["flavors"]:
                    yield from self.missing("ResourceFlavor", flavor["name"], "spec.resourceGroups")
        elif kind in ("RoleBinding", "ClusterRoleBinding"):
            yield from self.missing(manifest["roleRef"]["kind"], manifest["roleRef"]["name"], "roleRef")
            for subject in manifest.get("subjects", []):
                yield from self.missing(subject["kind"], subject["name"], "subjects")
        elif kind == "Ingress":
            for tls in spec.get("tls", []):
                yield from self.missing("Secret", tls["secretName"], "spec.tls")
            for rule in spec.get("rules", []):
                for path in rule["http"]["paths"]:
                    yield from self.missing("Service", path["backend"]["service"]["name"], f"host {rule.get('host')}")
        elif kind == "StatefulSet":
            yield from self.missing("Service", spec["serviceName"], "spec.serviceName")

    def _shared_claim_problems(self, manifest: dict[str, Any]) -> Iterator[str]:
        """Volumes that pods on several nodes mount, and that one node alone can write."""
        modes = {
            m["metadata"]["name"]: m["spec"].get("accessModes", [])
            for m in self.manifests
            if m["kind"] == "PersistentVolumeClaim"
        }
        volumes = [volume for pod in _pods(manifest) for volume in pod.get("volumes", [])]
        claims = {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}
        for claim in sorted(claims & modes.keys()):
            if "ReadWriteMany" not in modes[claim]:
                yield f"PersistentVolumeClaim {claim!r}: all nodes write to it, so its accessModes need ReadWriteMany"

    def _service_problems(self, spec: dict[str, Any]) -> Iterator[str]:
        selector = spec.get("selector")
        if not selector:
            return
        matching = [
            pod
            for manifest in self.manifests
            for labels, pod in _labelled_pods(manifest)
            if selector.items() <= labels.items()
        ]
        if not matching:
            yield f"spec.selector {selector}: no pod has these labels"
        ports = {p.get("name") for pod in matching for c in pod["containers"] for p in c.get("ports", [])}
        for port in spec.get("ports", []):
            target = port.get("targetPort", port["port"])
            if matching and isinstance(target, str) and target not in ports:
                yield f"spec.ports: no pod of the service has a port named {target!r}"

    def _queue_problems(self, manifest: dict[str, Any]) -> Iterator[str]:
        labels = manifest["metadata"].get("labels", {})
        for label, kind in (
            ("kueue.x-k8s.io/queue-name", "LocalQueue"),
            ("kueue.x-k8s.io/priority-class", "WorkloadPriorityClass"),
            ("volcano.sh/queue-name", "Queue"),
            ("ray.io/priority-class-name", "PriorityClass"),
        ):
            if label in labels:
                yield from self.missing(kind, labels[label], f"label {label}")


def _pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for _, pod in _labelled_pods(manifest):
        yield pod


def _labelled_pods(node: Any) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Every pod template of an object, however deep: Deployments, CronJobs and Ray groups alike."""
    if isinstance(node, dict):
        spec = node.get("spec")
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            yield node.get("metadata", {}).get("labels", {}), spec
            return
        for child in node.values():
            yield from _labelled_pods(child)
    elif isinstance(node, list):
        for child in node:
            yield from _labelled_pods(child)
