"""Distances between the set of results and the set of targets, from features kept by learned metrics."""

from collections.abc import Sequence

import numpy as np

from loomvideo.pipelines.evaluation.rows import Row
from loomvideo.pipelines.evaluation.store import Store

RESAMPLES = 500
FEATURES_FILE = "features.npz"


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID: unbiased squared MMD of features ``[n, d]`` with the cubic polynomial kernel (Binkowski et al. 2018).

    Unlike a Fréchet distance it is unbiased at the hundred or so samples that a suite has.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("KID needs at least two samples on each side")
    return _mmd(_kernel(a, a), _kernel(b, b), _kernel(a, b))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians through two feature sets ``[n, d]`` (Heusel et al. 2017; FVD on I3D features).

    Biased upwards by small sets: compare only figures over equally many samples.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a Fréchet distance needs at least two samples on each side")
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The product of two covariances has real, non-negative eigenvalues up to rounding.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots)


def set_distances(store: Store, rows: Sequence[Row], units: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Distances with 95 % intervals by metric: ``kid_dino``, ``kid_lite``, ``kvd`` and ``fvd``.

    Intervals resample sources with all that is made from them; a Fréchet distance has none (NaN), as resampling with
    ties inflates it.

    Args:
        store: Where the features are.
        rows: The rows of one series and suite.
        units: The source of each row.
    """
    found: dict[str, tuple[float, float, float]] = {}
    chosen = [(row, unit) for row, unit in zip(rows, units, strict=True) if row.get("features")]
    loaded = [dict(np.load(store.entry("metrics", row["features"]) / FEATURES_FILE)) for row, _ in chosen]
    networks = (("dino", "kid_dino", None), ("lite", "kid_lite", None), ("i3d", "kvd", "fvd"))
    for network, kernel_name, frechet_name in networks:
        pairs = [
            (features[f"result/{network}"], features[f"target/{network}"], unit)
            for features, (_, unit) in zip(loaded, chosen, strict=True)
            if f"result/{network}" in features
        ]
        if len({unit for *_, unit in pairs}) < 2:
            continue
        results, targets = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        found[kernel_name] = _with_interval(results, targets, [pair[:2] for pair in pairs], [p[2] for p in pairs])
        if frechet_name:
            found[frechet_name] = (frechet_distance(results, targets), np.nan, np.nan)
    return found


def _with_interval(
    results: np.ndarray, targets: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]], units: Sequence[str]
) -> tuple[float, float, float]:
    names = sorted(set(units))
    owner = [np.repeat([names.index(u) for u in units], [len(p[side]) for p in pairs]) for side in (0, 1)]
    members = [[np.flatnonzero(o == n) for n in range(len(names))] for o in owner]
    within_a, within_b, across = _kernel(results, results), _kernel(targets, targets), _kernel(results, targets)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(names), size=len(names))
        a, b = (np.concatenate([m[n] for n in drawn]) for m in members)
        # A row drawn twice would be compared with itself, which an unbiased estimate must leave out.
        values.append(_mmd(within_a[np.ix_(a, a)], within_b[np.ix_(b, b)], across[np.ix_(a, b)], a, b))
    low, high = np.quantile(values, (0.025, 0.975))
    return _mmd(within_a, within_b, across), float(low), float(high)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3


def _mmd(
    aa: np.ndarray,
    bb: np.ndarray,
    ab: np.ndarray,
    identity_a: np.ndarray | None = None,
    identity_b: np.ndarray | None = None,
) -> float:
    def mean_of_others(kernel: np.ndarray, identity: np.ndarray | None) -> float:
        identity = np.arange(len(kernel)) if identity is None else identity
        others = identity[:, None] != identity[None]
        return float(kernel[others].mean())

    return mean_of_others(aa, identity_a) + mean_of_others(bb, identity_b) - 2 * float(ab.mean())
