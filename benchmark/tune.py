"""Look for hyperparameters: Optuna proposes, jobs like a sweep's train, the worse half is stopped.

    python -m benchmark.tune my_space.toml
    python -m benchmark.tune my_space.toml --trials 100 --workers 8

The file says what to train and where to look:

    script = "ppo_continuous"
    env_id = "Hopper-v5"
    args = ["--total-timesteps", "300_000"]
    seeds = 2                                    # runs of each trial; its value is their mean
    [space]
    learning-rate = {low = 1e-5, high = 1e-2, log = true}
    num-steps = {low = 64, high = 512, step = 64}
    gae-lambda = [0.9, 0.95, 0.98]               # one of these
    norm-obs = [true, false]                     # --norm-obs or --no-norm-obs

The value of a trial is the mean final evaluation. Started again, it goes on where it was stopped,
Ctrl-C and kill -9 included; with a changed space or algorithm it begins anew. Seeds are numbered
from a million on, where no suite may have any: what is chosen here has to prove itself on others.
Exit code 0: a trial is complete; 1: none is; 2, 130 and 143 as in a sweep.
"""

import collections
import contextlib
import fcntl
import hashlib
import io
import json
import math
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmark import jobs, sweep
from benchmark.jobs import Job, Source
from benchmark.results import folder_name, read_run
from benchmark.sweep import TUNING_SEEDS, wrong

PARTS = 20  # of a run: after each one its return is compared with that of other trials
RECENT = 5  # points of a run's curve, which has 100
KEYS = ("script", "env_id", "args", "seeds", "space")


@dataclass(frozen=True)
class Options:
    space: Annotated[Path, tyro.conf.Positional]
    """A .toml file, as above."""
    trials: int = 50
    """How many combinations in all, those of earlier sessions included."""
    startup_trials: int = 8
    """So many trials are drawn at random, and none is stopped before so many have finished."""
    run_root: Path | None = None
    """Where the run folders and Optuna's study go; by default runs/tune-{name of the file}."""
    workers: int = field(default_factory=jobs.cores)
    """Jobs at once; by default one for each core."""
    retries: int = 2
    """How often crashed or killed jobs of a trial are tried again, from their checkpoints."""


@dataclass
class Trial:
    """Optuna's trial, its jobs, one for each seed, and their processes."""

    optuna: Any
    jobs: list[Job]
    reported: int  # parts that Optuna knows the return of
    running: dict = field(default_factory=dict)
    starts: int = 0

    def left(self) -> list[Job]:
        """The jobs that are neither complete nor running."""
        idle = [job for job in self.jobs if job not in self.running]
        return [job for job in idle if jobs.status(job) != "complete"]

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait()


# ---- The space -----------------------------------------------------------------------------------


def read_space(path: Path) -> dict:
    """What the file says, checked. A mistake is one line and exit code 2."""
    try:
        space = {"args": [], "seeds": 1} | tomllib.loads(path.read_text())
        if unknown := sorted(space.keys() - set(KEYS)):
            wrong(f"{path}: unknown {unknown[0]}: there are {', '.join(KEYS)}")
        if not (type(space["seeds"]) is int and space["seeds"] > 0):
            wrong(f"{path}: seeds is their number, 1 or more; they are tuning's own")
        if not isinstance(space["env_id"], str) or not isinstance(space["space"], dict):
            wrong(f"{path}: env_id is a string, space a table of flags")
        if not (sweep.ROOT / f"{space['script']}.py").is_file():
            wrong(f"{path}: there is no {sweep.ROOT / space['script']}.py")
        if not space["space"]:
            wrong(f"{path}: the space is empty")
        for flag, values in space["space"].items():
            try:
                distribution(values)
            except (ValueError, TypeError, KeyError, ArithmeticError) as error:
                wrong(f"{path}: {flag}: a list of values, or low and high, log or step: {error!r}")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
                wrong(f"{path}: {flag}: the name of a flag, without --")
        args = space["args"]
        if not isinstance(args, list) or not all(isinstance(word, str) for word in args):
            wrong(f"{path}: args is a list of strings")
        return space
    except KeyError as error:
        wrong(f"{path}: {error.args[0]} is missing")
    except (OSError, ValueError, TypeError) as error:
        wrong(f"{path}: {error}")


