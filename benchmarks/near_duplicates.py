"""Which near-duplicates are found among a million clips, by how much their hashes differ: recall, time and memory.

    python benchmarks/near_duplicates.py --clips 1000000

Clips are eight random 64-bit hashes. Among them lie copies of which every hash has some bits flipped at random and, of
some, two of the eight key frames are others; their captions differ, which plays no part.
"""

import argparse
import json
import resource
import time

import numpy as np

from loomvideo.pipelines.prepare.curation.duplicates import near_duplicates
from loomvideo.pipelines.prepare.curation.options import DuplicateLimits

COPIES_OF_A_KIND = 500


def flipped(random: np.random.Generator, hashes: np.ndarray, bits: int) -> np.ndarray:
    """Hashes with that many different bits flipped in each."""
    places = np.argsort(random.random((*hashes.shape, 64)), axis=-1)[..., :bits].astype(np.uint64)
    return hashes ^ np.bitwise_or.reduce(np.uint64(1) << places, axis=-1) if bits else hashes.copy()


def main() -> None:
    """Plant copies, search, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    table = random.integers(1, 2**63, (options.clips, 8), dtype=np.uint64)
    kinds = [(bits, others) for bits in range(7) for others in (0, 2)]
    places = random.choice(options.clips // 2, (len(kinds), COPIES_OF_A_KIND), replace=False)
    for number, (bits, others) in enumerate(kinds):
        copies = flipped(random, table[places[number]], bits)
        if others:
            copies[:, :others] = random.integers(1, 2**63, (COPIES_OF_A_KIND, others), dtype=np.uint64)
        start = options.clips - (number + 1) * COPIES_OF_A_KIND
        table[start : start + COPIES_OF_A_KIND] = copies
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.process_time()
    found = near_duplicates(table, [0] * options.clips, DuplicateLimits())
    cpu_s = time.process_time() - began
    recall = {}
    right = 0
    for number, (bits, others) in enumerate(kinds):
        start = options.clips - (number + 1) * COPIES_OF_A_KIND
        hits = sum(found.get(start + i) == int(places[number][i]) for i in range(COPIES_OF_A_KIND))
        recall[f"{bits} bits, {others} other frames"] = hits / COPIES_OF_A_KIND
        right += hits
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"clips": options.clips, "recall": recall, "wrong": len(found) - right, "cpu_s": cpu_s}
    print(json.dumps(figures | {"peak_mb": peak, "of_it_before_mb": before}, indent=1))


if __name__ == "__main__":
    main()
