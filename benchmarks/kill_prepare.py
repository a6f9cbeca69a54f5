"""Kill `loomvideo data prepare` at random moments and compare the finished dataset with an uninterrupted one's.

    python benchmarks/kill_prepare.py data/sample/samples.jsonl --kills 10

Each round starts the command, waits a random part of an uninterrupted run's time, and sends SIGKILL to the driver, to
one shard builder, or to every process of the run, Ray's included. A killed builder must not end the run; after the
other two the command is started again, with another number of builders. At the end of every round the SHA-256 of all
shards, of the index and of the manifest must equal the uninterrupted run's.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

VICTIMS = ("driver", "builder", "cluster")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of everything that is the dataset."""
    files = [*sorted(folder.glob("shards/*.tar")), folder / "index.parquet", folder / "manifest.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def start(samples: str, output: Path, builders: int) -> subprocess.Popen:
    """The command as a user starts it."""
    command = [sys.executable, "-m", "loomvideo.jobs.cli", "data", "prepare", f"input={samples}", f"output={output}"]
    log = (output.parent / f"{output.name}.log").open("ab")
    return subprocess.Popen([*command, f"workers.count={builders}"], stdout=log, stderr=log)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and everything it started."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def kill(process: subprocess.Popen, victim: str, generator: random.Random) -> str:
    """SIGKILL the victim; returns what was hit."""
    members = family(process)
    if victim == "builder":
        members = [p for p in members if p.is_running() and any("ShardBuilder" in part for part in p.cmdline())]
        if not members:
            return "no builder yet"
        members = [generator.choice(members)]
    elif victim == "driver":
        members = members[:1]
    for member in members:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return f"{len(members)} processes"


def wait_until_gone(members: list[psutil.Process], limit_s: float = 30.0) -> int:
    """Wait for the processes of a killed run; returns how many are still there."""
    _, alive = psutil.wait_procs(members, timeout=limit_s)
    return len(alive)


def main() -> None:
    """Run the rounds and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--builders", type=int, default=2)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-prepare-"))
    began = time.perf_counter()
    if start(arguments.samples, folder / "whole", arguments.builders).wait():
        sys.exit((folder / "whole.log").read_text())
    duration_s = time.perf_counter() - began
    expected = checksums(folder / "whole")
    print(f"uninterrupted: {duration_s:.1f} s, {len(expected)} files")
    failures = 0
    for number in range(arguments.kills):
        output = folder / f"round-{number}"
        victim = VICTIMS[number % len(VICTIMS)]
        process = start(arguments.samples, output, arguments.builders)
        delay_s = generator.uniform(0.1, 0.95) * duration_s
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            members = family(process)
            hit = kill(process, victim, generator)
        else:
            members, hit = [], "already finished"
        left = 0
        if victim != "builder":
            process.wait()
            left = wait_until_gone(members)
        code = process.wait() if victim == "builder" else start(arguments.samples, output, 1 + number % 2).wait()
        same = code == 0 and checksums(output) == expected
        failures += not same
        result = {"round": number, "victim": victim, "after_s": round(delay_s, 1), "hit": hit, "left": left}
        print(json.dumps({**result, "exit": code, "identical": same}), flush=True)
        if same:
            shutil.rmtree(output)
    print(f"{arguments.kills - failures} of {arguments.kills} identical")
    shutil.rmtree(folder)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