def words_of(values: dict) -> list[str]:
    """A choice of values as a command line has it."""
    return [word for flag, value in values.items() for word in sweep.flag_words(flag, value)]


def distribution(values: list | dict):
    """Optuna's form of a list or a range. Raises: ValueError, TypeError, KeyError."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, list):
        return CategoricalDistribution(values)
    if not -math.inf < values["low"] < values["high"] < math.inf:
        raise ValueError("low is not below high, or not finite")
    if all(type(values.get(name, 1)) is int for name in ("low", "high", "step")):
        return IntDistribution(**values)
    return FloatDistribution(**values)


def accepted(space: dict, words: list[str]) -> dict | None:
    """All arguments as the script understands them; None where it refuses them, without a word."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return sweep.resolve(space["script"], space["env_id"], [*space["args"], *words])


def check_flags(space: dict) -> None:
    """Refuse what the script takes no value of; whether values go together, each trial shows."""
    sweep.resolve(space["script"], space["env_id"], space["args"])
    for flag, values in space["space"].items():
        ends = values if isinstance(values, list) else [values["low"], values["high"]]
        if not any(accepted(space, sweep.flag_words(flag, value)) for value in ends):
            sweep.resolve(
                space["script"], space["env_id"], [*space["args"], *sweep.flag_words(flag, ends[0])]
            )


# ---- Trials --------------------------------------------------------------------------------------


def make_trial(proposal, space: dict, source: Source, root: Path) -> Trial:
    """The jobs of a proposal; none where the script refuses this combination of values."""
    script, env_id = space["script"], space["env_id"]
    words = words_of(proposal.params)
    resolved, words = accepted(space, words), (*space["args"], *words)
    name, found = sweep.title(folder_name(env_id), f"trial {proposal.number}"), []
    for seed in range(TUNING_SEEDS, TUNING_SEEDS + space["seeds"]) if resolved else ():
        about, folder = json.dumps(resolved | {"seed": seed}), root / f"{name}__{script}__{seed}"
        found.append(Job(script, env_id, seed, words, about, source.code, source.digest, folder))
    known = proposal.study.trials[proposal.number].intermediate_values
    return Trial(proposal, found, max(known, default=0))


def advance(trial: Trial, options: Options, free: int) -> str:
    """Look after the trial's process, or start the next if one is `free`. Returns why it failed.

    Its seeds are trained one after the other, so that all trials are compared at the same points.
    """
    for job, process in list(trial.running.items()):
        if (code := process.poll()) is None:
            continue
        del trial.running[job]
        again = jobs.worth_a_retry(code) and trial.starts < len(trial.jobs) + options.retries
        if jobs.status(job) != "complete" and not again:
            return jobs.failure(job, code)
    for job in trial.left()[:1] if free > 0 and not trial.running else []:
        if process := jobs.start(job):
            trial.running[job] = process
            trial.starts += 1
    return "" if trial.jobs else "the script refuses these values together"


def progress(trial: Trial) -> tuple[int, float]:
    """How many parts its runs have done together, and the mean of their recent returns."""
    parts, returns = 0, []
    for job in trial.jobs:
        with contextlib.suppress(ValueError):  # not begun
            run = read_run(job.folder)
            parts += int(PARTS * min(1.0, run["steps"] / run["args"]["total_timesteps"]))
            recent = [value for _, value in run["curve"][-RECENT:]]
            returns += [np.mean(recent)] if recent else []
    return parts, float(np.mean(returns)) if returns else np.nan


def outcome(trial: Trial) -> tuple[str, float]:
    """ "complete", "pruned", "fail" or "running", and the trial's value so far."""
    if not trial.running and not trial.left():
        finals = [read_run(job.folder)["eval"] for job in trial.jobs]
        if None in finals:
            return "fail", np.nan
        return "complete", float(np.mean([final["episodic_return"] for final in finals]))
    parts, value = progress(trial)
    if parts <= trial.reported or not np.isfinite(value):
        return "running", value
    for part in range(trial.reported + 1, parts + 1):  # each, as others are compared at each
        trial.optuna.report(value, part)
    trial.reported = parts
    return "pruned" if trial.optuna.should_prune() else "running", value


