"""Profiles render to manifests that pass schemas, operators' rules and cross references; mistakes fail by name."""

import copy
import os
from pathlib import Path

import pytest
import yaml

from loomvideo.platform.cluster import render
from loomvideo.platform.cluster.manifests import command_of, named_arguments, ray_cluster, ray_job
from loomvideo.platform.cluster.profile import QUEUES, load_profile
from loomvideo.platform.cluster.references import Given, reference_problems
from loomvideo.platform.cluster.rules import rule_problems
from loomvideo.platform.cluster.schemas import crd_folder, schema_problems, with_defaults
from loomvideo.platform.cluster.validate import Report, linting, secret_problems, validate_folder, validate_profile
from loomvideo.platform.errors import UserError

REPO = Path(__file__).parents[2]
KUBERNETES = REPO / "infra" / "kubernetes"
JOBS = ("data", "pretrain", "finetune-edit", "evaluate")
needs_kubectl = pytest.mark.skipif(render.find_kubectl() is None, reason="needs kubectl")


@pytest.fixture(autouse=True)
def _repo_profiles(monkeypatch):
    monkeypatch.setenv("LOOMVIDEO_PROFILES", str(REPO / "infra" / "profiles"))
    shared = REPO.parent / "shared" / "kuberay-crds"
    if "LOOMVIDEO_KUBERAY_CRDS" not in os.environ and shared.is_dir():
        monkeypatch.setenv("LOOMVIDEO_KUBERAY_CRDS", str(shared))


@pytest.fixture
def crds():
    folder = crd_folder()
    if folder is None:
        pytest.skip("set LOOMVIDEO_KUBERAY_CRDS to check against KubeRay's schemas")
    return folder


def profile_in(kind, name="production"):
    return load_profile(name, [f"queue.kind={kind}", "queue.name=training", "queue.priority_class=loomvideo-normal"])


def training_job(kind="plain"):
    return ray_job(profile_in(kind), "pretrain", "first", ["preset=5b"])


@needs_kubectl
@pytest.mark.parametrize("name", ["production", "small"])
@pytest.mark.parametrize("kind", QUEUES)
def test_profile_renders_to_valid_manifests(name, kind, tmp_path):
    profile = profile_in(kind, name)
    jobs = tuple(ray_job(profile, job, "first") for job in JOBS)
    report = Report()
    validate_profile(profile, jobs, tmp_path, report, KUBERNETES)
    assert report.problems == []
    assert report.checked > 20


@needs_kubectl
def test_other_namespace_reaches_every_namespaced_object(tmp_path):
    profile = load_profile("production", ["namespace=elsewhere"])
    render.write_folder(profile, tmp_path, KUBERNETES)
    objects = render.build(tmp_path)
    namespaced = [o for o in objects if o["kind"] not in ("Namespace", "PriorityClass")]
    assert {o["metadata"].get("namespace") for o in namespaced} == {"elsewhere"}
    mlflow = next(o for o in objects if o["kind"] == "Deployment")
    assert mlflow["spec"]["template"]["spec"]["containers"][0]["image"] == profile.tracking.image


def test_images_and_scripts_are_lint_clean(monkeypatch):
    monkeypatch.chdir(REPO)
    report = Report()
    with linting(Path(), report):
        assert report.checked == 0
    assert report.problems == []
    assert report.checked + len(report.skipped) >= 2


def test_head_runs_no_tasks_and_everything_asks_for_the_token():
    for manifest in (ray_cluster(profile_in("plain")), training_job()):
        spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert spec["authOptions"] == {"mode": "token", "secretName": "loomvideo-ray-token"}


def test_every_pod_is_unprivileged_with_shared_memory_and_local_caches():
    spec = training_job()["spec"]["rayClusterSpec"]
    for template in (spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]):
        pod, container = template["spec"], template["spec"]["containers"][0]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert environment["TRITON_CACHE_DIR"].startswith("/local/")
        assert environment["LOOMVIDEO_RUNS"] == "/mnt/loomvideo/runs"


def test_training_job_is_a_gang_and_data_job_scales():
    training = training_job()["spec"]["rayClusterSpec"]
    assert training["enableInTreeAutoscaling"] is False
    assert [g["minReplicas"] for g in training["workerGroupSpecs"]] == [8]
    data = ray_job(profile_in("plain"), "data", "shards")["spec"]["rayClusterSpec"]
    assert data["autoscalerOptions"]["version"] == "v2"
    assert [g["groupName"] for g in data["workerGroupSpecs"]] == ["decode", "encode"]
    assert data["workerGroupSpecs"][0]["minReplicas"] == 0


def test_failed_training_frees_gpus_at_once_and_keeps_the_head():
    rules = training_job()["spec"]["deletionStrategy"]["deletionRules"]
    failed = {r["policy"]: r["condition"]["ttlSeconds"] for r in rules if r["condition"].get("jobStatus") == "FAILED"}
    assert failed == {"DeleteWorkers": 0, "DeleteSelf": 24 * 3600}


