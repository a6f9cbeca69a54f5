"""How often ``loomvideo gate`` passes, fails and cannot tell, over sources, true gain and samples a source.

    python benchmarks/gate.py [--trials 2000] [--margin 0.1 0.25]

Made-up judge scores, rounded to 1 to 5: a source has its own level (deviation 0.7), every sample a deviation of 0.6
that both runs share and one of 0.6 of its own. The gate decides on ``judge`` at its level of 5 %. A gain of minus the
margin is the boundary: a pass there is false, and the share should be 5 % or less. At no gain everything but a pass is
a false fail. The gain is that of the scores: clipping at the ends of the scale swallows a tenth of a shift, which is
therefore searched for.
"""

import argparse
import dataclasses
import functools

import numpy as np
from scipy import optimize

from loomvideo.pipelines.evaluation.gate import FAILED, PASSED, GateRule, decide_gate
from loomvideo.pipelines.evaluation.results import SavedSuite


@dataclasses.dataclass(frozen=True)
class MadeUp(SavedSuite):
    """A suite of scores without rows."""

    scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    sources: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def values(self) -> dict[str, dict[str, float]]:
        """See :class:`SavedSuite`."""
        return {str(n): {"judge": float(score)} for n, score in enumerate(self.scores)}

    def units(self) -> dict[str, str]:
        """See :class:`SavedSuite`."""
        return {str(n): str(source) for n, source in enumerate(self.sources)}

    def categories(self) -> dict[str, str]:
        """See :class:`SavedSuite`."""
        return {str(n): "all" for n in range(len(self.scores))}


@functools.cache
def shift_of(gain: float) -> float:
    """The shift before rounding and clipping that makes a true difference of ``gain`` in the scores."""
    raw = np.random.default_rng(0).normal(3.2, np.sqrt(0.7**2 + 0.6**2 + 0.6**2), 200_000)

    def mean(shift: float) -> float:
        # A value rounds up with its fraction as probability; both ends are clipped.
        low = np.floor(raw + shift)
        fraction = raw + shift - low
        return float(((1 - fraction) * np.clip(low, 1, 5) + fraction * np.clip(low + 1, 1, 5)).mean())

    def error(shift: float) -> float:
        return mean(shift) - mean(0.0) - gain

    return 0.0 if gain == 0 else float(optimize.brentq(error, 0, 2 * gain, xtol=1e-4))


def two_runs(sources: int, per_source: int, gain: float, rng: np.random.Generator) -> dict[str, MadeUp]:
    """Scores of a baseline and of a candidate that is better by ``gain`` before rounding."""
    names = np.repeat(np.arange(sources), per_source)
    level = rng.normal(3.2, 0.7, sources)[names] + rng.normal(0, 0.6, len(names))
    runs = {}
    for name, shift in (("a", 0.0), ("b", shift_of(gain))):
        raw = level + shift + rng.normal(0, 0.6, len(names))
        # Randomised rounding keeps the mean but at the ends of the scale.
        scores = np.clip(np.floor(raw + rng.random(len(names))), 1, 5)
        runs[name] = MadeUp("made-up", {"status": "complete"}, [], [], scores, names)
    return runs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--sources", type=int, nargs="+", default=[4, 12, 54, 120, 431])
    parser.add_argument("--per-source", type=int, nargs="+", default=[1])
    parser.add_argument("--margin", type=float, nargs="+", default=[0.1, 0.25])
    arguments = parser.parse_args()
    print("| sources | samples a source | margin | true gain | passed | failed | too few to tell | stated power |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for sources in arguments.sources:
        for per_source in arguments.per_source:
            for margin in arguments.margin:
                for gain in (-margin, 0.0, margin):
                    rng = np.random.default_rng(1)
                    verdicts, powers = [], []
                    for _ in range(arguments.trials):
                        runs = two_runs(sources, per_source, gain, rng)
                        rule = GateRule("s", "judge", margin=margin)
                        decision = decide_gate(rule, {"s": runs["a"]}, {"s": runs["b"]})
                        verdicts.append(decision.verdict)
                        powers.append(decision.power)
                    shares = [verdicts.count(PASSED), verdicts.count(FAILED)]
                    shares.append(len(verdicts) - sum(shares))
                    cells = " | ".join(f"{share / len(verdicts):.1%}" for share in shares)
                    power = f"{np.mean(powers):.0%}" if gain == 0 else ""
                    print(f"| {sources} | {per_source} | {margin:g} | {gain:+g} | {cells} | {power} |", flush=True)


if __name__ == "__main__":
    main()
