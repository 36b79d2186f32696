"""Tables and pictures, made from runs alone.

    python -m benchmark.report                            README.md, from benchmark/results
    python -m benchmark.report runs/mujoco --out report   report/report.md, from run folders

The pictures carry a hash of their data, so that a test can tell whether they are the newest.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmark import stats
from benchmark.results import (
    RESULTS,
    ROOT,
    code_hash,
    load,
    read_run,
    references,
    relevant,
    run_folders,
)

ALGORITHMS = {
    "ppo_continuous": "PPO",
    "ppo_atari": "PPO",
    "a2c": "A2C",
    "reinforce": "REINFORCE",
    "trpo": "TRPO",
    "ddpg": "DDPG",
    "sac": "SAC",
    "dqn": "DQN",
    "double_dqn_per": "Double DQN + PER",
}
BEGIN, END = "<!-- results: python -m benchmark.report -->", "<!-- end of results -->"
# Okabe and Ito's colours, told apart by everybody; black and grey are for other people's results
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LIBRARIES = ("torch", "gymnasium", "mujoco", "ale_py")
BLACK, GREY = "#000000", "#777777"
SUITES = ROOT / "benchmark" / "suites"


# ---- Runs that belong together -------------------------------------------------------------------


class Row:
    """Runs that differ in nothing but the seed: same script, code, libraries, arguments."""

    def __init__(self, runs: list[dict]) -> None:
        self.runs = sorted(runs, key=lambda run: run["args"]["seed"])
        self.script, self.env_id = Path(runs[0]["script"]).stem, title(runs[0])
        self.code, self.arguments = runs[0]["code_hash"], same_for_all_seeds(runs[0])
        self.libraries = libraries(runs[0])
        self.done = [run for run in self.runs if run["eval"]]
        self.finals = np.array([run["eval"]["episodic_return"] for run in self.done])
        self.note = ""  # what tells it from other rows of its script and environment

    @property
    def older(self) -> bool:
        """Whether the script has changed since, other than in its prose."""
        path = ROOT / f"{self.script}.py"
        return not path.exists() or code_hash(path) != self.code

    @property
    def label(self) -> str:
        notes = [self.note] if self.note else []
        notes += ["older code"] if self.older else []
        return f" ({', '.join(notes)})" if notes else ""


def title(run: dict) -> str:
    """The environment, and the name that its suite gave to this group of runs, if any."""
    return run.get("title", run["args"]["env_id"])


def libraries(run: dict) -> dict:
    """The versions of those libraries that numbers may depend on."""
    return {name: run.get("versions", {}).get(name) for name in LIBRARIES}


def same_for_all_seeds(run: dict) -> dict:
    arguments = relevant(run["args"])
    return {key: value for key, value in arguments.items() if key not in ("seed", "env_id")}


def group(runs: list[dict]) -> list[Row]:
    """Rows in order of script and environment, for runs of the same code, libraries and arguments.

    Where a script and environment have several rows, each says what sets it apart.
    """
    groups = defaultdict(list)
    for run in runs:
        arguments = json.dumps(same_for_all_seeds(run), sort_keys=True)
        key = run["code_hash"], json.dumps(libraries(run)), arguments
        groups[run["script"], title(run), *key].append(run)
    rows = [Row(members) for _, members in sorted(groups.items())]
    together = defaultdict(list)
    for row in rows:
        together[row.script, row.env_id].append(row)
    for several in together.values():
        keys = {key for row in several for key in row.arguments}
        differ = [k for k in sorted(keys) if len({str(r.arguments.get(k)) for r in several}) > 1]
        for row in several if len(several) > 1 else []:
            notes = [f"{key}={row.arguments.get(key)}" for key in differ]
            notes += [f"code {row.code[:8]}"] if len({r.code for r in several}) > 1 else []
            for name in LIBRARIES:
                if len({r.libraries[name] for r in several}) > 1:
                    notes.append(f"{name} {row.libraries[name]}")
            row.note = ", ".join(notes)
    return rows


def without_repeats(runs: list[dict]) -> tuple[list[dict], list[str]]:
    """A seed counts once: of runs that agree in everything, the first; and what was left out."""
    kept, left_out = {}, []
    for run in runs:
        key = run["script"], run["code_hash"], json.dumps(relevant(run["args"]), sort_keys=True)
        if key in kept:
            left_out.append(f"{run.get('folder')}: the same run as {kept[key].get('folder')}")
        kept.setdefault(key, run)
    return list(kept.values()), left_out


# ---- Tables --------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def mean_and_std(finals: np.ndarray) -> str:
    spread = f" ± {number(finals.std(ddof=1))}" if len(finals) > 1 else ""  # one run has none
    return number(finals.mean()) + spread


def steps(count: int) -> str:
    return f"{count / 1e6:g}M" if count >= 1_000_000 else f"{count / 1e3:g}k"


def published_cell(row: Row, label: str, sources: list[str]) -> str:
    """A published result with a reference to its source, which is added to `sources`."""
    found = references().get((ALGORITHMS.get(row.script, row.script), row.env_id, label))
    if not found:
        return ""
    plural = "" if found["seeds"] == "1" else "s"
    seeds = f", {found['seeds']} seed{plural}" if found["seeds"] else ""
    note = "{published_env}, {} steps: {metric}".format(steps(int(found["steps"])), **found)
    note += f"{seeds}; {found['source']}"
    sources += [note] if note not in sources else []
    spread = f" ± {number(float(found['std']))}" if found["std"] else ""
    return f"{number(float(found['mean']))}{spread} [{sources.index(note) + 1}]"


def table(rows: list[Row]) -> str:
    """Final evaluations of one script beside published numbers, as Markdown."""
    lines = [
        f"| `{rows[0].script}.py` | steps | mean ± std | 95 % interval of the mean | seeds |"
        " best published | CleanRL |",
        "|---|---|---|---|---|---|---|",
    ]
    sources: list[str] = []
    for row in rows:
        best, cleanrl = (published_cell(row, label, sources) for label in ("best", "CleanRL"))
        seeds = f"{len(row.done)}" + (
            f" of {len(row.runs)}" if len(row.done) < len(row.runs) else ""
        )
        ours, around = "", ""
        if row.done:
            ours = mean_and_std(row.finals)
            reference = references().get((ALGORITHMS.get(row.script), row.env_id, "best"))
            if len(row.done) >= stats.FEWEST:
                low, high = stats.mean_interval(row.finals)
                around = f"[{number(low)}, {number(high)}]"
                if reference and row.finals.mean() >= float(reference["mean"]):
                    ours = f"**{ours}**"
        cells = [row.env_id + row.label, steps(row.arguments["total_timesteps"]), ours, around]
        lines.append(f"| {' | '.join([*cells, seeds, best, cleanrl])} |")
    notes = [f"[{n}] {text}  " for n, text in enumerate(sources, 1)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def each_run(rows: list[Row]) -> str:
    """Every run by itself, finished or not, folded away."""
    lines = [
        "<details><summary>Every run</summary>\n",
        "| environment | seed: final return ± std over its episodes | minutes a run |",
        "|---|---|---|",
    ]
    for row in rows:
        cells = []
        for run in row.runs:
            final = run.get("failed") or f"unfinished at step {run['steps']:,}"
            if run["eval"]:
                std = number(run["eval"]["episodic_return_std"])
                final = f"{number(run['eval']['episodic_return'])} ± {std}"
            cells.append(f"{run['args']['seed']}: {final}")
        minutes = statistics.median(run["wall_time"] for run in row.runs) / 60
        lines.append(f"| {row.env_id}{row.label} | {', '.join(cells)} | {minutes:.1f} |")
    return "\n".join([*lines, "", "</details>\n"])


def unfinished(rows: list[Row]) -> str:
    """A line for every run that did not finish, or failed."""
    lines = []
    for row in rows:
        for run in row.runs:
            total = run["args"]["total_timesteps"]
            what = run.get("failed") or f"unfinished at step {run['steps']:,} of {total:,}"
            if not run["eval"]:
                name = f"{row.script}.py {row.env_id}{row.label} seed {run['args']['seed']}"
                lines.append(f"- {name}: {what}")
    return "\n".join(["Not in the numbers:\n", *lines, ""]) if lines else ""


# ---- Over environments: normalised scores --------------------------------------------------------


def normalised(rows: list[Row]) -> dict[str, dict[str, np.ndarray]]:
    """script -> environment -> scores of its runs: 0 is random, 1 the best published of any script.

    Where a script has several rows of one environment, none of them counts: which would be it?
    """
    scores: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    known = references()
    for row in rows:
        keys = [key for key in known if key[1:] == (row.env_id, "best")]
        best = [float(known[key]["mean"]) for key in keys]
        floor = known.get(("any", row.env_id, "random"))
        if best and floor and row.done and not row.note:
            zero = float(floor["mean"])
            scores[row.script][row.env_id] = (row.finals - zero) / (max(best) - zero)
    return dict(scores)


def families(rows: list[Row], whole_suites: bool = False) -> list[list[Row]]:
    """The rows in parts: the environments that a suite, or each group of its runs, has together."""
    suites = [path for path in sorted(SUITES.glob("*.toml")) if path.stem != "smoke"]
    found, rest = [], rows
    for suite in (tomllib.loads(path.read_text())["runs"] for path in suites):
        titles = [
            {
                env_id + (f", {part['name']}" if part.get("name") else "")
                for env_id in part["env_ids"]
            }
            for part in suite
        ]
        for together in [set.union(*titles)] if whole_suites else titles:
            found.append([row for row in rest if row.env_id in together])
            rest = [row for row in rest if row.env_id not in together]
    return [part for part in [*found, rest] if part]


def comparable(rows: list[Row]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """The normalised scores of the scripts that have most environments, and those that all have.

    A script with less than half as many as another would leave nearly none to compare.
    """
    scores = normalised(rows)
    most = max(map(len, scores.values()), default=0)
    scores = {script: envs for script, envs in scores.items() if 2 * len(envs) >= most}
    every = [set(envs) for envs in scores.values()]
    return scores, sorted(set.intersection(*every)) if every else []


def own(rows: list[Row]) -> dict[str, dict[str, np.ndarray]]:
    """script -> environment -> final returns, where the script has one row of the environment."""
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for row in rows:
        if row.done and not row.note:
            found[row.script][row.env_id] = row.finals
    return dict(found)


def aggregates(rows: list[Row]) -> str:
    """IQM and mean of normalised scores over the environments of all scripts; "" without scores."""
    scores, shared = comparable(rows)
    if len(shared) < 2:
        return ""
    lines = [
        f"Over {len(shared)} environments ({', '.join(shared)}), with scores normalised so that"
        " random actions are 0 and the best published result is 1, every environment weighing the"
        " same:\n",
        *unequal_seeds({script: [envs[x] for x in shared] for script, envs in scores.items()}),
        "| script | IQM [95 % interval] | mean [95 % interval] | runs at or above 1 |",
        "|---|---|---|---|",
    ]
    for script, envs in scores.items():
        parts = [envs[env_id] for env_id in shared]
        cells = []
        for statistic in (stats.iqm, stats.mean):
            value = statistic(np.concatenate(parts), stats.equal_weights(parts))
            low, high = stats.interval(parts, statistic)
            cells.append(f"{value:.2f}{bracket(low, high, parts)}")
        share = np.mean([(x >= 1).mean() for x in parts])
        lines.append(f"| `{script}.py` | {cells[0]} | {cells[1]} | {share:.0%} |")
    few = {row.script: "too few environments" for row in rows if row.script not in scores}
    reasons = {f"{script}.py": reason for script, reason in few.items()}
    for row in rows:
        if row.script in few:
            continue
        if row.env_id not in shared and row.done:
            missing = [f"{name}.py" for name in scores if row.env_id not in own(rows).get(name, {})]
            known = any(row.env_id in envs for envs in scores.values())
            lacks = f"not of {', '.join(missing)}" if missing else "no published result"
            reasons[row.env_id] = lacks if known else "no published result"
        if row.note:
            reasons[row.env_id] = f"several rows of {row.script}.py"
    if reasons:
        text = "; ".join(f"{env_id} ({reason})" for env_id, reason in reasons.items())
        lines += ["", f"Left out: {text}."]
    return "\n".join(lines) + "\n"


def unequal_seeds(parts: dict[str, list[np.ndarray]]) -> list[str]:
    """A line for the scripts whose environments have different numbers of finished seeds."""
    counts = {script: sorted({len(x) for x in of}) for script, of in parts.items()}
    if len({n for of in counts.values() for n in of}) < 2:
        return []
    said = [f"{script}.py {' or '.join(map(str, of))}" for script, of in counts.items()]
    return [f"Numbers of seeds differ: {', '.join(said)}.\n"]


def bracket(low: float, high: float, parts: list[np.ndarray]) -> str:
    """An interval, where there are runs enough for one."""
    enough = min(map(len, parts)) >= stats.FEWEST
    return f" [{low:.2f}, {high:.2f}]" if enough else ""


def comparison(rows: list[Row]) -> str:
    """Scripts side by side, and who beats whom, on the environments that two of them share."""
    finals = own(rows)
    pairs = [(a, b) for a in finals for b in finals if a < b and finals[a].keys() & finals[b]]
    if not pairs:
        return ""
    scripts = [script for script in finals if any(script in pair for pair in pairs)]
    env_ids = sorted({x for a, b in pairs for x in finals[a].keys() & finals[b]})
    lines = [
        "Mean final return ± std over seeds (number of seeds), side by side:\n",
        f"| environment | {' | '.join(f'`{script}.py`' for script in scripts)} |",
        "|---|" + "---|" * len(scripts),
    ]
    for env_id in env_ids:
        of = [finals[script].get(env_id) for script in scripts]
        cells = ["" if x is None else f"{mean_and_std(x)} ({len(x)})" for x in of]
        lines.append(f"| {env_id} | {' | '.join(cells)} |")
    lines += ["", "| X | Y | P(a run of X beats one of Y) [95 % interval] | environments |"]
    lines.append("|---|---|---|---|")
    for a, b in pairs:
        shared = sorted(finals[a].keys() & finals[b])
        x, y = ([finals[script][env_id] for env_id in shared] for script in (a, b))
        value, low, high = stats.probability_of_improvement(x, y)
        chance = f"{value:.2f}{bracket(low, high, x + y)}"
        lines.append(f"| `{a}.py` | `{b}.py` | {chance} | {len(shared)} |")
    return "\n".join(lines) + "\n"


# ---- Pictures ------------------------------------------------------------------------------------


def data_hash(rows: list[Row]) -> str:
    """Hash of everything that the pictures show."""
    shown: list = [
        [r["label"], r["env_id"], r["algorithm"], r["mean"]] for r in references().values()
    ]
    for row in rows:
        shown.append([row.script, row.env_id, row.label])
        shown += [[run["args"]["seed"], run["eval"], run["curve"]] for run in row.runs]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    return plt


def common_curve(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Curves of the finished runs on common steps. Shapes: (points,), (runs, points)."""
    curves = [np.array(run["curve"]).T for run in row.done if len(run["curve"]) > 1]
    first = max((curve[0][0] for curve in curves), default=0)
    last = min((curve[0][-1] for curve in curves), default=0)
    every = np.unique(np.concatenate([curve[0] for curve in curves])) if curves else np.array([])
    steps = every[(every >= first) & (every <= last)]
    return steps, np.array([np.interp(steps, *curve) for curve in curves])


