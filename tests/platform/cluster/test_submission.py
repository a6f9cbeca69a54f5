"""Submitting: what is shipped, what is refused, idempotence by run name, exit codes over broken connections."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import yaml
from fixtures.texts import AS_TYPED

from loomvideo.platform.cluster import access, submission
from loomvideo.platform.cluster.manifests import ray_job
from loomvideo.platform.cluster.profile import load_profile
from loomvideo.platform.cluster.render import to_yaml
from loomvideo.platform.cluster.submission import SubmissionPlan, follow, ship_files, submit
from loomvideo.platform.cluster.upload import left_out_line, plan_upload
from loomvideo.platform.cluster.validate import secrets_in
from loomvideo.platform.cluster.wheel import build_wheel
from loomvideo.platform.errors import UserError

REPO = Path(__file__).parents[3]
PLAN = SubmissionPlan("http://h:8265", "pretrain", "first", ("loomvideo", "pretrain", "run=first"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(REPO, tmp_path_factory.mktemp("wheel"))


def test_wheel_has_the_code_and_no_dependencies(wheel):
    with zipfile.ZipFile(wheel.path) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
        record = next(archive.read(name).decode() for name in names if name.endswith("RECORD"))
    assert {"loomvideo/platform/config.py", "loomvideo/jobs/cli.py"} <= names
    assert {line.split(",")[0] for line in record.splitlines()} == names
    assert "Requires-Dist" not in metadata
    assert f"Version: 0.1.0+{wheel.digest}" in metadata


def test_wheel_is_named_by_its_content(wheel, tmp_path):
    assert build_wheel(REPO, tmp_path).path.read_bytes() == wheel.path.read_bytes()
    checkout = tmp_path / "checkout"
    for room in ("platform", "model", "pipelines", "jobs", "pyproject.toml", "LICENSE"):
        (checkout / room).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(REPO / room), str(checkout / room)], check=True)
    (checkout / "platform" / "errors.py").open("a").write("# changed\n")
    assert build_wheel(checkout, tmp_path).digest != wheel.digest


def test_wheel_holds_no_secret(wheel):
    with zipfile.ZipFile(wheel.path) as archive:
        found = {name: secrets_in(archive.read(name).decode(errors="replace")) for name in archive.namelist()}
    assert {name: kinds for name, kinds in found.items() if kinds} == {}


def test_wheel_needs_a_checkout(tmp_path):
    with pytest.raises(UserError, match=r"pyproject.toml: not found; run from a checkout"):
        build_wheel(tmp_path, tmp_path)


def write(root, files):
    for name, size in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def test_upload_leaves_out_history_data_and_caches(tmp_path):
    write(
        tmp_path, {"a.yaml": 3, ".git/objects/1": 10**6, "data/v.txt": 10**6, "sub/m.safetensors": 10**6, "sub/b.py": 2}
    )
    upload = plan_upload(tmp_path, limit_bytes=100)
    assert sorted(str(path) for path, _ in upload.files) == ["a.yaml", "sub/b.py"]
    upload.copy_to(tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "b.py").read_bytes() == b"xx"


def test_upload_over_the_limit_names_the_largest(tmp_path):
    write(tmp_path, {f"f{i}": i * 10**5 for i in range(1, 13)})
    with pytest.raises(UserError, match="over the limit of 1 MiB; largest: f12 ") as caught:
        plan_upload(tmp_path, limit_bytes=1024**2)
    assert "f3 " in str(caught.value)
    assert "f2 " not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [(".env", "A=1"), ("k.pem", ""), ("c.yaml", "uri: postgresql://u:pw12@db/x"), ("n.txt", "AKIA" + "A1" * 8)],
)
def test_upload_refuses_secrets(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="looks like a"):
        plan_upload(tmp_path, limit_bytes=1000)


def test_local_preset_files_go_along(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("a: 1")
    assert ship_files([f"preset={mine}", "training.steps=3"], tmp_path / "out") == [
        "preset=mine.yaml",
        "training.steps=3",
    ]
    assert (tmp_path / "out" / "mine.yaml").read_text() == "a: 1"
    with pytest.raises(UserError, match="yaml not found here"):
        ship_files(["preset=gone.yaml"], tmp_path / "out")


def test_two_yaml_files_of_one_name_are_both_sent(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(f"a: {number % 2}")
    arguments = [f"preset={tmp_path}/a/mine.yaml", f"extra={tmp_path}/b/mine.yaml", f"again={tmp_path}/c/mine.yaml"]
    out = tmp_path / "out"
    assert ship_files(arguments, out) == ["preset=mine.yaml", "extra=mine-2.yaml", "again=mine.yaml"]
    assert [(out / name).read_text() for name in ("mine.yaml", "mine-2.yaml")] == ["a: 0", "a: 1"]


def test_packages_called_data_or_build_go_along_and_what_stays_is_named(tmp_path):
    for name in (
        "data/__init__.py",
        "build/__init__.py",
        "runs/a.txt",
        "sub/film.mp4",
        "x/__pycache__/a.pyc",
        "x/m.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    upload = plan_upload(tmp_path, limit_bytes=1024)
    assert [str(path) for path, _ in upload.files] == ["build/__init__.py", "data/__init__.py", "x/m.py"]
    assert "not sent along: runs, sub/film.mp4 (" in left_out_line(upload)


def test_a_file_that_changes_while_it_is_packed_is_named(tmp_path, monkeypatch):
    source = tmp_path / "work"
    source.mkdir()
    (source / "log.txt").write_text("a")
    upload = plan_upload(source, limit_bytes=1024)
    copy = shutil.copy2

    def growing(path, target):
        copy(path, target)
        with open(path, "a") as out:
            out.write("b")

    monkeypatch.setattr("loomvideo.platform.cluster.upload.shutil.copy2", growing)
    with pytest.raises(UserError, match=r"log\.txt: changes while it is packed"):
        upload.copy_to(tmp_path / "out")
    (source / "log.txt").unlink()
    with pytest.raises(UserError, match=r"log\.txt: was removed while it was packed"):
        upload.copy_to(tmp_path / "out")


def kubernetes_arguments(text):
    """What a container gets for an argument: ``$(NAME)`` is expanded, ``$$`` is one ``$``."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "expanded" if m[1] else "$", text)


