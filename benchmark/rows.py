"""Runs that belong together, and what of them can be compared.

A row is what has one line in a table: runs of one script on one environment that differ in nothing
but the seed. A contender is what has one colour in a picture: a script, or a script with the name
of a group of a suite, such as "ppo_continuous.py, gae-lambda 0.5".
"""

import contextlib
import json
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmark import stats
from benchmark.results import ROOT, code_hash, references, relevant

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
}  # under which names results are published; a script of the user's own needs none
PUBLISHED = {"best_published": "best", "best_published_final": "final", "cleanrl": "CleanRL"}
LIBRARIES = ("torch", "gymnasium", "mujoco", "ale_py")
OF_ENVIRONMENT = ("env_kwargs", "sticky_actions")  # arguments that make it another task
SUITES = ROOT / "benchmark" / "suites"


class Row:
    """Runs that differ in nothing but the seed: same script, code, libraries, arguments."""

    def __init__(self, runs: list[dict]) -> None:
        self.runs = sorted(runs, key=lambda run: run["args"]["seed"])
        self.script, self.title = Path(runs[0]["script"]).stem, title(runs[0])
        self.env_id, kwargs = runs[0]["args"]["env_id"], runs[0]["args"].get("env_kwargs")
        self.name = self.title.removeprefix(self.env_id)  # of the suite's group: ", name" or ""
        self.kwargs = f" {json.dumps(kwargs, sort_keys=True)}" if kwargs else ""
        self.name_is_of_environment = False
        self.code, self.arguments = runs[0]["code_hash"], same_for_all_seeds(runs[0])
        self.libraries = libraries(runs[0])
        self.done = [run for run in self.runs if run["eval"]]
        self.finals = np.array([run["eval"]["episodic_return"] for run in self.done])
        self.note = ""  # what tells it from other rows of its script and title

    @property
    def environment(self) -> str:
        """What it is called: "Ant-v5", "Ant-v5, no contact forces" or 'Ant-v5 {"gravity": 3}'."""
        return self.env_id + (self.name if self.name_is_of_environment else self.kwargs)

    @property
    def contender(self) -> str:
        return f"{self.script}.py" + ("" if self.name_is_of_environment else self.name)

    @property
    def heading(self) -> str:
        """Its first cell in a table; of older code with the commit that made it."""
        name = "" if self.name_is_of_environment else self.name
        commit = self.older and self.runs[0].get("git")
        label = f"{self.label[:-1]}: {commit[:7]})" if commit else self.label
        return self.environment + name + label

    @property
    def older(self) -> bool:
        """Whether the script has changed since, other than in its prose; not if it is not here."""
        path = ROOT / f"{self.script}.py"
        try:
            return path.exists() and code_hash(path) != self.code
        except (SyntaxError, ValueError):  # somebody is editing it
            return True

    @property
    def label(self) -> str:
        notes = [self.note] if self.note else []
        notes += ["older code"] if self.older else []
        return f" ({', '.join(notes)})" if notes else ""

    def published(self, label: str) -> dict | None:
        """The row of reference_results.csv for this algorithm and environment."""
        algorithm = ALGORITHMS.get(self.script, "")
        titles = [self.title] if self.name else []
        titles += [] if self.kwargs or self.arguments.get("sticky_actions") else [self.env_id]
        keys = [(algorithm, name, label) for name in titles]
        return next((references()[key] for key in keys if key in references()), None)


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
    """Rows in order of script and title, for runs of the same code, libraries and arguments.

    Where a script and title have several rows, each says what sets it apart.
    """
    groups = defaultdict(list)
    for run in runs:
        arguments = json.dumps(same_for_all_seeds(run), sort_keys=True)
        key = run["code_hash"], json.dumps(libraries(run)), arguments
        groups[run["script"], title(run), *key].append(run)
    rows = [Row(members) for _, members in sorted(groups.items())]
    named = defaultdict(set)
    for row in rows:
        named[row.env_id, row.kwargs].add(row.name)
    for row in rows:  # arguments of the environment that always have the same name are its own
        always = named[row.env_id, row.kwargs] == {row.name}
        row.name_is_of_environment = bool(row.kwargs and row.name) and always
    together = defaultdict(list)
    for row in rows:
        together[row.contender, row.environment].append(row)
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
    """A seed counts once: of runs that agree in everything, the longest; and what was left out."""
    kept, left_out = {}, []
    for run in runs:
        parts = relevant(run["args"]), libraries(run)
        key = run["script"], title(run), run["code_hash"], json.dumps(parts, sort_keys=True)
        other = kept.setdefault(key, run)
        if other is not run:
            if (bool(run["eval"]), run["steps"]) > (bool(other["eval"]), other["steps"]):
                kept[key], run, other = run, other, run
            left_out.append(f"{run.get('folder')}: the same run as {other.get('folder')}")
    return list(kept.values()), left_out