def test_kueue_job_is_shut_down_and_has_no_deletion_rules():
    spec = training_job("kueue")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in spec


def head_pod(job):
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda j: j["spec"].update(backofLimit=2), "backofLimit"),
        (lambda j: head_pod(j).update(containes=[]), "containes"),
        (lambda j: j["spec"].update(backoffLimit="two"), "backoffLimit"),
        (lambda j: j["spec"]["rayClusterSpec"].pop("headGroupSpec"), "headGroupSpec"),
        (lambda j: j["metadata"].update(lables={}), "lables"),
    ],
)
def test_wrong_field_fails_by_name(crds, change, expected):
    job = training_job()
    assert list(schema_problems(job, "1.34", crds)) == []
    change(job)
    assert any(expected in problem for problem in schema_problems(job, "1.34", crds))


def test_wrong_core_field_fails_by_name():
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}
    assert list(schema_problems(service, "1.34", None)) == []
    service["spec"]["ports"][0]["targetPor"] = 80
    assert any("targetPor" in problem for problem in schema_problems(service, "1.34", None))


def test_defaults_are_applied_before_validation():
    schema = {"properties": {"low": {"default": 0}, "items": {"items": {"properties": {"n": {"default": 1}}}}}}
    assert with_defaults({"items": [{}, {"n": 2}], "low": None}, schema) == {"low": 0, "items": [{"n": 1}, {"n": 2}]}


def cluster(job):
    return job["spec"]["rayClusterSpec"]


def rules(job):
    return job["spec"]["deletionStrategy"]["deletionRules"]