def draw_curves(rows: list[Row], path: Path) -> None:
    """A panel an environment: each run thin, their mean thick with its 95 % interval."""
    plt = pyplot()
    env_ids = list(dict.fromkeys(row.env_id for row in rows))
    names = list(dict.fromkeys(f"{row.script}.py{row.label}" for row in rows))
    columns = min(3, len(env_ids))
    height = -(-len(env_ids) // columns)
    size = (3.3 * columns + 0.4, 2.5 * height + 0.9)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False)
    shown = {}
    for axis, env_id in zip(axes.flat, env_ids, strict=False):
        for row in (row for row in rows if row.env_id == env_id):
            name = f"{row.script}.py{row.label}"
            color = COLORS[names.index(name) % len(COLORS)]
            for run in row.runs:
                if run["curve"]:
                    steps, returns = zip(*run["curve"], strict=True)
                    line = axis.plot(np.array(steps) / 1e6, returns, color=color)[0]
                    line.set(alpha=0.35, linewidth=0.7, linestyle="-" if run["eval"] else ":")
            steps, curves = common_curve(row)
            if len(steps):
                mean = axis.plot(steps / 1e6, curves.mean(0), color=color, linewidth=1.8)[0]
                band = stats.mean_interval(curves.T)
                axis.fill_between(steps / 1e6, *band, color=color, alpha=0.2, lw=0)
                shown.setdefault(f"{name}: mean, 95 % interval, each seed", mean)
        for label, name, color, style in (
            ("best", "best published", BLACK, "--"),
            ("CleanRL", "CleanRL", GREY, ":"),
        ):
            found = {ALGORITHMS.get(row.script, ""): row for row in rows if row.env_id == env_id}
            for algorithm in found:
                if reference := references().get((algorithm, env_id, label)):
                    line = axis.axhline(float(reference["mean"]), color=color, linestyle=style)
                    shown.setdefault(name if len(found) == 1 else f"{name}, each algorithm", line)
        axis.set_title(env_id, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(env_ids) :]:
        axis.axis("off")
    for place, axis in enumerate(axes.flat[: len(env_ids)]):
        if place + columns >= len(env_ids):
            axis.set_xlabel("environment steps (millions)")
        if place % columns == 0:
            axis.set_ylabel("return per episode")
    figure.tight_layout(rect=(0, 0.55 / size[1], 1, 1))
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Data": data_hash(rows), "Software": None})
    plt.close(figure)


