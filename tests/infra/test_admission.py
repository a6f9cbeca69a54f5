"""What an API server, a quota or a network policy would stop is found without a cluster, by name."""

import copy
import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from loomvideo.platform.cluster import render
from loomvideo.platform.cluster.access import dashboard
from loomvideo.platform.cluster.admission import object_problems, quota_problems, restricted_problems
from loomvideo.platform.cluster.manifests import ray_cluster, ray_job
from loomvideo.platform.cluster.operator_pods import pods_of
from loomvideo.platform.cluster.profile import load_profile
from loomvideo.platform.cluster.queues import KUEUE, queue_objects, quota
from loomvideo.platform.cluster.references import Given
from loomvideo.platform.cluster.rules import rule_problems
from loomvideo.platform.cluster.service import ray_service
from loomvideo.platform.cluster.submission import SubmissionPlan, locked_packages
from loomvideo.platform.cluster.validate import Report, admission_problems, validate_manifests
from loomvideo.platform.errors import UserError

REPO = Path(__file__).parents[2]
KUBERNETES = REPO / "infra" / "kubernetes"
needs_kubectl = pytest.mark.skipif(render.find_kubectl() is None, reason="needs kubectl")


@pytest.fixture(autouse=True)
def _repo_profiles(monkeypatch):
    monkeypatch.setenv("LOOMVIDEO_PROFILES", str(REPO / "infra" / "profiles"))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """All objects of the production profile with a data job, whose cluster scales."""
    folder = tmp_path_factory.mktemp("rendered")
    profile = load_profile(str(REPO / "infra" / "profiles" / "production.yaml"))
    render.write_folder(profile, folder, KUBERNETES)
    return [*render.build(folder), ray_job(profile, "data", "check")]


