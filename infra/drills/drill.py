"""Rehearse daily work and failures on a cluster of several nodes on this machine: ``make rehearse``, ``make drill``.

A head without CPUs and two worker nodes with a token, as root each in a network of its own; their environment has our
dependencies and not our code, which every job ships. MLflow asks for a user and keeps its records in Postgres where
that is installed; an S3 emulator stands for the object store. Jobs are submitted from outside with
``loomvideo submit``. Each drill runs a short job, breaks something, and checks how it ends. Results go to
``drills.json`` and ``drills.md`` in the folder; a second call with the same folder keeps what is there.

    python infra/drills/drill.py --folder /tmp/drill --sample data/sample [--only worker,head]
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from daily_jobs import JOBS, job_data, job_secrets, prepare_job, shard_sums
from faulty_store import BUCKET
from rehearsal import STEPS, WORKERS, DrillError, Rehearsal, rehearsal

CUT_S = 30
OUTAGE_S = 15
LONG_STEPS = 300
ERROR_RATE = 0.2


def drill_data_worker(rehearsal: Rehearsal) -> str:
    """A worker node dies while it builds shards; another takes its place: the same bytes as without the loss."""
    run = "data-worker-killed"
    output = rehearsal.folder / run
    rehearsal.forget(run, output)
    prepare_job(rehearsal, run, str(output))
    records = output / "work" / "records"
    rehearsal.wait_for("three shards are there", lambda: len(list(records.glob("*"))) >= 3, run)
    rehearsal.cluster.kill(WORKERS[1])
    before = len(list(records.glob("*")))
    rehearsal.cluster.start_worker(WORKERS[1])
    rehearsal.finish(run)
    return f"killed after {before} shards; {_same_shards(rehearsal, (output / 'manifest.json').read_text())}"


def drill_store(rehearsal: Rehearsal) -> str:
    """The object store fails: every fifth request, and all of them for a while; data and training end as without."""
    store = rehearsal.store
    run = "store-errors"
    rehearsal.forget(run)
    store.error_rate = ERROR_RATE
    prepare_job(rehearsal, run, f"s3://{BUCKET}/{run}")
    try:
        rehearsal.wait_for("three shards are there", lambda: store.count(f"{run}/work/records") >= 3, run)
        store.error_rate = 1.0
        time.sleep(OUTAGE_S)
        store.error_rate = ERROR_RATE
        rehearsal.finish(run)
        data = f"{store.errors} of {store.requests} requests failed"
        outcome = _same_shards(rehearsal, store.read(f"{run}/manifest.json"))
        before = store.errors
        rehearsal.train_quickly(run, f"data.shards=[s3://{BUCKET}/{run}]")
        rehearsal.finish(run)
    finally:
        store.error_rate = 0.0
    return f"{data}; {outcome}; training met {store.errors - before} errors: {rehearsal.check_complete(run)}"


def drill_worker(rehearsal: Rehearsal) -> str:
    """A worker node dies during training, another takes its place: training goes on by itself."""
    run = "worker-killed"
    rehearsal.forget(run)
    rehearsal.train_quickly(run)
    rehearsal.wait_for_step(run, 8)
    rehearsal.cluster.kill(WORKERS[1])
    rehearsal.cluster.start_worker(WORKERS[1])
    rehearsal.finish(run)
    if "continuing at step" not in rehearsal.log(run):
        raise DrillError(f"{run}: did not continue from a checkpoint")
    return rehearsal.check_complete(run)


def drill_cut(rehearsal: Rehearsal) -> str:
    """A node is cut off for 30 s: training waits, or goes on from a checkpoint, and ends complete."""
    run = "node-cut-off"
    rehearsal.forget(run)
    rehearsal.train_quickly(run)
    rehearsal.wait_for_step(run, 8)
    rehearsal.cluster.pause(WORKERS[1])
    time.sleep(CUT_S)
    rehearsal.cluster.go_on(WORKERS[1])
    with contextlib.suppress(subprocess.TimeoutExpired):
        # A node that was given up ends itself; on Kubernetes its pod is then replaced.
        rehearsal.cluster.processes[WORKERS[1]].wait(30)
        rehearsal.cluster.processes.pop(WORKERS[1])
        rehearsal.cluster.start_worker(WORKERS[1])
    rehearsal.finish(run)
    how = "went on from a checkpoint" if "continuing at step" in rehearsal.log(run) else "waited"
    return f"{how}; {rehearsal.check_complete(run)}"


def drill_head(rehearsal: Rehearsal) -> str:
    """The head dies: the submitter says so (exit code 3), the same submit on a new head continues the run."""
    run = "head-killed"
    rehearsal.forget(run)
    rehearsal.train_quickly(run)
    rehearsal.wait_for_step(run, 8)
    for name in (*WORKERS, "head"):
        rehearsal.cluster.kill(name)
    rehearsal.start_nodes()
    rehearsal.finish(run, expected=3)
    before = max(rehearsal.steps(run))
    rehearsal.train_quickly(run)
    rehearsal.finish(run)
    if "continuing at step" not in rehearsal.log(run):
        raise DrillError(f"{run}: started anew instead of continuing")
    return f"exit code 3, then continued after step {before}: {rehearsal.check_complete(run)}"


def drill_mlflow(rehearsal: Rehearsal) -> str:
    """MLflow is away for a minute: training goes on, and its metrics arrive later."""
    run = "mlflow-away"
    rehearsal.forget(run)
    rehearsal.train_quickly(run, "training.checkpoint.every_steps=100", steps=LONG_STEPS)
    rehearsal.wait_for_step(run, 5)
    rehearsal.stop_mlflow()
    at = max(rehearsal.steps(run))
    time.sleep(60)
    during = max(rehearsal.steps(run)) - at
    rehearsal.start_mlflow()
    rehearsal.finish(run)
    if during == 0:
        raise DrillError(f"{run}: no step while MLflow was away")
    arrived = rehearsal.tracked_steps(run)
    if arrived != LONG_STEPS:
        raise DrillError(f"{run}: MLflow has {arrived} of {LONG_STEPS} losses")
    return f"{during} steps meanwhile, all {arrived} losses arrived; {rehearsal.check_complete(run, LONG_STEPS)}"


def drill_disk(rehearsal: Rehearsal) -> str:
    """The disk of the runs is full for a while: training says so and goes on; the next checkpoint is written."""
    run = "disk-full"
    rehearsal.forget(run)
    disk = rehearsal.small_disk
    if disk is None:
        raise DrillError("needs root, to mount a small disk")
    rehearsal.train_quickly(run, f"runs={disk}")
    folder = disk / "pretrain" / run
    rehearsal.wait_for("a first checkpoint is there", (folder / "checkpoints" / "step-00000005").is_dir, run)
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))
    rehearsal.wait_for_words(run, "was not written")
    filler.unlink()
    rehearsal.finish(run)
    failed = rehearsal.log(run).count("was not written")
    result = json.loads((folder / "result.json").read_text())
    recorded = [json.loads(line)["step"] for line in (folder / "steps.jsonl").read_text().splitlines()]
    if result["steps"] != STEPS or recorded != list(range(1, STEPS + 1)):
        raise DrillError(f"{run}: result says {result['steps']} steps, recorded {recorded}")
    return f"{failed} times a write failed and was reported; {STEPS} steps, each recorded once"


def _same_shards(rehearsal: Rehearsal, manifest: str) -> str:
    """The shards of a dataset must be those of the undisturbed data job."""
    found, expected = shard_sums(manifest), shard_sums((rehearsal.shards / "manifest.json").read_text())
    if found != expected:
        differ = [name for name in expected if found.get(name) != expected[name]]
        raise DrillError(f"{len(differ)} of {len(expected)} shards differ: {', '.join(differ[:5])}")
    return f"all {len(found)} shards byte for byte as without"


DRILLS = {
    "data-worker": drill_data_worker,
    "worker": drill_worker,
    "cut": drill_cut,
    "head": drill_head,
    "mlflow": drill_mlflow,
    "disk": drill_disk,
    "store": drill_store,
}
# Secrets are looked for last, when there is most to look through.
ALL = JOBS | DRILLS | {"secrets": job_secrets}


def run_drills(current: Rehearsal, names: list[str]) -> Iterator[dict]:
    """Run drills one after another and yield their results."""
    for name in names:
        started = time.monotonic()
        try:
            outcome, passed = ALL[name](current), True
        except (DrillError, TimeoutError, OSError, requests.RequestException) as error:
            outcome, passed = f"{type(error).__name__}: {error}", False
        seconds = time.monotonic() - started
        what = ALL[name].__doc__.strip()
        yield {"drill": name, "what": what, "passed": passed, "seconds": seconds, "outcome": outcome}


def keep(folder: Path, result: dict) -> None:
    """Add a result to those of the folder, as JSON and as a table."""
    path = folder / "drills.json"
    known = {entry["drill"]: entry for entry in json.loads(path.read_text())} if path.is_file() else {}
    known[result["drill"]] = result
    ordered = [known[name] for name in ALL if name in known]
    path.write_text(json.dumps(ordered, indent=2) + "\n")
    lines = ["| drill | what must happen | passed | seconds | what happened |", "|---|---|---|---|---|"]
    (folder / "drills.md").write_text("\n".join([*lines, *map(row, ordered)]) + "\n")


def row(result: dict) -> str:
    """A line of the table."""
    passed = "yes" if result["passed"] else "NO"
    return f"| {result['drill']} | {result['what']} | {passed} | {result['seconds']:.0f} | {result['outcome']} |"


def main() -> int:
    """Run the drills; exit code 1 when one ended otherwise than documented."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for runs, logs and results")
    parser.add_argument("--sample", type=Path, required=True, help="dataset made by loomvideo data sample")
    parser.add_argument("--only", default=",".join(ALL), help=f"of {', '.join(ALL)}, or jobs for the jobs alone")
    options = parser.parse_args()
    # Both ways of being stopped take everything down again.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    names = [*JOBS, "secrets"] if options.only == "jobs" else options.only.split(",")
    unknown = [name for name in names if name not in ALL]
    if unknown:
        parser.error(f"--only: no drill {', '.join(unknown)}; there are {', '.join(ALL)}")
    passed = True
    with rehearsal(folder, options.sample.absolute()) as current:
        if not (current.shards / "manifest.json").is_file() and "data" not in names:
            print(f"made shards for the drills: {job_data(current)}", flush=True)
        for result in run_drills(current, names):
            print(row(result), flush=True)
            keep(folder, result)
            passed = passed and result["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
