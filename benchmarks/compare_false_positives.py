"""How often ``loomvideo compare`` finds a difference between runs of one checkpoint that differ only in their seed.

    python benchmarks/compare_false_positives.py seed0 seed1 seed2 seed3 [--runs runs] [--resamples 200]

Each resample draws a share of the sources without replacement and, for every source, two of the runs at random as its
baseline and its candidate, so that no difference can be there. Printed: the share of resamples with any verdict after
Holm over all metrics of a suite (the rate a user sees; it should be about 5 % or less), and per metric the share of
uncorrected p-values under 0.05.
"""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np

from loomvideo.pipelines.evaluation.compare import compare_runs
from loomvideo.pipelines.evaluation.results import SavedSuite, load_suites


def resample(suites: list[SavedSuite], share: float, rng: np.random.Generator) -> tuple[SavedSuite, SavedSuite]:
    """Two made-up runs of a suite: a part of the sources, each with two different real runs in random order."""
    units = suites[0].units()
    names = sorted(set(units.values()))
    chosen = rng.choice(len(names), max(2, round(share * len(names))), replace=False)
    pairs = {names[index]: rng.choice(len(suites), 2, replace=False) for index in chosen}
    by_key = [{row["key"]: row for row in suite.rows if row["series"] == "model"} for suite in suites]
    sides = []
    for side in (0, 1):
        rows = [by_key[pairs[unit][side]][key] for key, unit in units.items() if unit in pairs]
        sides.append(dataclasses.replace(suites[0], rows=rows, figures=[]))
    return sides[0], sides[1]


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="RUN", help="evaluation runs of one checkpoint, seed by seed")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.7, help="of the sources in each resample")
    options = parser.parse_args()
    if len(options.names) < 2:
        parser.error("name at least two runs")
    loaded = [load_suites(options.runs / "evaluate" / name) for name in options.names]
    rng = np.random.default_rng(0)
    for suite in sorted(set.intersection(*(set(run) for run in loaded))):
        with_a_verdict, uncorrected, tests = 0, Counter(), 0
        for number in range(options.resamples):
            a, b = resample([run[suite] for run in loaded], options.share, rng)
            overall = compare_runs({suite: a}, {suite: b}, seed=number, by_category=False)
            with_a_verdict += any(c.verdict != "no difference found" for c in overall)
            uncorrected.update(c.metric for c in overall if c.test.permutation_p < 0.05)
            tests = max(tests, len(overall))
        rate = with_a_verdict / options.resamples
        print(f"{suite}: {options.resamples} resamples of {len(a.rows)} samples, {tests} metrics")
        print(f"  any verdict after Holm: {rate:.1%} of resamples")
        print(f"  p < 0.05 before Holm: {sum(uncorrected.values()) / (tests * options.resamples):.1%} of tests")
        for metric, count in uncorrected.most_common(5):
            print(f"    {metric}: {count / options.resamples:.1%}")


if __name__ == "__main__":
    main()
