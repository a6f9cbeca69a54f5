"""Failures that are made on purpose, and what must come of each."""

import contextlib
import subprocess
import sys
import time

from daily_jobs import prepare_job, shard_sums
from faulty_store import BUCKET
from rehearsal import REPO, WORKERS, DrillError, Rehearsal

RUN = "ordeal"
ENDLESS = 20_000
# Enough to be sure that a run goes on.
SOME_STEPS = 8
CUT_S = 30
MLFLOW_AWAY_S = 60
OUTAGE_S = 15
ERROR_RATE = 0.2
LOST_NODE = WORKERS[1]


def fail_data_worker(rehearsal: Rehearsal) -> str:
    """A worker node dies while it builds shards; another takes its place: the same bytes as without the loss."""
    run = "data-worker-killed"
    output = rehearsal.folder / run
    rehearsal.forget(run, output)
    prepare_job(rehearsal, run, str(output))
    records = output / "work" / "records"
    rehearsal.wait_for("three shards are there", lambda: len(list(records.glob("*"))) >= 3, run)
    rehearsal.cluster.kill(LOST_NODE)
    before = len(list(records.glob("*")))
    rehearsal.cluster.start_worker(LOST_NODE)
    rehearsal.finish(run)
    return f"killed after {before} shards; {_same_shards(rehearsal, (output / 'manifest.json').read_text())}"


def fail_data_store(rehearsal: Rehearsal) -> str:
    """The object store answers every fifth request with 500, and for 15 s all: data ends with the same bytes."""
    store = rehearsal.store
    run = "data-store-errors"
    rehearsal.forget(run)
    errors, requests = store.errors, store.requests
    store.error_rate = ERROR_RATE
    prepare_job(rehearsal, run, f"s3://{BUCKET}/{run}")
    try:
        rehearsal.wait_for("three shards are there", lambda: store.count(f"{run}/work/records") >= 3, run)
        store.error_rate = 1.0
        time.sleep(OUTAGE_S)
        store.error_rate = ERROR_RATE
        rehearsal.finish(run)
    finally:
        store.error_rate = 0.0
    same = _same_shards(rehearsal, store.read(f"{run}/manifest.json"))
    return f"{store.errors - errors} of {store.requests - requests} requests failed; {same}"


def fail_worker(rehearsal: Rehearsal) -> str:
    """A worker node dies during training, another takes its place: training goes on by itself from a checkpoint."""
    at, starts = _running(rehearsal), _num_continued(rehearsal)
    rehearsal.cluster.kill(LOST_NODE)
    rehearsal.cluster.start_worker(LOST_NODE)
    rehearsal.wait_for_words(RUN, "continuing at step", starts + 1)
    return f"killed at step {at}, {_continued(rehearsal)}; {_goes_on(rehearsal)}"


def fail_network(rehearsal: Rehearsal) -> str:
    """A node is cut off for 30 s: training waits, or goes on from a checkpoint."""
    at, starts = _running(rehearsal), _num_continued(rehearsal)
    rehearsal.cluster.pause(LOST_NODE)
    time.sleep(CUT_S)
    rehearsal.cluster.go_on(LOST_NODE)
    goal, given_up = max(rehearsal.steps(RUN)) + SOME_STEPS, False

    def goes_on() -> bool:
        nonlocal given_up
        if not given_up and rehearsal.cluster.num_alive() < 1 + len(WORKERS):
            # Its Ray ends by itself as soon as it hears so; on Kubernetes its pod is then started anew.
            rehearsal.cluster.kill(LOST_NODE)
            rehearsal.cluster.start_worker(LOST_NODE)
            given_up = True
        return max(rehearsal.steps(RUN)) >= goal

    rehearsal.wait_for(f"{RUN} at step {goal}", goes_on, RUN)
    steps = rehearsal.check_steps(RUN)
    how = "waited and went on"
    if _num_continued(rehearsal) > starts:
        how = f"the head gave the node up, {_continued(rehearsal)}" if given_up else _continued(rehearsal)
    return f"cut off at step {at}, {how}; {steps}"


def fail_mlflow(rehearsal: Rehearsal) -> str:
    """MLflow is away for a minute: training goes on, and its metrics arrive later."""
    at = _running(rehearsal)
    rehearsal.stop_mlflow()
    time.sleep(MLFLOW_AWAY_S)
    until = max(rehearsal.steps(RUN))
    rehearsal.start_mlflow()
    if until == at:
        raise DrillError(f"{RUN}: no step while MLflow was away")
    rehearsal.wait_for(f"MLflow has {until} losses", lambda: rehearsal.tracked_steps(RUN) >= until, RUN)
    return f"{until - at} steps meanwhile; MLflow has the losses of all {rehearsal.tracked_steps(RUN)} steps"


def fail_disk(rehearsal: Rehearsal) -> str:
    """The disk of the runs is full: training says so and goes on; with room again the next checkpoint is written."""
    if rehearsal.small_disk is None:
        raise DrillError("needs root, to mount a small disk")
    at = _running(rehearsal)
    filler = rehearsal.small_disk / "filler"
    said = rehearsal.log(RUN).count("was not written")
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))
    try:
        rehearsal.wait_for_words(RUN, "was not written", said + 1)
        before = _checkpoints(rehearsal)[-1]
    finally:
        filler.unlink()
    rehearsal.wait_for("a newer checkpoint is there", lambda: _checkpoints(rehearsal)[-1] > before, RUN)
    newest = _checkpoints(rehearsal)[-1]
    return f"full at step {at}, last checkpoint before {before}, next after {newest}; {_goes_on(rehearsal)}"


