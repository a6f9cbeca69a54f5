"""The training jobs of the drills: started with the real command, watched by what they record, ended in the end."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import psutil

from loomvideo.jobs.command import preset_file
from loomvideo.jobs.training.config import TrainingJobConfig
from loomvideo.pipelines.training.recipe import LoomVideoRecipe
from loomvideo.platform.config import load_config
from loomvideo.platform.machine import patience
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.packing import planner_of

PATIENCE_S = 300.0
NOTICE_S = 10.0
HANG_S = 30
STEPS, EVERY = 40, 5
PACK_TOKENS, PACKS = 864, 2
JOBS: dict[str, dict[str, object]] = {
    "pretrain": {},
    # Some steps of the critic before the student's first.
    "distill": {"distill.critic_warmup": 4},
    # Two rounds of generated results; most drills break the training of the first.
    "prefer": {
        "prefer.method": "nft",
        "prefer.nft.rounds": 2,
        "prefer.nft.steps_per_round": STEPS // 2,
        "prefer.nft.prompts": 12,
        "prefer.nft.repeats": 2,
        "prefer.nft.sampler_steps": 2,
        "prefer.nft.actors": 1,
    },
}
"""Jobs that are broken, and what keeps them short."""


class DrillError(Exception):
    """A drill that ended otherwise than documented."""


@dataclass
class Run:
    """A training job of a drill.

    Attributes:
        name: The name of the run.
        folder: All runs' folder.
        process: The job.
        job: Its name.
        started: The time at which it was started.
    """

    name: str
    folder: Path
    process: subprocess.Popen
    job: str = "pretrain"
    started: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder / "runs" / self.job / self.name

    @property
    def log(self) -> str:
        """What the job printed, over all its starts."""
        return (self.folder / f"{self.name}.log").read_text()

    def records(self) -> list[dict]:
        """The recorded steps."""
        path = self.path / "steps.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def steps(self) -> list[int]:
        """Their numbers."""
        return [record["step"] for record in self.records()]

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        """Wait for a condition while the job runs."""
        limit = patience(PATIENCE_S)
        deadline = time.monotonic() + limit
        while not ready():
            if self.process.poll() is not None:
                raise DrillError(f"{what}: the job ended with {self.process.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise DrillError(f"{what}: not within {limit:.0f} s")
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is recorded."""
        self.wait_for(f"step {step}", lambda: max(self.steps(), default=0) >= step)

    def finish(self, expected: int = 0) -> None:
        """Wait for the end and compare the exit code."""
        code = self.process.wait(patience(PATIENCE_S))
        if code != expected:
            raise DrillError(f"{self.name}: exit code {code}, expected {expected}: {self.tail()}")

    def tail(self) -> str:
        """The end of the log in one line."""
        return " / ".join(self.log.splitlines()[-4:])

    def workers(self) -> list[psutil.Process]:
        """The training workers' processes, oldest first."""
        return self.processes("RayTrainWorker")

    def processes(self, actor: str) -> list[psutil.Process]:
        """The processes of actors of a class, oldest first."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if actor in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def check_complete(self, last: int = STEPS) -> None:
        """Every step was recorded once, up to the last."""
        if self.steps() != list(range(1, last + 1)):
            raise DrillError(f"{self.name}: recorded steps {self.steps()}")

    def check_same(self, undisturbed: "Run", step: int = STEPS) -> None:
        """A checkpoint holds bit for bit what the undisturbed run's does, and so do the rounds of generated results.

        A rank's file has weights, moments and averages of all roles.
        """
        folders = [Path(CheckpointFolder(run.path / "checkpoints").at(step)) for run in (self, undisturbed)]
        own, other = (json.loads((folder / "manifest.json").read_text())["files"] for folder in folders)
        different = [name for name in own | other if name.startswith("rank-") and own.get(name) != other.get(name)]
        made, asked = self.round_files(), undisturbed.round_files()
        different += [name for name in made | asked if made.get(name) != asked.get(name)]
        if different:
            raise DrillError(f"{self.name}: not as in the undisturbed run: {sorted(different)[:4]}")

    def round_files(self) -> dict[str, bytes]:
        """Indices, scores and latents of all rounds; none where nothing is generated."""
        files = [path for kind in ("index.parquet", "results/*/*") for path in self.path.glob(f"rounds/*/{kind}")]
        return {str(path.relative_to(self.path)): path.read_bytes() for path in files}

    def expect(self, *texts: str) -> None:
        """The log holds each text."""
        for text in texts:
            if text not in self.log:
                raise DrillError(f"{self.name}: no {text!r} in the log: {self.tail()}")

    def continued_at(self) -> int:
        """The step at which the run first went on; a later round of prefer continues the one before too."""
        line = next((line for line in self.log.splitlines() if "continuing at step" in line), None)
        if line is None:
            raise DrillError(f"{self.name}: started anew instead of continuing")
        return int(line.split("continuing at step ")[1].split(":")[0])


class Rehearsal:
    """Where the drills run.

    Args:
        folder: New; keeps runs, logs and results.
        shards: Dataset prepared for the tiny preset.
        job: Of :data:`JOBS`.
        weights: The weights folder that the job starts from; None for its own.
    """

    def __init__(self, folder: Path, shards: Path, job: str = "pretrain", weights: Path | None = None):
        self.folder, self.shards, self.job, self.weights = folder, shards, job, weights
        self.runs: list[Run] = []
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}

    def train(self, name: str, *arguments: str, shards: Path | None = None, environment: dict | None = None) -> Run:
        """Start a job, or the same one again; later arguments win."""
        command = [sys.executable, "-m", "loomvideo.jobs.cli", self.job, f"data.shards=[{shards or self.shards}]"]
        values = {
            "run": name,
            "runs": self.folder / "runs",
            "training.steps": STEPS,
            "training.pack.tokens": PACK_TOKENS,
            "training.pack.per_step": PACKS,
            "training.log_every": 1,
            "training.checkpoint.every_steps": EVERY,
            "training.checkpoint.keep_last": 3,
            "evaluation.samples": "",
            "samples.every_steps": 0,
            "doctor": "false",
            **JOBS[self.job],
        }
        if self.weights:
            values["from_weights"] = self.weights
        values |= dict(argument.split("=", 1) for argument in arguments)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, *(f"{key}={value}" for key, value in values.items())],
                env=environment or self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        run = Run(name, self.folder, process, self.job)
        self.runs.append(run)
        return run

    @cached_property
    def undisturbed(self) -> Run:
        """The job as it is when nothing breaks; made when it is first asked for."""
        run = self.train("undisturbed")
        run.finish()
        run.check_complete()
        return run

    def length(self, steps: int, rounds: int = 2) -> list[str]:
        """Arguments for a run of so many steps, which prefer divides into rounds."""
        if self.job != "prefer":
            return [f"training.steps={steps}"]
        return [
            f"training.steps={steps}", f"prefer.nft.rounds={rounds}", f"prefer.nft.steps_per_round={steps // rounds}"
        ]  # fmt: skip

    def run_path(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / self.job / name

    def copy_of_shards(self, name: str) -> Path:
        """A copy of the dataset that may be damaged; unchanged files are shared."""
        target = self.folder / name
        shutil.copytree(self.shards, target, copy_function=os.link)
        return target

    def drawn_in_step(self, step: int) -> tuple[Path, dict]:
        """The shard (relative) and index row of the first sample that the run draws in a step."""
        dataset = ShardDataset.open(self.shards)
        job = load_config(TrainingJobConfig, [f"training.pack.tokens={PACK_TOKENS}"], preset_file("pretrain", "tiny"))
        recipe = LoomVideoRecipe("tiny", job.objective, [dataset.shared()["null"]])
        planner = planner_of(recipe, [dataset], job.training, PACKS)
        for _ in range(step):
            packs = planner.next_step()
        row = dataset.index.slice(packs[0][0].row, 1).to_pylist()[0]
        return Path("shards") / f"{row['shard']}.tar", row

    def stop(self) -> None:
        """End what is left."""
        for run in self.runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
