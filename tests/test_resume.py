"""Kills, signals and resumes: the run folder stays whole, and the end is bit-identical."""

import os
import random
import signal
import subprocess
import time

import pytest
from conftest import (
    GAMES,
    ONE,
    assert_same_end,
    checkpoint,
    command,
    env_id,
    environ,
    load,
    metrics,
    run,
    run_process,
)

KILLS = int(os.environ.get("KILLS", 1))  # more on request: KILLS=20 python -m pytest -k instant
LONG = ["--total-timesteps", 3072, "--checkpoint-frequency", 256]  # 24 iterations
LONG_GAMES = ["--num-steps", 16, "--total-timesteps", 768, "--checkpoint-frequency", 64]  # as many
RARE = ["--total-timesteps", 3072, "--checkpoint-frequency", 0]
HUGE = ["--num-steps", 2**16, "--num-minibatches", 1]  # an iteration that takes for ever


def long(script):
    return LONG_GAMES if script in GAMES else LONG


def start(script, *arguments, quick=True):
    return subprocess.Popen(
        command(script, *arguments, *(["--env-id", env_id(script)] if quick else []), quick=quick),
        env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(process, folder, step):
    """Until the run has logged a step."""
    for _ in range(12_000):
        try:
            if metrics(folder)[-1]["global_step"] >= step:
                return
        except (OSError, IndexError, ValueError):
            pass
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise TimeoutError


def wait_for_begin(process, folder):
    """Until the run has its folder."""
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def kill_at(step, folder, *arguments):
    """Start a run, and kill it once it has logged this step."""
    process = start(ONE, "--run-dir", folder, *arguments)
    wait_for_step(process, folder, step)
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs = {}

    def get(script):
        if script not in runs:
            runs[script] = tmp_path_factory.mktemp(script) / "undisturbed"
            run(script, "--run-dir", runs[script], *long(script), "--env-id", env_id(script))
        return runs[script]

    return get


class Crash(Exception):
    pass


@pytest.mark.parametrize("iteration", [2, 13])
def test_crashed_in_an_iteration(script, undisturbed, tmp_path, monkeypatch, iteration):
    """Between two checkpoints, in this process: what the checkpoint lacks would show here."""
    module, folder = load(script), tmp_path / "crashed"
    end_iteration, calls = module.Run.end_iteration, []

    def crash(*arguments):
        calls.append(arguments)
        if len(calls) == iteration:
            raise Crash
        end_iteration(*arguments)

    monkeypatch.setattr(module.Run, "end_iteration", crash)
    done = run(script, "--run-dir", folder, *long(script), "--env-id", env_id(script), code=1)
    assert "Crash" in done.stderr
    monkeypatch.setattr(module.Run, "end_iteration", end_iteration)
    done = run(script, "--resume", folder, quick=False)
    assert "not restored" not in done.stderr
    assert_same_end(folder, undisturbed(script))


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_instant(script, undisturbed, tmp_path, number):
    """kill -9 anywhere from the first file to the end: same weights and metrics, bit for bit."""
    reference, folder = undisturbed(script), tmp_path / "killed"
    duration = metrics(reference)[-1]["wall_time"]
    process = start(script, "--run-dir", folder, *long(script))
    while not (folder / "args.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    time.sleep(random.Random(f"{script} {number}").uniform(0, duration))
    process.kill()
    process.communicate()
    done = run_process(script, "--resume", folder, quick=False)
    assert "not restored" not in done.stderr
    assert_same_end(folder, reference)


def test_killed_again_and_again(undisturbed, tmp_path):
    folder = tmp_path / "killed"
    process = start(ONE, "--run-dir", folder, *LONG)
    for kill in range(3):
        wait_for_step(process, folder, 700 * (kill + 1))
        process.kill()
        process.communicate()
        process = start(ONE, "--resume", folder, quick=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_same_end(folder, undisturbed(ONE))


def test_killed_before_the_first_checkpoint(undisturbed, tmp_path):
    folder = tmp_path / "early"
    kill_at(128, folder, *RARE)
    assert not (folder / "checkpoint.pt").exists()
    run(ONE, "--resume", folder, quick=False)
    assert_same_end(folder, undisturbed(ONE))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_checkpoint_and_say_how_to_go_on(undisturbed, tmp_path, number):
    folder = tmp_path / "stopped"
    process = start(ONE, "--run-dir", folder, *RARE)
    wait_for_step(process, folder, 256)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"--resume {folder}" in err and "Traceback" not in err
    step = checkpoint(folder)["global_step"]
    assert 256 <= step < 3072 and metrics(folder)[-1]["global_step"] == step
    run(ONE, "--resume", folder, quick=False)
    assert_same_end(folder, undisturbed(ONE))


def test_a_later_second_signal_ends_at_once(tmp_path):
    folder = tmp_path / "stopped"
    process = start(ONE, "--run-dir", folder, "--total-timesteps", 10**7, *HUGE)
    wait_for_begin(process, folder)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(2.3)  # sooner, it would count as the same wish
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT


def test_a_signal_in_an_evaluation(finished, monkeypatch):
    """--evaluate is broken off after its step, and names itself and not --resume."""
    folder = finished(ONE)[1]

    def signalled(run):
        run.signal = signal.SIGTERM
        return evaluate(run)

    evaluate = load(ONE).Run.evaluate
    monkeypatch.setattr(load(ONE).Run, "evaluate", signalled)
    done = run(ONE, "--evaluate", folder, "--eval-episodes", 1000, quick=False, code=143)
    assert f"--evaluate {folder}" in done.stderr and not done.stdout


def test_a_signal_in_the_final_evaluation(undisturbed, tmp_path):
    """The training is over and saved: the evaluation is given up, and a resume makes it."""
    folder = tmp_path / "late"
    process = start(ONE, "--run-dir", folder, *LONG, "--eval-episodes", 100_000)
    while not (folder / "checkpoint.pt").exists() or checkpoint(folder)["global_step"] < 3072:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and f"--resume {folder}" in err and not out
    run(ONE, "--resume", folder, "--eval-episodes", 2, quick=False)
    assert_same_end(folder, undisturbed(ONE))


def test_other_evaluation_episodes_after_the_end(tmp_path):
    """A finished run, resumed with other --eval-episodes, evaluates again and logs it."""
    run(ONE, "--run-dir", tmp_path / "r")
    done = run(ONE, "--resume", tmp_path / "r", "--eval-episodes", 3, quick=False)
    assert "episodes=3" in done.stdout and metrics(tmp_path / "r")[-1]["eval/episodes"] == 3


def test_training_can_be_prolonged(script, tmp_path):
    """The prolonged run goes on from the old end and keeps its lines; wall time adds up."""
    folder = tmp_path / "longer"
    run(script, "--run-dir", folder, "--env-id", env_id(script))
    old = metrics(folder)
    run(script, "--resume", folder, "--total-timesteps", 1024, quick=False)
    new = metrics(folder)
    whole_episodes = 100 if script == "reinforce" else 0  # its iterations are not 128 steps
    assert new[: len(old)] == old and 0 <= new[-1]["global_step"] - 1024 <= whole_episodes
    assert new[len(old)]["wall_time"] > old[-1]["wall_time"]


def test_torn_and_extra_lines_are_cut(undisturbed, tmp_path):
    folder = tmp_path / "torn"
    kill_at(1500, folder, *LONG)
    with open(folder / "metrics.jsonl", "ab") as file:  # the last line of a torn disk is any bytes
        file.write(b'{"global_step": 99999, "wall_time": 1.0}\n{"global_st\xff\xfe')
    run(ONE, "--resume", folder, quick=False)
    assert_same_end(folder, undisturbed(ONE))


def test_killed_in_the_final_evaluation(undisturbed, tmp_path):
    """The last checkpoint is written before it, so that only the evaluation is done again."""
    folder = tmp_path / "late"
    process = start(ONE, "--run-dir", folder, *LONG, "--eval-episodes", 100_000)
    wait_for_step(process, folder, 3072)
    time.sleep(1)
    process.kill()
    process.communicate()
    assert checkpoint(folder)["global_step"] == 3072
    assert not any("eval/episodes" in line for line in metrics(folder))
    done = run(ONE, "--resume", folder, "--eval-episodes", 2, quick=False)
    assert_same_end(folder, undisturbed(ONE))
    again = run(ONE, "--resume", folder, quick=False)
    assert again.stdout == done.stdout
    assert_same_end(folder, undisturbed(ONE))
