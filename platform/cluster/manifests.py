"""RayCluster and RayJob manifests of a profile (KubeRay 1.7, ``ray.io/v1``) for plain, Kueue and Volcano clusters."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from loomvideo.platform.cluster.pods import (
    autoscaler_options,
    head_template,
    schedule_template,
    submitter_template,
    worker_template,
)
from loomvideo.platform.cluster.profile import DNS_1035, MAX_JOB_NAME, ClusterProfile, NodeGroup
from loomvideo.platform.errors import UserError

API_VERSION = "ray.io/v1"
# The other commands are told where to write by their own arguments.
NAMED_JOBS = ("data", "pretrain", "finetune-edit", "distill", "prefer", "evaluate")
# Jobs whose command is not their name.
COMMANDS = {
    "data": ["data", "prepare"],
    "data-sample": ["data", "sample"],
    "data-caption": ["data", "caption"],
    "doctor": ["doctor", "--cluster"],
}


def ray_cluster(profile: ClusterProfile) -> dict[str, Any]:
    """The long-lived cluster that ``loomvideo submit`` talks to."""
    return {
        "apiVersion": API_VERSION,
        "kind": "RayCluster",
        "metadata": {
            "name": profile.name,
            "namespace": profile.namespace,
            "labels": labels_of(profile) | _queue_labels(profile),
        },
        "spec": cluster_spec(profile, profile.groups, own_cluster=False),
    }


def ray_job(
    profile: ClusterProfile, job: str, run: str, arguments: Sequence[str] = (), wheel_uri: str | None = None
) -> dict[str, Any]:
    """A job with a cluster of its own, which is freed when the job ends.

    Args:
        profile: The cluster; its groups that list ``job`` make up the job's cluster.
        job: ``data``, ``pretrain``, …: a ``loomvideo`` command.
        run: Run name; a job that is tried again continues the run of this name.
        arguments: Further arguments of the command.
        wheel_uri: Remote wheel to run instead of the image's own code.

    Raises:
        UserError: if the run cannot name a job or no group takes the job.
    """
    groups = profile.groups_of(job)
    runtime_env = {"py_modules": [wheel_uri]} if wheel_uri else {}
    spec: dict[str, Any] = {
        "entrypoint": _entrypoint([*command_of(job), *arguments, *named_arguments(profile, job, run, arguments)]),
        "metadata": {"loomvideo.job": job, "loomvideo.run": run},
        "runtimeEnvYAML": yaml.safe_dump(runtime_env, sort_keys=True) if runtime_env else "",
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter_template(profile),
        # A retry is a new cluster, so it only makes sense for jobs that resume by run name: all of ours do.
        "backoffLimit": profile.job_retries,
        "rayClusterSpec": cluster_spec(profile, groups, own_cluster=True),
        **_ending(profile, groups),
    }
    if profile.job_deadline_hours:
        spec["activeDeadlineSeconds"] = int(profile.job_deadline_hours * 3600)
    if profile.pending_minutes:
        spec["preRunningDeadlineSeconds"] = profile.pending_minutes * 60
    return {
        "apiVersion": API_VERSION,
        "kind": "RayJob",
        "metadata": {
            "name": job_object_name(job, run),
            "namespace": profile.namespace,
            "labels": labels_of(profile) | _queue_labels(profile),
        },
        "spec": {key: value for key, value in spec.items() if value not in ("", None)},
    }


def _entrypoint(words: Sequence[str]) -> str:
    # The submitter's pod gets it as a container argument, where Kubernetes reads $(NAME) and turns $$ into $.
    return shlex.join(words).replace("$", "$$")


def cron_jobs(profile: ClusterProfile) -> list[dict[str, Any]]:
    """The profile's schedules as CronJobs; KubeRay's own RayCronJob is behind a gate that is off.

    Each submits to the long-lived cluster and waits, so that one that still runs is not started twice and one that
    fails shows as failed. Its run is named after the minute it was started in.
    """
    jobs = []
    for schedule in profile.schedules:
        run = f"{schedule.name}-$(date +%Y%m%d-%H%M)"
        named = [f'"run={run}"', f"runs={profile.storage.mount}/runs"] if schedule.job in NAMED_JOBS else []
        address = f"http://{profile.name}-head-svc:8265"
        metadata = f'{{\\"loomvideo.job\\": \\"{schedule.job}\\", \\"loomvideo.run\\": \\"{run}\\"}}'
        submit = (
            f'ray job submit --address {address} --submission-id "{schedule.job}-{run}" --metadata-json "{metadata}"'
        )
        words = [shlex.join([*command_of(schedule.job), *schedule.arguments]), *named]
        jobs.append(
            {
                "apiVersion": "batch/v1",
                "kind": "CronJob",
                "metadata": {"name": schedule.name, "namespace": profile.namespace, "labels": labels_of(profile)},
                "spec": {
                    "schedule": schedule.cron,
                    "concurrencyPolicy": "Forbid",
                    "startingDeadlineSeconds": 3600,
                    "failedJobsHistoryLimit": 3,
                    "jobTemplate": {
                        "spec": {
                            "backoffLimit": 0,
                            "template": schedule_template(profile, f"{submit} -- {' '.join(words)}"),
                        }
                    },
                },
            }
        )
    return jobs


def command_of(job: str) -> list[str]:
    """The command line of a job, without its ``key=value`` arguments."""
    return ["loomvideo", *COMMANDS.get(job, [job])]


def named_arguments(profile: ClusterProfile, job: str, run: str, arguments: Sequence[str]) -> list[str]:
    """The run name, and the runs folder on shared storage, for jobs that keep what they do under a run name."""
    if job not in NAMED_JOBS:
        return []
    named = {"run": run, "runs": f"{profile.storage.mount}/runs"}
    given = {argument.partition("=")[0] for argument in arguments}
    return [f"{key}={value}" for key, value in named.items() if key not in given]


def job_object_name(job: str, run: str) -> str:
    """The Kubernetes name of a run's job.

    Raises:
        UserError: if it would not be a DNS label of at most 47 characters.
    """
    name = f"{job}-{re.sub('[._]', '-', run)}".lower()
    if not DNS_1035.fullmatch(name) or len(name) > MAX_JOB_NAME:
        longest = MAX_JOB_NAME - len(job) - 1
        raise UserError(f"run={run!r}: a RayJob name is letters, digits and '-', here at most {longest} characters")
    return name


def cluster_spec(profile: ClusterProfile, groups: Sequence[NodeGroup], own_cluster: bool) -> dict[str, Any]:
    """The spec of a Ray cluster of some groups; ``own_cluster`` for one that lives as long as its job."""
    sizes = [_sizes(profile, group, own_cluster) for group in groups]
    autoscaler = any(low != high for low, _, high in sizes)
    spec: dict[str, Any] = {
        "rayVersion": profile.ray_version,
        "authOptions": {"mode": "token", "secretName": profile.token_secret},
        "enableInTreeAutoscaling": autoscaler,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # No task may run on the head: an out-of-memory task there would take the cluster with it.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": head_template(profile, autoscaler),
        },
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": start,
                "minReplicas": low,
                "maxReplicas": high,
                "rayStartParams": {},
                "labels": {"loomvideo.io/group": group.name},
                "template": worker_template(profile, group),
            }
            for group, (low, start, high) in zip(groups, sizes, strict=True)
        ],
    }
    if autoscaler:
        spec["autoscalerOptions"] = autoscaler_options()
    return spec


def _sizes(profile: ClusterProfile, group: NodeGroup, own_cluster: bool) -> tuple[int, int, int]:
    # Kueue admits a cluster of known size; a gang must be there as a whole before its job starts.
    if profile.queue.kind == "kueue" or (own_cluster and group.gang):
        return group.highest, group.highest, group.highest
    return group.lowest, group.replicas, group.highest


def _ending(profile: ClusterProfile, groups: Sequence[NodeGroup]) -> dict[str, Any]:
    """What is deleted when: GPUs at once, the head of a failed job only after someone could look at it."""
    if profile.queue.kind == "kueue":
        # Kueue counts the quota until the cluster is gone and insists on this; it excludes deletion rules.
        return {"shutdownAfterJobFinishes": True}
    evidence_s = int(profile.evidence_hours * 3600)
    if any(low != high for low, _, high in (_sizes(profile, group, True) for group in groups)):
        # KubeRay cannot delete the workers of a scaling cluster; the autoscaler removes idle ones.
        steps = {"SUCCEEDED": {"DeleteCluster": 0}, "FAILED": {"DeleteCluster": evidence_s}}
        if any(group.lowest and not group.gang for group in groups):
            steps["FAILED"] = {"DeleteCluster": 0}
    else:
        steps = {"SUCCEEDED": {"DeleteWorkers": 0, "DeleteCluster": 600}, "FAILED": {"DeleteWorkers": 0}}
    rules = [
        {"policy": policy, "condition": {"jobStatus": status, "ttlSeconds": ttl}}
        for status, policies in steps.items()
        for policy, ttl in (policies | {"DeleteSelf": evidence_s}).items()
    ]
    rules.append({"policy": "DeleteSelf", "condition": {"jobDeploymentStatus": "Failed", "ttlSeconds": evidence_s}})
    return {"shutdownAfterJobFinishes": False, "deletionStrategy": {"deletionRules": rules}}


def labels_of(profile: ClusterProfile) -> dict[str, str]:
    """Labels of every object of a profile."""
    return {"app.kubernetes.io/part-of": "loomvideo", "app.kubernetes.io/instance": profile.name}


def _queue_labels(profile: ClusterProfile) -> dict[str, str]:
    queue = profile.queue
    if queue.kind == "kueue":
        labels = {"kueue.x-k8s.io/queue-name": queue.name}
        return labels | ({"kueue.x-k8s.io/priority-class": queue.priority_class} if queue.priority_class else {})
    if queue.kind == "volcano":
        labels = {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": queue.name}
        return labels | ({"ray.io/priority-class-name": queue.priority_class} if queue.priority_class else {})
    return {}