def draw_profiles(rows: list[Row], path: Path) -> None:
    """Performance profiles: the share of runs above each normalised score, a panel a family."""
    plt = pyplot()
    panels = [family for family in families(rows) if aggregates(family)]
    names = list(dict.fromkeys(row.script for family in panels for row in family))
    thresholds, shown = np.linspace(0, 2, 201), {}
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 3.6), squeeze=False)
    for axis, family in zip(axes.flat, panels, strict=True):
        scores, shared = comparable(family)
        for script, envs in scores.items():
            parts = [envs[env_id] for env_id in shared]
            color = COLORS[names.index(script) % len(COLORS)]
            profile = stats.performance_profile(parts, thresholds)
            line = axis.plot(thresholds, profile, color=color, linewidth=1.8)[0]
            shown.setdefault(f"{script}.py", line)
            low, high = stats.profile_band(parts, thresholds)
            axis.fill_between(thresholds, low, high, color=color, alpha=0.2, lw=0)
        line = axis.axvline(1, color=BLACK, linestyle="--", linewidth=1)
        axis.set_title(f"{shared[0]} to {shared[-1]}: {len(shared)} environments", fontsize=10)
        axis.set_xlabel("normalised score (0: random actions, 1: best published)")
        axis.set(xlim=(0, 2), ylim=(0, 1.02))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("share of runs above the score")
    shown["best published"] = line
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Data": data_hash(rows), "Software": None})
    plt.close(figure)