RULES = {
    "kueue and deletion rules": (
        lambda j: j["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "training"}),
        "Kueue needs true",
    ),
    "bad name": (lambda j: j["metadata"].update(name="Pretrain_first"), "KubeRay wants lower-case"),
    "long name": (lambda j: j["metadata"].update(name="p" * 48), "at most 47"),
    "shutdown and rules": (lambda j: j["spec"].update(shutdownAfterJobFinishes=True), "excluded by shutdown"),
    "ttl without shutdown": (lambda j: j["spec"].update(ttlSecondsAfterFinished=5), "needs shutdownAfterJobFinishes"),
    "suspend": (lambda j: j["spec"].update(suspend=True), "can be suspended needs"),
    "sidecar": (lambda j: j["spec"].update(submissionMode="SidecarMode"), "not possible in SidecarMode"),
    "interactive": (lambda j: j["spec"].update(submissionMode="InteractiveMode"), "spec.backoffLimit: not possible"),
    "scaling": (lambda j: cluster(j).update(enableInTreeAutoscaling=True), "DeleteWorkers is not possible"),
    "order": (lambda j: rules(j)[0]["condition"].update(ttlSeconds=9999), "comes before DeleteWorkers"),
    "twice": (lambda j: rules(j).append(rules(j)[0]), "second DeleteWorkers"),
    "no authentication": (lambda j: cluster(j).pop("authOptions"), "without mode: token"),
    "old ray": (lambda j: cluster(j).update(rayVersion="2.51.0"), "2.52.0 or newer"),
    "public": (lambda j: cluster(j)["headGroupSpec"].update(serviceType="LoadBalancer"), "publishes the dashboard"),
    "replicas": (lambda j: cluster(j)["workerGroupSpecs"][0].update(replicas=9), "replicas 9 is not between"),
    "runtime env": (lambda j: j["spec"].update(runtimeEnvYAML="- a"), "must be a YAML mapping"),
}


@pytest.mark.parametrize("name", RULES)
def test_broken_operator_rule_fails_by_name(name):
    job = training_job()
    assert list(rule_problems(job)) == []
    change, expected = RULES[name]
    change(job)
    assert any(expected in problem for problem in rule_problems(job))


def test_scaling_cluster_under_kueue_fails_by_name():
    job = training_job("kueue")
    assert list(rule_problems(job)) == []
    cluster(job)["enableInTreeAutoscaling"] = True
    assert any("Kueue admits clusters of fixed size" in problem for problem in rule_problems(job))


def pod(manifest):
    return manifest["spec"]["template"]["spec"]


REFERENCES = [
    (
        "RayCluster",
        lambda o: o["spec"]["authOptions"].update(secretName="none"),
        "authOptions.secretName: Secret 'none'",
    ),
    (
        "Deployment",
        lambda o: pod(o)["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"].update(key="nope"),
        "has no key 'nope'",
    ),
    ("Deployment", lambda o: pod(o).update(serviceAccountName="nobody"), "ServiceAccount 'nobody'"),
    ("Service", lambda o: o["spec"]["ports"][0].update(targetPort="nope"), "port named 'nope'"),
    (
        "StatefulSet",
        lambda o: pod(o)["volumes"][0]["persistentVolumeClaim"].update(claimName="gone"),
        "PersistentVolumeClaim 'gone'",
    ),
]


@needs_kubectl
@pytest.mark.parametrize(("kind", "change", "expected"), REFERENCES)
def test_dangling_reference_fails_by_name(tmp_path, kind, change, expected):
    render.write_folder(profile_in("plain"), tmp_path, KUBERNETES)
    objects = render.build(tmp_path)
    given = Given.read(KUBERNETES / "given.yaml")
    assert list(reference_problems(objects, given)) == []
    broken = copy.deepcopy(objects)
    change(next(o for o in broken if o["kind"] == kind))
    assert any(expected in problem for _, problem in reference_problems(broken, given))


@needs_kubectl
def test_folder_changed_by_hand_fails_by_name(tmp_path):
    profile = profile_in("kueue", "small")
    job = ray_job(profile, "pretrain", "first")
    render.write_folder(profile, tmp_path / "rendered", KUBERNETES, (job,))
    path = tmp_path / "rendered" / "pretrain-first.rayjob.yaml"
    report = Report()
    validate_folder(tmp_path / "rendered", "1.34", report, KUBERNETES)
    assert report.problems == []
    changed = yaml.safe_load(path.read_text())
    changed["metadata"]["name"] = "Pretrain_first"
    changed["spec"] |= {"deletionStrategy": rules_of_a_plain_job()}
    changed["spec"]["rayClusterSpec"]["authOptions"]["secretName"] = "none"
    path.write_text(yaml.safe_dump(changed))
    validate_folder(tmp_path / "rendered", "1.34", report, KUBERNETES)
    for expected in ("excluded by shutdownAfterJobFinishes", "metadata.name 'Pretrain_first'", "Secret 'none'"):
        assert any(expected in problem for problem in report.problems), expected


def rules_of_a_plain_job():
    return training_job()["spec"]["deletionStrategy"]


def test_secret_in_a_manifest_is_found():
    container = {"env": [{"name": "DB_PASSWORD", "value": "hunter2"}, {"name": "TOKEN_PATH", "value": "/run/t"}]}
    assert list(secret_problems(container)) == [
        "env[0]: env DB_PASSWORD holds its value in the manifest; use secretKeyRef"
    ]
    assert any("password in a URL" in p for p in secret_problems({"uri": "postgresql://user:pw12@host/db"}))
    assert list(secret_problems({"uri": "postgresql://user@host/db"})) == []


def test_created_secrets_are_the_declared_ones():
    script = (KUBERNETES / "create-secrets.sh").read_text()
    declared = yaml.safe_load((KUBERNETES / "given.yaml").read_text())["secrets"]
    made = [secret for secret in declared if not secret.get("optional")]
    for secret in made:
        assert f"apply {secret['name']}\n" in script
        for key in secret["keys"]:
            assert f"value {secret['name']} {key}" in script
    assert script.count("apply loomvideo-") == len(made)
    for secret in declared:
        by_hand = secret["name"] == "loomvideo-serve-tls"
        assert secret in made or by_hand or f"\nkeys {secret['name']} " in script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nimage: i\ngroups: [{name: w, gpu: 1}]", "unknown key groups[0].gpu; did you mean gpus?"),
        ("name: A_b\nimage: i\ngroups: [{name: w}]", "name='A_b': use lower-case"),
        ("name: a\nimage: i", "groups: a cluster without workers"),
        ("name: a\nimage: i\nqueue: {kind: slurm}\ngroups: [{name: w}]", "queue.kind='slurm': use one of plain"),
        ("name: a\nimage: i\nqueue: {kind: kueue}\ngroups: [{name: w}]", "queue.name: name the queue"),
        ("name: a\nimage: i\ngroups: [{name: w, replicas: 3, max_replicas: 2}]", "min_replicas <= replicas"),
        ("name: a\nimage: i\ngroups: [{name: w, shared_memory_gib: 99}]", "must be smaller"),
        ("name: a\nimage: i\ntracking: {uri: 'http://u:p@h'}\ngroups: [{name: w}]", "keep the password in the secret"),
        ("name: a\nimag: i\ngroups: [{name: w}]", "unknown key imag; did you mean image?"),
    ],
)
def test_profile_mistakes_are_one_line_with_the_fix(tmp_path, text, expected):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(UserError, match="production, quickstart, small"):
        load_profile("nowhere")


def test_run_name_that_cannot_be_a_job_name():
    with pytest.raises(UserError, match="at most 38 characters"):
        ray_job(profile_in("plain"), "pretrain", "x" * 60)


@pytest.mark.parametrize(
    ("job", "command"),
    [
        ("data", "loomvideo data prepare preset=tiny run=r runs=/mnt/loomvideo/runs"),
        ("pretrain", "loomvideo pretrain preset=tiny run=r runs=/mnt/loomvideo/runs"),
        ("data-sample", "loomvideo data sample preset=tiny"),
        ("doctor", "loomvideo doctor --cluster preset=tiny"),
    ],
)
def test_command_of_a_job(job, command):
    arguments = ["preset=tiny"]
    words = [*command_of(job), *arguments, *named_arguments(profile_in("plain"), job, "r", arguments)]
    assert " ".join(words) == command


def test_job_without_a_group_is_named():
    with pytest.raises(UserError, match="no group lists job generate"):
        ray_job(profile_in("plain"), "generate", "x")