def words_of(shell_command):
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {shell_command}"], capture_output=True, check=True, env={"HOME": "/h"}
    )
    return printed.stdout.decode().split("\0")[:-1]


def test_texts_reach_the_job_as_typed_by_every_way(tmp_path):
    arguments = [f"prompt={text}" for text in AS_TYPED if len(text) < 1000]
    assert ship_files(arguments, tmp_path) == arguments
    command = ("loomvideo", "generate", *arguments)
    # `loomvideo submit` sends the line to a shell on the cluster; `ray job submit` reads the printed line in a shell
    # here and joins the words again.
    assert words_of(shlex.join(command)) == list(command)
    printed = words_of(SubmissionPlan("http://h:1", "generate", "a", command).command_line("a"))
    assert words_of(shlex.join(printed[printed.index("--") + 1 :])) == list(command)
    # A RayJob's entrypoint passes Kubernetes, the submitter's shell and the cluster's.
    profile = load_profile("infra/profiles/small.yaml", [])
    manifest = yaml.safe_load(to_yaml([ray_job(profile, "pretrain", "a", arguments)]))
    submitted = words_of(kubernetes_arguments(manifest["spec"]["entrypoint"]))
    assert words_of(shlex.join(submitted))[2 : 2 + len(arguments)] == arguments


def test_printed_line_says_what_is_submitted(tmp_path):
    plan = SubmissionPlan(
        "http://h:1", "pretrain", "a", ("loomvideo", "x=[1, 2]"), tmp_path / "w.whl", tmp_path, {"K": "v w"}
    )
    words = shlex.split(plan.command_line("pretrain-a-1"))
    assert words[:7] == ["ray", "job", "submit", "--address", "http://h:1", "--submission-id", "pretrain-a-1"]
    assert json.loads(words[words.index("--runtime-env-json") + 1]) == plan.runtime_env
    assert words[words.index("--") + 1 :] == ["loomvideo", "x=[1, 2]"]


class FakeClient:
    """The jobs API as Ray answers it, with scripted log connections."""

    def __init__(self, jobs=(), tails=(), statuses=(), unknown=False):
        self.jobs, self.tails, self.statuses = list(jobs), list(tails), list(statuses)
        self.submitted, self.unknown, self.followed = [], unknown, False

    def list_jobs(self):
        return self.jobs

    def submit_job(self, submission_id, entrypoint, metadata, **_):
        self.submitted.append(submission_id)
        if any(job.submission_id == submission_id for job in self.jobs):
            raise RuntimeError(f"{submission_id} already exists")
        self.jobs.append(job(submission_id, "PENDING", entrypoint, metadata))

    async def tail_job_logs(self, submission_id):
        assert not self.unknown, "the dashboard logs the token of this request"
        for piece in self.tails.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece
        self.followed = True

    def get_job_info(self, submission_id):
        if self.unknown:
            raise RuntimeError(f"Request failed with status code 404: Job {submission_id} does not exist.")
        if not self.followed:
            return job(submission_id, "RUNNING")
        self.followed = False
        status = self.statuses.pop(0)
        if isinstance(status, Exception):
            raise status
        return status


