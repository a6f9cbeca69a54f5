"""Run a training worker on several gloo ranks without Ray, for tests of the loop itself."""

import os
import socket
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function, world_size, *arguments):
    """Run ``function(rank, *arguments)`` on every rank in processes of its own; returns the results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(answers, function, rank, world_size, port, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results = dict(answers.get() for _ in processes)
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


def train_worker(rank, config, datasets, folder, wrap=None, stop_after=None, recipe=None):
    """Train the toy on one rank; returns the reports of the rank and its weights by name (rank 0's view)."""
    from helpers.toy_training import ToyDataset, ToyRecipe

    from loomvideo.platform.training.worker import Worker, WorkerJob

    reports = []

    def report(message):
        reports.append(message)
        step = max((record["step"] for record in message.get("steps", [])), default=0)
        return "asked to stop" if stop_after and step >= stop_after else ""

    folder = Path(folder)
    job = WorkerJob(
        config, lambda: recipe or ToyRecipe(wrap=wrap), datasets, ToyDataset, folder / "checkpoints", folder
    )
    result = Worker(job, torch.device("cpu"), report).run()
    return reports, result


def steps_of(reports):
    """The step records of a rank's reports."""
    return [record for message in reports if message["event"] == "steps" for record in message["steps"]]
