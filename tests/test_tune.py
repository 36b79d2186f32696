"""Tuning: trials go on after a kill, the worse ones are stopped, its seeds are its own."""

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, call
from test_report import fake
from test_sweep import SHORT, environment, folders, plan, processes, step, suite, wait_for

sys.path.insert(0, str(ROOT))
from benchmark import jobs, tune

optuna = pytest.importorskip("optuna")

SPACE = "learning-rate = {low = 1e-5, high = 1e-2, log = true}\ngae-lambda = [0.9, 0.95]\n"


def space(folder, steps=512, seeds=2, text=SPACE, script="ppo_continuous", more=""):
    path = folder / "my_space.toml"
    args = f"{SHORT} --total-timesteps {steps} {more}".split()
    path.write_text(
        f"script = '{script}'\nenv_id = 'Pendulum-v1'\nargs = {args}\nseeds = {seeds}\n"
        f"[space]\n{text}"
    )
    return path


def begin(path, root, *arguments):
    words = [sys.executable, "-m", "benchmark.tune", path, "--run-root", root, *arguments]
    return subprocess.Popen(
        [*map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def test_the_best_trial_is_the_best(tmp_path):
    path, root = space(tmp_path), tmp_path / "r"
    output = finish(begin(path, root, "--trials", 3))
    values = {n: float(x) for n, x in re.findall(r"^trial (\d): (-\d+\.\d)  \(", output, re.M)}
    assert len(values) == 3 and f"best: trial {max(values, key=values.get)}, " in output
    (folder,) = [path for path in root.iterdir() if path.is_dir()]
    found = folders(folder)
    assert len(found) == 6  # two seeds each
    seeds = {json.loads((f / "args.json").read_text())["args"]["seed"] for f in found}
    assert seeds == {1_000_000, 1_000_001}
    finals = [json.loads((f / "metrics.jsonl").read_text().splitlines()[-1]) for f in found]
    first = [line["eval/episodic_return"] for line in finals[:2]]
    assert values["0"] == pytest.approx(np.mean(first), abs=0.06)
    again = finish(begin(path, root, "--trials", 3))
    assert "3 of 3 trials begun" in again and again.splitlines()[-1] == output.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_goes_on_where_it_was_stopped(tmp_path, number):
    path, root = space(tmp_path, steps=10_240, seeds=1), tmp_path / "r"
    running = begin(path, root, "--trials", 2, "--workers", 1)
    wait_for(lambda: any(0 < step(f) < 10_000 for inner in root.glob("*") for f in folders(inner)))
    running.send_signal(number)
    output = finish(running, code=-9 if number == signal.SIGKILL else 143)
    assert number == signal.SIGKILL or "the same command again" in output
    wait_for(lambda: not processes(root))
    output = finish(begin(path, root, "--trials", 2, "--workers", 1))
    assert "1 of 2 trials begun" in output and "2 trials (2 complete)" in output
    (folder,) = [path for path in root.iterdir() if path.is_dir()]
    assert len(folders(folder)) == 2 and not list(folder.glob("*.old*"))
    log = (folder / "logs" / "Pendulum-v1, trial 0__ppo_continuous__1000000.log").read_text()
    assert log.count("$ ") == 2 and "--resume" in log


def test_what_falls_behind_the_median_is_stopped(tmp_path):
    """By hand: three finished trials with returns of 10 at every part, then 20 and 0."""
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=3)
    )
    for _ in range(3):
        trial = study.ask()
        for part in range(1, 41):
            trial.report(10.0, part)
        study.tell(trial, 10.0)

    def outcome(value, name):
        folder = fake(tmp_path / name, final=None)  # half of its steps are done
        lines = folder / "metrics.jsonl"
        lines.write_text(re.sub(r'return": [\d.]+', f'return": {value}', lines.read_text()))
        job = jobs.Job("", "", 1, (), "", "", "", folder)
        trial = tune.Trial(study.ask(), [job], 0, running={job: None})
        return tune.outcome(trial), trial.reported

    assert outcome(20.0, "good") == (("running", 20.0), 10)
    assert outcome(0.0, "bad") == (("pruned", 0.0), 10)


def test_values_that_do_not_go_together_are_a_failed_trial(tmp_path):
    path = space(tmp_path, seeds=1, text="num-minibatches = [3, 4]\n")  # of 128 steps
    output = finish(begin(path, tmp_path / "r", "--trials", 4, "--workers", 2))
    assert "failed: the script refuses these values together" in output
    assert re.search(r"4 trials \(\d complete, \d fail\)", output)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gama = [0.9]\n", "refuses"),
        ("gamma = {low = 0.0, high = 0.9, log = true}\n", "gamma: a list of values"),
        ("gamma = {low = 0.1, high = 0.9, log = true, step = 0.1}\n", "gamma: a list of values"),
        ("num-steps = {low = 32, high = 64, step = 0.25, log = true}\n", "num-steps: a list"),
        ("gamma = {low = 0.1, high = 0.9, until = 3}\n", "gamma: a list of values"),
        ("gamma = 0.9\n", "gamma: a list of values, or low and high"),
        ("gamma = {low = 0.9}\n", "gamma: a list of values, or low and high"),
        ("gamma = {low = 0.9, high = 0.5}\n", "gamma: a list"),
        ("learning-rate = {low = 1.0, high = inf}\n", "learning-rate: a list"),
        ("--env_id", "env_id is missing"),
        ("--script", "script is missing"),
        ("gamma = [7.0]\n", "refuses"),
        ("", "the space is empty"),
        ("seed = [1, 2]\n", "--seed among the arguments"),
        ("gamma = [0.9]\n[other]\n", "unknown other"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, said):
    path = space(tmp_path, text=text)
    if text.startswith("--"):  # without a line of the file
        path.write_text(re.sub(rf"{text[2:]} = .*\n", "", space(tmp_path).read_text()))
    last = (
        call(tune.main, path, "--run-root", tmp_path / "r", code=2).stderr.strip().splitlines()[-1]
    )
    assert last.startswith("error: ") and said in last
    assert not (tmp_path / "r").exists()


def test_a_path_that_sqlite_would_cut(tmp_path):
    done = call(
        tune.main, space(tmp_path), "--run-root", tmp_path / "what? r", "--trials", 1, code=2
    )
    assert "a ? in the path" in done.stderr and not list(tmp_path.glob("what*"))


def test_a_study_belongs_to_one_process(tmp_path):
    path, root = space(tmp_path, seeds=1), tmp_path / "r"
    first = begin(path, root, "--trials", 1, "--workers", 1)
    wait_for(lambda: list(root.glob("*/study.db")))
    assert "another process tunes there" in finish(begin(path, root), code=2)
    finish(first)


def test_seeds_of_a_trial_come_one_after_the_other(tmp_path):
    """Else trials would be compared at different points, as they get more workers or fewer."""
    path, root = space(tmp_path), tmp_path / "r"
    finish(begin(path, root, "--trials", 1, "--workers", 2))
    one, two = sorted(root.glob("*/Pendulum-v1, trial 0__*/metrics.jsonl"))
    begun = (two.parent / "hardware.txt").stat().st_mtime  # what a job writes first
    assert one.stat().st_mtime < begun


def test_no_suite_may_have_seeds_of_tuning(tmp_path):
    path = suite(tmp_path, seeds=(1_000_000,))
    assert "seeds is a list" in plan(path, "--dry-run", code=2).stderr
    done = plan(suite(tmp_path), "--dry-run", "--seeds", "1000000", code=2)
    assert "benchmark.tune's" in done.stderr and jobs.ROOT == ROOT
