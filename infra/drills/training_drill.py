"""Rehearse what training must survive, with the real command at the tiny preset: ``make drill-training``.

Each drill trains 40 steps, breaks something, and checks how it ends: exit code, message, that every step was recorded
once, and how many steps were computed again. Those that lose nothing but time (``worker``, ``hang``, ``driver``,
``notice``, ``disk`` and the rounds of prefer) must end with checkpoints, and rounds of generated results, that are bit
for bit those of an undisturbed run. A full disk is a small tmpfs on the checkpoints folder (needs root).
``elastic`` and ``preemption`` use a Ray cluster of several nodes on this machine. Results: a Markdown table and
``drills.json``.

    python infra/drills/training_drill.py --folder /tmp/drill --shards SHARDS [--only worker,driver]
    python infra/drills/training_drill.py --folder /tmp/drill --shards SHARDS --job distill --weights WEIGHTS
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from local_cluster import LocalCluster
from reward_drill import drill_judge, drill_rewards, drill_rollout, drill_round, drill_round_notice
from training_rehearsal import EVERY, HANG_S, JOBS, NOTICE_S, STEPS, DrillError, Rehearsal, Run

from loomvideo.platform.shards.tensors import HEADER_SIZE_BYTES, parse_header
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder


def drill_worker(rehearsal: Rehearsal) -> str:
    """SIGKILL of one worker."""
    run = rehearsal.train("worker-killed")
    run.wait_for_step(12)
    before = max(run.steps())
    run.workers()[-1].kill()
    run.finish()
    run.check_complete()
    run.check_same(rehearsal.undisturbed)
    again = before - run.continued_at()
    return f"went on by itself from step {run.continued_at()}; {max(again, 0)} steps computed again"


def drill_hang(rehearsal: Rehearsal) -> str:
    """One worker stands still: it answers nothing and does not end."""
    run = rehearsal.train("hang", f"training.guard.hang_s={HANG_S}")
    run.wait_for_step(12)
    still = run.workers()[-1]
    still.suspend()
    stopped = time.monotonic()
    run.wait_for("an end of the hang", lambda: not still.is_running() or still.status() == psutil.STATUS_ZOMBIE)
    ended_s = time.monotonic() - stopped
    run.finish()
    run.check_complete()
    run.check_same(rehearsal.undisturbed)
    stacks = [path for path in (run.path / "logs").glob("hang-rank-*.txt") if "backward" in path.read_text()]
    flights = list((run.path / "logs" / "flight").iterdir())
    if not stacks or not flights:
        raise DrillError(f"left behind: {sorted(path.name for path in (run.path / 'logs').rglob('*'))}")
    return (
        f"after {ended_s:.0f} s both workers were ended ({HANG_S} s without a step are a hang), stacks in "
        f"{stacks[0].name}, collectives in flight/; went on from step {run.continued_at()}"
    )


def drill_driver(rehearsal: Rehearsal) -> str:
    """SIGKILL of the driver, then the same command."""
    run = rehearsal.train("driver-killed")
    run.wait_for_step(12)
    workers, left = run.workers(), psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.process.wait()
    killed = time.monotonic()
    _, alive = psutil.wait_procs(workers, timeout=30)
    ended_s = time.monotonic() - killed
    before = max(run.steps())
    run = rehearsal.train("driver-killed")
    run.finish()
    run.check_complete()
    run.check_same(rehearsal.undisturbed)
    # Ray's agents look for their raylet now and then only.
    alive += psutil.wait_procs(left, timeout=60)[1]
    if alive:
        raise DrillError(f"{len(alive)} processes outlive the driver, first {alive[0]}")
    return f"workers ended after {ended_s:.1f} s; continued from step {run.continued_at()} of {before} recorded"


def drill_notice(rehearsal: Rehearsal) -> str:
    """SIGTERM with 10 s notice, then the same command."""
    run = rehearsal.train("notice")
    run.wait_for_step(12)
    sent, sent_at = time.monotonic(), time.time()
    run.process.send_signal(signal.SIGTERM)
    try:
        code = run.process.wait(NOTICE_S)
    except subprocess.TimeoutExpired:
        os.killpg(run.process.pid, signal.SIGKILL)
        code = run.process.wait()
    ended_s = time.monotonic() - sent
    folder = CheckpointFolder(run.path / "checkpoints")
    newest = folder.newest()
    if newest is None or newest.step != max(run.steps()):
        raise DrillError(f"last recorded step {max(run.steps())}, checkpoint {newest and newest.step}")
    written_s = (Path(newest.url) / "manifest.json").stat().st_mtime - sent_at
    stopped_at = newest.step
    run = rehearsal.train("notice")
    run.finish()
    run.check_complete()
    run.check_same(rehearsal.undisturbed)
    if run.continued_at() != stopped_at:
        raise DrillError(f"stopped at {stopped_at}, continued at {run.continued_at()}")
    ended = f"exit code {code} after {ended_s:.1f} s" if code >= 0 else f"killed after {NOTICE_S:.0f} s"
    return f"checkpoint of step {stopped_at} after {written_s:.1f} s, {ended}; continued there, no step lost"


def drill_disk(rehearsal: Rehearsal) -> str:
    """A full disk while a checkpoint is written."""
    size_mb = sum(f.stat().st_size for f in _a_checkpoint(rehearsal).iterdir()) / 1e6
    folder = rehearsal.run_path("disk-full") / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={int(1.5 * size_mb) + 1}m", "none", folder], check=True)
    try:
        run = rehearsal.train("disk-full")
        run.wait_for("a failed checkpoint", lambda: "was not written" in run.log)
        failed_at = max(run.steps())
        subprocess.run([*mount, "remount,size=2g", "none", folder], check=True)
        run.finish()
        run.check_complete()
        run.check_same(rehearsal.undisturbed)
        checkpoints = CheckpointFolder(folder)
        for step in checkpoints.steps():
            checkpoints.open(step).verify()
        whole = {checkpoints.name_of(step) for step in checkpoints.steps()}
        left = [path.name for path in folder.iterdir() if path.name not in whole]
        if left or STEPS not in checkpoints.steps():
            raise DrillError(f"checkpoints {checkpoints.steps()}, left behind {left}")
        message = next(line for line in run.log.splitlines() if "was not written" in line)
        return f"at step {failed_at}: “{message.strip()}”; with room again: {checkpoints.steps()}, all whole"
    finally:
        subprocess.run(["umount", folder], check=True)


def drill_bit(rehearsal: Rehearsal) -> str:
    """One flipped bit in the newest checkpoint, then the same command with more steps: another round of prefer."""
    source = rehearsal.run_path("worker-killed")
    name = "bit-flipped"
    shutil.copytree(source, source.with_name(name), ignore=shutil.ignore_patterns(".ray", "mlflow.json"))
    folder = CheckpointFolder(source.with_name(name) / "checkpoints")
    file = next(Path(folder.at(STEPS)).glob("rank-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    steps = STEPS + (STEPS // 2 if rehearsal.job == "prefer" else EVERY)
    run = rehearsal.train(name, *rehearsal.length(steps, rounds=3))
    run.finish()
    run.check_complete(steps)
    run.expect("checkpoint passed over", "content differs from the manifest's hash")
    if run.continued_at() != STEPS - EVERY:
        raise DrillError(f"continued at {run.continued_at()}")
    if rehearsal.job == "prefer":
        # The steps of the damaged checkpoint are trained again on their own round.
        run.expect(f"after step {STEPS}: 1 datasets joined")
    return f"the damaged one was named and passed over; continued from step {run.continued_at()}"


def drill_shard(rehearsal: Rehearsal) -> str:
    """A shard that is gone."""
    shards = rehearsal.copy_of_shards("shards-without-one")
    name, _ = rehearsal.drawn_in_step(6)
    (shards / name).unlink()
    run = rehearsal.train("shard-gone", shards=shards)
    run.finish(2)
    message = next(line for line in reversed(run.log.splitlines()) if line.startswith("error:"))
    if name.name not in message or "Traceback" in run.log:
        raise DrillError(f"{name} is not named: {message}")
    return f"after {len(run.steps())} steps, exit code 2: “{message.replace(str(shards), 'SHARDS')}”"


def drill_nan(rehearsal: Rehearsal) -> str:
    """A NaN in one sample's latents."""
    shards = rehearsal.copy_of_shards("shards-with-nan")
    name, row = rehearsal.drawn_in_step(8)
    member = row["members"].index("target")
    start = row["member_offsets"][member]
    content = bytearray((shards / name).read_bytes())
    length = int.from_bytes(content[start : start + HEADER_SIZE_BYTES], "little")
    body = start + HEADER_SIZE_BYTES + length
    for tensor, entry in parse_header(bytes(content[start + HEADER_SIZE_BYTES : body])).items():
        if tensor.startswith("mean."):
            at = body + entry["data_offsets"][0]
            content[at : at + 2] = np.uint16(0x7FC0).tobytes()
    (shards / name).unlink()
    (shards / name).write_bytes(content)
    run = rehearsal.train("nan", shards=shards)
    run.finish()
    run.check_complete()
    skipped = [record["step"] for record in run.records() if not record["updated"]]
    quarantined = json.loads((run.path / "quarantine.json").read_text())
    if list(quarantined) != [row["key"]] or 8 not in skipped:
        raise DrillError(f"quarantined {quarantined}, skipped {skipped}, planted in {row['key']}")
    weights = CheckpointFolder(run.path / "checkpoints").open().weights()
    if not all(weights[name].isfinite().all() for name in weights):
        raise DrillError("weights are not finite")
    return f"step {', '.join(map(str, skipped))} skipped on both workers, {row['key']} named and quarantined"


