"""Cluster profiles: one typed YAML file that says what a cluster is made of, from which all manifests are rendered."""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from loomvideo.platform.config import load_config, option
from loomvideo.platform.errors import UserError

PROFILE_FOLDER = Path("infra/profiles")
QUEUES = ("plain", "kueue", "volcano")
POD_SECURITY = ("restricted", "privileged")
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# KubeRay appends suffixes for services and, to a RayJob's cluster, five random characters.
MAX_CLUSTER_NAME = 53
MAX_JOB_NAME = 47
GOOGLE_ROLE = "iam.gke.io/gcp-service-account"


@dataclass
class NodeGroup:
    """A group of equal Ray worker nodes."""

    name: str = option("", "name of the group")
    jobs: list[str] = option([], "jobs whose RayJob gets this group")
    replicas: int = option(1, "nodes at the start")
    min_replicas: int | None = option(None, "fewest nodes the autoscaler keeps; replicas when unset")
    max_replicas: int | None = option(None, "most nodes the autoscaler starts; replicas when unset")
    cpus: int = option(4, "CPUs a node")
    memory_gib: int = option(16, "memory a node")
    gpus: int = option(0, "GPUs a node")
    gpu_resource: str = option("nvidia.com/gpu", "Kubernetes name of the GPU resource")
    shared_memory_gib: int = option(4, "size of /dev/shm, part of memory_gib")
    local_disk_gib: int = option(50, "node-local disk for spilled objects and compile caches")
    gang: bool = option(False, "in a job's own cluster: all nodes at once, as many as max_replicas, never resized")
    spot: bool = option(False, "nodes that may be taken away: adds the spot toleration and the preemption grace")
    node_selector: dict[str, str] = option({}, "labels of the Kubernetes nodes to run on")
    tolerations: list[str] = option([], "taint keys to tolerate")
    image: str = option("", "image of this group; the profile's when empty")
    resources: dict[str, str] = option(
        {}, "further resources a node: {rdma/hca: 8}, {vpc.amazonaws.com/efa: 32, hugepages-2Mi: 5Gi}, …"
    )
    capabilities: list[str] = option([], "Linux capabilities, e.g. [IPC_LOCK] for RDMA; needs pod_security: privileged")
    host_network: bool = option(False, "use the node's own network interfaces; needs pod_security: privileged")
    runtime_class: str = option("", "RuntimeClass of the pods, e.g. nvidia; the node's default when empty")
    topology: str = option(
        "", "label of a network domain (rack, block) that all nodes of a job must share; Kueue places them"
    )
    environment: dict[str, str] = option({}, "further environment of this group's pods: NCCL_*, FI_*; no secrets")
    min_bus_gb_per_s: float = option(
        0.0, "all-reduce bus bandwidth below which doctor fails, one process a node, GB/s; 0 only reports it"
    )

    @property
    def autoscales(self) -> bool:
        """Whether the number of nodes may change while the cluster lives."""
        return self.lowest != self.highest

    @property
    def lowest(self) -> int:
        """Fewest nodes."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def highest(self) -> int:
        """Most nodes."""
        return self.replicas if self.max_replicas is None else self.max_replicas


@dataclass
class Head:
    """The Ray head: control processes only, no tasks, no GPU."""

    cpus: int = option(4, "CPUs of the head")
    memory_gib: int = option(16, "memory of the head; an out-of-memory head loses every job")
    node_selector: dict[str, str] = option({}, "labels of the Kubernetes nodes to run on; choose on-demand nodes")
    priority_class: str = option("", "PriorityClass of the head")


@dataclass
class Queue:
    """Who admits jobs."""

    kind: str = option("plain", "plain, kueue or volcano")
    name: str = option("", "LocalQueue (kueue) or Queue (volcano)")
    priority_class: str = option("", "WorkloadPriorityClass (kueue) or PriorityClass (volcano)")


@dataclass
class Quota:
    """What Kueue and Volcano let LoomVideo use at once."""

    cluster_queue: str = option("loomvideo", "name of the ClusterQueue (kueue) that the queue draws from")
    flavor: str = option("loomvideo", "name of the ResourceFlavor (kueue)")
    cohort: str = option("", "cohort (kueue) of queues that lend each other what they do not use")
    node_labels: dict[str, str] = option({}, "labels of the nodes the quota counts (kueue); all nodes when empty")
    resources: dict[str, str] = option(
        {}, "quota a resource: {nvidia.com/gpu: 80, memory: 20Ti}; what is left out: all groups at their largest"
    )


@dataclass
class StorageClaim:
    """Where runs, shards and caches live."""

    claim: str = option("loomvideo-shared", "ReadWriteMany volume claim with runs and shards")
    mount: str = option("/mnt/loomvideo", "where the claim is mounted in every pod")
    storage_class: str = option("", "storage class of the claim; the cluster's default when empty")
    size_gib: int = option(1000, "size of the claim")
    object_store_secret: str = option(
        "", "secret with AWS_* keys of the buckets with data; empty for workload identity or no object store"
    )
    object_store_endpoint: str = option("", "S3 endpoint when it is not AWS's")
    artifacts: str = option("s3://loomvideo-mlflow", "where the MLflow server keeps artifacts")


@dataclass
class Identity:
    """Workload identity: which cloud role a pod has without a key."""

    nodes: dict[str, str] = option({}, "annotations of the Ray nodes' service account, e.g. eks.amazonaws.com/role-arn")
    mlflow: dict[str, str] = option({}, "annotations of the MLflow server's service account")
    metadata_server: bool = option(False, "let pods ask the node's metadata server for tokens (GKE, EKS Pod Identity)")


@dataclass
class Tracking:
    """The MLflow server jobs report to."""

    uri: str = option("http://mlflow:5000", "tracking URI as seen from the pods")
    secret: str = option(
        "loomvideo-mlflow-client",
        "secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of the jobs' user, who is no administrator",
    )
    image: str = option("loomvideo/mlflow:0.1.0", "image of the MLflow server: infra/images/Dockerfile.mlflow")


@dataclass
class Schedule:
    """A job that is submitted again and again to the long-lived cluster."""

    name: str = option("", "name of the schedule; runs are called NAME-YYYYMMDD-HHMM")
    cron: str = option("0 2 * * *", "when, in cron's five fields and the cluster's time zone")
    job: str = option("evaluate", "the job")
    arguments: list[str] = option([], "its arguments: preset=… section.key=…")


@dataclass
class Service:
    """``loomvideo serve`` for other people: a RayService on the groups whose jobs name serve, behind an ingress."""

    arguments: list[str] = option(
        [], "arguments of loomvideo serve: checkpoint=… replicas.max_replicas=…; none: no service"
    )
    host: str = option("", "host name of the page")
    tls_secret: str = option("loomvideo-serve-tls", "secret with the certificate of the host (kubernetes.io/tls)")
    ingress_class: str = option("nginx", "IngressClass that publishes it")
    ingress_namespace: str = option("ingress-nginx", "namespace of the ingress controller, which may reach the page")
    annotations: dict[str, str] = option({}, "annotations of the ingress: body sizes, certificate issuer")
    token_secret: str = option("loomvideo-serve", "secret whose LOOMVIDEO_SERVE_TOKEN people enter first")


@dataclass
class Access:
    """How a person's machine reaches the dashboard."""

    address: str = option("", "URL of the dashboard; empty: kubectl port-forward to the head service")
    context: str = option("", "kubectl context; the current one when empty")


