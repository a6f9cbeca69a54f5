"""Generators in processes of their own: groups of Ray actors, each group making one file at a time."""

import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
import torch.distributed as dist

from loomvideo.jobs.generation.config import GenerateConfig
from loomvideo.model.parallel import Ranks
from loomvideo.pipelines.generation.beside import WriterBeside
from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.requests import Request
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.devices import device_for
from loomvideo.platform.time_limits import RANK_FAILED_ALONE

Outcome = tuple[str, str]
"""``done``, ``kept`` or ``failed``, and a failure's message."""


class GeneratorActor:
    """A loaded generator, alone or one rank of a group."""

    def __init__(self, config: GenerateConfig):
        self.config, self.rank = config, 0
        self._denoising = threading.Lock()

    def load(self, requests: Sequence[Request] = ()) -> str:
        """Load the model for these requests; returns where the ranks of a group with this one as the first can meet."""
        device = device_for(self.config.gpus, "gpus").type
        source = dataclasses.replace(self.config.model_source(drop_exact=True), device=device)
        self.generator = FileGenerator.load(source, self.config, requests)
        self._beside = WriterBeside(self.generator) if self.config.decode_beside else None
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def join(self, rank: int, world: int, address: str) -> None:
        """Become one rank of a group."""
        self.rank = rank
        dist.init_process_group(
            "nccl" if self.config.gpus else "gloo", init_method=address, rank=rank, world_size=world
        )
        self.generator.pipeline.ranks = Ranks.split(self.config.sequence_ranks)

    def generate(self, request: Request) -> Outcome:
        """Make one file, together with the other ranks; the first one writes it."""
        try:
            if self.config.whole:
                self.generator.generate(request)
                return "done", ""
            with self._denoising:
                prepared = self.generator.prepare(request)
                latents = self.generator.sample(prepared)
                written = self._beside.write(prepared, latents) if self._beside else None
            if written is not None:
                written.result()
            elif self.rank == 0:
                self.generator.write(prepared, latents)
        except UserError as error:
            if self.config.gpus:
                torch.cuda.empty_cache()
            return "failed", str(error)
        return "done", ""

    def is_done(self, request: Request) -> bool:
        """Whether the file was made from exactly this already."""
        try:
            return self.generator.is_done(request)
        except UserError:
            return False  # `generate` says what is wrong


class GeneratorGroup:
    """Actors that make one file at a time together: ``config.ranks`` of them.

    Raises:
        UserError: if the model cannot be loaded or divided among them.
    """

    def __init__(self, config: GenerateConfig, requests: Sequence[Request] = ()):
        self.config, self._requests = config, list(requests)
        self._start()

    def generate(self, request: Request) -> Outcome:
        """Make one file, unless it is there."""
        import ray

        if ray.get(self.actors[0].is_done.remote(request)):
            return "kept", ""
        pending = [actor.generate.remote(request) for actor in self.actors]
        outcomes: list[Outcome] = []
        while pending:
            failed = any(outcome == "failed" for outcome, _ in outcomes)
            ready, pending = ray.wait(pending, timeout=RANK_FAILED_ALONE.here() if failed else None)
            outcomes += ray.get(ready)
            if failed and not ready:
                self._restart()
                break
        return next((outcome for outcome in outcomes if outcome[0] == "failed"), outcomes[0])

    def _start(self) -> None:
        import ray

        at_once = requests_at_once(self.config)
        actor = ray.remote(num_gpus=self.config.gpus, num_cpus=1, max_concurrency=at_once)(GeneratorActor)
        self.actors = [actor.remote(self.config) for _ in range(self.config.ranks)]
        try:
            address, *_ = ray.get([actor.load.remote(self._requests) for actor in self.actors])
            if self.config.ranks > 1:
                joins = [a.join.remote(rank, self.config.ranks, address) for rank, a in enumerate(self.actors)]
                ray.get(joins)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def _restart(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self._start()


def requests_at_once(config: GenerateConfig) -> int:
    """Requests that a group has at a time: one is denoised, and with ``decode_beside`` another one written."""
    return 2 if config.decode_beside else 1


def generate_all(config: GenerateConfig, requests: Sequence[Request]) -> Iterator[tuple[Request, Outcome]]:
    """Make every request on ``config.workers`` groups; results come in the order of the requests."""
    groups: SimpleQueue[GeneratorGroup] = SimpleQueue()

    def make(request: Request) -> Outcome:
        group = groups.get()
        try:
            return group.generate(request)
        finally:
            groups.put(group)

    workers, at_once = min(config.workers, len(requests)), requests_at_once(config)
    with ThreadPoolExecutor(workers * at_once) as threads:
        start: Callable[[int], GeneratorGroup] = lambda _: GeneratorGroup(config, requests)  # noqa: E731
        for group in threads.map(start, range(workers)):
            for _ in range(at_once):
                groups.put(group)
        yield from zip(requests, threads.map(make, requests), strict=True)
