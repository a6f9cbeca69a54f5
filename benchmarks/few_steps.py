"""A distilled model against its teacher on held-out samples, a row a task: quality, diversity over seeds, CPU time.

    python benchmarks/few_steps.py TEACHER STUDENT data/sample/samples.jsonl --steps 20 --scales 1.0 1.5 --count 4

``edit PSNR`` is against the target (edits alone); ``colour`` the share of results whose garment has the colour asked
for, where one is, and ``drawn`` of results from words alone with all garments of the caption right; as teacher,
student, and the mean of paired differences with a 95 % interval (bootstrap over figures). CPU seconds are those of
sampling in this process, a result.

A scale of edits comes with a visual scale half-way between it and 1, so that all three branches run; equal scales would
leave the visual one out. A scale of 1 is the full branch alone.

``diversity`` is the mean distance of two seeds' results in grey levels, the student's over the teacher's: of all
pixels; of means of 8x8 pixels (``coarse``: fine noise is gone); where the edit changes pixels and where it should not
(``inside``, ``outside``: there every difference between seeds is an error of one of them). ``outside dB`` is the PSNR
to the source there.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from loomvideo.model.guidance import Guidance
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline
from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.evaluation.inputs import InputOptions, LoadedItem, load_item
from loomvideo.pipelines.evaluation.measures import edit_region, measure
from loomvideo.pipelines.evaluation.statistics import bootstrap_mean
from loomvideo.pipelines.evaluation.suites import own

METRICS = ("edit_psnr_db", "garment_colour_right", "garments_drawn_right", "outside_psnr_db")
DISTANCES = ("all", "coarse", "inside", "outside")
CELL = 8


def distances(videos: list[NDArray[np.uint8]], region: NDArray[np.bool_] | None) -> list[float]:
    """Mean distances between seeds' results in grey levels, as :data:`DISTANCES`; NaN without such pixels."""
    found = []
    for one, other in itertools.combinations(videos, 2):
        apart = one.astype(np.float32) - other
        frames, height, width = apart.shape[:3]
        cells = apart[:, : height // CELL * CELL, : width // CELL * CELL]
        cells = cells.reshape(frames, height // CELL, CELL, width // CELL, CELL, 3).mean((2, 4))
        parts = [apart, cells] + ([apart[region], apart[~region]] if region is not None else [])
        found.append([np.abs(part).mean() if part.size else np.nan for part in parts])
    means = [float(value) for value in np.mean(found, 0)]
    return means + [np.nan] * (len(DISTANCES) - len(means))


def measured(
    pipeline: LoomVideoPipeline, inputs: LoadedItem, steps: int, guidance: Guidance, seeds: int
) -> tuple[list[float], list[float], float]:
    """:data:`METRICS`, :data:`DISTANCES` and CPU seconds of a result."""
    item = inputs.item
    conditions = pipeline.encode(
        item.task, item.text, inputs.source, list(inputs.references), inputs.size, inputs.num_frames
    )
    started = time.process_time()
    latents = [pipeline.sample(conditions, steps, guidance, seed) for seed in range(seeds)]
    seconds = (time.process_time() - started) / seeds
    videos = [pipeline.decode(each) for each in latents]
    values = [measure(video, inputs, METRICS) for video in videos]
    means = [float(np.mean([each.get(name, np.nan) for each in values])) for name in METRICS]
    return means, distances(videos, edit_region(inputs)), seconds


def difference(values: NDArray[np.float64], clusters: list[str], digits: int) -> str:
    """Teacher, student and their difference with its interval, from values [samples, 2]."""
    found = bootstrap_mean(values[:, 1] - values[:, 0], clusters)
    if not found.num_samples:
        return "-"
    teacher, student = np.nanmean(values, 0)
    ends = f"{found.low:+.{digits}f} to {found.high:+.{digits}f}, {found.num_samples} samples"
    return f"{teacher:.{digits}f}, {student:.{digits}f}: {found.value:+.{digits}f} ({ends})"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="of the teacher")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="guidance of its edits, a row each; 1 for none"
    )
    parser.add_argument("--first", type=int, default=0, help="take the student's first steps alone, such as 2 or 1")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of these tasks alone")
    parser.add_argument("--count", type=int, default=4, help="held-out samples of a task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bucket", type=int, default=96)
    parser.add_argument("--frames", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student = (load_pipeline(ModelSource(path)) for path in (options.teacher, options.student))
    if student.few_steps is None:
        parser.error(f"{options.student}: was not distilled")
    if options.first:
        student.few_steps = student.few_steps.first(options.first)
    manifest = own.sample(options.samples, heldout_fraction=0.0)
    sizes = InputOptions(
        bucket_classes=(options.bucket,), reference_classes=(options.bucket,), grid=teacher.grid,
        num_frames=options.frames, text_size=(options.bucket, options.bucket),
    )  # fmt: skip
    print(f"teacher {options.steps} steps; student {student.few_steps.describe()}; {options.seeds} seeds")
    apart = f"diversity {', '.join(DISTANCES)}"
    print(f"task, scale, branches | edit PSNR dB | colour | drawn | outside dB | {apart} | CPU s")
    for task in options.tasks.split(","):
        own_scale = teacher.default_guidance(task)
        edits = TASKS[task].needs_source
        scales = [Guidance(scale, (1 + scale) / 2) for scale in options.scales] if edits else [own_scale]
        models = [(teacher, options.steps, guidance) for guidance in scales]
        # Guidance is folded into it.
        models.append((student, student.few_steps.num_steps, own_scale))
        rows, clusters = [], []
        for item in [item for item in manifest.items if item.task == task][: options.count]:
            inputs = load_item(item, manifest.root, sizes)
            made = [measured(model, inputs, steps, guidance, options.seeds) for model, steps, guidance in models]
            rows.append([[*metrics, *apart, seconds] for metrics, apart, seconds in made])
            clusters.append(item.cluster or item.key)
        if not rows:
            continue
        table = np.array(rows)
        for number, guidance in enumerate(scales):
            pair = table[:, [number, -1]]
            shown = [difference(pair[:, :, place], clusters, 2) for place in range(len(METRICS))]
            apart = pair[:, :, len(METRICS) : -1]
            spread = np.nanmean(apart[:, :, ~np.isnan(apart).all((0, 1))], 0)  # without a source there is no region
            ratios = ", ".join(f"{own / of:.2f}" for of, own in zip(*spread, strict=True))
            grey = ", ".join(f"{of:.1f}" for of in spread[0])
            seconds, own_seconds = pair[:, :, -1].mean(0)
            num_branches = len(guidance.weights())
            print(
                f"{task}, {guidance.scale:g}, {num_branches} | {' | '.join(shown)} | {ratios} of {grey} grey levels | "
                f"{seconds:.2f}, {own_seconds:.2f} ({seconds / own_seconds:.1f}x less)",
                flush=True,
            )


if __name__ == "__main__":
    main()