def find(manifests, kind, name=None):
    return next(m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"]))


def problems_of(manifests):
    return [problem for _, problem in admission_problems(manifests)]


def test_the_operator_adds_what_kuberay_adds():
    job = ray_job(load_profile("production"), "data", "check")
    head, *workers, submitter = pods_of(job)
    assert [container["name"] for container in head.containers] == ["ray-head", "autoscaler"]
    assert [worker.containers[0]["name"] for worker in workers] == ["wait-gcs-ready"] * 2
    assert submitter.role == "submitter"
    mounts = {m["mountPath"]: (m["name"], m.get("subPath")) for m in head.containers[1]["volumeMounts"]}
    # The head reads the autoscaler's logs: both see one folder.
    assert mounts["/tmp/ray"] == ("local", "ray")
    assert "ray-logs" not in [volume["name"] for volume in head.spec["volumes"]]


def test_only_the_autoscaler_holds_the_token_of_the_kubernetes_api():
    head = next(pods_of(ray_cluster(load_profile("production"))))
    path = "/var/run/secrets/kubernetes.io/serviceaccount"
    holders = [c["name"] for c in head.containers if path in [m["mountPath"] for m in c["volumeMounts"]]]
    assert head.spec["automountServiceAccountToken"] is False
    assert holders == ["autoscaler"]


def test_a_head_without_options_for_its_autoscaler_is_refused():
    cluster = ray_cluster(load_profile("production"))
    assert [p for pod in pods_of(cluster) for p in restricted_problems(pod)] == []
    del cluster["spec"]["autoscalerOptions"]["securityContext"]
    found = [p for pod in pods_of(cluster) for p in restricted_problems(pod)]
    assert any(p.startswith("container autoscaler: needs securityContext.allowPrivilegeEscalation") for p in found)


def test_a_job_without_submitter_template_is_refused():
    job = ray_job(load_profile("small"), "pretrain", "check")
    del job["spec"]["submitterPodTemplate"]
    found = [p for pod in pods_of(job) for p in restricted_problems(pod)]
    assert any("container ray-job-submitter: needs runAsNonRoot: true" in p for p in found)


POD_FAULTS = {
    "host network": (lambda pod: pod.update(hostNetwork=True), "hostNetwork is not allowed"),
    "host path": (lambda pod: pod["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "hostPath is not"),
    "root": (lambda pod: pod["securityContext"].update(runAsUser=0), "must not run as user 0"),
    "seccomp": (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccompProfile.type: RuntimeDefault"),
    "capability": (
        lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
        "must not add the capability IPC_LOCK",
    ),
    "privileged": (lambda pod: pod["containers"][0]["securityContext"].update(privileged=True), "not be privileged"),
    "host port": (lambda pod: pod["containers"][0]["ports"][0].update(hostPort=8080), "hostPort 8080"),
}


@pytest.mark.parametrize("name", POD_FAULTS)
def test_pod_security_fault_is_named(name):
    cluster = ray_cluster(load_profile("production"))
    change, expected = POD_FAULTS[name]
    change(cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"])
    found = [f"{pod.role}: {p}" for pod in pods_of(cluster) for p in restricted_problems(pod)]
    assert any(p.startswith("worker group decode: ") and expected in p for p in found)


def test_quota_reaches_the_containers_that_the_operator_adds():
    limits = {"kind": "ResourceQuota", "metadata": {"name": "team"}}
    cluster = ray_cluster(load_profile("production"))
    asked = limits | {"spec": {"hard": {"requests.cpu": "9000", "limits.memory": "90Ti", "pods": "100"}}}
    assert [p for pod in pods_of(cluster) for p in quota_problems(pod, asked)] == []
    disk = limits | {"spec": {"hard": {"requests.ephemeral-storage": "90Ti"}}}
    found = {p for pod in pods_of(cluster) for p in quota_problems(pod, disk)}
    # KubeRay fixes the resources of the container that waits for the head: such a quota admits no worker.
    wait = "container wait-gcs-ready: states no requests.ephemeral-storage, which ResourceQuota team demands"
    assert found == {wait}


@needs_kubectl
def test_everything_rendered_is_admitted(rendered):
    assert problems_of(rendered) == []


NETWORK_FAULTS = {
    "no way to the Kubernetes API": ("ray-nodes", lambda s: s["egress"].pop(2), "head to Kubernetes API, TCP 443"),
    "no submitter": ("ray-dashboard", lambda s: s["ingress"][0]["from"].pop(0), "submitter to head, TCP 8265"),
    "no operator": ("ray-dashboard", lambda s: s["ingress"][0]["from"].pop(1), "KubeRay operator to head, TCP 8265"),
    "no DNS": ("dns", lambda s: s["egress"][0]["ports"].pop(0), "submitter to DNS, UDP 53"),
    "no nodes": ("ray-nodes", lambda s: s["ingress"].pop(0), "worker group decode to head, TCP 6379"),
    "no database": ("mlflow-postgres", lambda s: s["ingress"][0].update(ports=[]) or s["ingress"].pop(), "5432"),
    "wrong port": ("mlflow", lambda s: s["ingress"][0]["ports"][0].update(port=5001), "to mlflow, TCP 5000"),
}


@needs_kubectl
@pytest.mark.parametrize("name", NETWORK_FAULTS)
def test_network_fault_is_named(rendered, name):
    manifests = copy.deepcopy(rendered)
    policy, change, expected = NETWORK_FAULTS[name]
    change(find(manifests, "NetworkPolicy", policy)["spec"])
    assert any(expected in problem and "no policy allows" in problem for problem in problems_of(manifests))


def config_map(**changes):
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "dashboards"},
        "data": {"a.json": "{}"},
    } | changes


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (config_map(data={"a.json": "x" * 300_000}), "kubectl apply keeps a copy in an annotation"),
        (config_map(data={"a.json": "x" * 1_100_000}), "a ConfigMap holds at most 1,048,576"),
        (config_map(data={"a b": "x"}), "data key 'a b'"),
        (config_map(metadata={"name": "Dash_boards"}), "metadata.name 'Dash_boards'"),
        (config_map(metadata={"name": "d", "labels": {"run": "a/b"}}), "metadata.labels.run: 'a/b'"),
        (config_map(metadata={"name": "d", "labels": {"run": "x" * 64}}), "at most 63 letters"),
    ],
)
def test_sizes_and_names_that_are_refused(manifest, expected):
    assert list(object_problems(config_map())) == []
    assert any(expected in problem for problem in object_problems(manifest))


FAST = """
name: fast
image: i
pod_security: privileged
groups:
  - {name: train, jobs: [pretrain], gang: true, replicas: 8, gpus: 8, memory_gib: 1600, shared_memory_gib: 256,
     cpus: 180, local_disk_gib: 1000, resources: {rdma/hca: "8", hugepages-2Mi: 5Gi}, capabilities: [IPC_LOCK],
     host_network: true,
     runtime_class: nvidia, topology: topology.example.com/block, environment: {NCCL_IB_HCA: mlx5},
     tolerations: [nvidia.com/gpu], node_selector: {pool: h100}}
queue: {kind: kueue, name: training, priority_class: high}
quota: {cluster_queue: fashion, flavor: h100, cohort: company, resources: {cpu: "4000"}}
"""


@pytest.fixture
def fast(tmp_path):
    (tmp_path / "fast.yaml").write_text(FAST)
    return load_profile(str(tmp_path / "fast.yaml"))


def test_fast_network_reaches_the_pods(fast):
    job = ray_job(fast, "pretrain", "check")
    template = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    container = template["spec"]["containers"][0]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["rdma/hca"] == "8"
        assert container["resources"][kind]["hugepages-2Mi"] == "5Gi"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in container["env"]
    assert template["spec"]["hostNetwork"] is True
    assert template["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert template["spec"]["runtimeClassName"] == "nvidia"
    assert template["metadata"]["annotations"] == {
        "kueue.x-k8s.io/podset-required-topology": "topology.example.com/block"
    }
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "hostNetwork" not in head


@needs_kubectl
def test_the_exception_covers_the_group_that_asks_and_nothing_else(fast, tmp_path):
    render.write_folder(fast, tmp_path / "out", KUBERNETES)
    manifests = [*render.build(tmp_path / "out"), ray_job(fast, "pretrain", "check")]
    namespace = find(manifests, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    assert problems_of(manifests) == []
    find(manifests, "Deployment")["spec"]["template"]["spec"]["hostNetwork"] = True
    assert any("Deployment: hostNetwork is not allowed" in problem for problem in problems_of(manifests))
    namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "restricted"
    assert any("worker group train: hostNetwork" in problem for problem in problems_of(manifests))


def test_kueue_objects_follow_the_profile(fast):
    objects = {item["kind"]: item for item in queue_objects(fast)}
    assert {item["apiVersion"] for item in objects.values()} == {KUEUE}
    assert objects["ClusterQueue"]["metadata"]["name"] == "fashion"
    assert objects["ClusterQueue"]["spec"]["cohortName"] == "company"
    group = objects["ClusterQueue"]["spec"]["resourceGroups"][0]
    amounts = {item["name"]: item["nominalQuota"] for item in group["flavors"][0]["resources"]}
    assert amounts == quota(fast)
    assert amounts["nvidia.com/gpu"] == "64"
    assert amounts["rdma/hca"] == "64"
    assert amounts["hugepages-2Mi"] == f"{8 * 5 * 1024}Mi"
    assert amounts["cpu"] == "4000"
    assert amounts["memory"] == f"{8 * 1600 + 2 * 16 + 1}Gi"
    assert objects["ResourceFlavor"]["spec"]["topologyName"] == objects["Topology"]["metadata"]["name"] == "h100"
    assert objects["WorkloadPriorityClass"]["metadata"]["name"] == "high"


def test_old_kueue_version_is_named():
    report = Report()
    old = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "ResourceFlavor", "metadata": {"name": "f"}}
    validate_manifests([old], Given(), "1.34", report, "here")
    assert any("use kueue.x-k8s.io/v1beta2" in problem for problem in report.problems)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "groups: [{name: w, capabilities: [IPC_LOCK]}]",
            "groups[w].capabilities: the restricted Pod Security standard",
        ),
        ("groups: [{name: w, host_network: true}]", "set pod_security: privileged"),
        ("pod_security: baseline\ngroups: [{name: w}]", "pod_security='baseline': use one of restricted, privileged"),
        ("groups: [{name: w, resources: {memory: 5Gi}}]", "memory has its own key"),
        ("groups: [{name: w, topology: rack}]", "only Kueue places by topology"),
    ],
)
def test_profile_mistakes_about_networks_and_security(tmp_path, line, expected):
    (tmp_path / "p.yaml").write_text(f"name: a\nimage: i\n{line}")
    with pytest.raises(UserError) as caught:
        load_profile(str(tmp_path / "p.yaml"))
    assert expected in str(caught.value)


