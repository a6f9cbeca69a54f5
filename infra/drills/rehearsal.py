"""A cluster to rehearse on: nodes without our code, MLflow with a user (on Postgres where it is installed), storage."""

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
from faulty_store import FaultyStore
from local_cluster import LocalCluster, free_port
from node_network import Loopback, Namespaces, can_make_namespaces

from loomvideo.platform.cluster.mlflow_server import PASSWORD_FILE, USER, Server, prepare_server
from loomvideo.platform.machine import patience

REPO = Path(__file__).resolve().parents[2]
PATIENCE_S = 300
DISK_MIB = 256
WORKERS = ("worker-1", "worker-2")


class DrillError(Exception):
    """A drill that ended otherwise than documented."""


@dataclass
class Rehearsal:
    """The cluster and what its jobs use.

    Attributes:
        folder: Everything is kept here; the jobs' shared storage.
        sample: Raw sample dataset.
        cluster: Head and workers.
        store: Object store.
        small_disk: A small disk of its own, or None where none can be mounted.
        mlflow: The tracking server's settings.
        server: Its process.
        jobs: Running submissions by run name.
        places: Runs folder of runs that are not in ``folder/runs``.
    """

    folder: Path
    sample: Path
    cluster: LocalCluster
    store: FaultyStore
    small_disk: Path | None
    mlflow: Server
    server: subprocess.Popen | None = None
    jobs: dict[str, subprocess.Popen] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)

    @property
    def raw(self) -> Path:
        """A part of the sample dataset with all tasks and both splits: ``samples.jsonl``."""
        folder = self.folder / "raw"
        if not folder.is_dir():
            folder.mkdir()
            (folder / "media").symlink_to(self.sample / "media")
            lines = (self.sample / "samples.jsonl").read_text().splitlines(keepends=True)
            (folder / "samples.jsonl").write_text("".join(lines[::14]))
        return folder

    @property
    def shards(self) -> Path:
        """Where the data job puts its dataset."""
        return self.folder / "shards"

    def password(self) -> str:
        """MLflow's."""
        return (self.mlflow.folder / PASSWORD_FILE).read_text()

    def start_nodes(self) -> None:
        """Start head and workers."""
        self.cluster.start_head(num_cpus=0)
        for name in WORKERS:
            self.cluster.start_worker(name)

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
        subprocess.run(self.mlflow.make_user, env=os.environ | self.mlflow.users, check=True)

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

    def train(self, run: str, shards: str, steps: int, *arguments: str, job: str = "pretrain") -> None:
        """Submit a training run with a worker on each of two nodes that checkpoints often."""
        self.submit(
            job,
            run,
            *("preset=tiny", f"data.shards=[{shards}]", f"training.steps={steps}", "training.workers.num=2"),
            *("training.checkpoint.every_steps=10", "training.log_every=1"),
            *arguments,
        )

    def forget(self, run: str, *folders: Path) -> None:
        """Remove what an earlier time left of a run."""
        (self.folder / f"{run}.log").unlink(missing_ok=True)
        for folder in (self.run_folder(run), *folders):
            shutil.rmtree(folder, ignore_errors=True)

    def run_folder(self, run: str, job: str = "pretrain") -> Path:
        """Where a run keeps what it does."""
        return self.places.get(run, self.folder / "runs") / job / run

    def steps(self, run: str, job: str = "pretrain") -> list[int]:
        """Steps a training run has recorded."""
        path = self.run_folder(run, job) / "steps.jsonl"
        if not path.is_file():
            return []
        return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]

    def wait_for_step(self, run: str, step: int) -> None:
        """Wait until a run has passed a step."""
        self.wait_for(f"{run} at step {step}", lambda: max(self.steps(run), default=0) >= step, run)

    def wait_for_words(self, run: str, words: str, times: int = 1) -> None:
        """Wait until a job's log has said something so many times."""
        self.wait_for(f"{run} says {words!r}", lambda: self.log(run).count(words) >= times, run)

    def wait_for(self, what: str, ready: Callable[[], bool], run: str | None = None) -> None:
        """Wait for a condition; a job that ends early is an error."""
        limit = patience(PATIENCE_S)
        deadline = time.monotonic() + limit
        while not ready():
            if run and self.jobs[run].poll() is not None:
                raise DrillError(f"{what}: the job ended with {self.jobs[run].returncode}: {self.tail(run)}")
            if time.monotonic() > deadline:
                raise DrillError(f"{what}: not within {limit:.0f} s")
            time.sleep(0.5)

    def finish(self, run: str, expected: int = 0) -> None:
        """Wait for a job's end; its exit code, as the submitting person sees it, must be the expected one."""
        try:
            limit = patience(PATIENCE_S)
            code = self.jobs.pop(run).wait(limit)
        except subprocess.TimeoutExpired as error:
            raise DrillError(f"{run}: not finished within {limit:.0f} s: {self.tail(run)}") from error
        if code != expected:
            raise DrillError(f"{run}: exit code {code}, expected {expected}: {self.tail(run)}")

    def log(self, run: str) -> str:
        """A job's log, as the submitting person sees it."""
        return (self.folder / f"{run}.log").read_text()

    def tail(self, run: str) -> str:
        """The end of a job's log in one line."""
        return " / ".join(self.log(run).splitlines()[-4:])

    def check_steps(self, run: str, job: str = "pretrain") -> str:
        """Every step up to the last was recorded once, in order."""
        recorded = self.steps(run, job)
        if recorded != list(range(1, len(recorded) + 1)):
            raise DrillError(f"{run}: recorded steps {recorded}")
        return f"steps 1 to {len(recorded)} recorded once each"

    def tracked(self, run: str, job: str = "pretrain") -> dict:
        """What MLflow has of a run, asked as its user."""
        known = json.loads((self.run_folder(run, job) / "mlflow.json").read_text())
        return self.ask_mlflow("runs/get", run_id=known["run_id"])["run"]

    def tracked_steps(self, run: str) -> int:
        """Number of loss values MLflow has of a training run."""
        known = json.loads((self.run_folder(run) / "mlflow.json").read_text())
        found = self.ask_mlflow(
            "metrics/get-history", run_id=known["run_id"], metric_key="train/loss", max_results="25000"
        )
        return len({metric["step"] for metric in found.get("metrics", [])})

    def ask_mlflow(self, method: str, **parameters: str) -> dict:
        """Call MLflow's API as its user."""
        url = f"{self.mlflow.url}/api/2.0/mlflow/{method}"
        answer = requests.get(url, params=parameters, auth=(USER, self.password()), timeout=30)
        answer.raise_for_status()
        return answer.json()


