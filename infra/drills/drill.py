"""Rehearse failures on a real cluster of several nodes on this machine: ``make drill``.

A head without CPUs and worker nodes with a token, an MLflow server with a user (on Postgres where it is installed), and
jobs submitted from outside with ``loomvideo submit``, the wheel shipped. Each drill trains a few steps, breaks
something, and checks how it ends. Results go to a Markdown table and ``drills.json`` in the folder.

    python infra/drills/drill.py --folder /tmp/drill --shards SHARDS [--only worker,head,pause,mlflow]
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import requests
from local_cluster import LocalCluster, free_port

from loomvideo.platform.cluster.mlflow_server import PASSWORD_FILE, USER, Server, prepare_server

REPO = Path(__file__).resolve().parents[2]
PATIENCE_S = 900
STEPS = 40


class DrillError(Exception):
    """A drill that ended otherwise than documented."""


@dataclass
class Rehearsal:
    """The cluster and what its jobs use.

    Attributes:
        folder: Everything is kept here.
        shards: Prepared dataset.
        cluster: Head and workers.
        mlflow: The tracking server's settings.
        server: Its process.
    """

    folder: Path
    shards: Path
    cluster: LocalCluster
    mlflow: Server
    server: subprocess.Popen | None = None
    jobs: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start_mlflow(self) -> None:
        """Start the tracking server and wait for it."""
        with (self.folder / "mlflow.log").open("ab") as log:
            self.server = subprocess.Popen(
                self.mlflow.command,
                env=os.environ | self.mlflow.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_for("mlflow answers", self.mlflow_answers)

    def stop_mlflow(self) -> None:
        """Kill the tracking server."""
        if self.server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
            self.server = None

    def mlflow_answers(self) -> bool:
        """Whether the tracking server is up."""
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.mlflow.url}/health", timeout=5).status_code == 200
        return False

    def profile(self) -> Path:
        """The profile that outside commands use."""
        path = self.folder / "profile.yaml"
        path.write_text(
            f"name: drill\nimage: none\naccess: {{address: '{self.cluster.address}'}}\n"
            f"storage: {{mount: '{self.folder}'}}\ntracking: {{uri: '{self.mlflow.url}'}}\n"
            "groups: [{name: w, jobs: [data, pretrain, finetune-edit, evaluate]}]\n"
        )
        return path

    def submit(self, job: str, run: str, *arguments: str) -> None:
        """Submit from outside; the log goes to ``RUN.log``."""
        command = [sys.executable, "-m", "loomvideo.jobs.cli", "submit", "--cluster", str(self.profile()), "--run", run]
        with (self.folder / f"{run}.log").open("ab") as log:
            self.jobs[run] = subprocess.Popen(
                [*command, job, "--", *arguments], cwd=REPO, env=self.cluster.variables(), stdout=log, stderr=log
            )

    def train(self, run: str, *arguments: str) -> None:
        """Submit a short training run on one worker that checkpoints often."""
        self.submit(
            "pretrain",
            run,
            *(f"data.shards=[{self.shards}]", f"training.steps={STEPS}", "training.workers.num=1"),
            *("training.checkpoint.every_steps=5", "training.log_every=1", "evaluation.samples=", "doctor=false"),
            *arguments,
        )

    def steps(self, run: str) -> list[int]:
        """Steps a run has recorded."""
        path = self.folder / "runs" / "pretrain" / run / "steps.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text().splitlines()
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def wait_for_step(self, run: str, step: int) -> None:
        """Wait until a run has passed a step."""
        self.wait_for(f"{run} at step {step}", lambda: max(self.steps(run), default=0) >= step, run)

    def wait_for(self, what: str, ready: Callable[[], bool], run: str | None = None) -> None:
        """Wait for a condition; a job that ends early is an error."""
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            if run and self.jobs[run].poll() is not None:
                raise DrillError(f"{what}: the job ended with {self.jobs[run].returncode}: {self.tail(run)}")
            if time.monotonic() > deadline:
                raise DrillError(f"{what}: not within {PATIENCE_S} s")
            time.sleep(0.5)

    def finish(self, run: str) -> int:
        """The exit code that the submitting person sees."""
        try:
            return self.jobs.pop(run).wait(PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise DrillError(f"{run}: not finished within {PATIENCE_S} s: {self.tail(run)}") from error

    def tail(self, run: str) -> str:
        """The end of a job's log in one line."""
        return " / ".join((self.folder / f"{run}.log").read_text().splitlines()[-4:])

    def check_complete(self, run: str) -> str:
        """Every step was recorded once, and the last checkpoint is the last step's."""
        steps = self.steps(run)
        if steps != list(range(1, STEPS + 1)):
            raise DrillError(f"{run}: recorded steps {steps}")
        result = json.loads((self.folder / "runs" / "pretrain" / run / "result.json").read_text())
        if result["steps"] != STEPS:
            raise DrillError(f"{run}: result says {result['steps']} steps")
        return f"{STEPS} steps, each recorded once"

    def tracked_steps(self, run: str) -> int:
        """Number of loss values MLflow has of a run."""
        known = json.loads((self.folder / "runs" / "pretrain" / run / "mlflow.json").read_text())
        answer = requests.get(
            f"{self.mlflow.url}/api/2.0/mlflow/metrics/get-history",
            params={"run_id": known["run_id"], "metric_key": "train/loss", "max_results": "1000"},
            auth=(USER, (self.mlflow.folder / PASSWORD_FILE).read_text()),
            timeout=30,
        )
        answer.raise_for_status()
        return len({metric["step"] for metric in answer.json().get("metrics", [])})


