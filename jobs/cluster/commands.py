"""Commands around a cluster: render, validate, submit, jobs, doctor."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loomvideo.platform.console import console, table
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from loomvideo.platform.cluster.profile import ClusterProfile
    from loomvideo.platform.cluster.submission import SubmissionPlan
    from loomvideo.platform.cluster.validate import Report

app = typer.Typer()
jobs_app = typer.Typer(no_args_is_help=True, help="List, follow and stop jobs of a cluster.")
app.add_typer(jobs_app, name="jobs")
PROFILES = Path("infra/profiles")
RAY_JOBS = ("data", "pretrain", "finetune-edit", "distill", "prefer", "evaluate")

Cluster = Annotated[str, typer.Option("--cluster", help="profile: a name in infra/profiles or a path to a .yaml file")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="change a profile's key: section.key=value")]


@app.command()
def render(
    cluster: Cluster,
    output: Annotated[Path | None, typer.Option("--output", help="folder to write; build/CLUSTER when unset")] = None,
    job: Annotated[str | None, typer.Option("--job", help="also write a RayJob for this job")] = None,
    run: Annotated[str | None, typer.Option("--run", help="run name of the RayJob")] = None,
    wheel: Annotated[str | None, typer.Option("--wheel", help="remote wheel that the RayJob runs")] = None,
    changes: Changes = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="arguments of the job: preset=… section.key=…")] = None,
) -> None:
    """Write a cluster's manifests as a Kustomize folder: kubectl apply -k FOLDER."""
    from loomvideo.platform.cluster.manifests import ray_job
    from loomvideo.platform.cluster.profile import load_profile
    from loomvideo.platform.cluster.render import write_folder

    if job and not run:
        raise UserError("--run: name the run of the job, so that a second try continues it")
    profile = load_profile(cluster, changes or [])
    if profile.existing:
        raise UserError(
            f"--cluster {cluster}: existing: true describes a cluster that is up; there is nothing to render"
        )
    jobs = (ray_job(profile, job, run, arguments or [], wheel),) if job and run else ()
    folder = output or Path("build") / Path(cluster).stem
    for path in write_folder(profile, folder, jobs=jobs):
        print(path)
    print(f"apply with: kubectl apply -k {folder}")
    for manifest in jobs:
        print(f"start with: kubectl apply -f {folder}/{manifest['metadata']['name']}.rayjob.yaml")


@app.command()
def validate(
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="one profile; all in infra/profiles if unset")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="a folder that render wrote, with changes made by hand, instead")
    ] = None,
    changes: Changes = None,
) -> None:
    """Check manifests, images and scripts without a cluster; exit code 1 when something is wrong."""
    from loomvideo.platform.cluster.profile import ClusterProfile
    from loomvideo.platform.cluster.validate import Report, linting, validate_folder

    report = Report()
    if folder:
        validate_folder(folder, ClusterProfile.kubernetes_version, report)
    else:
        with linting(Path(), report):
            _validate_profiles(cluster, changes, report)
    for reason in report.skipped:
        print(f"skipped: {reason}")
    for problem in report.problems:
        print(problem)
    print(f"{report.checked} objects and files checked, {len(report.problems)} problems")
    if report.problems:
        raise typer.Exit(1)


def _validate_profiles(cluster: str | None, changes: list[str] | None, report: "Report") -> None:
    """Check what is rendered from one profile or all, for every kind of queue."""
    from loomvideo.platform.cluster.manifests import ray_job
    from loomvideo.platform.cluster.profile import QUEUES, load_profile
    from loomvideo.platform.cluster.validate import validate_profile

    names = [cluster] if cluster else sorted(str(path) for path in PROFILES.glob("*.yaml"))
    if not names:
        raise UserError(f"{PROFILES}: no profiles; run from a checkout of the repository or give --cluster PATH")
    with tempfile.TemporaryDirectory(dir=".", prefix=".validate-") as scratch:
        for name in names:
            own = load_profile(name, changes or [])
            if own.existing:
                report.checked += 1
                continue
            # A profile that chose its queue is checked with it, one without with every kind.
            for kind in QUEUES if own.queue.kind == "plain" else (own.queue.kind,):
                queue = [] if changes or own.queue.kind != "plain" else [f"queue.kind={kind}", "queue.name=training"]
                profile = load_profile(name, [*queue, *(changes or [])])
                served = [job for job in RAY_JOBS if any(job in group.jobs for group in profile.groups)]
                jobs = tuple(ray_job(profile, job, "check") for job in served)
                validate_profile(profile, jobs, Path(scratch) / f"{Path(name).stem}-{kind}", report)
                if changes:
                    break


