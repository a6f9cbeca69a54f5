"""Kill `loomvideo data prepare` at random moments and compare the finished dataset with an uninterrupted one's.

    python benchmarks/kill_prepare.py data/sample/samples.jsonl --kills 10 shards.max_samples=8 curate=true

Each round starts the command, waits a random part of the middle half of an uninterrupted run, and sends SIGKILL to the
driver, to one worker (an assessor or a shard builder), or to every process of the run, Ray's included. A killed worker
must not end the run; after the other two the command is started again, with another number of workers. At the end of
every round the SHA-256 of all shards, of the index and of the manifest must equal the uninterrupted run's.
"""

import argparse
import contextlib
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

VICTIMS = ("driver", "worker", "cluster")
WORKERS = ("ShardBuilder", "SampleAssessor")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of everything that is the dataset."""
    files = [*sorted(folder.glob("shards/*.tar")), folder / "index.parquet", folder / "manifest.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def start(arguments: argparse.Namespace, output: Path, builders: int) -> subprocess.Popen:
    """The command as a user starts it."""
    command = [sys.executable, "-m", "loomvideo.jobs.cli", "data", "prepare", f"input={arguments.samples_file}"]
    log = (output.parent / f"{output.name}.log").open("ab")
    command += [f"output={output}", f"workers.count={builders}", *arguments.overrides]
    return subprocess.Popen(command, stdout=log, stderr=log)


def subset(file: Path, folder: Path, count: int) -> Path:
    """Every n-th sample of a file, ``count`` of them, with absolute media paths."""
    lines = file.read_text().splitlines()
    rows = [json.loads(line) for line in lines[:: max(len(lines) // count, 1)][:count]]
    for row in rows:
        for name in ("target", "source"):
            if row.get(name):
                row[name] = str((file.parent / row[name]).absolute())
        row["references"] = [str((file.parent / path).absolute()) for path in row.get("references", [])]
    chosen = folder / "samples.jsonl"
    chosen.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return chosen


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and everything it started."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def kill(process: subprocess.Popen, victim: str, generator: random.Random) -> str:
    """SIGKILL the victim; returns what was hit."""
    if victim == "worker":
        return kill_worker(process, generator)
    members = family(process)[: 1 if victim == "driver" else None]
    for member in members:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return f"{len(members)} processes"


def kill_worker(process: subprocess.Popen, generator: random.Random) -> str:
    """SIGKILL one assessor or builder, as soon as there is one."""
    while process.poll() is None:
        titles = {}
        for member in family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                # Ray names its processes after the actor in them.
                titles[member] = next((name for name in WORKERS if name in " ".join(member.cmdline())), "")
        workers = [member for member, name in titles.items() if name]
        if workers:
            chosen = generator.choice(workers)
            chosen.send_signal(signal.SIGKILL)
            return titles[chosen]
        time.sleep(0.1)
    return "already finished"


def wait_until_gone(members: list[psutil.Process], limit_s: float = 30.0) -> int:
    """Wait for the processes of a killed run; returns how many still live."""
    until = time.monotonic() + limit_s
    while (left := sum(map(_lives, members))) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def _lives(process: psutil.Process) -> bool:
    try:
        # Where nobody reaps orphans, the dead stay in the table.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Run the rounds and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples_file", type=Path)
    parser.add_argument("overrides", nargs="*", help="more arguments of the command")
    parser.add_argument("--samples", type=int, default=96, help="samples of the file that are taken")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first round, to split a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--builders", type=int, default=2)
    arguments = parser.parse_intermixed_args()
    generator = random.Random(arguments.seed + arguments.first)
    folder = Path(tempfile.mkdtemp(prefix="kill-prepare-"))
    arguments.samples_file = subset(arguments.samples_file, folder, arguments.samples)
    began = time.perf_counter()
    if start(arguments, folder / "whole", arguments.builders).wait():
        sys.exit((folder / "whole.log").read_text())
    duration_s = time.perf_counter() - began
    expected = checksums(folder / "whole")
    print(f"uninterrupted: {duration_s:.1f} s, {len(expected)} files")
    failures = 0
    for number in range(arguments.first, arguments.first + arguments.kills):
        output = folder / f"round-{number}"
        victim = VICTIMS[number % len(VICTIMS)]
        process = start(arguments, output, arguments.builders)
        delay_s = generator.uniform(0.25, 0.75) * duration_s
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            members = family(process)
            hit = kill(process, victim, generator)
        else:
            members, hit = [], "already finished"
        left = 0
        if victim != "worker":
            process.wait()
            left = wait_until_gone(members)
        code = process.wait() if victim == "worker" else start(arguments, output, 1 + number % 2).wait()
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