@dataclass
class UploadLimit:
    """What a submission may ship."""

    limit_mib: int = option(20, "largest upload (wheel and working directory); Ray's own limit is 100")


@dataclass
class ClusterProfile:
    """Everything the manifests of a cluster are made from."""

    name: str = option("???", "name of the RayCluster")
    namespace: str = option("loomvideo", "Kubernetes namespace")
    kubernetes_version: str = option("1.34", "version whose schemas manifests are checked against")
    ray_version: str = option("2.60.0", "Ray in the image; must equal the submitting machine's")
    existing: bool = option(
        False,
        "a Ray cluster that is there already, reached by access.address: nothing is rendered, packages are shipped",
    )
    packages: list[str] = option(
        [], "pip packages that an existing cluster's nodes install for a job; empty: the versions of locks/base.txt"
    )
    image: str = option("", "image of all nodes, pinned by digest for anything that must be repeatable")
    image_pull_secret: str = option("", "secret for a private registry")
    token_secret: str = option("loomvideo-ray-token", "secret whose auth_token guards dashboard and jobs API")
    head: Head = option(Head, "")
    groups: list[NodeGroup] = option([], "worker groups")
    queue: Queue = option(Queue, "")
    quota: Quota = option(Quota, "")
    identity: Identity = option(Identity, "")
    storage: StorageClaim = option(StorageClaim, "")
    tracking: Tracking = option(Tracking, "")
    schedules: list[Schedule] = option([], "jobs by the clock: nightly evaluation, pruning")
    service: Service = option(Service, "")
    access: Access = option(Access, "")
    upload: UploadLimit = option(UploadLimit, "")
    pod_security: str = option(
        "restricted",
        "Pod Security standard of the namespace: restricted, or privileged where a group needs the host's network or "
        "capabilities; every other pod is still held to restricted by validate",
    )
    environment: dict[str, str] = option({}, "further environment of every pod; no secrets")
    job_retries: int = option(2, "new clusters a failed RayJob gets; each continues the run")
    job_deadline_hours: float = option(0.0, "stop a RayJob after so long; 0 for never")
    pending_minutes: int = option(60, "fail a RayJob that has not started running after so long; 0 for never")
    evidence_hours: float = option(24.0, "how long the head of a failed job stays for a look, without its GPUs")
    stop_grace_s: int = option(120, "seconds a stopped job gets to write a checkpoint; Ray's own default is 3")
    preemption_grace_s: int = option(120, "seconds a pod gets between the warning and the kill")

    def groups_of(self, job: str) -> list[NodeGroup]:
        """The groups a job's own cluster gets.

        Raises:
            UserError: if no group names the job.
        """
        groups = [group for group in self.groups if job in group.jobs]
        if not groups:
            known = sorted({name for group in self.groups for name in group.jobs})
            raise UserError(f"profile {self.name}: no group lists job {job} under groups[].jobs; jobs: {known}")
        return groups

    @property
    def autoscales(self) -> bool:
        """Whether any group's size may change."""
        return any(group.autoscales for group in self.groups)


