"""The rehearsal of daily work: every job submitted from outside, and what must have come of it."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import requests
from rehearsal import REPO, WORKERS, DrillError, Rehearsal

# Small shards, so that there are many to lose.
PREPARE = ("preset=tiny", "shards.max_samples=4", "limits.max_loss=0")
SHORT_EVALUATION = ("num_edits=2", "num_generated=1", "num_films=1", "steps=2")
JOB_STEPS = 12


def prepare_job(rehearsal: Rehearsal, run: str, output: str, *arguments: str) -> None:
    """Submit a data job."""
    where = (f"input={rehearsal.raw}/samples.jsonl", f"output={output}")
    rehearsal.submit("data", run, *PREPARE, *where, *arguments)


def shard_sums(manifest: str) -> dict[str, str]:
    """SHA-256 by shard of a manifest's text."""
    return {shard["name"]: shard["sha256"] for shard in json.loads(manifest)["shards"]}


def job_data(rehearsal: Rehearsal) -> str:
    """`data`: shards are built on both workers from the shipped wheel."""
    rehearsal.forget("data", rehearsal.shards, rehearsal.run_folder("data", "data-prepare"))
    prepare_job(rehearsal, "data", str(rehearsal.shards))
    rehearsal.finish("data")
    shards = shard_sums((rehearsal.shards / "manifest.json").read_text())
    tracked = rehearsal.tracked("data", "data-prepare")
    if tracked["info"]["status"] != "FINISHED":
        raise DrillError(f"MLflow says the data run is {tracked['info']['status']}")
    return f"{len(shards)} shards; in MLflow FINISHED"


def job_pretrain(rehearsal: Rehearsal) -> str:
    """`pretrain`: nodes are examined, each builds its kernels, a worker on each trains; weights come out."""
    run = "pretrain"
    rehearsal.forget(run)
    for built in rehearsal.cluster.caches.glob("*/cpp-*"):
        shutil.rmtree(built)
    samples = f"evaluation.samples={rehearsal.raw}/samples.jsonl"
    short = (f"evaluation.{value}" for value in SHORT_EVALUATION)
    rehearsal.train(run, str(rehearsal.shards), JOB_STEPS, samples, *short)
    rehearsal.finish(run)
    folder = rehearsal.run_folder(run)
    diagnosis = json.loads((folder / "doctor.json").read_text())
    prepared = [row["host"] for row in json.loads((folder / "kernels.json").read_text()).values()]
    built = sorted(path.parent.name for path in rehearsal.cluster.caches.glob("*/cpp-*"))
    if sorted(prepared) != built or len(built) != 1 + len(WORKERS):
        raise DrillError(f"kernels were prepared on {prepared}, built on {built}")
    if not (folder / "weights").is_dir():
        raise DrillError(f"{folder}: no weights")
    return (
        f"doctor: {len(diagnosis['checks'])} checks in {diagnosis['seconds']:.0f} s; "
        f"kernels built on {', '.join(built)}; "
        f"{rehearsal.check_steps(run)}; MLflow {_status(rehearsal, run, 'pretrain')}"
    )


def job_finetune(rehearsal: Rehearsal) -> str:
    """`finetune-edit`: continues the pretrained weights."""
    run = "finetune"
    rehearsal.forget(run, rehearsal.run_folder(run, "finetune-edit"))
    start = ("evaluation.samples=", "from_run=pretrain/pretrain")
    rehearsal.train(run, str(rehearsal.shards), JOB_STEPS, *start, job="finetune-edit")
    rehearsal.finish(run)
    complete = rehearsal.check_steps(run, "finetune-edit")
    return f"{complete}; MLflow {_status(rehearsal, run, 'finetune-edit')}"


def job_evaluate(rehearsal: Rehearsal) -> str:
    """`evaluate`: the fine-tuned weights on held-out samples, judged."""
    run = "evaluate"
    rehearsal.forget(run, rehearsal.run_folder(run, "evaluate"))
    where = ("checkpoint=finetune-edit/finetune", f"data.sample={rehearsal.sample}")
    rehearsal.submit(
        "evaluate", run, "preset=tiny", *where, "limit=4", "generation.steps=2", "inputs.bucket_classes=[64]"
    )
    rehearsal.finish(run)
    result = json.loads((rehearsal.run_folder(run, "evaluate") / "result.json").read_text())
    if result["status"] != "complete":
        raise DrillError(f"{run}: {result['status']}")
    return f"{result['status']}; MLflow {_status(rehearsal, run, 'evaluate')}"


def job_plain(rehearsal: Rehearsal) -> str:
    """The `ray job submit` line that `--dry-run` prints does the same, by hand."""
    submit = [sys.executable, "-m", "loomvideo.jobs.cli", "submit", "doctor", "--cluster", str(rehearsal.profile())]
    environment = rehearsal.cluster.variables()
    printed = subprocess.run(
        [*submit, "--run", "plain", "--dry-run"], cwd=REPO, env=environment, capture_output=True, text=True, check=True
    )
    line = shlex.split(printed.stdout)
    if line[:3] != ["ray", "job", "submit"]:
        raise DrillError(f"--dry-run printed {printed.stdout}")
    command = [sys.executable, "-m", "ray.scripts.scripts", *line[1:]]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    (rehearsal.folder / "plain.log").write_text(done.stdout + done.stderr)
    if done.returncode != 0 or "succeeded" not in done.stdout:
        raise DrillError(f"exit code {done.returncode}: {rehearsal.tail('plain')}")
    return f"doctor: {next(line for line in done.stdout.splitlines() if 'checks in' in line).strip()}"


def job_refusals(rehearsal: Rehearsal) -> str:
    """Strangers are refused by dashboard, jobs API and MLflow."""
    search = f"{rehearsal.mlflow.url}/api/2.0/mlflow/experiments/search?max_results=1"
    pages = [f"{rehearsal.cluster.address}/api/jobs/", f"{rehearsal.cluster.address}/nodes?view=summary", search]
    seen = []
    for page in pages:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            status = requests.get(page, headers=headers, timeout=30).status_code
            seen.append(status)
            if status not in (401, 403):
                raise DrillError(f"{page} answered {status} to a stranger")
    return f"{len(seen)} requests without or with a wrong token: {sorted(set(seen))}"


def job_secrets(rehearsal: Rehearsal) -> str:
    """The token and MLflow's password are in no log, run folder or shipped file."""
    secrets = [rehearsal.cluster.token.encode(), rehearsal.password().encode()]
    places = [rehearsal.folder, *rehearsal.cluster.network.logs(), REPO / "build" / "submit"]
    files = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    # The server's own folder is private and is where they are kept.
    files = [path for path in files if rehearsal.mlflow.folder not in path.parents]
    leaks = [str(path) for path in files if holds(path, secrets)]
    if leaks:
        raise DrillError(f"found in {', '.join(leaks[:5])}")
    return f"{len(files)} files searched"


def holds(path: Path, secrets: list[bytes]) -> bool:
    """Whether a file has one of the secrets in it."""
    content = path.read_bytes()
    return any(secret in content for secret in secrets)


def _status(rehearsal: Rehearsal, run: str, job: str) -> str:
    status = rehearsal.tracked(run, job)["info"]["status"]
    if status != "FINISHED":
        raise DrillError(f"MLflow says {job} {run} is {status}")
    return status


JOBS = {
    "data": job_data,
    "pretrain": job_pretrain,
    "finetune-edit": job_finetune,
    "evaluate": job_evaluate,
    "plain": job_plain,
    "refusals": job_refusals,
}
