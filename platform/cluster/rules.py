"""Rules of the KubeRay operator, Kueue and Volcano that no schema expresses, checked before anything is applied.

They follow KubeRay 1.7's ``validation.go`` and Kueue's RayJob and RayCluster webhooks.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import yaml
from packaging.version import Version

from loomvideo.platform.cluster.profile import DNS_1035, MAX_CLUSTER_NAME, MAX_JOB_NAME

# KubeRay appends suffixes for two clusters and their services.
MAX_SERVICE_NAME = 41
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_ELASTIC = "kueue.x-k8s.io/elastic-job"
KUEUE_MAX_GROUPS = 7
FIRST_VERSION_WITH_TOKENS = Version("2.52.0")
RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}


def rule_problems(manifest: dict[str, Any]) -> Iterator[str]:
    """Broken rules of a RayCluster or RayJob, and versions that are going away; nothing for other kinds."""
    kind = manifest.get("kind")
    if manifest.get("apiVersion") == "kueue.x-k8s.io/v1beta1":
        yield "apiVersion kueue.x-k8s.io/v1beta1 is deprecated since Kueue 0.15; use kueue.x-k8s.io/v1beta2"
    if kind == "RayCluster":
        yield from _name_problems(manifest, MAX_CLUSTER_NAME)
        yield from _cluster_problems(manifest["spec"], manifest["metadata"], prefix="spec")
    elif kind == "RayJob":
        yield from _name_problems(manifest, MAX_JOB_NAME)
        yield from _job_problems(manifest)
    elif kind == "RayService":
        yield from _name_problems(manifest, MAX_SERVICE_NAME)
        yield from _service_problems(manifest)


def _name_problems(manifest: dict[str, Any], longest: int) -> Iterator[str]:
    name = manifest["metadata"].get("name", "")
    if not DNS_1035.fullmatch(name) or len(name) > longest:
        yield (
            f"metadata.name {name!r}: KubeRay wants lower-case letters, digits and '-', at most {longest} characters"
        )


def _job_problems(manifest: dict[str, Any]) -> Iterator[str]:
    spec = manifest["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    selector = spec.get("clusterSelector")
    cluster = spec.get("rayClusterSpec")
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("suspend") and not shutdown:
        yield "spec.suspend: a job that can be suspended needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and selector:
        yield "spec.suspend: not possible together with clusterSelector"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes: true"
    if cluster is None and not selector:
        yield "spec: one of rayClusterSpec and clusterSelector must be set"
    if spec.get("backoffLimit", 0) > 0 and (selector or mode == "InteractiveMode"):
        yield "spec.backoffLimit: not possible with clusterSelector or InteractiveMode"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if key in spec and spec[key] <= 0:
            yield f"spec.{key}: must be positive"
    yield from _sidecar_problems(spec, mode)
    yield from _deletion_problems(spec)
    try:
        runtime_env = yaml.safe_load(spec.get("runtimeEnvYAML") or "")
        if runtime_env is not None and not isinstance(runtime_env, dict):
            yield "spec.runtimeEnvYAML: must be a YAML mapping"
    except yaml.YAMLError as error:
        yield f"spec.runtimeEnvYAML: not YAML ({str(error).splitlines()[0]})"
    if cluster is not None:
        yield from _cluster_problems(cluster, manifest["metadata"], prefix="spec.rayClusterSpec")
        if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
            yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth: not supported for RayJob"
    if _queue_of(manifest["metadata"]):
        yield from _kueue_job_problems(spec)


def _service_problems(manifest: dict[str, Any]) -> Iterator[str]:
    cluster = manifest["spec"]["rayClusterConfig"]
    yield from _cluster_problems(cluster, manifest["metadata"], prefix="spec.rayClusterConfig")
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "spec.rayClusterConfig.authOptions.enableK8sTokenAuth: not supported for RayService"
    ports = cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("ports", [])
    if "serve" not in [port.get("name") for port in ports]:
        yield "spec.rayClusterConfig.headGroupSpec: KubeRay makes the service of the container port named serve; add it"
    try:
        serve = yaml.safe_load(manifest["spec"].get("serveConfigV2") or "")
    except yaml.YAMLError as error:
        yield f"spec.serveConfigV2: not YAML ({str(error).splitlines()[0]})"
        return
    if not isinstance(serve, dict) or not serve.get("applications"):
        yield "spec.serveConfigV2: needs a list of applications"


def _sidecar_problems(spec: dict[str, Any], mode: str) -> Iterator[str]:
    if mode != "SidecarMode":
        return
    for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
        if spec.get(key):
            yield f"spec.{key}: not possible in SidecarMode"
    head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
    if head.get("restartPolicy", "Never") != "Never":
        yield "spec.rayClusterSpec.headGroupSpec: restartPolicy must be Never in SidecarMode"


def _deletion_problems(spec: dict[str, Any]) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if not strategy:
        return
    rules = strategy.get("deletionRules") or []
    legacy = "onSuccess" in strategy or "onFailure" in strategy
    if rules and legacy:
        yield "spec.deletionStrategy: onSuccess/onFailure and deletionRules exclude each other"
    if not rules and not ("onSuccess" in strategy and "onFailure" in strategy):
        yield "spec.deletionStrategy: needs deletionRules, or both onSuccess and onFailure"
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "spec.deletionStrategy.deletionRules: excluded by shutdownAfterJobFinishes: true"
    autoscaling = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    ttls: dict[str, dict[str, int]] = {}
    for position, rule in enumerate(rules):
        path = f"spec.deletionStrategy.deletionRules[{position}]"
        condition = rule.get("condition", {})
        if ("jobStatus" in condition) == ("jobDeploymentStatus" in condition):
            yield f"{path}.condition: exactly one of jobStatus and jobDeploymentStatus"
            continue
        if rule["policy"] == "DeleteWorkers" and autoscaling:
            yield f"{path}: DeleteWorkers is not possible with enableInTreeAutoscaling: true"
        if rule["policy"] in ("DeleteWorkers", "DeleteCluster") and spec.get("clusterSelector"):
            yield f"{path}: {rule['policy']} is not possible with clusterSelector"
        # A deployment that Failed is its own case: it must not count as the job's status FAILED.
        status = condition.get("jobStatus") or f"deployment {condition['jobDeploymentStatus']}"
        if rule["policy"] in ttls.setdefault(status, {}):
            yield f"{path}: second {rule['policy']} for {status}"
        ttls[status][rule["policy"]] = condition.get("ttlSeconds", 0)
    for status, policies in ttls.items():
        ordered = [(policy, policies[policy]) for policy in DELETION_ORDER if policy in policies]
        for (before, early), (after, late) in itertools.pairwise(ordered):
            if late < early:
                yield f"spec.deletionStrategy: for {status}, {after} ({late} s) comes before {before} ({early} s)"


def _cluster_problems(spec: dict[str, Any], metadata: dict[str, Any], prefix: str) -> Iterator[str]:
    head = spec["headGroupSpec"]
    groups = spec.get("workerGroupSpecs") or []
    named = [("headGroupSpec", head), *((f"workerGroupSpecs[{group.get('groupName')}]", group) for group in groups)]
    autoscaling = bool(spec.get("enableInTreeAutoscaling"))
    version_2 = autoscaling and spec.get("autoscalerOptions", {}).get("version", "v2") == "v2"
    for name, group in named:
        path = f"{prefix}.{name}"
        pod = group["template"].get("spec", {})
        parameters = group.get("rayStartParams") or {}
        if not pod.get("containers"):
            yield f"{path}.template.spec.containers: at least one, the Ray container first"
        if RESOURCE_PARAMETERS & parameters.keys() and group.get("resources"):
            yield f"{path}: resources in rayStartParams and in resources exclude each other"
        if "labels" in parameters:
            yield f"{path}.rayStartParams.labels: use the group's labels"
        if version_2 and pod.get("restartPolicy", "Never") != "Never":
            yield f"{path}: restartPolicy must be Never or unset with autoscaler v2"
    names = [group.get("groupName") for group in groups]
    for group in groups:
        path = f"{prefix}.workerGroupSpecs[{group.get('groupName')}]"
        low, start, high = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        if low is not None and high is not None and low > high:
            yield f"{path}: minReplicas {low} is more than maxReplicas {high}"
        if start is not None and ((low is not None and start < low) or (high is not None and start > high)):
            yield f"{path}: replicas {start} is not between minReplicas {low} and maxReplicas {high}"
        if names.count(group.get("groupName")) > 1:
            yield f"{path}: groupName used twice"
        if autoscaling and group.get("suspend"):
            yield f"{path}.suspend: not possible with autoscaling"
    if spec.get("authOptions", {}).get("mode") == "token":
        version = spec.get("rayVersion")
        if not version or Version(version) < FIRST_VERSION_WITH_TOKENS:
            yield f"{prefix}.rayVersion: token authentication needs {FIRST_VERSION_WITH_TOKENS} or newer, not {version}"
    else:
        yield f"{prefix}.authOptions: without mode: token anyone who reaches the dashboard runs code"
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"{prefix}.headGroupSpec.serviceType: {head['serviceType']} publishes the dashboard; use ClusterIP"
    environment = {item["name"] for item in head["template"]["spec"]["containers"][0].get("env", [])}
    for variable in sorted(environment & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}):
        yield f"{prefix}.headGroupSpec: env {variable}: use gcsFaultToleranceOptions"
    if _queue_of(metadata):
        yield from _kueue_cluster_problems(spec, metadata, names, prefix)


def _kueue_job_problems(spec: dict[str, Any]) -> Iterator[str]:
    if not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes: Kueue needs true, or the finished cluster keeps the quota"
    if spec.get("clusterSelector"):
        yield "spec.clusterSelector: a job in a Kueue queue brings its own cluster"


def _kueue_cluster_problems(
    spec: dict[str, Any], metadata: dict[str, Any], names: list[str | None], prefix: str
) -> Iterator[str]:
    elastic = metadata.get("annotations", {}).get(KUEUE_ELASTIC) == "true"
    if spec.get("enableInTreeAutoscaling") and not elastic:
        yield f"{prefix}.enableInTreeAutoscaling: Kueue admits clusters of fixed size"
    if len(names) > KUEUE_MAX_GROUPS:
        yield f"{prefix}.workerGroupSpecs: Kueue takes at most {KUEUE_MAX_GROUPS} groups"
    if "head" in names:
        yield f"{prefix}.workerGroupSpecs: Kueue reserves the group name head"


def _queue_of(metadata: dict[str, Any]) -> str | None:
    return metadata.get("labels", {}).get(KUEUE_QUEUE)