def profile_path(name: str) -> Path:
    """The file of a profile given by path or by name in ``infra/profiles`` (or ``LOOMVIDEO_PROFILES``).

    Raises:
        UserError: naming the profiles that exist.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    folder = Path(os.environ.get("LOOMVIDEO_PROFILES", PROFILE_FOLDER))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        raise UserError(f"cluster profile {name!r}: no {path}; use one of {', '.join(names) or '(none)'} or a path")
    return path


def load_profile(name: str, overrides: Sequence[str] = ()) -> ClusterProfile:
    """Read and check a profile.

    Args:
        name: A path to a YAML file or a name in the profile folder.
        overrides: ``section.key=value`` changes, such as ``queue.kind=kueue queue.name=training``.

    Raises:
        UserError: naming the file, the key and the fix.
    """
    path = profile_path(name)
    if not path.is_file():
        raise UserError(f"cluster profile {path}: not found")
    _check_item_keys(path)
    profile = load_config(ClusterProfile, overrides, path)
    check_profile(profile, str(path))
    return profile


def _check_item_keys(path: Path) -> None:
    # The configuration loader treats a list as one value; its items get the same kind of message here.
    values = yaml.safe_load(path.read_text()) or {}
    for section, schema in (("groups", NodeGroup), ("schedules", Schedule)):
        known = [field.name for field in dataclasses.fields(schema)]
        for position, item in enumerate(values.get(section) or []):
            for key in item:
                if key not in known:
                    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                    hint = f"; did you mean {near[0]}?" if near else f"; valid keys: {', '.join(known)}"
                    raise UserError(f"{path}: unknown key {section}[{position}].{key}{hint}")


def check_profile(profile: ClusterProfile, source: str) -> None:
    """Rules between a profile's keys.

    Raises:
        UserError: naming the source, the key and the fix.
    """
    if profile.queue.kind not in QUEUES:
        raise UserError(f"{source}: queue.kind={profile.queue.kind!r}: use one of {', '.join(QUEUES)}")
    if profile.pod_security not in POD_SECURITY:
        raise UserError(f"{source}: pod_security={profile.pod_security!r}: use one of {', '.join(POD_SECURITY)}")
    if profile.queue.kind != "plain" and not profile.queue.name:
        raise UserError(f"{source}: queue.name: name the queue that {profile.queue.kind} admits jobs from")
    _check_name(profile.name, f"{source}: name", MAX_CLUSTER_NAME)
    _check_name(profile.namespace, f"{source}: namespace", 63)
    if profile.existing:
        _check_existing(profile, source)
        return
    if not profile.image:
        raise UserError(f"{source}: image: name the image of all nodes, or set existing: true for a cluster that is up")
    if not profile.groups:
        raise UserError(f"{source}: groups: a cluster without workers runs nothing; add a group")
    names = [group.name for group in profile.groups]
    for group in profile.groups:
        key = f"{source}: groups[{group.name or '?'}]"
        _check_name(group.name, f"{key}.name", 63)
        if names.count(group.name) > 1:
            raise UserError(f"{key}.name: used twice")
        if not 0 <= group.lowest <= group.replicas <= group.highest:
            raise UserError(f"{key}: need min_replicas <= replicas <= max_replicas")
        if group.shared_memory_gib >= group.memory_gib:
            raise UserError(f"{key}.shared_memory_gib: /dev/shm is part of memory_gib and must be smaller")
        _check_group_access(profile, group, key)
    if profile.service.arguments:
        if not profile.service.host:
            raise UserError(f"{source}: service.host: name the host that people open")
        if not any("serve" in group.jobs for group in profile.groups):
            raise UserError(f"{source}: service: no group lists serve under jobs, so nothing would run the generators")
    for schedule in profile.schedules:
        _check_name(schedule.name, f"{source}: schedules[{schedule.name or '?'}].name", 40)
        if len(schedule.cron.split()) != 5:
            raise UserError(
                f"{source}: schedules[{schedule.name}].cron={schedule.cron!r}: five fields, like '0 2 * * *'"
            )
    _check_identity(profile, source)
    endpoint = profile.storage.object_store_endpoint
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UserError(f"{source}: storage.object_store_endpoint={endpoint!r}: start with http:// or https://")
    if profile.tracking.uri.partition("://")[2].count("@"):
        raise UserError(f"{source}: tracking.uri: keep the password in the secret tracking.secret, not in the URI")


def _check_identity(profile: ClusterProfile, source: str) -> None:
    identity = profile.identity
    for key in ("nodes", "mlflow"):
        if GOOGLE_ROLE in getattr(identity, key) and not identity.metadata_server:
            raise UserError(
                f"{source}: identity.{key}: Google's roles are asked for at the metadata server, which the network "
                "policies close; set identity.metadata_server: true"
            )


def _check_existing(profile: ClusterProfile, source: str) -> None:
    if profile.image or profile.groups:
        raise UserError(f"{source}: existing: true takes no image and no groups; the cluster has its own")
    if profile.access.address and not profile.access.address.startswith(("http://", "https://")):
        raise UserError(f"{source}: access.address={profile.access.address!r}: start with http:// or https://")


def _check_group_access(profile: ClusterProfile, group: NodeGroup, key: str) -> None:
    for name in ("capabilities", "host_network"):
        if getattr(group, name) and profile.pod_security != "privileged":
            raise UserError(
                f"{key}.{name}: the restricted Pod Security standard refuses it; set pod_security: privileged, "
                "which lifts the API server's check for the whole namespace"
            )
    for resource in group.resources:
        if resource in ("cpu", "memory", "ephemeral-storage", group.gpu_resource):
            raise UserError(f"{key}.resources: {resource} has its own key (cpus, memory_gib, local_disk_gib, gpus)")
    if group.topology and profile.queue.kind != "kueue":
        raise UserError(f"{key}.topology: only Kueue places by topology; set queue.kind: kueue or leave it out")


def _check_name(name: str, key: str, longest: int) -> None:
    if not DNS_1035.fullmatch(name) or len(name) > longest:
        raise UserError(
            f"{key}={name!r}: use lower-case letters, digits and '-', starting with a letter, at most {longest}"
        )
