"""Packing of the published stages at 8, 64 and 512 ranks: fill, true FLOP imbalance, MLLM tokens, planning time.

Run ``python benchmarks/packing.py``. Sets are synthetic, of the published buckets and the 5b model: ``stage 1`` is
images and 33-frame clips 1:1 with captions of 80 to 220 tokens; ``stage 3`` all six tasks alike, clips of up to 121
frames, up to three references; ``3:1`` image to video edits. Imbalance is of the counted operations of what each visit
computes, guidance dropout included; ``plain`` budgets plain tokens, as a packer does that counts no operations.
"""

import argparse
import dataclasses
import time

import numpy as np
import pyarrow as pa

from loomvideo.model.buckets import IMAGE_BUCKETS
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.training.config import ObjectiveConfig
from loomvideo.pipelines.training.recipe import LoomVideoRecipe
from loomvideo.platform.training.config import MixtureConfig, PackConfig
from loomvideo.platform.training.order import SampleOrder, SampleSizes, build_sources
from loomvideo.platform.training.packing import PackPlanner

NULL_TOKENS = 8
"""MLLM tokens of the empty message."""
MIXTURES = {
    "stage 1": (256, 33, {"t2i": 1, "t2v": 1}),
    "stage 3": (640, 121, dict.fromkeys(("t2i", "t2v", "image_edit", "video_edit", "ref_edit", "mi2v"), 1)),
    "3:1": (640, 121, {"image_edit": 3, "video_edit": 1}),
}


def synthetic_index(area, most_frames, tasks, num_samples=1500):
    """An index of ``num_samples`` samples of every task."""
    rng = np.random.default_rng(0)
    rows = []
    for task in tasks:
        for number in range(num_samples):
            width, height = IMAGE_BUCKETS[area][rng.integers(len(IMAGE_BUCKETS[area]))]
            frames = 1
            if task not in ("t2i", "image_edit"):
                # Most clips are cut to the full length, some are shorter.
                frames = (
                    most_frames
                    if rng.random() < 0.7
                    else 4 * int(rng.integers(most_frames // 12, most_frames // 4)) + 1
                )
            a_frame = width * height // 1024
            num_references = int(rng.integers(1, 4)) if task in ("ref_edit", "mi2v") else 0
            text = int(rng.integers(20, 80)) if task.endswith("_edit") else int(rng.integers(80, 221))
            # The MLLM sees a source image once, a clip as two pairs of frames with their times, every reference.
            shown = {"image_edit": 1, "video_edit": 2, "ref_edit": 2}.get(task, 0) + num_references
            rows.append(
                {
                    "key": f"{task}-{number}",
                    "task": task,
                    "dataset": "synthetic",
                    "split": "train",
                    "width": width,
                    "height": height,
                    "num_frames": frames,
                    "dit_tokens": ((frames - 1) // 4 + 1 + num_references) * a_frame,
                    "mllm_tokens": 15 + text + shown * (a_frame + 12),
                }
            )
    return pa.Table.from_pylist(rows)


def recipe_of(name):
    """The recipe of a published stage, which knows costs and dropout."""
    objective = ObjectiveConfig(use_source_embedding=name != "stage 1")
    # Only the number of tokens of the empty message is read.
    return LoomVideoRecipe("5b", objective, [np.empty((1, NULL_TOKENS, 0))])


def figures(recipe, index, weights, config, ranks, steps, plain):
    """Fill, mean and worst imbalance of true operations, mean and most MLLM tokens of a pack, seconds a step."""
    true = recipe.sample_sizes(0, index)
    sizes = SampleSizes.plain(true.tokens[:, 0]) if plain else true
    sources = build_sources([index], [sizes], "train", MixtureConfig(tasks=weights))
    order = SampleOrder(sources, 0, None if plain else recipe.visit_variant)
    measured = SampleOrder(
        build_sources([index], [true], "train", MixtureConfig(tasks=weights)), 0, recipe.visit_variant
    )
    planner = PackPlanner(order, config, ranks)
    fills, imbalances, context, spent = [], [], [], 0.0
    for _ in range(steps):
        started = time.process_time()
        packs = planner.next_step()
        spent += time.process_time() - started
        visits = [[measured.draw(draw.source, draw.number) for draw in pack] for pack in packs]
        costs = np.array([sum(draw.cost for draw in pack) for pack in visits])
        fills.append(sum(draw.cost for pack in packs for draw in pack) / (config.tokens * ranks))
        imbalances.append(costs.max() / costs.mean() - 1)
        context += [sum(draw.context_tokens for draw in pack) for pack in visits]
    return np.mean(fills), np.mean(imbalances), max(imbalances), np.mean(context), max(context), spent / steps


def main():
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", nargs="*", default=[], help="NAME=TOKENS[/MLLM TOKENS]; default: the presets'")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 512])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    from loomvideo.jobs.command import job_config
    from loomvideo.jobs.training.config import TrainingJobConfig

    stages = {
        name: job_config(TrainingJobConfig, "pretrain", [f"preset=5b-stage{name[-1]}"])
        for name in ("stage 1", "stage 3")
    }
    packs = {name: stage.training.pack for name, stage in stages.items()} | {"3:1": stages["stage 3"].training.pack}
    for entry in arguments.budgets:
        name, _, budget = entry.rpartition("=")
        tokens, _, context = budget.partition("/")
        packs[name] = PackConfig(tokens=int(tokens), max_context_tokens=int(context or 0))
    states_bytes = model_size("5b").dit.num_layers * model_size("5b").dit.mllm_dim * 2
    print("mixture  budget  packer   ranks   fill  imbalance  worst  MLLM mean  MLLM most  host GiB/pack  ms/step")
    for name, (area, frames, weights) in MIXTURES.items():
        recipe, index = recipe_of(name), synthetic_index(area, frames, weights)
        counted = dataclasses.replace(packs[name], max_tokens=0)
        plain = PackConfig(tokens=10_240 if name == "stage 1" else 16_384)
        for packer, config in (("counted", counted), ("plain", plain)):
            for ranks in arguments.ranks:
                fill, mean, worst, context, most, seconds = figures(
                    recipe, index, weights, config, ranks, arguments.steps, packer == "plain"
                )
                print(
                    f"{name:8s} {config.tokens:6d}  {packer:8s} {ranks:4d}  {fill:6.1%} {mean:9.2%} {worst:7.2%}"
                    f"  {context:9.0f}  {most:9d}  {most * states_bytes / 2**30:13.2f}  {1e3 * seconds:7.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
