"""The pictures of the report: learning curves and performance profiles.

They carry a hash of their data, so that a test can tell whether they are the newest.
"""

import hashlib
import json
import math
import textwrap
from pathlib import Path

import numpy as np

from benchmark import stats
from benchmark.results import references
from benchmark.rows import ALGORITHMS, Row, best_published, comparable, has_scores

# Okabe and Ito's colours, told apart by everybody; black and grey are for other people's results
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
STYLES = ["-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1))]  # for more contenders than colours
BLACK, GREY = "#000000", "#777777"
EARLY = 0.1  # part of a run that does not count for the range of the returns' axis
FAR = 10  # times the range of 0 and the returns: a line so far above would press the curves flat


def data_hash(rows: list[Row]) -> str:
    """Hash of everything that the pictures show."""
    shown: list = [
        [r["label"], r["env_id"], r["algorithm"], r["mean"]] for r in references().values()
    ]
    for row in rows:
        shown.append([row.script, row.title, row.label])
        shown += [[run["args"]["seed"], run["eval"], run["curve"]] for run in row.runs]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams |= {"pdf.fonttype": 42}  # text stays text, as publishers ask
    return plt


def save(figure, rows: list[Row], path: Path, pdf: bool) -> None:
    figure.savefig(path, dpi=110, metadata={"Data": data_hash(rows), "Software": None})
    if pdf:
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    pyplot().close(figure)


def add_legend(figure, shown: dict, caption: str) -> None:
    """The names below the panels, in as many lines as they need, and below them the caption."""
    width, height = figure.get_size_inches()
    room = max(len(name) for name in shown)
    columns = max(1, min(len(shown), int(width / (0.65 + 0.085 * room))))
    words = textwrap.fill(caption, int(width * 15))
    lines = -(-len(shown) // columns)
    below = 0.1 + 0.15 * (words.count("\n") + 1)
    figure.tight_layout(rect=(0, (below + 0.1 + 0.22 * lines) / height, 1, 1))
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, (below - 0.05) / height)}
    figure.legend(shown.values(), shown.keys(), ncols=columns, frameon=False, **place)
    figure.text(0.5, 0.06 / height, words, ha="center", va="bottom", fontsize=8, color=GREY)


# ---- Learning curves -----------------------------------------------------------------------------


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the window - 1 before it. Shapes: (n,) -> (n,)."""
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    first = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    last = np.arange(1, len(values) + 1)
    return (sums[last] - sums[first]) / (last - first)


def curve_of(run: dict, returns: str, axis: str, smooth: int) -> np.ndarray:
    """Places on the axis (millions of steps, or minutes) and returns there. Shapes: (2, points)."""
    if returns == "evaluation":
        steps, values, minutes = np.array(run["evaluations"], float).reshape(-1, 3).T
    else:
        steps, values = np.array(run["curve"], float).reshape(-1, 2).T
        minutes = np.array(run.get("minutes", []))
    if len(values):
        values = smoothed(values, smooth)
    return np.array([minutes if axis == "time" else steps / 1e6, values])


def common_curve(curves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of finished runs where all of them are. Shapes: (points,), (runs, points)."""
    curves = [curve for curve in curves if curve.shape[1] > 1]
    first = max((curve[0][0] for curve in curves), default=0)
    last = min((curve[0][-1] for curve in curves), default=0)
    every = np.unique(np.concatenate([curve[0] for curve in curves])) if curves else np.array([])
    places = every[(every >= first) & (every <= last)]
    return places, np.array([np.interp(places, *curve) for curve in curves])


def interesting(curves: list[np.ndarray], lines: list[float]) -> tuple[float, float] | None:
    """Range of the axis without the returns of the beginning, where these take most of it."""
    late = [curve[1][curve[0] > EARLY * curve[0].max()] for curve in curves if curve.shape[1]]
    if not late:
        return None
    values = np.concatenate([*late, np.array(lines)])
    low, high = values.min(), values.max()
    margin = 0.05 * max(high - low, 0.05 * abs(high)) or 1.0  # rounding is no range
    every = np.concatenate([curve[1] for curve in curves if curve.shape[1]])
    cut = min(every.min(), low) < low - (high - low)  # it would take half of the axis or more
    return (float(low - margin), float(high + margin)) if cut else None