# ---- README and reports --------------------------------------------------------------------------


def collected() -> dict[str, list[Row]]:
    """script -> its rows, from the committed results."""
    found = {script: group(load(script)) for script in ALGORITHMS}
    return {script: rows for script, rows in found.items() if rows}


def readme_with_results() -> str:
    """README.md with the part between the markers made anew."""
    text = (ROOT / "README.md").read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    parts, everything = [], []
    for script, rows in collected().items():
        image = f"![Learning curves of {script}.py](benchmark/results/{script}.png)"
        parts += [table(rows), unfinished(rows), image, "", each_run(rows)]
        everything += rows
    parts += [text for family in families(everything, True) if (text := comparison(family))]
    if over := [text for family in families(everything) if (text := aggregates(family))]:
        parts += [*over, "![Performance profiles](benchmark/results/profiles.png)"]
    return before + BEGIN + "\n\n" + "\n".join(part for part in parts) + "\n\n" + END + after


def write_readme() -> None:
    found = collected()
    for script, rows in found.items():
        draw_curves(rows, RESULTS / f"{script}.png")
    everything = [row for rows in found.values() for row in rows]
    if any(map(aggregates, families(everything))):
        draw_profiles(everything, RESULTS / "profiles.png")
    (ROOT / "README.md").write_text(readme_with_results())


