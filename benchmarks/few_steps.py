"""A distilled model against its teacher on held-out samples, a row a task: quality, diversity over seeds, CPU time.

    python benchmarks/few_steps.py TEACHER STUDENT data/sample/samples.jsonl --steps 20 --count 4 --seeds 3

``edit_psnr_db`` is against the target (edits alone), ``diversity`` the mean distance of two seeds' results in grey
levels, both with a standard error over samples of the paired difference; CPU seconds are those of this process.
"""

import argparse
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
from loomvideo.pipelines.evaluation.metrics import psnr_db
from loomvideo.pipelines.evaluation.suites import own


def measured(
    pipeline: LoomVideoPipeline, inputs: LoadedItem, steps: int, scale: float, seeds: int
) -> tuple[float, float, float]:
    """PSNR against the target, distance between seeds and CPU seconds of a result."""
    item = inputs.item
    conditions = pipeline.encode(
        item.task, item.text, inputs.source, list(inputs.references), inputs.size, inputs.num_frames
    )
    guidance = Guidance(scale, scale if TASKS[item.task].has_media else None)
    started = time.process_time()
    latents = [pipeline.sample(conditions, steps, guidance, seed) for seed in range(seeds)]
    seconds = (time.process_time() - started) / seeds
    videos = [pipeline.decode(each) for each in latents]
    psnr = float("nan")
    if inputs.target is not None and inputs.source is not None:
        psnr = float(np.mean([psnr_db(video, inputs.target) for video in videos]))
    pairs = itertools.combinations(videos, 2)
    distance = float(np.mean([np.abs(a.astype(np.float32) - b).mean() for a, b in pairs]))
    return psnr, distance, seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="of the teacher")
    parser.add_argument("--scale", type=float, default=1.0, help="guidance of the teacher")
    parser.add_argument("--count", type=int, default=4, help="held-out samples of a task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bucket", type=int, default=96)
    parser.add_argument("--frames", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student = (load_pipeline(ModelSource(path)) for path in (options.teacher, options.student))
    if student.few_steps is None:
        parser.error(f"{options.student}: was not distilled")
    manifest = own.sample(options.samples, heldout_fraction=0.0)
    sizes = InputOptions(
        bucket_classes=(options.bucket,), reference_classes=(options.bucket,), grid=teacher.grid,
        num_frames=options.frames, text_size=(options.bucket, options.bucket),
    )  # fmt: skip
    print(f"teacher {options.steps} steps, scale {options.scale:g}; student {student.few_steps.describe()}")
    print("task | samples | edit PSNR dB teacher, student, difference ± error | diversity student/teacher | CPU s")
    for task in TASKS:
        items = [item for item in manifest.items if item.task == task][: options.count]
        rows = []
        for item in items:
            inputs = load_item(item, manifest.root, sizes)
            models = ((teacher, options.steps, options.scale), (student, student.few_steps.num_steps, 1.0))
            rows.append([measured(model, inputs, steps, scale, options.seeds) for model, steps, scale in models])
        if not rows:
            continue
        table = np.array(rows)
        (psnr, other), apart = table[:, :, 0].mean(0), table[:, 1, 0] - table[:, 0, 0]
        error = apart.std(ddof=1) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
        diversity = table[:, 1, 1].mean() / table[:, 0, 1].mean()
        seconds = table[:, :, 2].mean(0)
        print(
            f"{task} | {len(rows)} | {psnr:.2f}, {other:.2f}, {apart.mean():+.2f} ± {error:.2f} | {diversity:.2f} | "
            f"{seconds[0]:.2f}, {seconds[1]:.2f} ({seconds[0] / seconds[1]:.1f}x less)",
            flush=True,
        )


if __name__ == "__main__":
    main()