SUBMIT_FOLDER = Path("build/submit")
LOCK = Path("locks/base.txt")


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    job: Annotated[str, typer.Argument(help="data, pretrain, finetune-edit, evaluate, doctor, …")],
    cluster: Cluster,
    run: Annotated[str, typer.Option("--run", help="run name: submitting it again follows or continues the run")],
    arguments: Annotated[list[str] | None, typer.Argument(help="arguments of the job: preset=… section.key=…")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the ray job submit line and stop")] = False,
    code: Annotated[
        str, typer.Option("--code", help="wheel: ship this checkout; image: run the image's code")
    ] = "wheel",
    working_dir: Annotated[Path | None, typer.Option("--working-dir", help="small folder to ship along")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the log and return the exit code")] = True,
    again: Annotated[bool, typer.Option("--again", help="start even if the same command has succeeded")] = False,
    changes: Changes = None,
) -> None:
    """Run a job on a cluster: ships this checkout's code, follows the log, returns the job's exit code."""
    from loomvideo.platform.cluster import submission
    from loomvideo.platform.cluster.access import dashboard
    from loomvideo.platform.cluster.profile import load_profile

    profile = load_profile(cluster, changes or [])
    plan_for = _planner(profile, job, run, arguments or [], code, working_dir)
    if dry_run:
        print(plan_for(profile.access.address or "http://127.0.0.1:8265").command_line(f"{job}-{run}-1"))
        return
    with dashboard(profile) as address:
        client = submission.connect(address)
        plan = plan_for(address)
        submitted = submission.submit(client, plan, again)
        name = submitted.submission_id
        if submitted.finished:
            print(f"{name}: this command has succeeded already; --again runs it once more")
            return
        if submitted.started:
            print(f"{name}: shipped {submission.upload_summary(plan)}; the same as:")
            print(plan.command_line(name))
        else:
            print(f"{name}: is running already; following it")
        if wait:
            _follow(client, name, cluster)


def _planner(
    profile: "ClusterProfile", job: str, run: str, arguments: list[str], code: str, working_dir: Path | None
) -> "Callable[[str], SubmissionPlan]":
    """Build what is shipped, once, and return the plan for an address."""
    from loomvideo.platform.cluster import submission
    from loomvideo.platform.cluster.manifests import command_of, named_arguments
    from loomvideo.platform.cluster.pods import STOP_VARIABLE
    from loomvideo.platform.cluster.upload import MIB, left_out_line
    from loomvideo.platform.cluster.wheel import build_wheel
    from loomvideo.platform.runs import RUN_NAME

    if not RUN_NAME.fullmatch(run):
        raise UserError(f"--run={run!r}: use letters, digits, '.', '_' and '-', at most 63 characters")
    if profile.existing and code == "image":
        raise UserError("--code=image: an existing cluster has no image of ours; use --code wheel")
    if code not in ("wheel", "image"):
        raise UserError(f"--code={code!r}: use wheel or image")
    limit = profile.upload.limit_mib * MIB
    folder = SUBMIT_FOLDER / f"{job}-{run}"
    shutil.rmtree(folder, ignore_errors=True)
    files = folder / "files"
    if working_dir:
        left_out = left_out_line(submission.ship_folder(working_dir, files, limit))
        if left_out:
            print(left_out, file=sys.stderr)
    arguments = submission.ship_files(arguments, files)
    wheel = build_wheel(Path(), folder) if code == "wheel" else None
    shipped = files if files.is_dir() else None
    submission.check_size(wheel.path if wheel else None, shipped, limit)
    # A shipped wheel has no script on the nodes' PATH; its module is found through PYTHONPATH.
    command = command_of(job)
    command = ["python", "-m", "loomvideo.jobs.cli", *command[1:]] if wheel else command
    named = named_arguments(profile, job, run, arguments)
    environment = {"MLFLOW_TRACKING_URI": profile.tracking.uri, STOP_VARIABLE: str(profile.stop_grace_s)}
    environment |= profile.environment
    packages = tuple(profile.packages) or submission.locked_packages(LOCK) if profile.existing else ()
    metadata = {"loomvideo.code": wheel.digest if wheel else "image", **_source_state()}

    def plan(address: str) -> submission.SubmissionPlan:
        return submission.SubmissionPlan(
            address=address,
            job=job,
            run=run,
            entrypoint=(*command, *arguments, *named),
            wheel=wheel.path if wheel else None,
            working_dir=shipped,
            environment=environment,
            metadata=metadata,
            packages=packages,
        )

    return plan


def _source_state() -> dict[str, str]:
    """The checkout's commit and whether it has changes, as far as git tells."""
    git = shutil.which("git")
    if git is None or not Path(".git").exists():
        return {}
    commit = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {"loomvideo.commit": commit, "loomvideo.changed": "yes" if changed else "no"}


def _follow(client: "JobSubmissionClient", name: str, cluster: str) -> None:
    from loomvideo.platform.cluster.submission import follow

    try:
        code = follow(client, name, lambda piece: print(piece, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nleft; the job goes on. loomvideo jobs logs {name} --cluster {cluster}")
        code = 130
    if code:
        raise typer.Exit(code)


@jobs_app.command("ls")
def list_jobs(cluster: Cluster, changes: Changes = None) -> None:
    """List the cluster's jobs, oldest first."""
    import datetime

    from loomvideo.platform.cluster.submission import JOB_KEY, RUN_KEY, jobs_of

    listed = table("id", "job", "run", "status", "started", "minutes")
    with _client(cluster, changes) as client:
        for details in jobs_of(client):
            start, end = (details.start_time or 0) / 1000, details.end_time
            started = datetime.datetime.fromtimestamp(start)
            until = end / 1000 if end else datetime.datetime.now().timestamp()
            row = [details.submission_id, details.metadata[JOB_KEY], details.metadata[RUN_KEY], str(details.status)]
            listed.add_row(*row, f"{started:%Y-%m-%d %H:%M}", f"{(until - start) / 60:.1f}")
    console().print(listed)


@jobs_app.command("logs")
def job_logs(
    name: Annotated[str, typer.Argument(help="job id or run name")], cluster: Cluster, changes: Changes = None
) -> None:
    """Follow a job's log; returns its exit code."""
    with _client(cluster, changes) as client:
        _follow(client, _find(client, name), cluster)


@jobs_app.command("stop")
def stop_job(
    name: Annotated[str, typer.Argument(help="job id or run name")], cluster: Cluster, changes: Changes = None
) -> None:
    """Stop a job; submitting its run again continues it."""
    with _client(cluster, changes) as client:
        name = _find(client, name)
        print(f"{name}: stopping" if client.stop_job(name) else f"{name}: was not running")


@contextlib.contextmanager
def _client(cluster: str, changes: list[str] | None) -> "Iterator[JobSubmissionClient]":
    from loomvideo.platform.cluster.access import dashboard
    from loomvideo.platform.cluster.profile import load_profile
    from loomvideo.platform.cluster.submission import connect

    with dashboard(load_profile(cluster, changes or [])) as address:
        yield connect(address)


def _find(client: "JobSubmissionClient", name: str) -> str:
    """The job of an id, or the newest job of a run name."""
    from loomvideo.platform.cluster.submission import RUN_KEY, jobs_of

    jobs = jobs_of(client)
    matching = [details.submission_id for details in jobs if name in (details.submission_id, details.metadata[RUN_KEY])]
    if not matching:
        known = ", ".join(details.submission_id for details in jobs[-5:]) or "(none)"
        raise UserError(f"{name}: no such job or run on the cluster; newest: {known}")
    return matching[-1]


@app.command()
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="check every node of the Ray cluster")] = False,
    storage: Annotated[
        str | None, typer.Option("--storage", envvar="LOOMVIDEO_RUNS", help="folder or URL that jobs write to")
    ] = None,
    tracking: Annotated[
        str | None, typer.Option("--tracking", envvar="MLFLOW_TRACKING_URI", help="MLflow server")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="also write the findings as JSON")] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="seconds a node may take to answer; 60 on an ordinary machine when 0")
    ] = 0.0,
) -> None:
    """Check this machine, or all nodes of a cluster, before a job runs; exit code 1 when something would break it.

    From outside: loomvideo submit doctor --cluster PROFILE --run NAME.
    """
    import json

    from loomvideo.jobs.kernels.build import MODEL_PROBES
    from loomvideo.platform.cluster.doctor import examine_cluster, examine_machine

    if cluster:
        from loomvideo.platform.ray_session import in_cluster, ray_session

        if not in_cluster():
            raise UserError(
                "doctor --cluster: not on a cluster; use loomvideo submit doctor --cluster PROFILE --run NAME"
            )
        with ray_session():
            diagnosis = examine_cluster(storage, tracking, extra=MODEL_PROBES, timeout_s=timeout)
    else:
        diagnosis = examine_machine(storage, tracking, extra=MODEL_PROBES)
    console().print(diagnosis.table())
    if output:
        output.write_text(json.dumps(diagnosis.as_dict(), indent=2) + "\n")
    if diagnosis.failed:
        raise typer.Exit(1)


@app.command("mlflow-server")
def mlflow_server(
    folder: Annotated[Path, typer.Option("--folder", help="its users, password, database")] = Path(
        "runs/mlflow-server"
    ),
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="port to listen on")] = 5000,
    artifacts: Annotated[str, typer.Option("--artifacts", help="folder or bucket; in FOLDER when unset")] = "",
    allowed_hosts: Annotated[str, typer.Option("--allowed-hosts", help="Host headers that are answered")] = "",
) -> None:
    """Run an MLflow server with a user for jobs; the database is MLFLOW_BACKEND_STORE_URI (Postgres) or in FOLDER."""
    import os

    from loomvideo.platform.cluster.mlflow_server import prepare_server

    server = prepare_server(folder, host, port, artifacts, allowed_hosts)
    print(server.how_to_log_in(), flush=True)
    subprocess.Popen(server.make_user, env=os.environ | server.users)
    os.execvpe(server.command[0], server.command, os.environ | server.environment)