def test_amount_that_is_no_number_is_named(tmp_path):
    text = "name: a\nimage: i\ngroups: [{name: w, resources: {rdma/hca: some}}]\nqueue: {kind: volcano, name: q}"
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=r"groups\[w\].resources.rdma/hca='some': use a whole number"):
        queue_objects(load_profile(str(tmp_path / "p.yaml")))


@needs_kubectl
def test_a_schedule_submits_to_the_long_lived_cluster(rendered, tmp_path):
    job = find(rendered, "CronJob", "nightly")
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    recorder = tmp_path / "ray"
    recorder.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    recorder.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    run = next(word for word in words if word.startswith("run="))
    assert re.fullmatch(r"run=nightly-\d{8}-\d{4}", run)
    assert words[words.index("--address") + 1] == "http://loomvideo-head-svc:8265"
    assert json.loads(words[words.index("--metadata-json") + 1])["loomvideo.run"] == run.removeprefix("run=")
    assert words[words.index("--") + 1 :][:2] == ["loomvideo", "evaluate"]
    assert "suites=[fashion]" in words
    assert "runs=/mnt/loomvideo/runs" in words


def test_an_existing_cluster_needs_an_address_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    profile = load_profile("quickstart")
    with pytest.raises(UserError, match="set RAY_API_SERVER_ADDRESS=http://HEAD:8265"), dashboard(profile):
        pass
    packages = locked_packages(REPO / "locks" / "base.txt")
    assert any(pin.startswith("torch==") for pin in packages)
    assert not any(pin.startswith("ray==") or "#" in pin for pin in packages)
    plan = SubmissionPlan("http://h:8265", "pretrain", "r", ("loomvideo",), packages=("six==1.17.0",))
    assert plan.runtime_env["pip"] == {"packages": ["six==1.17.0"]}
    assert plan.runtime_env["config"]["setup_timeout_seconds"] > 600
    (tmp_path / "p.yaml").write_text("name: a\nexisting: true\nimage: i")
    with pytest.raises(UserError, match="takes no image and no groups"):
        load_profile(str(tmp_path / "p.yaml"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("{name: N, cron: 0 2 * * *}", "schedules[N].name='N'"),
        ("{name: n, cron: daily}", "schedules[n].cron='daily': five fields"),
        ("{name: n, when: daily}", "unknown key schedules[0].when"),
    ],
)
def test_schedule_mistakes_are_named(tmp_path, schedule, expected):
    (tmp_path / "p.yaml").write_text(f"name: a\nimage: i\ngroups: [{{name: w}}]\nschedules: [{schedule}]")
    with pytest.raises(UserError) as caught:
        load_profile(str(tmp_path / "p.yaml"))
    assert expected in str(caught.value)