def tune(
    study, distributions: dict, make: Callable[[Any], Trial], options: Options, stop: sweep.Stop
) -> None:
    """Keep all workers busy until there are trials enough, or a signal comes."""
    from optuna.trial import Trial as Proposal
    from optuna.trial import TrialState

    begun = study.get_trials(states=[TrialState.RUNNING])  # by a session that was stopped
    trials = [make(Proposal(study, old._trial_id)) for old in begun]
    while not stop.signal:
        for trial in list(trials):
            busy = sum(len(other.running) for other in trials)
            reason = advance(trial, options, options.workers - busy)
            state, value = ("fail", np.nan) if reason else outcome(trial)
            if state == "running":
                continue
            trial.stop()
            trials.remove(trial)
            told = value if state == "complete" else None
            study.tell(trial.optuna, told, state=TrialState[state.upper()])
            share = trial.reported / PARTS / max(1, len(trial.jobs))
            how = {
                "complete": f"{value:.1f}",
                "pruned": f"{value:.1f} after {share:.0%}, stopped",
                "fail": f"failed: {reason or 'the return of an evaluation is not finite'}",
            }[state]
            words = shlex.join(words_of(trial.optuna.params))
            print(f"trial {trial.optuna.number}: {how}  ({words})", flush=True)
        if len(trials) < options.workers and len(study.trials) < options.trials:
            trials.append(make(study.ask(distributions)))
        elif not trials:
            return
        else:
            time.sleep(0.5)
    for process in (process for trial in trials for process in trial.running.values()):
        process.terminate()  # all at once, as each takes a while for its checkpoint
    for trial in trials:
        trial.stop()


def conclude(study, space: dict, root: Path) -> None:
    """What was found, as a command line has it."""
    states = collections.Counter(trial.state.name.lower() for trial in study.trials)
    said = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(f"{len(study.trials)} trials ({said}) in {sweep.show(root)}")
    if states["complete"]:
        best = study.best_trial
        print(f"best: trial {best.number}, {best.value:.1f}: {shlex.join(words_of(best.params))}")


def main() -> None:
    options = sweep.read_options(Options, __doc__)
    if min(options.workers, options.trials) < 1 or min(options.retries, options.startup_trials) < 0:
        wrong("--workers and --trials must be at least 1, --retries and --startup-trials 0 or more")
    try:
        import optuna
    except ImportError:
        wrong("benchmark.tune needs Optuna: pip install -r benchmark/requirements-tune.txt")
    space = read_space(options.space)
    sweep.check_environment(space["env_id"])
    check_flags(space)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    source = jobs.read_source(space["script"])
    question = hashlib.sha256(json.dumps([space, source.code], sort_keys=True).encode()).hexdigest()
    root = (options.run_root or Path("runs") / f"tune-{options.space.stem}").absolute()
    root /= question[:8]  # another space, or another algorithm, is another study
    if "?" in str(root):
        wrong(f"--run-root {root}: a ? in the path would end the name of Optuna's database")
    try:
        source.keep(root)
        lock = open(root / "lock", "w")  # noqa: SIM115  as long as this process lives
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        wrong(f"--run-root {sweep.show(root)}: another process tunes there")
    except OSError as error:
        wrong(f"--run-root {root}: {error}")
    pruner = optuna.pruners.MedianPruner(options.startup_trials)
    study = optuna.create_study(
        storage=f"sqlite:///{root}/study.db",
        study_name="trials",
        load_if_exists=True,
        direction="maximize",
        pruner=pruner,
    )
    first = options.startup_trials
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=first, seed=len(study.trials))
    stop = sweep.Stop()
    print(
        f"{len(study.trials)} of {options.trials} trials begun, in {sweep.show(root)}", flush=True
    )
    distributions = {flag: distribution(values) for flag, values in space["space"].items()}

    def make(proposal) -> Trial:
        return make_trial(proposal, space, source, root)

    tune(study, distributions, make, options, stop)
    conclude(study, space, root)
    if stop.signal:
        print("stopped, with checkpoints; go on: the same command again")
        sys.exit(128 + stop.signal)
    sys.exit(0 if any(trial.state.name == "COMPLETE" for trial in study.trials) else 1)


if __name__ == "__main__":
    main()
