"""Run a training worker on several gloo ranks without Ray, for tests of the loop itself."""

import os
import queue
import shutil
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.toy_training import ToyDataset, ToyRecipe

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.worker import Worker, WorkerJob


def run_ranks(function, world_size, *arguments):
    """Run ``function(rank, *arguments)`` on every rank in processes of its own; returns the results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(answers, function, rank, world_size, port, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results = {}
    while len(results) < world_size:
        try:
            results |= [answers.get(timeout=5)]
        except queue.Empty:
            # A rank that could not even start (its function cannot be imported there) answers nothing.
            silent = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in results]
            if silent:
                raise AssertionError(f"ranks {silent} ended without an answer") from None
    for process in processes:
        process.join()
    for rank, (ok, value) in results.items():
        if not ok:
            raise AssertionError(f"rank {rank} failed:\n{value}")
    return [results[rank][1] for rank in range(world_size)]


def _rank(answers, function, rank, world_size, port, arguments):
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        answers.put((rank, (True, function(rank, *arguments))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, (False, traceback.format_exc())))


@dataclass
class Scenario:
    """One training: where, how, and after which step the driver asks it to stop."""

    folder: str
    config: TrainingConfig
    url: str = "toy://64"
    stop_after: int = 0
    copy_from: str = ""
    """A folder whose checkpoints this one starts with."""
    from_step: int = 0
    """The newest of those it takes; 0 for all."""
    recipe: Callable = ToyRecipe
    open_dataset: Callable = ToyDataset
    checkpoints: str = ""
    """Where checkpoints go, if not into the folder."""


def train_scenarios(rank, scenarios):
    """Run scenarios one after another on one rank; returns for each the reports and the final report, or the error."""
    outcomes = []
    for scenario in scenarios:
        if scenario.copy_from and rank == 0:
            shutil.copytree(scenario.copy_from, scenario.folder)
            copied = CheckpointFolder(f"{scenario.folder}/checkpoints")
            for step in copied.steps():
                if step > scenario.from_step > 0:
                    copied.discard(step)
        dist.barrier()
        outcomes.append(_train(scenario))
        dist.barrier()
    return outcomes


def _train(scenario):
    reports = []

    def report(message):
        reports.append(message)
        step = max((record["step"] for record in message.get("steps", [])), default=0)
        return "asked to stop" if 0 < scenario.stop_after <= step else ""

    folder = Path(scenario.folder)
    # As the driver does; workers look at its disk.
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = scenario.checkpoints or folder / "checkpoints"
    job = WorkerJob(scenario.config, scenario.recipe, [scenario.url], scenario.open_dataset, checkpoints, folder)
    try:
        final = Worker(job, torch.device("cpu"), report).run()
    except UserError as error:
        final = {"error": str(error)}
    return reports, final


def steps_of(reports):
    """The step records of a rank's reports."""
    return [record for message in reports if message["event"] == "steps" for record in message["steps"]]