def fail_store(rehearsal: Rehearsal) -> str:
    """The object store that training reads from answers every fifth request with 500, and for 15 s all."""
    store = rehearsal.store
    at, errors = _running(rehearsal), store.errors
    store.error_rate = ERROR_RATE
    try:
        rehearsal.wait_for_step(RUN, at + SOME_STEPS)
        store.error_rate = 1.0
        time.sleep(OUTAGE_S)
        store.error_rate = ERROR_RATE
        goes_on = _goes_on(rehearsal)
    finally:
        store.error_rate = 0.0
    return f"{store.errors - errors} requests failed; {goes_on}"


def fail_head(rehearsal: Rehearsal) -> str:
    """The head dies: the submitter says so (exit code 3), the same submit on a new head continues the run."""
    _running(rehearsal)
    for name in (*WORKERS, "head"):
        rehearsal.cluster.kill(name)
    rehearsal.start_nodes()
    rehearsal.finish(RUN, expected=3)
    before, starts = max(rehearsal.steps(RUN)), _num_continued(rehearsal)
    _running(rehearsal)
    if _num_continued(rehearsal) == starts:
        raise DrillError(f"{RUN}: started anew instead of continuing")
    return f"exit code 3 at step {before}, {_continued(rehearsal)}; {_goes_on(rehearsal)}"


def fail_stop(rehearsal: Rehearsal) -> str:
    """`jobs stop` ends a run with a checkpoint of its last step; whoever follows it sees exit code 130."""
    _running(rehearsal)
    loomvideo = [sys.executable, "-m", "loomvideo.jobs.cli", "jobs"]
    where = {"cwd": REPO, "env": rehearsal.cluster.variables(), "capture_output": True, "text": True, "check": True}
    cluster = ["--cluster", str(rehearsal.profile())]
    subprocess.run([*loomvideo, "stop", RUN, *cluster], **where)
    rehearsal.finish(RUN, expected=130)
    listed = subprocess.run([*loomvideo, "ls", *cluster], **where).stdout
    state = [line.split()[3] for line in listed.splitlines() if f" {RUN} " in line][-1]
    last, newest = max(rehearsal.steps(RUN)), _checkpoints(rehearsal)[-1]
    if newest != last or state != "STOPPED":
        raise DrillError(f"{RUN}: {state} after step {last} with the checkpoint of step {newest}")
    return f"{state} at step {last} with its checkpoint; {rehearsal.check_steps(RUN)}"


def _running(rehearsal: Rehearsal) -> int:
    """The newest step of a run that goes through all failures; started or continued when it does not run.

    It reads from the object store and writes to the small disk.
    """
    if RUN not in rehearsal.places:
        rehearsal.places[RUN] = rehearsal.small_disk or rehearsal.folder / "runs"
        rehearsal.forget(RUN)
        rehearsal.store.files.put(f"{rehearsal.shards}/", f"{BUCKET}/shards/", recursive=True)
    job = rehearsal.jobs.get(RUN)
    if job is None or job.poll() is not None:
        before = max(rehearsal.steps(RUN), default=0)
        plain = ("evaluation.samples=", "doctor=false", "kernels.backend=eager", f"runs={rehearsal.places[RUN]}")
        rehearsal.train(RUN, f"s3://{BUCKET}/shards", ENDLESS, *plain)
        rehearsal.wait_for_step(RUN, before + SOME_STEPS + 2)
    return max(rehearsal.steps(RUN))


def _goes_on(rehearsal: Rehearsal) -> str:
    """Wait for some more steps."""
    rehearsal.wait_for_step(RUN, max(rehearsal.steps(RUN)) + SOME_STEPS)
    return rehearsal.check_steps(RUN)


def _num_continued(rehearsal: Rehearsal) -> int:
    return rehearsal.log(RUN).count("continuing at step")


def _continued(rehearsal: Rehearsal) -> str:
    step = rehearsal.log(RUN).rpartition("continuing at ")[2].partition(":")[0]
    return f"continued at {step}"


def _checkpoints(rehearsal: Rehearsal) -> list[int]:
    """Steps of the run's checkpoints."""
    folder = rehearsal.run_folder(RUN) / "checkpoints"
    return sorted(
        int(path.name.removeprefix("step-"))
        for path in folder.glob("step-????????")
        if (path / "manifest.json").is_file()
    )


def _same_shards(rehearsal: Rehearsal, manifest: str) -> str:
    """The shards of a dataset must be those of the undisturbed data job."""
    found, expected = shard_sums(manifest), shard_sums((rehearsal.shards / "manifest.json").read_text())
    if found != expected:
        differ = [name for name in expected if found.get(name) != expected[name]]
        raise DrillError(f"{len(differ)} of {len(expected)} shards differ: {', '.join(differ[:5])}")
    return f"all {len(found)} shards byte for byte as without"


FAILURES = {
    "data-worker": fail_data_worker,
    "data-store": fail_data_store,
    "worker": fail_worker,
    "network": fail_network,
    "mlflow": fail_mlflow,
    "disk": fail_disk,
    "store": fail_store,
    "head": fail_head,
    "stop": fail_stop,
}