# ---- Over environments ---------------------------------------------------------------------------


def best_published(environment: str, rows: list[Row]) -> float | None:
    """The best published result of any algorithm; of the rows' named groups, too."""
    titles = {environment, *(row.title for row in rows if row.environment == environment)}
    found = references().items()
    means = [float(r["mean"]) for (_, env, label), r in found if label == "best" and env in titles]
    return max(means, default=None)


def normalised(rows: list[Row]) -> dict[str, dict[str, np.ndarray]]:
    """contender -> environment -> scores: 0 is random, 1 the best published of any algorithm.

    Where a contender has several rows of one environment, none of them counts, as none is its own.
    """
    scores: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for row in rows:
        best, floor = (
            best_published(row.environment, rows),
            references().get(("any", row.environment, "random")),
        )
        if best is not None and floor and row.done and not row.note:
            zero = float(floor["mean"])
            scores[row.contender][row.environment] = (row.finals - zero) / (best - zero)
    return dict(scores)


def families(rows: list[Row], whole_suites: bool = False) -> list[list[Row]]:
    """The rows in parts: the environments that a suite, or each group of its runs, has together."""
    suites = [path for path in sorted(SUITES.glob("*.toml")) if path.stem != "smoke"]
    found, rest = [], rows
    for path in suites:
        env_ids = []
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # a user's
            for part in tomllib.loads(path.read_text())["runs"]:
                other = f", {part.get('name')}" if "--env-kwargs" in part.get("args", []) else ""
                env_ids.append({env_id + other for env_id in part["env_ids"]})
        for together in [set().union(*env_ids)] if whole_suites else env_ids:
            found.append([row for row in rest if row.environment in together])
            rest = [row for row in rest if row.environment not in together]
    return [part for part in [*found, rest] if part]


