"""Do the network policies let through what the platform needs? A model of NetworkPolicy for the flows we know.

A pod that a policy selects for a direction sends (or receives) only what some policy of that direction allows; both
ends must agree. Pods on the host's network are outside of all policies.
"""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loomvideo.platform.cluster.operator_pods import OperatorPod

NAMESPACE_LABEL = "kubernetes.io/metadata.name"
DNS, OPERATOR, PROMETHEUS = "kube-system", "kuberay-operator", "monitoring"
API_PORTS = (443, 6443)


@dataclass(frozen=True)
class End:
    """One end of a flow: a pod of the namespace, a pod of another one, or an address outside.

    Attributes:
        name: What messages call it.
        labels: The labels of the pod.
        namespace: None for the manifests' own, else its name; empty for an address.
        address: Outside of the cluster.
        host_network: No policy binds it.
    """

    name: str
    labels: dict[str, str]
    namespace: str | None = None
    address: str = ""
    host_network: bool = False


def network_problems(manifests: list[dict[str, Any]], pods: list[OperatorPod], autoscales: bool) -> Iterator[str]:
    """``flow: what stops it`` for every flow that the policies of a namespace do not let through.

    Args:
        manifests: All objects of the namespace.
        pods: The pods that :func:`operator_pods.pods_of` found.
        autoscales: The head asks the Kubernetes API for nodes.
    """
    policies = [manifest for manifest in manifests if manifest.get("kind") == "NetworkPolicy"]
    if not policies:
        return
    for source, target, port, protocol in _flows(pods, autoscales):
        for end, other, direction in ((source, target, "Egress"), (target, source, "Ingress")):
            if not _allowed(policies, end, other, direction, port, protocol):
                yield f"{source.name} to {target.name}, {protocol} {port}: no policy allows the {direction.lower()}"


def _flows(pods: list[OperatorPod], autoscales: bool) -> Iterator[tuple[End, End, int, str]]:
    ends = {pod.role: End(pod.role, pod.labels, host_network=bool(pod.spec.get("hostNetwork"))) for pod in pods}
    apps = [(pod.labels.get("app.kubernetes.io/name"), pod.labels) for pod in pods]
    by_app = {app: End(app, labels) for app, labels in apps if app}
    head, submitter = ends.get("head"), ends.get("submitter")
    workers = [end for role, end in ends.items() if role.startswith("worker group ")]
    dns = End("DNS", {}, namespace=DNS)
    for end in (*filter(None, (head, submitter)), *workers, *by_app.values()):
        yield end, dns, 53, "UDP"
    if head:
        for worker in workers:
            yield worker, head, 6379, "TCP"
            yield head, worker, 10002, "TCP"
            yield worker, worker, 29500, "TCP"
        if submitter:
            yield submitter, head, 8265, "TCP"
        yield End("KubeRay operator", {}, namespace=OPERATOR), head, 8265, "TCP"
        yield End("Prometheus", {}, namespace=PROMETHEUS), head, 8080, "TCP"
        if autoscales:
            for port in API_PORTS:
                yield head, End("Kubernetes API", {}, namespace="", address="10.96.0.1"), port, "TCP"
    mlflow = by_app.get("mlflow")
    if mlflow:
        clients = [*workers, *filter(None, (head, by_app.get("mlflow-user")))]
        for client in clients:
            yield client, mlflow, 5000, "TCP"
        if "mlflow-postgres" in by_app:
            yield mlflow, by_app["mlflow-postgres"], 5432, "TCP"


def _allowed(policies: list[dict[str, Any]], end: End, other: End, direction: str, port: int, protocol: str) -> bool:
    # Policies bind pods of their own namespace alone.
    if end.namespace is not None or end.host_network:
        return True
    binding = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"].get("policyTypes", ["Ingress"])
        and _selects(policy["spec"].get("podSelector") or {}, end.labels)
    ]
    if not binding:
        return True
    key, side = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return any(
        _port_matches(rule.get("ports"), port, protocol) and _peer_matches(rule.get(side), other)
        for spec in binding
        for rule in spec.get(key) or []
    )


def _port_matches(ports: list[dict[str, Any]] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    return any(
        entry.get("protocol", "TCP") == protocol
        and ("port" not in entry or entry["port"] == port or entry["port"] <= port <= entry.get("endPort", -1))
        for entry in ports
    )


def _peer_matches(peers: list[dict[str, Any]] | None, other: End) -> bool:
    if not peers:
        return True
    return any(_one_peer_matches(peer, other) for peer in peers)


def _one_peer_matches(peer: dict[str, Any], other: End) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        if not other.address:
            return False
        address = ipaddress.ip_address(other.address)
        excepted = any(address in ipaddress.ip_network(part) for part in block.get("except", []))
        return address in ipaddress.ip_network(block["cidr"]) and not excepted
    if other.address:
        return False
    if "namespaceSelector" in peer:
        if other.namespace is None or not _selects(peer["namespaceSelector"], {NAMESPACE_LABEL: other.namespace}):
            return False
    elif other.namespace is not None:
        return False
    return _selects(peer.get("podSelector") or {}, other.labels)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels") or {}
    return wanted.items() <= labels.items() and all(
        _expression_holds(expression, labels) for expression in selector.get("matchExpressions") or []
    )


def _expression_holds(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or []
    if operator == "Exists":
        return key in labels
    if operator == "DoesNotExist":
        return key not in labels
    return (labels.get(key) in values) == (operator == "In")