def drill_refusals(rehearsal: Rehearsal) -> str:
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


def drill_worker(rehearsal: Rehearsal) -> str:
    """A worker node dies during training: training goes on by itself on another node."""
    run = "worker-killed"
    rehearsal.train(run)
    rehearsal.wait_for_step(run, 12)
    rehearsal.cluster.start_worker("spare", num_cpus=2)
    rehearsal.cluster.kill("worker")
    code = rehearsal.finish(run)
    rehearsal.cluster.start_worker("worker", num_cpus=2)
    rehearsal.cluster.kill("spare")
    _expect(code, 0, rehearsal, run)
    return rehearsal.check_complete(run)


def drill_head(rehearsal: Rehearsal) -> str:
    """The head dies: the submitter says so (exit code 3), the same submit on a new head continues the run."""
    run = "head-killed"
    rehearsal.train(run)
    rehearsal.wait_for_step(run, 12)
    rehearsal.cluster.kill("head")
    rehearsal.cluster.kill("worker")
    rehearsal.cluster.start_head(num_cpus=0)
    rehearsal.cluster.start_worker("worker", num_cpus=2)
    _expect(rehearsal.finish(run), 3, rehearsal, run)
    before = max(rehearsal.steps(run))
    rehearsal.train(run)
    _expect(rehearsal.finish(run), 0, rehearsal, run)
    if "continuing at step" not in (rehearsal.folder / f"{run}.log").read_text():
        raise DrillError(f"{run}: started anew instead of continuing")
    return f"exit code 3, then continued after step {before}: {rehearsal.check_complete(run)}"


def drill_pause(rehearsal: Rehearsal) -> str:
    """A node is cut off for 30 s: training waits or restarts from a checkpoint, and ends complete."""
    run = "node-cut-off"
    rehearsal.train(run)
    rehearsal.wait_for_step(run, 12)
    rehearsal.cluster.pause("worker")
    time.sleep(30)
    rehearsal.cluster.go_on("worker")
    code = rehearsal.finish(run)
    if rehearsal.cluster.processes["worker"].poll() is not None:
        rehearsal.cluster.processes.pop("worker")
        rehearsal.cluster.start_worker("worker", num_cpus=2)
    _expect(code, 0, rehearsal, run)
    return rehearsal.check_complete(run)


def drill_mlflow(rehearsal: Rehearsal) -> str:
    """MLflow is away for a minute: training goes on, and its metrics arrive later."""
    run = "mlflow-away"
    rehearsal.train(run, f"training.steps={STEPS}")
    rehearsal.wait_for_step(run, 5)
    rehearsal.stop_mlflow()
    at = max(rehearsal.steps(run))
    time.sleep(60)
    during = max(rehearsal.steps(run)) - at
    rehearsal.start_mlflow()
    _expect(rehearsal.finish(run), 0, rehearsal, run)
    if during == 0 and at < STEPS:
        raise DrillError(f"{run}: no step while MLflow was away")
    arrived = rehearsal.tracked_steps(run)
    if arrived != STEPS:
        raise DrillError(f"{run}: MLflow has {arrived} of {STEPS} losses")
    return f"{during} steps meanwhile, all {arrived} losses arrived; {rehearsal.check_complete(run)}"


