"""How much a preference for garment colour could gain on held-out edits, before anything is trained.

    python benchmarks/preference_room.py WEIGHTS data/sample/samples.jsonl --seeds 6 --scales 1.15 1.3

Mean CIEDE2000 of held-out garments: of results as they are and of what bounds them. ``floor`` is the target through the
codec; ``best of n`` takes the best seed by the target, ``spread`` is a prompt's standard deviation over seeds.
``further from the source`` moves each result's mean colour along the line from the source's, by one factor for all or
(``own``) by its best; ``mean of the word`` answers every garment with the mean colour of all *other* targets of
the same word. Guided results are listed with the change outside the edit.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000

from loomvideo.model.guidance import Guidance
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline
from loomvideo.pipelines.evaluation import editing
from loomvideo.pipelines.evaluation.inputs import InputOptions, LoadedItem, load_item
from loomvideo.pipelines.evaluation.measures import edit_region
from loomvideo.pipelines.evaluation.suites import own

FACTORS = (0.05, 0.1, 0.15, 0.2)


def results(
    pipeline: LoomVideoPipeline, inputs: LoadedItem, region: NDArray[np.bool_], steps: int, scale: float, seeds: int
) -> tuple[NDArray[np.float64], float]:
    """Mean colour of the region of every seed's result [seeds, 3], and their mean PSNR outside it."""
    item = inputs.item
    conditions = pipeline.encode(
        item.task, item.text, inputs.source, list(inputs.references), inputs.size, inputs.num_frames
    )
    latents = pipeline.sample_seeds(conditions, list(range(seeds)), steps, Guidance(scale, 1.0))
    videos = [pipeline.decode(each) for each in latents]
    outside = [editing.preservation(video, inputs.source, region)["outside_psnr_db"] for video in videos]
    return np.array([editing.mean_lab(video, region) for video in videos]), float(np.nanmean(outside))


def bounds(made: NDArray[np.float64], source: NDArray[np.float64], target: NDArray[np.float64], words: Sequence[str]):
    """Lines of the table that need no further result; colours [garments, 3]."""
    off = ((made - target) * (source - target)).sum(1) / ((source - target) ** 2).sum(1)
    yield "share of the way back to the source", float(off.mean())
    for factor in FACTORS:
        yield f"further from the source by 1/{1 - factor:.2f}", error(source + (made - source) / (1 - factor), target)
    yield "further from the source, own factor", error(source + (made - source) / (1 - off)[:, None], target)
    mean = made.copy()
    for place, word in enumerate(words):
        others = [n for n, other in enumerate(words) if other == word and n != place]
        if word and others:
            mean[place] = target[others].mean(0)
    yield "mean of the word", error(mean, target)


def error(colours: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """Mean CIEDE2000 of colours [garments, 3]."""
    return float(deltaE_ciede2000(colours, target).mean())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--scales", type=float, nargs="*", default=[], help="guidance scales beside none")
    parser.add_argument("--count", type=int, default=0, help="the first garments alone; 0 for all")
    parser.add_argument("--bucket", type=int, default=96)
    parser.add_argument("--frames", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline(ModelSource(options.weights))
    sizes = InputOptions(
        bucket_classes=(options.bucket,), reference_classes=(options.bucket,), grid=pipeline.grid,
        num_frames=options.frames, text_size=(options.bucket, options.bucket),
    )  # fmt: skip
    manifest = own.sample(options.samples, heldout_fraction=0.0)
    garments = [item for item in manifest.items if item.extra.get("garment")]
    scales = [1.0, *options.scales]
    made, outside = {scale: [] for scale in scales}, {scale: [] for scale in scales}
    source, target, through, words = [], [], [], []
    for item in garments[: options.count or None]:
        inputs = load_item(item, manifest.root, sizes)
        region = edit_region(inputs)
        if region is None or not region.any():
            continue
        source.append(editing.mean_lab(inputs.source, region))
        target.append(editing.mean_lab(inputs.target, region))
        through.append(editing.mean_lab(pipeline.decode(pipeline.latents(inputs.target)), region))
        words.append(item.text.split()[-1] if item.task != "ref_edit" else "")
        for scale in scales:
            colours, psnr = results(pipeline, inputs, region, options.steps, scale, options.seeds)
            made[scale].append(colours)
            outside[scale].append(psnr)
    asked, before = np.array(target), np.array(source)
    print(f"{len(asked)} held-out garments, {options.seeds} seeds, {options.steps} steps")
    print(f"floor | {error(np.array(through), asked):.2f}\nsource copied | {error(before, asked):.2f}")
    for scale in scales:
        errors = deltaE_ciede2000(np.array(made[scale]), asked[:, None])
        print(
            f"scale {scale:g} | {errors.mean():.2f} | best of {options.seeds} {errors.min(1).mean():.2f} | spread "
            f"{errors.std(1).mean():.2f} | outside {np.nanmean(outside[scale]):.2f} dB"
        )
    for name, value in bounds(np.array(made[1.0]).mean(1), before, asked, words):
        print(f"{name} | {value:.2f}")


if __name__ == "__main__":
    main()
