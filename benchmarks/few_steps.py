"""A distilled model against its teacher on held-out samples, a row a task: quality, diversity over seeds, CPU time.

    python benchmarks/few_steps.py TEACHER STUDENT data/sample/samples.jsonl --steps 20 --count 4 --seeds 3

``edit_psnr_db`` is against the target (edits alone), with the standard error over samples of the paired difference;
``colour`` the share of results whose garment has the colour asked for, where one is; ``diversity`` the mean distance of
two seeds' results in grey levels, the student's over the teacher's; CPU seconds are those of this process.
"""

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import torch

from loomvideo.model.guidance import Guidance
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline
from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.evaluation.inputs import InputOptions, LoadedItem, load_item
from loomvideo.pipelines.evaluation.measures import measure
from loomvideo.pipelines.evaluation.suites import own


def measured(
    pipeline: LoomVideoPipeline, inputs: LoadedItem, steps: int, scale: float, seeds: int
) -> tuple[float, float, float, float]:
    """PSNR against the target, share of right garment colours, distance between seeds and CPU seconds of a result."""
    item = inputs.item
    conditions = pipeline.encode(
        item.task, item.text, inputs.source, list(inputs.references), inputs.size, inputs.num_frames
    )
    guidance = Guidance(scale, scale if TASKS[item.task].has_media else None)
    started = time.process_time()
    latents = [pipeline.sample(conditions, steps, guidance, seed) for seed in range(seeds)]
    seconds = (time.process_time() - started) / seeds
    videos = [pipeline.decode(each) for each in latents]
    values = [measure(video, inputs) for video in videos] if inputs.source is not None else [{}]
    psnr, colour = (
        float(np.mean([each.get(name, np.nan) for each in values])) for name in ("edit_psnr_db", "garment_colour_right")
    )
    pairs = itertools.combinations(videos, 2)
    distance = float(np.mean([np.abs(a.astype(np.float32) - b).mean() for a, b in pairs]))
    return psnr, colour, distance, seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="of the teacher")
    parser.add_argument("--scale", type=float, default=1.0, help="guidance of the teacher")
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
        student.few_steps = dataclasses.replace(
            student.few_steps, timesteps=student.few_steps.timesteps[: options.first]
        )
    manifest = own.sample(options.samples, heldout_fraction=0.0)
    sizes = InputOptions(
        bucket_classes=(options.bucket,), reference_classes=(options.bucket,), grid=teacher.grid,
        num_frames=options.frames, text_size=(options.bucket, options.bucket),
    )  # fmt: skip
    print(f"teacher {options.steps} steps, scale {options.scale:g}; student {student.few_steps.describe()}")
    print("task | samples | edit PSNR dB teacher, student, difference ± error | colour | diversity | CPU s")
    for task in options.tasks.split(","):
        items = [item for item in manifest.items if item.task == task][: options.count]
        rows = []
        for item in items:
            inputs = load_item(item, manifest.root, sizes)
            models = ((teacher, options.steps, options.scale), (student, student.few_steps.num_steps, 1.0))
            rows.append([measured(model, inputs, steps, scale, options.seeds) for model, steps, scale in models])
        if not rows:
            continue
        table = np.array(rows)
        apart = table[:, 1, 0] - table[:, 0, 0]
        error = apart.std(ddof=1) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
        (psnr, _, spread, seconds), (other, _, own_spread, own_seconds) = table.mean(0)[0], table.mean(0)[1]
        asked = table[~np.isnan(table[:, 0, 1]), :, 1]
        colours = f"{asked[:, 0].mean():.2f}, {asked[:, 1].mean():.2f} of {len(asked)}" if len(asked) else "-"
        print(
            f"{task} | {len(rows)} | {psnr:.2f}, {other:.2f}, {apart.mean():+.2f} ± {error:.2f} | {colours} | "
            f"{own_spread / spread:.2f} | {seconds:.2f}, {own_seconds:.2f} ({seconds / own_seconds:.1f}x less)",
            flush=True,
        )


if __name__ == "__main__":
    main()
