"""What a real cluster refused or starved of an earlier rendering: planted together, validation names each."""

import copy
from pathlib import Path

import pytest
import yaml

from loomvideo.platform.cluster import render
from loomvideo.platform.cluster.manifests import ray_job
from loomvideo.platform.cluster.profile import load_profile
from loomvideo.platform.cluster.queues import queue_objects
from loomvideo.platform.cluster.references import Given
from loomvideo.platform.cluster.validate import Report, validate_manifests
from loomvideo.platform.errors import UserError

REPO = Path(__file__).parents[2]
KUBERNETES = REPO / "infra" / "kubernetes"
PROFILES = REPO / "infra" / "profiles"
needs_kubectl = pytest.mark.skipif(render.find_kubectl() is None, reason="needs kubectl")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The production profile whole, with a scaling and a training job."""
    folder = tmp_path_factory.mktemp("rendered")
    profile = load_profile(str(PROFILES / "production.yaml"))
    render.write_folder(profile, folder, KUBERNETES)
    return [*render.build(folder), ray_job(profile, "data", "check"), ray_job(profile, "pretrain", "check")]


def problems_of(manifests):
    report = Report()
    validate_manifests(manifests, Given.read(KUBERNETES / "given.yaml"), "1.34", report, "here")
    return report.problems


def pod(group):
    return group["template"]["spec"]


def cluster(objects):
    return objects["RayCluster"]["spec"]


def worker(objects):
    return pod(cluster(objects)["workerGroupSpecs"][0])


def holds(secret):
    return {"secretRef": {"name": secret}}


def claim_of_one_node(objects):
    objects["PersistentVolumeClaim loomvideo-shared"]["spec"]["accessModes"] = ["ReadWriteOnce"]


def one_cloud_role(objects):
    for account in ("loomvideo-node", "loomvideo-mlflow"):
        role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/all"}
        objects[f"ServiceAccount {account}"]["metadata"]["annotations"] = role


def old_queue(objects):
    queue = queue_objects(load_profile(str(PROFILES / "production.yaml"), ["queue.kind=kueue", "queue.name=q"]))[0]
    objects["queue"] = queue | {"apiVersion": "kueue.x-k8s.io/v1beta1"}


FAULTS = {
    "autoscaler without security context": (
        lambda o: cluster(o)["autoscalerOptions"].pop("securityContext"),
        "RayCluster loomvideo: head: container autoscaler: needs securityContext",
    ),
    "submitter of KubeRay's own": (
        lambda o: o["RayJob data-check"]["spec"].pop("submitterPodTemplate"),
        "RayJob data-check: submitter: container ray-job-submitter: needs runAsNonRoot: true",
    ),
    "RDMA in a restricted namespace": (
        lambda o: worker(o)["containers"][0]["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
        "worker group decode: container ray-worker: must not add the capability IPC_LOCK",
    ),
    "host network in a restricted namespace": (
        lambda o: worker(o).update(hostNetwork=True),
        "worker group decode: hostNetwork is not allowed",
    ),
    "Kueue's old objects": (old_queue, "use kueue.x-k8s.io/v1beta2"),
    "job pods with MLflow's administrator": (
        lambda o: worker(o)["containers"][0]["envFrom"].append(holds("loomvideo-mlflow-server")),
        "worker group decode: holds secret 'loomvideo-mlflow-server', which is for mlflow, mlflow-user alone",
    ),
    "job pods with the artifacts' keys": (
        lambda o: pod(cluster(o)["headGroupSpec"])["containers"][0]["envFrom"].append(
            holds("loomvideo-artifact-store")
        ),
        "head: holds secret 'loomvideo-artifact-store', which is for mlflow alone",
    ),
    "one cloud role for all": (one_cloud_role, "has MLflow's cloud role arn:aws:iam::1:role/all"),
    "MLflow in the nodes' image": (
        lambda o: pod(o["Deployment mlflow"]["spec"])["containers"][0].update(
            image=worker(o)["containers"][0]["image"]
        ),
        "MLflow's server runs the same image",
    ),
    "dashboards over the annotation limit": (
        lambda o: o["ConfigMap loomvideo-mlflow"]["data"].update(dashboard="x" * 300_000),
        "ConfigMap loomvideo-mlflow: 300,",
    ),
    "a label over its size": (
        lambda o: o["RayJob data-check"]["metadata"]["labels"].update(run="x" * 64),
        "metadata.labels.run: 'xxxx",
    ),
    "shared storage of one node": (claim_of_one_node, "its accessModes need ReadWriteMany"),
    "page without a port": (
        lambda o: pod(o["RayService"]["spec"]["rayClusterConfig"]["headGroupSpec"])["containers"][0]["ports"].pop(),
        "KubeRay makes the service of the container port named serve",
    ),
    "ingress to nowhere": (
        lambda o: o["Ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"].update(name="page"),
        "Service 'page' is neither rendered nor declared",
    ),
    "nightly job as root": (
        lambda o: pod(o["CronJob"]["spec"]["jobTemplate"]["spec"])["securityContext"].update(runAsUser=0),
        "CronJob nightly: CronJob: container submit: must not run as user 0",
    ),
}


@needs_kubectl
def test_without_a_fault_nothing_is_named(rendered):
    assert problems_of(rendered) == []


@pytest.fixture(scope="module")
def found(rendered):
    """What validation says of a rendering with all faults: they touch different fields."""
    objects = {}
    for manifest in copy.deepcopy(rendered):
        objects[f"{manifest['kind']} {manifest['metadata']['name']}"] = manifest
    plain = {key.partition(" ")[0]: manifest for key, manifest in reversed(objects.items())}
    both = {**plain, **objects}
    for change, _ in FAULTS.values():
        change(both)
    # The object a fault adds is one more; the rest are what they were.
    added = [both[key] for key in both.keys() - plain.keys() - objects.keys()]
    return problems_of([*objects.values(), *added])


@needs_kubectl
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_named(found, name):
    _, expected = FAULTS[name]
    assert any(expected in problem for problem in found), found


def test_a_google_role_needs_the_metadata_server(tmp_path):
    text = yaml.safe_load((PROFILES / "gke.yaml").read_text())
    text["identity"]["metadata_server"] = False
    (tmp_path / "gke.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=r"gke.yaml: identity.nodes: .* set identity.metadata_server: true"):
        load_profile(str(tmp_path / "gke.yaml"))