def drill_elastic(rehearsal: Rehearsal) -> str:
    """A node is lost with workers.min=1: fewer workers, the same packs."""
    with cluster(rehearsal, "one", "two") as (nodes, environment):
        run = rehearsal.train("elastic", "training.workers.min=1", environment=environment)
        run.wait_for_step(12)
        nodes.kill("two")
        run.finish()
    run.check_complete()
    run.expect("2 workers", "1 workers")
    reference = [r["keys_digest"] for r in Run("worker-killed", rehearsal.folder, run.process, rehearsal.job).records()]
    if [record["keys_digest"] for record in run.records()] != reference:
        raise DrillError("other samples than on two workers")
    return f"2 workers to 1 at step {run.continued_at()}; all {STEPS} steps of the same samples as on two workers"


def drill_preemption(rehearsal: Rehearsal) -> str:
    """A node is drained with 25 s notice and then killed, max_failures=0."""
    # A round of prefer must still train when its node is killed.
    steps = 400 if rehearsal.job == "prefer" else 150
    with cluster(rehearsal, "one", "two", "three") as (nodes, environment):
        run = rehearsal.train(
            "preempted", "training.workers.max_failures=0", "training.checkpoint.every_steps=1000",
            *rehearsal.length(steps), environment=environment,
        )  # fmt: skip
        run.wait_for_step(12)
        victim = next(name for name in ("one", "two", "three") if _has_worker(nodes, name))
        before = max(run.steps())
        drain = "from loomvideo.platform.cluster.drain import drain; import ray; ray.init(address='auto', "
        drain += "log_to_driver=False); node = [n for n in ray.nodes() if n['Alive'] and n['Resources'].get"
        drain += f"('{victim}')][0]; drain(node['NodeID'], ray.get_runtime_context().gcs_address, 25)"
        subprocess.run([sys.executable, "-c", drain], env=environment, check=True, capture_output=True)
        drained = time.monotonic()
        run.wait_for("a checkpoint on notice", lambda: bool(CheckpointFolder(run.path / "checkpoints").steps()))
        written_s = time.monotonic() - drained
        saved = CheckpointFolder(run.path / "checkpoints").steps()[-1]
        time.sleep(max(0.0, 25 - written_s))
        nodes.kill(victim)
        run.finish()
    run.check_complete(steps)
    if not saved <= run.continued_at() < (steps // 2 if rehearsal.job == "prefer" else steps):
        raise DrillError(f"saved {saved}, continued at {run.continued_at()}")
    return (
        f"notice after step {before}: checkpoint of step {saved} within {written_s:.1f} s; "
        f"continued from step {run.continued_at()} on another node, not counted as a failure"
    )


def _has_worker(nodes: LocalCluster, name: str) -> bool:
    children = psutil.Process(nodes.processes[name].pid).children(recursive=True)
    return any("RayTrainWorker" in " ".join(process.cmdline()) for process in children if process.is_running())


def _a_checkpoint(rehearsal: Rehearsal) -> Path:
    folder = CheckpointFolder(rehearsal.run_path("worker-killed") / "checkpoints")
    return Path(folder.at(folder.steps()[-1]))


@contextlib.contextmanager
def cluster(rehearsal: Rehearsal, *names: str) -> Iterator[tuple[LocalCluster, dict[str, str]]]:
    """A head without CPUs and nodes of one CPU, each with a resource of its own name."""
    with tempfile.TemporaryDirectory(prefix="lv") as short:
        nodes = LocalCluster(Path(short))
        try:
            nodes.start_head(num_cpus=0)
            for name in names:
                nodes.start_worker(name, 1, resources={name: 1})
            yield (
                nodes,
                nodes.variables()
                | rehearsal.environment
                | {"RAY_ADDRESS": nodes.gcs_address}
                | {
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": nodes.token,
                },
            )
        finally:
            nodes.stop()


DRILLS = {
    "worker": drill_worker,
    "hang": drill_hang,
    "driver": drill_driver,
    "notice": drill_notice,
    "disk": drill_disk,
    "bit": drill_bit,
    "shard": drill_shard,
    "nan": drill_nan,
    "elastic": drill_elastic,
    "preemption": drill_preemption,
    "rewards": drill_rewards,
    "judge": drill_judge,
    "rollout": drill_rollout,
    "round": drill_round,
    "round-notice": drill_round_notice,
}
COMPARED = {"disk", "bit", "elastic"}
"""Drills that need the run of ``worker``."""
OF_JOB = {"shard": "pretrain", "nan": "pretrain"} | dict.fromkeys(
    ("rewards", "judge", "rollout", "round", "round-notice"), "prefer"
)
"""Drills of one job alone: two know the order in which pretrain draws, five break what only prefer has."""


def main() -> int:
    """Run the drills; exit code 1 when one ended otherwise than documented."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for runs, logs and results")
    parser.add_argument("--shards", type=Path, required=True, help="dataset prepared for the tiny preset")
    parser.add_argument("--only", help=f"of {', '.join(DRILLS)}, by default all of the job; disk, bit and elastic "
                        "compare with worker's run, which is made first where the folder has none")  # fmt: skip
    parser.add_argument("--job", choices=list(JOBS), default="pretrain", help="what is broken; shard and nan are of "
                        "pretrain alone, rewards, judge, rollout, round and round-notice of prefer")  # fmt: skip
    parser.add_argument("--weights", type=Path, help="weights folder that distill and prefer start from")
    options = parser.parse_args()
    if options.job != "pretrain" and not options.weights:
        parser.error(
            f"--job {options.job}: name the editor that it starts from, --weights runs/finetune-edit/…/weights"
        )
    # Both ways of being stopped take everything down again.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    options.folder.mkdir(parents=True, exist_ok=True)
    weights = options.weights and options.weights.absolute()
    rehearsal = Rehearsal(options.folder.absolute(), options.shards.absolute(), options.job, weights)
    of_job = [name for name in DRILLS if OF_JOB.get(name, options.job) == options.job]
    names = options.only.split(",") if options.only else of_job
    if not set(names) <= set(of_job):
        parser.error(f"--only {options.only}: --job {options.job} has {', '.join(of_job)}")
    if COMPARED & set(names) and not (rehearsal.run_path("worker-killed") / "result.json").exists():
        names = ["worker", *(name for name in names if name != "worker")]
    results = []
    try:
        for name in names:
            started = time.monotonic()
            try:
                outcome, passed = DRILLS[name](rehearsal), True
            except (DrillError, TimeoutError, subprocess.SubprocessError) as error:
                outcome, passed = str(error), False
            seconds = time.monotonic() - started
            what = DRILLS[name].__doc__.strip()
            results.append({"drill": name, "what": what, "passed": passed, "seconds": seconds, "outcome": outcome})
            print(f"| {what} | {'yes' if passed else 'NO'} | {seconds:.0f} s | {outcome} |", flush=True)
    finally:
        rehearsal.stop()
    (options.folder / "drills.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
