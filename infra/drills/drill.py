"""Rehearse daily work and failures on a cluster of several nodes on this machine: ``make rehearse``, ``make drill``.

A head without CPUs and two worker nodes with a token, as root each in a network of its own; their environment has our
dependencies and not our code, which every job ships. MLflow asks for a user and keeps its records in Postgres where
that is installed; an S3 emulator stands for the object store. Jobs are submitted from outside with
``loomvideo submit``. The failures of training happen to one run that goes on through all of them. Results go to
``drills.json`` and ``drills.md`` in the folder; a second call with the same folder keeps what is there.

    python infra/drills/drill.py --folder /tmp/drill --sample data/sample [--only worker,head]
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from daily_jobs import JOBS, job_data, job_secrets
from failures import FAILURES
from rehearsal import DrillError, Rehearsal, rehearsal

# Secrets are looked for last, when there is most to look through.
ALL = JOBS | FAILURES | {"secrets": job_secrets}


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