def seeds_text(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def draw_curves(
    rows: list[Row],
    path: Path,
    pdf: bool = False,
    axis: str = "steps",
    returns: str = "training",
    smooth: int = 1,
) -> None:
    """A panel an environment: each run thin, their mean thick with its 95 % interval."""
    plt = pyplot()
    env_ids = list(dict.fromkeys(row.environment for row in rows))
    names = list(dict.fromkeys(row.contender + row.label for row in rows))
    algorithms = {ALGORITHMS.get(row.script) for row in rows}
    columns = min(3, len(env_ids))
    height = -(-len(env_ids) // columns)
    size = (max(4.5, 3.3 * columns + 0.4), 2.5 * height + 1 + 0.2 * (len(names) // columns))
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False)
    shown, some_cut = {}, False
    for panel, env_id in zip(axes.flat, env_ids, strict=False):
        here = [row for row in rows if row.environment == env_id]
        drawn, counts = [], []
        for row in here:
            place = names.index(row.contender + row.label)
            color, style = COLORS[place % len(COLORS)], STYLES[place // len(COLORS) % len(STYLES)]
            finished = []
            for run in row.runs:
                curve = curve_of(run, returns, axis, smooth)
                line = panel.plot(*curve, color=color)[0]
                line.set(alpha=0.35, linewidth=0.7, linestyle="-" if run["eval"] else ":")
                line.set(marker="o" if curve.shape[1] == 1 else "", markersize=4)
                drawn.append(curve)
                finished += [curve] if run["eval"] else []
            places, curves = common_curve(finished)
            counts.append(len(curves) if len(places) else len(row.done))
            thick = {"color": color, "linestyle": style, "linewidth": 1.8}
            if len(places):
                panel.plot(places, curves.mean(0), **thick)
                band = stats.mean_interval(curves.T)
                panel.fill_between(places, *band, color=color, alpha=0.2, lw=0)
            shown.setdefault(row.contender + row.label, plt.Line2D([], [], **thick))
        published = []
        if len(algorithms) == 1 and algorithms != {None}:
            known = {label: here[0].published(label) for label in ("best", "CleanRL")}
            found = {label: float(x["mean"]) for label, x in known.items() if x}
            published = [("best published", found.get("best"), BLACK, "--")]
            published += [("CleanRL", found.get("CleanRL"), GREY, ":")]
        else:
            best = best_published(env_id, here)
            published = [("best published of any algorithm", best, BLACK, "--")]
        published = [line for line in published if line[1] is not None]
        values = np.concatenate([np.zeros(1), *(curve[1] for curve in drawn)])
        reach = values.max() + FAR * np.ptp(values) if values.any() else np.inf
        for name, mean, color, style in (line for line in published if line[1] <= reach):
            shown.setdefault(name, panel.axhline(mean, color=color, linestyle=style, linewidth=1.2))
        far = [f"{name}: {mean:.4g}" for name, mean, *_ in published if mean > reach]
        place = {"va": "top", "transform": panel.transAxes}
        panel.text(0.03, 0.97, "\n".join(far), fontsize=8, color=GREY, **place)
        limits = interesting(drawn, [mean for _, mean, *_ in published if mean <= reach])
        if limits:
            panel.set_ylim(limits)
            some_cut = True
        cut = ", cut" if limits else ""
        title = textwrap.fill(f"{env_id} ({seeds_text(counts)}{cut})", 40)
        panel.set_title(title, fontsize=10)
        if not any(curve.size for curve in drawn):
            panel.text(0.5, 0.5, f"no {returns} returns", ha="center", transform=panel.transAxes)
        panel.grid(alpha=0.25)
    for panel in axes.flat[len(env_ids) :]:
        panel.axis("off")
    for place, panel in enumerate(axes.flat[: len(env_ids)]):
        if place + columns >= len(env_ids):
            panel.set_xlabel("minutes" if axis == "time" else "environment steps (millions)")
        if place % columns == 0:
            panel.set_ylabel("evaluated return" if returns == "evaluation" else "training return")
    caption = "Thin: each seed; thick: their mean, with its 95 % interval from 3 seeds on."
    caption += f" Each point is the mean of the {smooth} up to it." if smooth > 1 else ""
    caption += " Cut: the axis leaves out low returns of the beginning." if some_cut else ""
    named = [name for name in shown if "published" not in name and name != "CleanRL"]
    ordered = {name: shown[name] for name in [*named, *(x for x in shown if x not in named)]}
    add_legend(figure, ordered, caption)
    save(figure, rows, path, pdf)


# ---- Performance profiles ------------------------------------------------------------------------


def draw_profiles(parts: list[list[Row]], path: Path, pdf: bool = False) -> None:
    """Performance profiles: the share of runs above each normalised score, a panel a part."""
    plt = pyplot()
    panels = [rows for rows in parts if has_scores(rows)]
    names = list(dict.fromkeys(row.contender for rows in panels for row in rows))
    shown: dict = {}
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    size = (max(5.0, 4.6 * columns), 2.9 * height + 0.9)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False)
    for panel, rows in zip(axes.flat, panels, strict=False):
        scores, shared = comparable(rows)
        every = np.concatenate([envs[env_id] for envs in scores.values() for env_id in shared])
        low, high = min(0, every.min()), max(1, every.max())
        low, high = math.floor(low * 10) / 10, math.ceil(high * 10 + 0.5) / 10
        thresholds = np.linspace(low, high, 201)
        for name, envs in scores.items():
            of, place = [envs[env_id] for env_id in shared], names.index(name)
            color, style = COLORS[place % len(COLORS)], STYLES[place // len(COLORS) % len(STYLES)]
            profile = stats.performance_profile(of, thresholds)
            thick = {"color": color, "linestyle": style, "linewidth": 1.8}
            shown.setdefault(name, panel.plot(thresholds, profile, **thick)[0])
            band = stats.profile_band(of, thresholds)
            panel.fill_between(thresholds, *band, color=color, alpha=0.2, lw=0)
        line = panel.axvline(1, color=BLACK, linestyle="--", linewidth=1)
        title = f"{len(shared)} environments, from {shared[0]} to {shared[-1]}"
        panel.set_title(textwrap.fill(title, 56), fontsize=10)
        panel.set_xlabel("normalised score (0: random, 1: best published)")
        panel.set(xlim=(low, high), ylim=(0, 1.02))
        panel.grid(alpha=0.25)
    for panel in axes.flat[len(panels) :]:
        panel.axis("off")
    for panel in axes[:, 0]:
        panel.set_ylabel("share of runs above it")
    shown["best published of any algorithm"] = line
    add_legend(figure, shown, "Bands: 95 % stratified bootstrap intervals over seeds.")
    save(figure, [row for rows in parts for row in rows], path, pdf)