def job(submission_id, status, entrypoint="loomvideo pretrain run=first", metadata=None, exit_code=None):
    return SimpleNamespace(
        submission_id=submission_id,
        status=status,
        entrypoint=entrypoint,
        metadata=metadata or {"loomvideo.job": "pretrain", "loomvideo.run": "first"},
        start_time=1,
        message="why\nmore",
        driver_exit_code=exit_code,
    )


@pytest.mark.parametrize(
    ("jobs", "again", "expected_id", "started", "finished"),
    [
        ([], False, "pretrain-first-1", True, False),
        ([job("pretrain-first-1", "RUNNING")], False, "pretrain-first-1", False, False),
        ([job("pretrain-first-1", "FAILED")], False, "pretrain-first-2", True, False),
        ([job("pretrain-first-1", "SUCCEEDED")], False, "pretrain-first-1", False, True),
        ([job("pretrain-first-1", "SUCCEEDED")], True, "pretrain-first-2", True, False),
        ([job("pretrain-first-1", "SUCCEEDED", "loomvideo pretrain other=1")], False, "pretrain-first-2", True, False),
        ([job("x", "RUNNING", metadata={"other": "job"})], False, "pretrain-first-1", True, False),
    ],
)
def test_submit_is_idempotent_by_run_name(jobs, again, expected_id, started, finished):
    client = FakeClient(jobs)
    submitted = submit(client, PLAN, again)
    assert (submitted.submission_id, submitted.started, submitted.finished) == (expected_id, started, finished)
    assert client.submitted == ([expected_id] if started else [])


def test_two_submits_at_once_start_one_job():
    class Racing(FakeClient):
        def submit_job(self, submission_id, **_):
            self.jobs.append(job(submission_id, "PENDING"))
            raise RuntimeError("Job with submission_id pretrain-first-1 already exists")

    submitted = submit(Racing(), PLAN)
    assert (submitted.submission_id, submitted.started) == ("pretrain-first-1", False)


