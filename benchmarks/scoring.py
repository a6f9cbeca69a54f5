"""CPU seconds of scoring a result as a preset of `loomvideo prefer` does, on one thread, by its length and edit.

python benchmarks/scoring.py [--preset 5b-lora] [--frames 9 121] [--size 832x480] [--together 0]

With ``--together N`` also how long N results take one after another and all at once, as actors with N CPUs score them.
"""

import argparse
import time

import cv2
import numpy as np
import torch

from loomvideo.jobs.command import job_config
from loomvideo.jobs.training.config import PreferJobConfig
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.suites.items import EvalItem

SHARES = (0.05, 0.2)
"""Of a frame, that the edit changes."""


def edit(frames: int, width: int, height: int, share: float) -> tuple[np.ndarray, LoadedItem]:
    """A result and what it is measured against: a moving picture of which a stripe is recoloured."""
    random = np.random.default_rng(0)
    cells = random.integers(0, 255, (30, 52, 3), dtype=np.uint8)
    picture = cv2.resize(cells, (width + 32, height + 32), interpolation=cv2.INTER_CUBIC)
    source = np.stack([picture[i % 32 : i % 32 + height, i % 32 : i % 32 + width] for i in range(frames)])
    target = source.copy()
    target[:, :, : int(width * share)] = (200, 30, 40)
    noise = random.integers(-6, 7, target.shape, dtype=np.int8)
    result = np.clip(target.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    item = EvalItem("round", "edit", "video_edit", "", "", source="edit", aligned=True, extra={"garment": True})
    return result, LoadedItem(item, source, (), target, None, (width, height), frames, 24.0)


def compare(config: PreferJobConfig, count: int, made: tuple[np.ndarray, LoadedItem]) -> None:
    """Print seconds of one after another and of all at once, in turns."""
    for threads in (1, count, 1, count):
        config.prefer.nft.cpus = threads
        rewarder, start = config.rewarder(), time.perf_counter()
        rewarder.scores([made[0]] * count, made[1])
        print(f"{count} results, {threads} at once: {time.perf_counter() - start:.2f} s")


def main() -> None:
    """Print a line a case, twice each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="5b-lora")
    parser.add_argument("--frames", type=int, nargs="+", default=[9, 121])
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--together", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    config = job_config(PreferJobConfig, "prefer", [f"preset={given.preset}"])
    config.prefer.nft.cpus = 1
    rewarder = config.rewarder()
    width, height = map(int, given.size.split("x"))
    print(f"measured: {', '.join(sorted(rewarder.measured))}")
    for frames in given.frames:
        for share in SHARES:
            result, inputs = edit(frames, width, height, share)
            for _ in range(2):
                start = time.process_time()
                score = rewarder.score(result, inputs)
                seconds = time.process_time() - start
                print(f"{frames} frames, {share:.0%} edited: {seconds:.2f} s, {score.metrics}")
        if given.together:
            compare(config, given.together, edit(frames, width, height, SHARES[0]))


if __name__ == "__main__":
    main()
