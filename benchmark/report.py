"""Tables and pictures, made from runs alone.

    python -m benchmark.report                            README.md, from benchmark/results
    python -m benchmark.report runs/mujoco --out report   report/report.md, from run folders

A report has its tables as CSV files, too, and its pictures as PNG and PDF.
"""

import argparse
import contextlib
import csv
import itertools
import math
import statistics
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmark import plots
from benchmark.results import RESULTS, ROOT, load, read_run, run_folders
from benchmark.rows import (
    ALGORITHMS,
    SUITES,
    Row,
    aggregates,
    comparable,
    every_run,
    families,
    group,
    has_scores,
    kinds,
    left_out,
    mixtures,
    own,
    own_rows,
    pairs,
    summary,
    training,
    without_repeats,
)
from benchmark.stats import FEWEST

MADE = """report.md results.csv runs.csv pairs.csv scores.csv curves.png curves.pdf profiles.png
profiles.pdf""".split()
BEGIN, END = "<!-- results: python -m benchmark.report -->", "<!-- end of results -->"


# ---- Tables --------------------------------------------------------------------------------------


def number(value: float, mean: float | None = None) -> str:
    """With three digits or so; a spread or the end of an interval with as many as its mean."""
    size = abs(value if mean is None else mean)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def mean_and_std(finals: np.ndarray) -> str:
    mean = finals.mean()
    spread = f" ± {number(finals.std(ddof=1), mean)}" if len(finals) > 1 else ""  # one run has none
    return number(mean) + spread


def bracket(low: float, high: float) -> str:
    """An interval, where there is one."""
    return "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"


def code(contender: str) -> str:
    """Its script as code: `ppo_continuous.py`, gae-lambda 0.5."""
    script, comma, name = contender.partition(",")
    return f"`{script}`{comma}{name}"


def steps(count: int) -> str:
    return f"{count / 1e6:g}M" if count >= 1_000_000 else f"{count / 1e3:g}k"


def published_cell(row: Row, label: str, sources: list[str]) -> str:
    """A published result, its steps if they are not ours, and its number in `sources`."""
    found = row.published(label)
    if not found:
        return ""
    plural = "" if found["seeds"] == "1" else "s"
    seeds = f", {found['seeds']} seed{plural}" if found["seeds"] else ""
    note = "{published_env}, {} steps: {metric}".format(steps(int(found["steps"])), **found)
    note += f"{seeds}; {found['source']}"
    sources += [note] if note not in sources else []
    mean = float(found["mean"])
    spread = f" ± {number(float(found['std']), mean)}" if found["std"] else ""
    count = int(found["steps"])
    after = f" ({steps(count)} steps)" if count != row.arguments["total_timesteps"] else ""
    return f"{number(mean)}{spread}{after} <sup>{sources.index(note) + 1}</sup>"


