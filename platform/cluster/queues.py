"""Objects of the queue that admits jobs, from the profile: Kueue's and Volcano's."""

from typing import Any

from loomvideo.platform.cluster.profile import ClusterProfile
from loomvideo.platform.errors import UserError

KUEUE = "kueue.x-k8s.io/v1beta2"
"""Served since Kueue 0.15; v1beta1 is deprecated there. Checked against the schemas of Kueue 0.19."""
VOLCANO = "scheduling.volcano.sh/v1beta1"
PRIORITY = 1000
MIB_OF = {"Mi": 1, "Gi": 1024, "Ti": 1024**2}


def queue_objects(profile: ClusterProfile) -> list[dict[str, Any]]:
    """The cluster-wide objects of a profile's queue; the LocalQueue, which has a namespace, is not among them."""
    kind = profile.queue.kind
    return {"plain": _none, "kueue": _kueue, "volcano": _volcano}[kind](profile)


def quota(profile: ClusterProfile) -> dict[str, str]:
    """Quota a resource: what the profile states, and for the rest the head and all groups at their largest."""
    amounts: dict[str, int] = {}
    head = profile.head

    def add(cpus: int, memory_gib: int, disk_gib: int, nodes: int) -> None:
        for name, amount in (("cpu", cpus), ("memory", memory_gib), ("ephemeral-storage", disk_gib)):
            amounts[name] = amounts.get(name, 0) + amount * nodes

    # A job of its own may run beside the long-lived cluster: two heads, and a submitter with a CPU.
    add(head.cpus, head.memory_gib, 20, 2)
    add(1, 1, 1, 1)
    counted: dict[str, int] = {}
    for group in profile.groups:
        add(group.cpus, group.memory_gib, group.local_disk_gib, group.highest)
        if group.gpus:
            counted[group.gpu_resource] = counted.get(group.gpu_resource, 0) + group.gpus * group.highest
        for name, amount in group.resources.items():
            number, unit = _number(amount, f"groups[{group.name}].resources.{name}")
            counted[name] = counted.get(name, 0) + number * (MIB_OF[unit] if unit else 1) * group.highest
    sized = {name for group in profile.groups for name, amount in group.resources.items() if not amount.isdigit()}
    wanted = {name: f"{amount}Gi" if name != "cpu" else str(amount) for name, amount in amounts.items()}
    wanted |= {name: f"{amount}Mi" if name in sized else str(amount) for name, amount in counted.items()}
    return wanted | {name: str(amount) for name, amount in profile.quota.resources.items()}


def _number(amount: str, key: str) -> tuple[int, str]:
    number, unit = amount.rstrip("MGTi"), amount[len(amount.rstrip("MGTi")) :]
    if not number.isdigit() or (unit and unit not in MIB_OF):
        raise UserError(f"{key}={amount!r}: use a whole number, with Mi, Gi or Ti for sizes")
    return int(number), unit


def _none(profile: ClusterProfile) -> list[dict[str, Any]]:
    return []


def _kueue(profile: ClusterProfile) -> list[dict[str, Any]]:
    limits, amounts = profile.quota, quota(profile)
    levels = list(dict.fromkeys(group.topology for group in profile.groups if group.topology))
    flavor_spec: dict[str, Any] = {}
    if limits.node_labels:
        flavor_spec["nodeLabels"] = dict(limits.node_labels)
    objects = []
    if levels:
        flavor_spec["topologyName"] = limits.flavor
        nodes = [*levels, "kubernetes.io/hostname"]
        levels_spec = [{"nodeLabel": label} for label in dict.fromkeys(nodes)]
        objects.append(_object(KUEUE, "Topology", limits.flavor, {"levels": levels_spec}))
    flavor = _object(KUEUE, "ResourceFlavor", limits.flavor, flavor_spec)
    resources = [{"name": name, "nominalQuota": amount} for name, amount in amounts.items()]
    spec: dict[str, Any] = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": profile.namespace}},
        "queueingStrategy": "BestEffortFIFO",
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [
            {"coveredResources": list(amounts), "flavors": [{"name": limits.flavor, "resources": resources}]}
        ],
    }
    if limits.cohort:
        spec["cohortName"] = limits.cohort
    objects += [flavor, _object(KUEUE, "ClusterQueue", limits.cluster_queue, spec)]
    if profile.queue.priority_class:
        priority = _object(KUEUE, "WorkloadPriorityClass", profile.queue.priority_class, None)
        objects.append(priority | {"value": PRIORITY, "description": "Jobs of LoomVideo."})
    return objects


def _volcano(profile: ClusterProfile) -> list[dict[str, Any]]:
    spec = {"weight": 1, "reclaimable": True, "capability": quota(profile)}
    return [_object(VOLCANO, "Queue", profile.queue.name, spec)]


def _object(api_version: str, kind: str, name: str, spec: dict[str, Any] | None) -> dict[str, Any]:
    labels = {"app.kubernetes.io/part-of": "loomvideo"}
    head = {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "labels": labels}}
    return head if spec is None else head | {"spec": spec}
