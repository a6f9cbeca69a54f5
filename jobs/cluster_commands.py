"""Commands around a cluster: render, validate, submit, jobs, doctor."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loomvideo.platform.errors import UserError

app = typer.Typer()
PROFILES = Path("infra/profiles")
RAY_JOBS = ("data", "pretrain", "finetune-edit", "evaluate")

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
    changes: Changes = None,
) -> None:
    """Check manifests, images and scripts without a cluster; exit code 1 when something is wrong."""
    from loomvideo.platform.cluster.manifests import ray_job
    from loomvideo.platform.cluster.profile import QUEUES, load_profile
    from loomvideo.platform.cluster.validate import Report, lint, validate_profile

    report = Report()
    names = [cluster] if cluster else sorted(str(path) for path in PROFILES.glob("*.yaml"))
    if not names:
        raise UserError(f"{PROFILES}: no profiles; run from a checkout of the repository or give --cluster PATH")
    with tempfile.TemporaryDirectory(dir=".", prefix=".validate-") as scratch:
        for name in names:
            for kind in QUEUES:
                queue = [] if changes else [f"queue.kind={kind}", "queue.name=training"]
                profile = load_profile(name, [*queue, *(changes or [])])
                served = [job for job in RAY_JOBS if any(job in group.jobs for group in profile.groups)]
                jobs = tuple(ray_job(profile, job, "check") for job in served)
                validate_profile(profile, jobs, Path(scratch) / f"{Path(name).stem}-{kind}", report)
                if changes:
                    break
    lint(Path(), report)
    console = Console(soft_wrap=True)
    for reason in report.skipped:
        console.print(f"skipped: {reason}", markup=False)
    for problem in report.problems:
        console.print(problem, markup=False)
    console.print(f"{report.checked} objects and files checked, {len(report.problems)} problems")
    if report.problems:
        raise typer.Exit(1)