@needs_kubectl
def test_the_page_is_reached_through_its_ingress_and_asks_for_a_token(rendered):
    service = find(rendered, "RayService")
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    module, _, function = serve["applications"][0]["import_path"].partition(":")
    source = Path(importlib.util.find_spec(module).origin).read_text()
    assert re.search(rf"^def {function}\(arguments:", source, re.MULTILINE)
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["groupName"] == "encode"
    container = group["template"]["spec"]["containers"][0]
    assert {"secretRef": {"name": "loomvideo-serve"}} in container["envFrom"]
    assert {"name": "serve", "containerPort": 8000} in container["ports"]
    ingress = find(rendered, "Ingress")["spec"]
    assert ingress["tls"] == [{"hosts": ["loomvideo.example.com"], "secretName": "loomvideo-serve-tls"}]
    backend = ingress["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == f"{service['metadata']['name']}-serve-svc"


def test_a_changed_service_is_another_cluster():
    def cluster(title):
        return ray_service(load_profile("production", [f"service.arguments=[title={title}]"]), "page")["spec"][
            "rayClusterConfig"
        ]

    assert cluster("First") == cluster("First") != cluster("Second")


SERVICE_FAULTS = {
    "port": (lambda c, s: c["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"].pop(), "port named serve"),
    "config": (lambda c, s: s.update(serveConfigV2="- a"), "needs a list of applications"),
    "token": (lambda c, s: c.pop("authOptions"), "without mode: token"),
}


@needs_kubectl
@pytest.mark.parametrize("name", SERVICE_FAULTS)
def test_service_fault_is_named(rendered, name):
    service = copy.deepcopy(find(rendered, "RayService"))
    assert list(rule_problems(service)) == []
    change, expected = SERVICE_FAULTS[name]
    change(service["spec"]["rayClusterConfig"], service["spec"])
    assert any(expected in problem for problem in rule_problems(service))


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ("{arguments: [preset=5b]}", "service.host: name the host"),
        ("{arguments: [preset=5b], host: h.example.com}", "no group lists serve under jobs"),
    ],
)
def test_service_mistakes_are_named(tmp_path, service, expected):
    (tmp_path / "p.yaml").write_text(f"name: a\nimage: i\ngroups: [{{name: w}}]\nservice: {service}")
    with pytest.raises(UserError, match=expected):
        load_profile(str(tmp_path / "p.yaml"))