def nodes_python(folder: Path) -> Path:
    """An interpreter with this one's packages but without this checkout: what is in a cluster's image.

    A path file adds folders without reading the path files in them, and an editable installation is such a file.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join(packages) + "\n")
    python = folder / "bin" / "python"
    found = subprocess.run([python, "-c", "import loomvideo.jobs"], capture_output=True, cwd=folder)
    if found.returncode == 0:
        raise DrillError("loomvideo is installed beside its dependencies: install it with pip install -e")
    return python


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
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A folder on a disk of its own, or None where this process may not mount one."""
    if os.geteuid() != 0:
        yield None
        return
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def rehearsal(folder: Path, sample: Path) -> Iterator[Rehearsal]:
    """Bring everything up, and down again; what a folder holds from an earlier time is used again."""
    with contextlib.ExitStack() as stack:
        # Ray's sockets need a short path, Postgres one that its own user may enter.
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lv", ignore_cleanup_errors=True)))
        open_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lvpg")))
        open_folder.chmod(0o755)
        database = stack.enter_context(postgres(open_folder))
        if database:
            os.environ["MLFLOW_BACKEND_STORE_URI"] = database
        disk = stack.enter_context(small_disk(folder / "small-disk"))
        network = Namespaces(short) if can_make_namespaces() else Loopback(short)
        stack.callback(network.close)
        print(f"nodes: {type(network).__name__}; MLflow on {'Postgres' if database else 'sqlite'}", flush=True)
        mlflow = prepare_server(folder / "mlflow", host=network.outside, port=free_port())
        store = FaultyStore(network.outside)
        stack.callback(store.stop)
        environment = store.environment() | {
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": (mlflow.folder / PASSWORD_FILE).read_text(),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        }
        python = nodes_python(short / "venv")
        cluster = LocalCluster(short, environment=environment, network=network, python=python)
        cluster.caches = folder / "kernels"
        current = Rehearsal(folder, sample, cluster, store, disk, mlflow)
        stack.callback(_take_down, current)
        current.start_mlflow()
        current.start_nodes()
        yield current


def _take_down(current: Rehearsal) -> None:
    for job in current.jobs.values():
        job.kill()
        job.wait()
    current.cluster.stop()
    current.stop_mlflow()
    for number, logs in enumerate(current.cluster.network.logs()):
        shutil.copytree(logs, current.folder / "ray-logs" / str(number), dirs_exist_ok=True)
