"""The statistics of the report, in numpy.

Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice", arXiv:2108.13264. Scores of
one algorithm are a list with one array an environment, each holding one number a run (seed).
Intervals are percentile bootstrap intervals with a fixed seed, so that a table does not change
when it is made again. With few runs they are too narrow: n runs give an interval of the mean about
sqrt((n - 1) / n) as wide as it should be, 0.89 for five.
"""

from collections.abc import Callable, Sequence

import numpy as np

REPETITIONS, LEVEL = 10_000, 0.95


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean without the lowest and the highest quarter.

    A quarter is rounded down to whole values (as scipy.stats.trim_mean does): with up to three
    values it is the mean. Shapes: (..., n) -> (...).
    """
    values = np.sort(np.moveaxis(np.asarray(values, float), axis, -1), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def resample(scores: Sequence[np.ndarray], repetitions: int, seed: int = 0) -> list[np.ndarray]:
    """Stratified: runs drawn with replacement within each environment.

    Shapes: one (n,) an environment -> one (repetitions, n) an environment.
    """
    rng = np.random.default_rng(seed)
    return [np.asarray(x)[rng.integers(0, len(x), (repetitions, len(x)))] for x in scores]


def interval(
    scores: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """95 % stratified bootstrap interval of a statistic over all runs of all environments.

    `statistic` maps (repetitions, runs) to (repetitions,).
    """
    drawn = np.concatenate(resample(scores, REPETITIONS), axis=1)
    tails = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    low, high = np.percentile(statistic(drawn), tails)
    return float(low), float(high)


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean curve. Shapes: (runs, points) -> (points,), (points,)."""
    rng = np.random.default_rng(0)
    drawn = curves[rng.integers(0, len(curves), (2000, len(curves)))].mean(1)
    tails = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    low, high = np.percentile(drawn, tails, axis=0)
    return low, high


def performance_profile(scores: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """Share of runs above each threshold, every environment counting the same.

    Shapes: thresholds (k,) -> (k,). Source: Agarwal et al. 2021, section 4.2.
    """
    shares = [(np.asarray(x)[:, None] > thresholds).mean(0) for x in scores]
    return np.mean(shares, axis=0)


def profile_band(scores: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """95 % stratified bootstrap interval of the profile. Shapes: (k,) -> (2, k)."""
    drawn = resample(scores, 2000)
    shares = np.mean([(x[:, :, None] > thresholds).mean(1) for x in drawn], axis=0)
    return np.percentile(shares, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2], axis=0)


def better(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Chance that a run of x beats a run of y, a tie counting half. Shapes: (..., n), (..., m)."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def probability_of_improvement(
    x: Sequence[np.ndarray], y: Sequence[np.ndarray]
) -> tuple[float, float, float]:
    """Chance that x beats y on an environment drawn at random, with its 95 % interval.

    Source: Agarwal et al. 2021, section 4.3 (Mann-Whitney U over the product of the run counts).
    """
    x, y = [np.asarray(a) for a in x], [np.asarray(b) for b in y]
    value = np.mean([better(a, b) for a, b in zip(x, y, strict=True)])
    pairs = zip(resample(x, 2000, seed=0), resample(y, 2000, seed=1), strict=True)
    drawn = np.mean([better(a, b) for a, b in pairs], axis=0)
    low, high = np.percentile(drawn, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return float(value), float(low), float(high)