def follow_fake(**scripts):
    pieces = []
    code = follow(FakeClient(**scripts), "pretrain-first-1", pieces.append, lost_after_s=0.05, retry_s=0.02)
    return code, "".join(pieces)


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [("SUCCEEDED", None, 0), ("FAILED", 7, 7), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_exit_code_is_the_jobs_own(status, exit_code, expected):
    code, text = follow_fake(tails=[["a\n", "b\n"]], statuses=[job("pretrain-first-1", status, exit_code=exit_code)])
    assert code == expected
    assert text.startswith("a\nb\n")
    assert ("FAILED: why\n" in text) == (status == "FAILED")


def test_broken_connection_repeats_nothing_and_loses_nothing():
    done = job("pretrain-first-1", "SUCCEEDED")
    tails = [["a\n", "b", RuntimeError("closed unexpectedly")], ["a\nb", "c\n"], ["a\nbc\n", "d\n"]]
    assert follow_fake(tails=tails, statuses=[job("x", "RUNNING"), done]) == (0, "a\nbc\nd\n")


def test_a_long_connection_that_breaks_is_taken_up_again():
    class Slow(FakeClient):
        async def tail_job_logs(self, submission_id):
            for piece in self.tails.pop(0):
                if isinstance(piece, Exception):
                    await asyncio.sleep(0.2)
                    raise piece
                yield piece
            self.followed = True

    client = Slow(tails=[["a\n", ConnectionError("gone")], ["a\n", "b\n"]], statuses=[job("x", "SUCCEEDED")])
    pieces = []
    assert follow(client, "pretrain-first-1", pieces.append, lost_after_s=0.1, retry_s=0.01) == 0
    assert "".join(pieces) == "a\nb\n"


def test_replaced_head_is_said_and_not_taken_for_success():
    code, text = follow_fake(unknown=True)
    assert code == 3
    assert "its head was replaced; submit the run again" in text


def test_absent_dashboard_is_given_up_after_a_while():
    code, text = follow_fake(tails=[[ConnectionError("refused")]] * 50)
    assert code == 3
    assert "submit the run again to continue it" in text


KUBECTL = """#!/bin/sh
case "$*" in
  *"get secret loomvideo-ray-token"*) printf c2VjcmV0LXRva2Vu ;;
  *"port-forward service/loomvideo-head-svc :8265"*) echo "Forwarding from 127.0.0.1:43210 -> 8265"; exec sleep 60 ;;
  *) echo "no $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    path = tmp_path / "kubectl"
    path.write_text(KUBECTL)
    path.chmod(0o755)
    monkeypatch.setenv("LOOMVIDEO_KUBECTL", str(path))
    monkeypatch.setenv("LOOMVIDEO_PROFILES", str(REPO / "infra" / "profiles"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    # Set and removed through monkeypatch, so that what access sets is taken back.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return path


def test_cluster_is_reached_through_a_port_forward_with_its_token(kubectl):
    with access.dashboard(load_profile("production")) as address:
        assert address == "http://127.0.0.1:43210"
        assert os.environ["RAY_AUTH_TOKEN"] == "secret-token"
        assert os.environ["RAY_AUTH_MODE"] == "token"


def test_unreachable_cluster_is_one_line(kubectl):
    with pytest.raises(UserError, match="port-forward to service loomvideo-small-head-svc: no "):  # noqa: SIM117
        with access.dashboard(load_profile("small")):
            pass


def test_address_variable_wins(kubectl, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")
    with access.dashboard(load_profile("production")) as address:
        assert address == "http://elsewhere:1"


@pytest.mark.slow
def test_dashboard_refuses_without_the_token(token_cluster, monkeypatch):
    for headers, refusal in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        for page in ("/api/jobs/", "/api/version", "/nodes?view=summary", "/api/cluster_status"):
            assert requests.get(token_cluster.address + page, headers=headers, timeout=10).status_code == refusal
        stolen = {"entrypoint": "id"}
        assert (
            requests.post(f"{token_cluster.address}/api/jobs/", json=stolen, headers=headers, timeout=10).status_code
            == refusal
        )
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match="refuses the token"):
        submission.connect(token_cluster.address)


@pytest.mark.slow
def test_shipped_code_runs_and_its_exit_code_comes_back(token_cluster, wheel, tmp_path):
    (tmp_path / "note.txt").write_text("along")
    code = "import loomvideo.platform.errors as e, sys; print(e.__file__, open('note.txt').read()); sys.exit(7)"
    plan = SubmissionPlan(
        token_cluster.address, "pretrain", "shipped", ("python", "-c", code), wheel.path, tmp_path, {"MARK": "1"}
    )
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from loomvideo.platform.cluster.submission import *\n"
        "values = json.loads(sys.stdin.read())\n"
        "paths = {key: Path(values.pop(key)) for key in ('wheel', 'working_dir')}\n"
        "client = connect(values['address'])\n"
        "plan = SubmissionPlan(**values, **paths)\n"
        "name = submit(client, plan).submission_id\n"
        "sys.exit(follow(client, name, lambda piece: print(piece, end='')))\n"
    )
    values = {key: getattr(plan, key) for key in ("address", "job", "run", "entrypoint", "environment")}
    values |= {"wheel": str(wheel.path), "working_dir": str(tmp_path)}
    # A process of its own: Ray reads the token once and keeps it.
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(values),
        env=token_cluster.variables(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 7, result.stdout + result.stderr
    assert "py_modules_files" in result.stdout
    assert "errors.py along" in result.stdout
    assert token_cluster.token not in result.stdout + result.stderr + plan.command_line("x")


@pytest.mark.slow
def test_printed_ray_job_submit_line_works_as_printed(token_cluster, tmp_path):
    profile = tmp_path / "local.yaml"
    profile.write_text(
        f"name: local\nimage: i\naccess: {{address: '{token_cluster.address}'}}\ngroups: [{{name: w}}]\n"
    )
    command = [sys.executable, "-m", "loomvideo.jobs.cli", "submit", "--cluster", str(profile), "--run", "line"]
    command += ["render", "--dry-run", "--code", "image", "--", "--help"]
    printed = subprocess.run(
        command, cwd=tmp_path, env=token_cluster.variables(), capture_output=True, text=True, check=True
    )
    result = subprocess.run(
        ["bash", "-c", printed.stdout], cwd=tmp_path, env=token_cluster.variables(), capture_output=True, text=True
    )
    assert "Running entrypoint for job render-line-1: loomvideo render --help" in result.stdout
