"""The statistics of the report, in numpy.

Over environments: Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice",
arXiv:2108.13264, with the same weight for every environment, whatever its number of runs. Scores of
one algorithm are a list with one array an environment, each holding one number a run (seed).
Intervals are 95 % intervals: Student's for the mean of one environment's runs; over environments,
and for probabilities, percentile bootstrap intervals with a fixed seed, so that a table does not
change when it is made again. The latter are too narrow for few runs: resampling n of them shows
only (n - 1) / n of their variance.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

REPETITIONS, LEVEL = 10_000, 0.95
TAILS = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)
FEWEST = 3  # runs of an environment, for an interval
# Two-sided 95 % quantiles of Student's t, for 1, 2, ... degrees of freedom.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's interval of the mean of normally distributed runs; NaN below three runs.

    Shapes: (..., n) -> (...), (...).
    """
    values = np.asarray(values, float)
    n = values.shape[-1]
    mean = values.mean(-1)
    if n < FEWEST:
        return np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    z = 1.960  # beyond the table: the first terms of the expansion in 1 / (n - 1)
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else z + (z**3 + z) / (4 * (n - 1))
    half = t * values.std(-1, ddof=1) / math.sqrt(n)
    return mean - half, mean + half


def equal_weights(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Weights of all runs, one environment after the other: each environment's sum is the same."""
    return np.concatenate([np.full(len(x), 1 / len(x) / len(scores)) for x in scores])


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean. Shapes: (..., n), (n,) -> (...)."""
    return (np.asarray(values) * weights).sum(-1)


def iqm(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Interquartile mean: the mean of the middle half of the weight.

    A run at the border of that half counts with the part of its weight that is inside
    (scipy.stats.trim_mean rounds to whole runs instead). Shapes: (..., n), (n,) -> (...).
    """
    values = np.asarray(values, float)
    order = np.argsort(values, axis=-1)
    upper = np.cumsum(weights[order], axis=-1)
    lower = upper - weights[order]
    inside = np.clip(np.minimum(upper, 0.75) - np.maximum(lower, 0.25), 0, None)
    return (np.take_along_axis(values, order, -1) * inside).sum(-1) / 0.5


def resample(scores: Sequence[np.ndarray], repetitions: int, seed: int = 0) -> list[np.ndarray]:
    """Stratified: runs drawn with replacement within each environment.

    Shapes: one (n,) an environment -> one (repetitions, n) an environment.
    """
    rng = np.random.default_rng(seed)
    return [np.asarray(x)[rng.integers(0, len(x), (repetitions, len(x)))] for x in scores]


def interval(
    scores: Sequence[np.ndarray], statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Stratified bootstrap interval of a statistic over all runs of all environments.

    `statistic` maps (repetitions, runs) and weights (runs,) to (repetitions,).
    """
    drawn = np.concatenate(resample(scores, REPETITIONS), axis=1)
    low, high = np.percentile(statistic(drawn, equal_weights(scores)), TAILS)
    return float(low), float(high)


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
    return np.percentile(shares, TAILS, axis=0)


def better(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Chance that a run of x beats a run of y, a tie counting half. Shapes: (..., n), (..., m)."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def every_resample(n: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each of n runs is drawn, in all resamples, and their probabilities.

    Shapes: (k, n), (k,); k is 10 for n = 3, 126 for n = 5.
    """
    drawn = itertools.combinations_with_replacement(range(n), n)
    counts = np.array([np.bincount(x, minlength=n) for x in drawn])
    ways = [math.factorial(n) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
    return counts, np.array(ways) / n**n


def probability_of_improvement(
    x: Sequence[np.ndarray], y: Sequence[np.ndarray]
) -> tuple[float, float, float]:
    """Chance that x beats y on an environment drawn at random, with its bootstrap interval.

    For one environment with up to seven runs each, from all resamples instead of random ones.
    Source: Agarwal et al. 2021, section 4.3 (Mann-Whitney U over the product of the run counts).
    """
    x, y = [np.asarray(a) for a in x], [np.asarray(b) for b in y]
    value = np.mean([better(a, b) for a, b in zip(x, y, strict=True)])
    if len(x) == 1 and max(len(x[0]), len(y[0])) <= 7:
        (a, of_a), (b, of_b) = every_resample(len(x[0])), every_resample(len(y[0]))
        wins = (x[0][:, None] > y[0]) + 0.5 * (x[0][:, None] == y[0])
        chances = (a / len(x[0])) @ wins @ (b / len(y[0])).T
        order = np.argsort(chances, axis=None)
        below = np.cumsum(np.outer(of_a, of_b).ravel()[order])
        places = np.searchsorted(below, np.array(TAILS) / 100)
        low, high = chances.ravel()[order][places]
    else:
        pairs = zip(resample(x, 2000, seed=0), resample(y, 2000, seed=1), strict=True)
        low, high = np.percentile(np.mean([better(a, b) for a, b in pairs], axis=0), TAILS)
    return float(value), float(low), float(high)
