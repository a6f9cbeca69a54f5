"""Packing of a mixed set at 8, 64 and 512 ranks: fill, imbalance and planning time.

Run ``python benchmarks/packing.py``. The set mixes images of several sizes and 33-, 97- and 121-frame clips over four
tasks, 200 samples each; attention costs as much as all else at 23,566 tokens, as in the 5b model (`loomvideo plan`).
``plain`` fills packs by order of arrival, one after another, under the same budget.
"""

import time

import numpy as np
import pyarrow as pa

from loomvideo.platform.training.config import MixtureConfig, PackConfig
from loomvideo.platform.training.order import SampleOrder, build_sources
from loomvideo.platform.training.packing import PackPlanner, fill_and_imbalance, sample_cost

LENGTHS = {
    "t2i": [256, 400, 1560],
    "t2v": [2304, 3510, 9750],
    "video_edit": [3510, 9750, 12090],
    "image_edit": [400, 768, 1560],
}
ATTENTION_TOKENS = 23_566
NUM_STEPS = 30


def mixed_sources():
    """200 samples of every task."""
    rng = np.random.default_rng(0)
    rows = [(f"{task}-{n}", task, "mixed", "train") for task in LENGTHS for n in range(200)]
    tokens = [int(rng.choice(LENGTHS[task])) for _, task, _, _ in rows]
    names = ("key", "task", "dataset", "split")
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    return build_sources([table], [tokens], "train", MixtureConfig())


def plain_packs(order, config, num_packs):
    """Packs filled in order of arrival."""
    packs, gap = [[]], float(config.tokens)
    while True:
        draw = order.next()
        cost = sample_cost(draw.tokens, config.attention_tokens)
        if cost > gap:
            if len(packs) == num_packs:
                return packs
            packs.append([])
            gap = float(config.tokens)
        packs[-1].append(draw)
        gap -= cost


def main():
    """Print a table."""
    sources = mixed_sources()
    print("budget  ranks  packer       fill   imbalance  worst  ms/step")
    for budget in (20_000, 28_000, 32_000):
        for ranks in (8, 64, 512):
            config = PackConfig(budget, ATTENTION_TOKENS)
            planner, arrival = PackPlanner(SampleOrder(sources, 0), config, ranks), SampleOrder(sources, 0)
            for name, step in (
                ("best fit", planner.next_step),
                ("plain", lambda order=arrival, c=config, n=ranks: plain_packs(order, c, n)),
            ):
                started = time.process_time()
                figures = np.array([fill_and_imbalance(step(), config) for _ in range(NUM_STEPS)])
                ms = 1e3 * (time.process_time() - started) / NUM_STEPS
                fill, imbalance = figures.mean(0)
                shares = f"{fill:7.1%}  {imbalance:9.2%}  {figures[:, 1].max():6.2%}"
                print(f"{budget:6d}  {ranks:5d}  {name:9s}  {shares}  {ms:6.1f}")


if __name__ == "__main__":
    main()