def drill_secrets(rehearsal: Rehearsal) -> str:
    """The token and MLflow's password are in no log, run folder or shipped file."""
    secrets = [rehearsal.cluster.token.encode(), (rehearsal.mlflow.folder / PASSWORD_FILE).read_bytes()]
    places = [rehearsal.folder, rehearsal.cluster.folder / "t" / "session_latest" / "logs", REPO / "build" / "submit"]
    files = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    # The server's own folder is private and is where they are kept.
    files = [path for path in files if rehearsal.mlflow.folder not in path.parents]
    leaks = [str(path) for path in files if any(secret in path.read_bytes() for secret in secrets)]
    if leaks:
        raise DrillError(f"found in {', '.join(leaks[:5])}")
    return f"{len(files)} files searched"


def _expect(code: int, expected: int, rehearsal: Rehearsal, run: str) -> None:
    if code != expected:
        raise DrillError(f"{run}: exit code {code}, expected {expected}: {rehearsal.tail(run)}")


DRILLS = {
    "refusals": drill_refusals,
    "mlflow": drill_mlflow,
    "worker": drill_worker,
    "pause": drill_pause,
    "head": drill_head,
    "secrets": drill_secrets,
}


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str | None]:
    """A Postgres of our own, or None where Debian's postgresql is not installed."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        yield None
        return
    port = free_port()
    data = folder / "postgres"
    # Postgres refuses to run as root.
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    data.mkdir()
    if as_user:
        shutil.chown(data, "postgres")
    subprocess.run([*as_user, binaries[-1] / "initdb", "-D", data, "-A", "trust"], check=True, capture_output=True)
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1"
    control = [*as_user, binaries[-1] / "pg_ctl", "-D", data]
    subprocess.run([*control, "-o", options, "-l", data / "log", "-w", "start"], check=True, capture_output=True)
    try:
        user = "postgres" if as_user else os.environ["USER"]
        yield f"postgresql+psycopg2://{user}@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "fast", "stop"], check=True, capture_output=True)


@contextlib.contextmanager
def rehearsal(folder: Path, shards: Path) -> Iterator[Rehearsal]:
    """Bring everything up, and down again."""
    # Ray's sockets need a short path, Postgres one that its own user may enter.
    with tempfile.TemporaryDirectory(prefix="lv") as short, tempfile.TemporaryDirectory(prefix="lvpg") as open_folder:
        Path(open_folder).chmod(0o755)
        with postgres(Path(open_folder)) as database:
            if database:
                os.environ["MLFLOW_BACKEND_STORE_URI"] = database
            mlflow = prepare_server(folder / "mlflow", port=free_port())
            credentials = {
                "MLFLOW_TRACKING_USERNAME": USER,
                "MLFLOW_TRACKING_PASSWORD": (mlflow.folder / PASSWORD_FILE).read_text(),
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            }
            cluster = LocalCluster(Path(short), environment=credentials)
            current = Rehearsal(folder, shards, cluster, mlflow)
            try:
                current.start_mlflow()
                cluster.start_head(num_cpus=0)
                cluster.start_worker("worker", num_cpus=2)
                yield current
            finally:
                for job in current.jobs.values():
                    job.kill()
                cluster.stop()
                current.stop_mlflow()
                logs = cluster.folder / "t" / "session_latest" / "logs"
                if logs.is_dir():
                    shutil.copytree(logs, folder / "ray-logs", dirs_exist_ok=True)


def main() -> int:
    """Run the drills; exit code 1 when one ended otherwise than documented."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for runs, logs and results")
    parser.add_argument("--shards", type=Path, required=True, help="dataset made by loomvideo data prepare")
    parser.add_argument("--only", default=",".join(DRILLS), help=f"of {', '.join(DRILLS)}")
    options = parser.parse_args()
    # Both ways of being stopped take everything down again.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    options.folder.mkdir(parents=True)
    results = []
    with rehearsal(options.folder.absolute(), options.shards.absolute()) as current:
        for name in options.only.split(","):
            started = time.monotonic()
            try:
                outcome, passed = DRILLS[name](current), True
            except (DrillError, TimeoutError) as error:
                outcome, passed = str(error), False
            seconds = time.monotonic() - started
            what = DRILLS[name].__doc__.strip()
            results.append({"drill": name, "what": what, "passed": passed, "seconds": seconds, "outcome": outcome})
            print(f"| {name} | {what} | {'yes' if passed else 'NO'} | {seconds:.0f} | {outcome} |", flush=True)
    (options.folder / "drills.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