def table(rows: list[Row], sources: list[str]) -> str:
    """Final evaluations of one script beside published numbers; adds to the list of sources."""
    titles = {"best": "best published", "final": "best published final", "CleanRL": "CleanRL"}
    labels = [label for label in titles if any(row.published(label) for row in rows)]
    names = ["steps", "mean ± std", "95 % interval of the mean", "seeds", *map(titles.get, labels)]
    lines = [f"| `{rows[0].script}.py` | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        published = [published_cell(row, label, sources) for label in labels]
        line, ours, around = summary(row), "", ""
        seeds = f"{line['seeds']}" + (f" of {line['runs']}" if line["seeds"] < line["runs"] else "")
        if row.done:
            ours = mean_and_std(row.finals)
            if not math.isnan(line["low"]):
                low, high = (number(line[name], line["mean"]) for name in ("low", "high"))
                around = f"[{low}, {high}]"
                best = row.published("best")
                fair = best and line["steps"] <= int(best["steps"])
                ours = f"**{ours}**" if fair and line["mean"] >= float(best["mean"]) else ours
        cells = [row.heading, steps(line["steps"]), ours, around]
        lines.append(f"| {' | '.join([*cells, seeds, *published])} |")
    return "\n".join([*lines, ""])


def details(rows: list[Row], sources: list[str]) -> str:
    """Where published numbers are from, and every run, finished or not, folded away."""
    notes = [f"{n}. {text}" for n, text in enumerate(sources, 1)]
    lines = [
        f"<details><summary>{'Sources of the published numbers; every' if notes else 'Every'} run"
        "</summary>\n",
        *([*notes, ""] if notes else []),
        "| environment | seed: final return ± std over its episodes | training: highest, end "
        "| minutes a run |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for run in every_run([row]):
            final = run["state"]
            if final == "finished":
                mean, std = run["final_return"], run["std_over_episodes"]
                final = f"{number(mean)} ± {number(std, mean)}"
            cells.append(f"{run['seed']}: {final}")
        curve, ends = training(row), ""
        if not math.isnan(curve["training_end"]):
            ends = f"{number(curve['training_highest'])}, {number(curve['training_end'])}"
        whole = [run["minutes"] for run in every_run([row]) if run["state"] == "finished"]
        minutes = f"{statistics.median(whole):.1f}" if whole else ""
        lines.append(f"| {row.heading} | {', '.join(cells)} | {ends} | {minutes} |")
    return "\n".join([*lines, "", "</details>\n"])


def unfinished(rows: list[Row]) -> str:
    """A line for every run that did not finish, or failed."""
    lines = []
    for row in rows:
        for run in every_run([row]):
            what, total = run["state"], row.arguments["total_timesteps"]
            what += f" of {total:,}" if what.startswith("unfinished") else ""
            if what != "finished":
                name = f"{row.script}.py {row.heading} seed {run['seed']}"
                lines.append(f"- {name}: {what}")
    return "\n".join(["Not in the numbers:\n", *lines, ""]) if lines else ""


def score_table(rows: list[Row]) -> str:
    """IQM and mean of normalised scores over what all contenders share; "" without scores."""
    if not has_scores(rows):
        return ""
    scores, shared = comparable(rows)
    lines = [
        f"Over {len(shared)} environments ({', '.join(shared)}), with scores normalised so that"
        " random actions are 0 and the best published result of any algorithm is 1, every"
        " environment weighing the same:\n",
        *careful([x for x in rows if x.contender in scores and x.environment in shared]),
        *unequal_seeds({name: [envs[x] for x in shared] for name, envs in scores.items()}),
        "| script | IQM [95 % interval] | mean [95 % interval] | runs at or above 1 |",
        "|---|---|---|---|",
    ]
    for line in aggregates(rows):
        cells = [
            f"{line[name]:.2f}{bracket(line[f'{name}_low'], line[f'{name}_high'])}"
            for name in ("iqm", "mean")
        ]
        cells += [f"{line['at_or_above_1']:.0%}"]
        lines.append(f"| {code(line['script'])} | {' | '.join(cells)} |")
    if reasons := left_out(rows):
        text = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        lines += ["", f"Left out: {text}."]
    return "\n".join(lines) + "\n"


def without_scores(parts: list[list[Row]]) -> str:
    """A line for the environments that stand in none of the tables of scores, "" if all do."""
    alone = {row.environment for part in parts if not has_scores(part) for row in part if row.done}
    if not alone:
        return ""
    why = "means over two environments or more that belong together and have scores"
    return f"In no table of scores, which are {why}: {', '.join(sorted(alone))}.\n"


def careful(rows: list[Row]) -> list[str]:
    """A line on what else differs between the rows that are compared or averaged."""
    mixed = mixtures(rows)
    return [f"Careful, not only the algorithm differs: {'; '.join(mixed)}.\n"] if mixed else []


def unequal_seeds(parts: dict[str, list[np.ndarray]]) -> list[str]:
    """A line for the contenders whose environments have different numbers of finished seeds."""
    counts = {name: sorted({len(x) for x in of}) for name, of in parts.items()}
    if len({n for of in counts.values() for n in of}) < 2:
        return []
    said = [f"{name} {' or '.join(map(str, of))}" for name, of in counts.items()]
    return [f"Numbers of seeds differ: {', '.join(said)}.\n"]


def comparison(rows: list[Row], fewest: int = 1) -> str:
    """Contenders side by side, and who beats whom, if they share so many environments."""
    finals = own(rows)
    found = [pair for pair in pairs(rows) if pair["environments"] >= fewest]
    several = {f"{row.contender} on {row.environment}" for row in rows if row.note and row.done}
    left = [f"Not compared, as there are several rows: {', '.join(sorted(several))}.\n"]
    if not found:
        return "\n".join(left) if several else ""
    names = [name for name in finals if any(name in (pair["x"], pair["y"]) for pair in found)]
    env_ids = sorted({x for p in found for x in finals[p["x"]].keys() & finals[p["y"]]})
    lines = [
        *careful([row for row in rows if row.contender in names and row.environment in env_ids]),
        "Mean final return ± std over seeds (number of seeds), side by side:\n",
        f"| environment | {' | '.join(map(code, names))} |",
        "|---|" + "---|" * len(names),
    ]
    for env_id in env_ids:
        of = [finals[name].get(env_id) for name in names]
        notes = [
            own_rows(rows)[name][env_id].label if env_id in finals[name] else "" for name in names
        ]
        cells = [
            "" if x is None else f"{mean_and_std(x)} ({len(x)}){note}"
            for x, note in zip(of, notes, strict=True)
        ]
        lines.append(f"| {env_id} | {' | '.join(cells)} |")
    lines += ["", "| X | Y | P(a run of X beats one of Y) [95 % interval] | environments |"]
    lines.append("|---|---|---|---|")
    for pair in found:
        chance = f"{pair['probability']:.2f}{bracket(pair['low'], pair['high'])}"
        cells = [code(pair["x"]), code(pair["y"]), chance, str(pair["environments"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(left if several else [])])


# ---- README and reports --------------------------------------------------------------------------


def still_to_run(rows: list[Row]) -> str:
    """What the suites name, and no row of today's code has with as many seeds, folded away."""
    made = defaultdict(int)  # (script, title, steps) -> finished seeds
    for row in (row for row in rows if not row.older):
        key = row.script, row.title, row.arguments["total_timesteps"]
        made[key] = max(made[key], len(row.done))
    lines, planned, left = [], 0, 0
    for path in sorted(path for path in SUITES.glob("*.toml") if path.stem != "smoke"):
        missing = defaultdict(list)
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # a user's
            suite = tomllib.loads(path.read_text())
            for part in suite["runs"]:
                total = int(float(part["args"][part["args"].index("--total-timesteps") + 1]))
                name = f", {part['name']}" if "name" in part else ""
                for script, env_id in itertools.product(part["scripts"], part["env_ids"]):
                    planned += 1
                    if made[script, env_id + name, total] < len(suite["seeds"]):
                        left += 1
                        missing[script].append(env_id + name)
        lines += [f"| {path.stem} | `{x}.py` | {'; '.join(of)} |" for x, of in missing.items()]
    return "\n".join(
        [
            f"<details><summary>Rows of `benchmark/suites` that are still to be run with today's"
            f" code: {left} of {planned}</summary>\n",
            "| suite | script | environments |",
            "|---|---|---|",
            *lines,
            "\n</details>\n",
        ]
    )


def collected() -> dict[str, list[Row]]:
    """script -> its rows, from the committed results; scripts that are not ours come last."""
    more = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())
    found = {script: group(load(script)) for script in dict.fromkeys([*ALGORITHMS, *more])}
    return {script: rows for script, rows in found.items() if rows}


def readme_with_results() -> str:
    """README.md with the part between the markers made anew."""
    text = (ROOT / "README.md").read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks the lines {BEGIN} and {END}")
    found = collected()
    parts, everything = [still_to_run([row for rows in found.values() for row in rows])], []
    for script, rows in found.items():
        image = f"![Learning curves of {script}.py](benchmark/results/{script}.png)"
        sources: list[str] = []
        parts.append(table(rows, sources))
        if left := unfinished(rows):
            parts.append(left)
        parts += [image, "", details(rows, sources)]
        everything += rows
    enough = [row for row in everything if len(row.done) >= FEWEST]  # to compare scripts with
    parts += [text for family in families(enough, True) if (text := comparison(family, 2))]
    few = [f"{code(row.contender)} on {row.environment}" for row in everything if row not in enough]
    if few:
        parts += [f"Not compared, with fewer than {FEWEST} seeds: {', '.join(few)}.\n"]
    if over := [text for family in families(everything) if (text := score_table(family))]:
        parts += [*over, without_scores(families(everything))]
        parts += ["![Performance profiles](benchmark/results/profiles.png)"]
    return before + BEGIN + "\n\n" + "\n".join(parts) + "\n\n" + END + after


def write_readme() -> None:
    found = collected()
    for script, rows in found.items():
        plots.draw_curves(rows, RESULTS / f"{script}.png")
    everything = [row for rows in found.values() for row in rows]
    if any(map(has_scores, families(everything))):
        plots.draw_profiles(families(everything), RESULTS / "profiles.png")
    (ROOT / "README.md").write_text(readme_with_results())


def write_csv(path: Path, lines: list[dict]) -> None:
    """What is not a number is an empty field."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            empty = {key for key, x in line.items() if isinstance(x, float) and math.isnan(x)}
            writer.writerow(line | dict.fromkeys(empty, ""))


def write_report(paths: list[Path], out: Path, **curves) -> list[str]:
    """report.md, its tables and pictures, from run folders. `curves` are draw_curves' options.

    Returns what could not be used, and why.
    """
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
    for name in MADE:  # nothing of an earlier report stays
        (out / name).unlink(missing_ok=True)
    parts = ["# Results\n"]
    for script in dict.fromkeys(row.script for row in rows):
        mine, sources = [row for row in rows if row.script == script], []
        parts += [table(mine, sources), details(mine, sources)]
    parts += [unfinished(rows)]
    if problems:
        parts += ["Could not be used:\n", *(f"- {text}" for text in problems), ""]
    if any(run["curve"] for run in runs):
        plots.draw_curves(rows, out / "curves.png", pdf=True, **curves)
        parts += ["![Learning curves](curves.png)\n"]
    parts += [comparison(rows)]
    if over := [text for part in kinds(rows) if (text := score_table(part))]:
        plots.draw_profiles(kinds(rows), out / "profiles.png", pdf=True)
        parts += [*over, without_scores(kinds(rows)), "![Performance profiles](profiles.png)"]
    (out / "report.md").write_text("\n".join(parts) + "\n")
    tables = {
        "results": [summary(row) for row in rows],
        "runs": every_run(rows),
        "pairs": pairs(rows),
        "scores": [line for part in kinds(rows) for line in aggregates(part)],
    }
    for name, lines in tables.items():
        if lines:
            write_csv(out / f"{name}.csv", lines)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument("--xaxis", choices=["steps", "time"], default="steps")
    parser.add_argument(
        "--returns",
        choices=["training", "evaluation"],
        default="training",
        help="what the curves show; evaluations are those of --eval-frequency, and the final ones",
    )
    parser.add_argument(
        "--smooth", type=int, default=1, help="each point is the mean of so many; a run has 100"
    )
    options = parser.parse_args()
    if options.smooth < 1:
        parser.error("--smooth must be at least 1")
    curves = {"axis": options.xaxis, "returns": options.returns, "smooth": options.smooth}
    try:
        if not options.runs and len(sys.argv) > 1:
            parser.error("which runs? Without any argument, README.md is made anew")
        if not options.runs:
            return write_readme()
        problems = write_report(options.runs, options.out, **curves)
    except ImportError as error:
        print(f"error: {error}: pip install -r benchmark/requirements.txt", file=sys.stderr)
        sys.exit(2)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for text in problems:
        print(f"not used: {text}", file=sys.stderr)
    print(options.out / "report.md")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
