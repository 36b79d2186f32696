"""Committed results: small per-seed files made from run folders, and how to read them back.

    python -m benchmark.results RUN_DIR ...     collect finished runs into benchmark/results/

results/{script}/{environment}/{seed}.csv holds the learning curve (training returns, thinned), and
{seed}.json what the run was: arguments, code, versions, hardware, wall time, final evaluation.
"""

import ast
import csv
import hashlib
import json
import platform
import statistics
import sys
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
POINTS = 100  # of a thinned curve


def code_hash(path: Path) -> str:
    """Hash of a script's code: its syntax tree without docstrings, so that prose may change."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                part
                for part in body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def thin(lines: list[dict], total: int) -> list[tuple[int, float]]:
    """(step, mean return of the episodes that ended in the interval up to it), at most POINTS."""
    bins = defaultdict(list)
    for line in lines:
        if "charts/episodes" in line:
            place = min(POINTS, -(-line["global_step"] * POINTS // total))
            bins[place].append((line["charts/episodic_return"], line["charts/episodes"]))
    curve = []
    for place, parts in sorted(bins.items()):
        episodes = sum(count for _, count in parts)
        mean = sum(value * count for value, count in parts) / episodes
        curve.append((place * total // POINTS, round(mean, 2)))
    return curve


def collect(run_dir: Path) -> Path:
    """Write the two files of one finished run. Raises: ValueError if it is not finished."""
    about = json.loads((run_dir / "args.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    args, last = about["args"], lines[-1]
    if last["global_step"] < args["total_timesteps"] or "eval/episodic_return" not in last:
        raise ValueError(f"{run_dir} has no final evaluation: resume it first")
    folder = RESULTS / Path(about["script"]).stem / args["env_id"].replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    about["args"] = {key: value for key, value in args.items() if key != "run_dir"}
    about |= {
        "code_hash": code_hash(run_dir / about["script"]),
        "hardware": f"{platform.machine()}, {platform.system()}",
        "wall_time": round(last["wall_time"], 1),
        "eval": {key[5:]: value for key, value in last.items() if key.startswith("eval/")},
    }
    (folder / f"{args['seed']}.json").write_text(json.dumps(about, indent=1) + "\n")
    with open(folder / f"{args['seed']}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["global_step", "episodic_return"])
        writer.writerows(thin(lines, last["global_step"]))
    return folder


def load(script: str) -> dict[str, dict[int, dict]]:
    """environment -> seed -> what its json holds, with its curve under "curve"."""
    found = defaultdict(dict)
    for path in sorted((RESULTS / script).glob("*/*.json"), key=lambda p: int(p.stem)):
        about = json.loads(path.read_text())
        with open(path.with_suffix(".csv")) as file:
            _, *rows = csv.reader(file)
        found[about["args"]["env_id"]][about["args"]["seed"]] = about | {
            "curve": [(int(step), float(value)) for step, value in rows]
        }
    return dict(sorted(found.items()))


def references() -> dict[tuple[str, str, str], dict]:
    """(algorithm, environment, label) -> row of reference_results.csv."""
    with open(RESULTS.parent / "reference_results.csv") as file:
        return {(r["algorithm"], r["env_id"], r["label"]): r for r in csv.DictReader(file)}


def mean_and_std(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    for name in sys.argv[1:]:
        try:
            print(collect(Path(name)))
        except (OSError, KeyError, IndexError, ValueError) as error:
            sys.exit(f"error: {name}: {error}")