def write_report(paths: list[Path], out: Path) -> list[str]:
    """report.md and its pictures from run folders. Returns what could not be used, and why."""
    runs, problems = [], []
    for folder in run_folders(paths):
        try:
            runs.append(read_run(folder) | {"folder": str(folder)})
        except ValueError as error:
            problems.append(str(error))
    runs, repeated = without_repeats(runs)
    problems += repeated
    rows = group(runs)
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Results\n"]
    for script in dict.fromkeys(row.script for row in rows):
        mine = [row for row in rows if row.script == script]
        parts += [table(mine), each_run(mine)]
    parts += [unfinished(rows)]
    if problems:
        parts += ["Could not be used:\n", *(f"- {text}" for text in problems), ""]
    if any(run["curve"] for run in runs):
        draw_curves(rows, out / "curves.png")
        parts += ["![Learning curves](curves.png)\n"]
    parts += [text for family in families(rows, True) if (text := comparison(family))]
    if over := [text for family in families(rows) if (text := aggregates(family))]:
        draw_profiles(rows, out / "profiles.png")
        parts += [*over, "![Performance profiles](profiles.png)"]
    (out / "report.md").write_text("\n".join(parts) + "\n")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    options = parser.parse_args()
    try:
        if not options.runs:
            return write_readme()
        problems = write_report(options.runs, options.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for text in problems:
        print(f"not used: {text}", file=sys.stderr)
    print(options.out / "report.md")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
