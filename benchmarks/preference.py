"""Editors tuned by preferences against the one they started from, on held-out edits: what was rewarded, what not.

    python benchmarks/preference.py BEFORE data/sample/samples.jsonl AFTER [AFTER …]

Every edit is made with the same noise by each of the weights folders. A row a metric: its mean before, and for each
AFTER the mean of paired differences with a 95 % interval (bootstrap over samples). ``copied`` is the share of results
that hardly differ from their source (by less than half a grey level), ``nearer_source`` of those that are nearer to the
source than to the target where these differ; ``gain_psnr_db`` is the gain over copying.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from loomvideo.model.guidance import Guidance
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import load_pipeline
from loomvideo.pipelines.evaluation.inputs import InputOptions, LoadedItem, load_item
from loomvideo.pipelines.evaluation.measures import edit_region, measure
from loomvideo.pipelines.evaluation.statistics import bootstrap_mean
from loomvideo.pipelines.evaluation.suites import own

METRICS = (
    "garment_delta_e", "garment_colour_right", "outside_psnr_db", "edit_psnr_db", "gain_psnr_db", "edit_locality",
    "sharpness", "copied", "nearer_source",
)  # fmt: skip
COPIED = 0.5
"""Mean change from the source in grey levels under which nothing was edited, as evaluations count it."""


def figures(video: NDArray[np.uint8], inputs: LoadedItem) -> dict[str, float]:
    """:data:`METRICS` of a result, those that apply."""
    values = measure(video, inputs, {*METRICS, "edit_strength"})
    region = edit_region(inputs)
    values["copied"] = float(values["edit_strength"] < COPIED)
    if region is not None and region.any():
        result, source, target = (each[region].astype(np.float32) for each in (video, inputs.source, inputs.target))
        values["nearer_source"] = float(np.square(result - source).mean() < np.square(result - target).mean())
    return values


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="weights folder of the start")
    parser.add_argument("samples", type=Path)
    parser.add_argument("after", nargs="+", help="weights folders of the tuned")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--bucket", type=int, default=96)
    parser.add_argument("--frames", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = [load_pipeline(ModelSource(path)) for path in (options.before, *options.after)]
    sizes = InputOptions(
        bucket_classes=(options.bucket,), reference_classes=(options.bucket,), grid=models[0].grid,
        num_frames=options.frames, text_size=(options.bucket, options.bucket),
    )  # fmt: skip
    manifest = own.sample(options.samples, heldout_fraction=0.0)
    rows, clusters = [], []
    for item in manifest.items:
        inputs = load_item(item, manifest.root, sizes)
        if inputs.source is None:
            continue
        conditions = models[0].encode(
            item.task, item.text, inputs.source, list(inputs.references), inputs.size, inputs.num_frames
        )
        found = []
        for model in models:
            made = [
                figures(model.denoise(conditions, options.steps, Guidance(1.0, 1.0), seed), inputs)
                for seed in range(options.seeds)
            ]
            found.append([np.mean([values.get(name, np.nan) for values in made]) for name in METRICS])
        rows.append(found)
        clusters.append(item.cluster or item.key)
    table = np.array(rows)
    for place, name in enumerate(METRICS):
        values = table[:, :, place]
        found = [bootstrap_mean(values[:, number] - values[:, 0], clusters) for number in range(1, len(models))]
        shown = "; ".join(f"{each.value:+.3f} ({each.low:+.3f} to {each.high:+.3f})" for each in found)
        print(f"{name} | {found[0].num_samples} samples | {np.nanmean(values[:, 0]):.3f} | {shown}", flush=True)


if __name__ == "__main__":
    main()
