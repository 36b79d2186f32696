"""The statistics of the report, in numpy.

Over environments: Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice",
arXiv:2108.13264, with the same weight for every environment, whatever its number of runs. Scores of
one algorithm are a list with one array an environment, each holding one number a run (seed).
Intervals are 95 % intervals: Student's for the mean of one environment's runs; Newcombe's for the
chance that a run beats another; over environments, stratified bootstrap intervals, widened for few
runs, with a fixed seed, so that a table does not change when it is made again.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

REPETITIONS, LEVEL = 10_000, 0.95
NORMAL = NormalDist()
Z = NORMAL.inv_cdf((1 + LEVEL) / 2)
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
    half = student(n - 1) * values.std(-1, ddof=1) / math.sqrt(n)
    return mean - half, mean + half


def student(degrees: int) -> float:
    """Two-sided 95 % quantile; beyond the table, the first terms of its expansion."""
    known = degrees <= len(STUDENT)
    return STUDENT[degrees - 1] if known else Z + (Z**3 + Z) / (4 * degrees)


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


def resample(scores: Sequence[np.ndarray], repetitions: int) -> list[np.ndarray]:
    """Stratified: runs drawn with replacement within each environment.

    Shapes: one (n,) an environment -> one (repetitions, n) an environment.
    """
    rng = np.random.default_rng(0)
    return [np.asarray(x)[rng.integers(0, len(x), (repetitions, len(x)))] for x in scores]


def widening(scores: Sequence[np.ndarray]) -> float:
    """How many of the bootstrap's standard deviations are half a 95 % interval.

    Resampling n runs shows only (n - 1) / n of their variance, and few runs say little about it: so
    Student's t, with the degrees of freedom of a sum of unequal variances. NaN for single runs. An
    interquartile mean of few runs needs more, if one environment is much noisier than the others.
    Sources: Hesterberg 2015, arXiv:1411.5279, section 3; Satterthwaite 1946, Biometrics Bulletin 2.
    """
    counts = np.array([len(x) for x in scores])
    if min(counts) < 2:
        return math.nan
    variances = np.array([np.var(x, ddof=1) / len(x) for x in scores])  # of the means
    if not variances.any():  # equal runs: no width, whatever the factor
        return Z
    degrees = variances.sum() ** 2 / (variances**2 / (counts - 1)).sum()
    shown = (variances * (1 - 1 / counts)).sum() / variances.sum()
    return student(int(degrees + 1e-9)) / math.sqrt(shown)


def interval(
    scores: Sequence[np.ndarray], statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Stratified bootstrap interval of a statistic over all runs of all environments.

    `statistic` maps (repetitions, runs) and weights (runs,) to (repetitions,).
    """
    weights = equal_weights(scores)
    drawn = np.concatenate(resample(scores, REPETITIONS), axis=1)
    value = float(statistic(np.concatenate(scores), weights))
    half = widening(scores) * float(statistic(drawn, weights).std())
    return value - half, value + half


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
    half = widening(scores) * shares.std(0)
    profile = performance_profile(scores, thresholds)
    return np.clip([profile - half, profile + half], 0, 1)


def better(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Chance that a run of x beats a run of y, a tie counting half. Shapes: (..., n), (..., m)."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def probability_of_improvement(
    x: Sequence[np.ndarray], y: Sequence[np.ndarray]
) -> tuple[float, float, float]:
    """Chance that x beats y on an environment drawn at random, with its interval.

    The interval has all chances t that are within 1.96 standard deviations of the value; these are
    the Mann-Whitney statistic's if the chance is t, so there is a width even where one always wins.
    Sources: Agarwal et al. 2021, section 4.3; Newcombe 2006, Statistics in Medicine 25, method 5,
    here with the mean over environments.
    """
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(x, y, strict=True)]
    value = float(np.mean([better(a, b) for a, b in pairs]))

    def variance(t: float) -> float:
        found = 0.0
        for a, b in pairs:
            more = ((len(a) + len(b)) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
            found += t * (1 - t) * (1 + more) / (len(a) * len(b))
        return found / len(pairs) ** 2

    def end(outside: float) -> float:
        inside = value
        for _ in range(50):
            middle = (inside + outside) / 2
            if abs(value - middle) <= Z * math.sqrt(variance(middle)):
                inside = middle
            else:
                outside = middle
        return inside

    return value, end(0.0), end(1.0)
