"""Drills of preference tuning alone: what generates and scores breaks, and nothing but time is lost."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from reward_server import REWARD
from training_rehearsal import PATIENCE_S, DrillError, Rehearsal, Run

from loomvideo.pipelines.evaluation.judges.fake import FakeJudgeServer
from loomvideo.platform.machine import patience
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder

PROMPTS, STEPS, OUTAGE_S = 12, 10, 10.0
SAME = "; rounds, scores and all that checkpoints hold bit for bit as in the undisturbed run"


def drill_rewards(rehearsal: Rehearsal) -> str:
    """The reward server is killed in the middle of a round and started again later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (
        f"prefer.rewards.server=http://127.0.0.1:{port}", "prefer.rewards.weights={" + REWARD + ": 1.0}"
    )  # fmt: skip
    server = _serve_rewards(port)
    try:
        whole = _one_round(rehearsal, "rewards-whole", *arguments)
        whole.finish()
        broken = _one_round(rehearsal, "rewards-broken", *arguments)
        broken.wait_for("scored results", lambda: len(_scored(broken)) >= PROMPTS // 4)
        server.kill()
        server.wait()
        time.sleep(1.0)  # what had its answer is written
        before = len(_scored(broken))
        time.sleep(OUTAGE_S)
        after = len(_scored(broken))
        server = _serve_rewards(port)
        broken.finish()
    finally:
        server.kill()
        server.wait()
    if not before == after < PROMPTS:
        raise DrillError(f"{before} prompts scored when the server was killed, {after} before it was back")
    same = _check_same_round(whole, broken)
    return f"{before} of {PROMPTS} prompts scored, none more in {OUTAGE_S:.0f} s without a server; then {same}"


def drill_judge(rehearsal: Rehearsal) -> str:
    """The judge's process is killed in the middle of a round, and its server answers 503 for a while."""
    away = threading.Event()
    server = FakeJudgeServer(lambda call: "503" if away.is_set() else "ok", score="yes")
    with server.running():
        arguments = (
            "judge.kind=openai", "judge.model=m", f"judge.base_url={server.base_url}/v1", "judge.max_attempts=2",
            "prefer.rewards.weights={outside: 1.0, judge: 1.0}",
        )  # fmt: skip
        environment = rehearsal.environment | {"OPENAI_API_KEY": "none"}
        whole = _one_round(rehearsal, "judge-whole", *arguments, environment=environment)
        whole.finish()
        asked = len(server.calls)
        broken = _one_round(rehearsal, "judge-broken", *arguments, environment=environment)
        broken.wait_for("scored results", lambda: len(_scored(broken)) >= PROMPTS // 4)
        away.set()
        broken.processes("JudgeActor")[-1].kill()
        time.sleep(1.0)  # what had its answer is written
        before = len(_scored(broken))
        time.sleep(OUTAGE_S)
        after = len(_scored(broken))
        away.clear()
        broken.finish()
    if not before == after < PROMPTS or not asked:
        raise DrillError(f"{before} prompts judged when the judge was killed, {after} before its server was back")
    same = _check_same_round(whole, broken)
    return f"{before} of {PROMPTS} prompts judged, none more in {OUTAGE_S:.0f} s without an answer; then {same}"


def _one_round(rehearsal: Rehearsal, name: str, *arguments: str, environment: dict[str, str] | None = None) -> Run:
    # One round and one worker: what is broken comes before training.
    return rehearsal.train(
        name, "prefer.nft.rounds=1", f"prefer.nft.steps_per_round={STEPS}", "training.workers.num=1",
        f"prefer.nft.prompts={PROMPTS}", f"training.steps={STEPS}", *arguments, environment=environment,
    )  # fmt: skip


def _check_same_round(whole: Run, broken: Run) -> str:
    for run in (whole, broken):
        run.check_complete(STEPS)
    rounds = [sorted((run.path / "rounds").glob("round-*/index.parquet")) for run in (whole, broken)]
    same_rounds = [path.read_bytes() for path in rounds[0]] == [path.read_bytes() for path in rounds[1]]
    one, other = (CheckpointFolder(run.path / "checkpoints").open().weights() for run in (whole, broken))
    same_weights = set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    if not rounds[0] or not same_rounds or not same_weights:
        raise DrillError(f"without the outage: {len(rounds[0])} rounds equal: {same_rounds}, weights: {same_weights}")
    return f"the round and all {len(one)} trained tensors bit for bit those of a run without the outage"


def drill_rollout(rehearsal: Rehearsal) -> str:
    """SIGKILL of an actor that generates, in the second round."""
    run = rehearsal.train("rollout-killed")
    run.wait_for("results of the second round", lambda: len(_scored(run, 1)) >= 2)
    run.processes("RolloutActor")[-1].kill()
    before = len(_scored(run, 1))
    run.finish()
    run.check_complete()
    run.expect("an actor of round 1 was lost, another takes its place")
    run.check_same(rehearsal.undisturbed)
    return f"after {before} prompts; another actor took its place and made its prompt again{SAME}"


def drill_round(rehearsal: Rehearsal) -> str:
    """SIGKILL of the driver in the middle of a round, then the same command."""
    return _broken_round(rehearsal, "round-killed", signal.SIGKILL)


def drill_round_notice(rehearsal: Rehearsal) -> str:
    """SIGTERM in the middle of a round, then the same command."""
    return _broken_round(rehearsal, "round-notice", signal.SIGTERM)


def _broken_round(rehearsal: Rehearsal, name: str, number: signal.Signals) -> str:
    run = rehearsal.train(name)
    run.wait_for("results of the second round", lambda: len(_scored(run, 1)) >= 2)
    actors, sent = run.processes("RolloutActor"), time.monotonic()
    run.process.send_signal(number)
    code = run.process.wait(patience(PATIENCE_S))
    psutil.wait_procs(actors, timeout=patience(PATIENCE_S))
    ended_s = time.monotonic() - sent
    if code not in (130, -signal.SIGKILL):
        raise DrillError(f"exit code {code}: {run.tail()}")
    kept = {path: path.stat().st_mtime_ns for path in _scored(run, 1)}
    run = rehearsal.train(name)
    run.finish()
    run.check_complete()
    changed = [path.name for path, at in kept.items() if path.stat().st_mtime_ns != at]
    prompts = len(_scored(run, 1))
    if changed or not len(kept) < prompts:
        raise DrillError(f"{len(kept)} prompts were made before and {prompts} after, again: {changed}")
    run.check_same(rehearsal.undisturbed)
    ended = f"exit code {code}, actors gone after {ended_s:.1f} s"
    return f"{ended}; {len(kept)} of {prompts} prompts were kept, the rest made{SAME}"


def _serve_rewards(port: int) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("reward_server.py")), str(port)])
    deadline = time.monotonic() + patience(PATIENCE_S)
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return process
        time.sleep(0.1)
    process.kill()
    raise DrillError(f"the reward server did not start on port {port}")


def _scored(run: Run, number: int = 0) -> list[Path]:
    return list((run.path / "rounds" / f"round-{number:04d}" / "results").glob("*/*.json"))
