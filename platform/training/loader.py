"""Background loading: plans steps ahead, reads this rank's packs in threads, hands them over in order."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from loomvideo.platform.errors import UserError
from loomvideo.platform.time_limits import LOADER_STOP
from loomvideo.platform.training.order import Draw
from loomvideo.platform.training.packing import PackPlanner, fill_and_imbalance, packs_of_rank
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import Pack, Recipe, TrainingDataset


@dataclass
class LoadedStep:
    """What one rank computes in one step.

    Attributes:
        step: Index of the planned step.
        packs: One a micro-step, and whether its loss counts.
        draws: The draws of all ranks, pack by pack.
        state: The planner's state after this step.
        fill, imbalance: How full the step's packs are, and how unevenly they lie over all ranks.
        wait_s: How long the consumer waited for it.
        read_s: Seconds that loader threads spent reading the samples of this rank's packs, summed over threads.
    """

    step: int
    packs: list[tuple[Pack, bool]]
    draws: list[list[Draw]]
    state: dict[str, Any]
    fill: float
    imbalance: float
    wait_s: float = 0.0
    read_s: float = 0.0

    @property
    def keys(self) -> list[str]:
        """Keys of the step's samples on all ranks, in plan order, with their visit."""
        return [f"{draw.key}@{draw.visit}" for pack in self.draws for draw in pack]


class SampleError(RuntimeError):
    """A sample could not be loaded; the message names its key."""


class StepLoader:
    """Loads steps ahead of the training loop.

    Args:
        planner: Continued from its state.
        recipe: Loads and collates.
        datasets: The run's datasets.
        seed: The run's seed.
        rank, world_size: Which packs are ours.
        num_steps: Steps to load.
        num_threads: Threads that load samples.
        prefetch: Steps loaded ahead.
        excluded: ``excluded(step)`` gives the keys quarantined when a step is planned; equal on all ranks.
        pin_memory: Copy packs to page-locked memory.
    """

    def __init__(
        self,
        planner: PackPlanner,
        recipe: Recipe,
        datasets: Sequence[TrainingDataset],
        seed: int,
        rank: int,
        world_size: int,
        num_steps: int,
        num_threads: int = 2,
        prefetch: int = 3,
        excluded: Callable[[int], set[str]] = lambda step: set(),
        pin_memory: bool = False,
    ):
        self._planner, self._recipe, self._datasets, self._seed = planner, recipe, datasets, seed
        self._rank, self._world_size, self._num_steps = rank, world_size, num_steps
        self._excluded, self._pin_memory = excluded, pin_memory
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load-sample")
        # Between planning and hand-over sit: this queue, the ready queue and one step in each thread's hands.
        self.max_ahead = 2 * prefetch + 2
        self._planned: queue.Queue[Any] = queue.Queue(prefetch)
        self._ready: queue.Queue[LoadedStep | BaseException | None] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__.strip("_"), daemon=True)
            for work in (self._plan, self._collate)
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> LoadedStep | None:
        """The next step, or None after the last.

        Raises:
            Exception: what a loader thread raised.
        """
        start = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        if item is not None:
            item.wait_s = time.perf_counter() - start
        return item

    def close(self) -> None:
        """Stop the threads."""
        self._stop.set()
        for waiting in (self._planned, self._ready):
            while not waiting.empty():
                waiting.get_nowait()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.join(timeout=LOADER_STOP.here())

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(self._ready, error)

    def _put(self, target: queue.Queue, item: Any) -> None:
        while not self._stop.is_set():
            try:
                target.put(item, timeout=0.2)
            except queue.Full:
                continue
            return

    def _plan(self) -> None:
        for step in range(self._planner.step, self._planner.step + self._num_steps):
            if self._stop.is_set():
                return
            draws = self._planner.next_step(self._excluded(step))
            state = self._planner.state()
            mine = []
            for place, counts in packs_of_rank(len(draws), self._rank, self._world_size):
                mine.append(([self._pool.submit(self._load, draw) for draw in draws[place]], counts))
            self._put(self._planned, (step, draws, state, mine))
        self._put(self._planned, None)

    def _load(self, draw: Draw) -> tuple[Any, float]:
        taken: list[float] = []
        return load_draw(self._recipe, self._datasets, draw, self._seed, taken.append), sum(taken)

    def _collate(self) -> None:
        while not self._stop.is_set():
            try:
                item = self._planned.get(timeout=0.2)
            except queue.Empty:
                continue
            if item is None:
                self._put(self._ready, None)
                return
            step, draws, state, mine = item
            packs = [(self._collated(futures), counts) for futures, counts in mine]
            read_s = sum(future.result()[1] for futures, _ in mine for future in futures)
            fill, imbalance = fill_and_imbalance(draws, self._planner.config)
            self._put(self._ready, LoadedStep(step, packs, draws, state, fill, imbalance, read_s=read_s))

    def _collated(self, futures: list[Future]) -> Pack:
        pack = self._recipe.collate([future.result()[0] for future in futures])
        return pack.pin_memory() if self._pin_memory and hasattr(pack, "pin_memory") else pack


def load_draw(
    recipe: Recipe,
    datasets: Sequence[TrainingDataset],
    draw: Draw,
    seed: int,
    on_read: Callable[[float], Any] = lambda seconds: None,
) -> Any:
    """The example of one draw.

    Args:
        recipe: Reads and loads.
        datasets: The run's datasets.
        draw: Which sample and visit.
        seed: The run's seed.
        on_read: Told how many seconds reading took.

    Raises:
        SampleError: naming the key, from whatever went wrong.
    """
    dataset = datasets[draw.dataset]
    row = dataset.index.slice(draw.row, 1).to_pylist()[0]
    random = SampleRandom(seed, draw.key, draw.visit)
    try:
        with torch.no_grad():
            began = time.perf_counter()
            sample = recipe.read(dataset, draw.row, row, random)
            on_read(time.perf_counter() - began)
            return recipe.load_example(draw.dataset, row, sample, random)
    except Exception as error:  # whatever is wrong with a sample, its key is told
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise SampleError(f"sample {draw.key} of {row['dataset']}: {reason}") from error