def comparable(rows: list[Row]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """The normalised scores of the contenders that have most environments, and what all have.

    A contender with less than half as many as another would leave nearly none to compare.
    """
    scores = normalised(rows)
    most = max(map(len, scores.values()), default=0)
    scores = {name: envs for name, envs in scores.items() if 2 * len(envs) >= most}
    every = [set(envs) for envs in scores.values()]
    return scores, sorted(set.intersection(*every)) if every else []


def has_scores(rows: list[Row]) -> bool:
    """Whether there is more than one environment to take a mean over."""
    return len(comparable(rows)[1]) > 1


def kinds(rows: list[Row]) -> list[list[Row]]:
    """All rows together where the contenders share environments; otherwise parts that may do so."""
    return [rows] if has_scores(rows) else families(rows)


def own_rows(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """contender -> environment -> its row, where it has one with finished runs."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.done and not row.note:
            found[row.contender][row.environment] = row
    return dict(found)


def own(rows: list[Row]) -> dict[str, dict[str, np.ndarray]]:
    """The same, with the final returns of the runs."""
    found = own_rows(rows).items()
    return {name: {env: row.finals for env, row in envs.items()} for name, envs in found}


def mixtures(rows: list[Row]) -> list[str]:
    """In which code and arguments differ what is averaged over environments, or compared."""
    found, said = own_rows(rows), []
    for name, envs in found.items():
        several = list(envs.values())
        keys = {key for row in several for key in row.arguments} - {"env_kwargs", "total_timesteps"}
        differ = [k for k in sorted(keys) if len({str(r.arguments.get(k)) for r in several}) > 1]
        if len({row.code for row in several}) > 1:
            differ = ["code", *differ]
        what = ", ".join(differ)
        said += [f"{name} does not have the same {what} on all environments"] if differ else []
    for env_id in dict.fromkeys(env_id for envs in found.values() for env_id in envs):
        of = {name: envs[env_id] for name, envs in found.items() if env_id in envs}
        for what in ("total_timesteps", "eval_episodes", *OF_ENVIRONMENT, *LIBRARIES):
            values = {n: (r.libraries | r.arguments).get(what) for n, r in of.items()}
            known = {str(value) for value in values.values() if value is not None}
            if len(known) > 1:  # None: a library that a run did not load
                each = ", ".join(f"{name} {value}" for name, value in values.items())
                said.append(f"{what} on {env_id}: {each}")
    return said


def left_out(rows: list[Row]) -> dict[str, str]:
    """What the measures over environments do not have -> the reason."""
    scores, shared = comparable(rows)
    known_at_all = normalised(rows)
    few = {row.contender for row in rows if row.contender not in scores}
    reasons = {
        name: "too few environments" if name in known_at_all else "nothing to compare with"
        for name in sorted(few)
    }
    for row in (row for row in rows if row.contender not in few):
        if row.environment not in shared and row.done:
            missing = [name for name in scores if row.environment not in own(rows).get(name, {})]
            known = any(row.environment in envs for envs in scores.values())
            reason = f"not of {', '.join(missing)}"
            if not known:
                published = best_published(row.environment, rows) is not None
                reason = "no score of random actions" if published else "no published result"
            reasons[row.environment] = reason
        if row.note:
            reasons[row.environment] = f"several rows of {row.contender}"
    return reasons


# ---- Measures, as data: of the tables, and of the CSV files --------------------------------------


def training(row: Row) -> dict:
    """The highest place of the seeds' mean learning curve, and its end; each is 5 % of the run."""
    curves = [np.array(run["curve"], float).T for run in row.done if run["curve"]]
    if not curves:
        return {"training_highest": np.nan, "training_end": np.nan}
    places = np.linspace(0, row.arguments["total_timesteps"], 101)[1:]
    curve = np.mean([np.interp(places, *curve) for curve in curves], axis=0)
    means = np.convolve(curve, np.full(5, 1 / 5), "valid")
    return {"training_highest": means.max(), "training_end": means[-1]}


def summary(row: Row) -> dict:
    """One line of a table of results."""
    low, high = stats.mean_interval(row.finals) if len(row.done) else (np.nan, np.nan)
    published = {}
    for column, label in PUBLISHED.items():
        found = row.published(label) or {"mean": "nan", "std": "", "source": ""}
        published[column] = float(found["mean"])
        published[f"{column}_std"] = float(found["std"] or "nan")
        published[f"{column}_source"] = found["source"]
    return {
        "script": f"{row.script}.py",
        "environment": row.environment,
        "variant": row.contender.removeprefix(f"{row.script}.py").removeprefix(", "),
        "note": row.label.strip(" ()"),
        "steps": row.arguments["total_timesteps"],
        "mean": row.finals.mean() if row.done else np.nan,
        "std": row.finals.std(ddof=1) if len(row.done) > 1 else np.nan,
        "low": float(low),
        "high": float(high),
        "seeds": len(row.done),
        "runs": len(row.runs),
        **training(row),
        **published,
    }


def every_run(rows: list[Row]) -> list[dict]:
    """One line for every run, finished or not."""
    found = []
    for row in rows:
        for run in row.runs:
            state = run.get("failed") or f"unfinished at step {run['steps']:,}"
            final = run["eval"] or {}
            found.append(
                {
                    "script": f"{row.script}.py",
                    "environment": row.environment,
                    "variant": row.contender.removeprefix(f"{row.script}.py").removeprefix(", "),
                    "note": row.label.strip(" ()"),
                    "seed": run["args"]["seed"],
                    "final_return": final.get("episodic_return", np.nan),
                    "std_over_episodes": final.get("episodic_return_std", np.nan),
                    "episodes": final.get("episodes", 0),
                    "steps": run["steps"],
                    "minutes": run["wall_time"] / 60,
                    "state": "finished" if run["eval"] else state,
                }
            )
    return found


def pairs(rows: list[Row]) -> list[dict]:
    """Who beats whom, for every two contenders that share an environment."""
    finals, found = own(rows), []
    for a, b in ((a, b) for a in finals for b in finals if a < b and finals[a].keys() & finals[b]):
        shared = sorted(finals[a].keys() & finals[b])
        x, y = ([finals[name][env_id] for env_id in shared] for name in (a, b))
        value, low, high = stats.probability_of_improvement(x, y)
        if min(map(len, x + y)) < stats.FEWEST:
            low = high = np.nan
        line = {"x": a, "y": b, "probability": value, "low": low, "high": high}
        found.append(line | {"environments": len(shared)})
    return found


def aggregates(rows: list[Row]) -> list[dict]:
    """IQM and mean of normalised scores over what all contenders share; [] below two of these."""
    scores, shared = comparable(rows)
    found = []
    for name, envs in scores.items() if has_scores(rows) else []:
        parts, line = [envs[env_id] for env_id in shared], {"script": name}
        for measure, statistic in (("iqm", stats.iqm), ("mean", stats.mean)):
            line[measure] = float(statistic(np.concatenate(parts), stats.equal_weights(parts)))
            low, high = stats.interval(parts, statistic)
            few = min(map(len, parts)) < stats.FEWEST
            line[f"{measure}_low"], line[f"{measure}_high"] = (np.nan,) * 2 if few else (low, high)
        line["at_or_above_1"] = float(np.mean([(x >= 1).mean() for x in parts]))
        found.append(line | {"environments": len(shared)})
    return found
