"""The contract on a run from the outside: folder, metrics, last line, evaluation, determinism."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    GAMES,
    ONE,
    ROOT,
    VECTORS,
    checkpoint,
    command,
    env_id,
    environ,
    load,
    metrics,
    probe,
    run,
    run_process,
    same,
    training,
    without_times,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

ATARI = {"dqn", "double_dqn_per", "a2c"}  # scripts whose defaults depend on the environment
LAST_LINE = re.compile(
    r"eval mean_return=(-?\d+\.\d+) std=(\d+\.\d+) episodes=(\d+) global_step=(\d+) run_dir=(\S+)"
)


def last_line(done):
    match = LAST_LINE.fullmatch(done.stdout.strip().splitlines()[-1])
    assert match, done.stdout
    return match.groups()


def test_run_folder(script, finished):
    _, folder = finished(script)
    about = json.loads((folder / "args.json").read_text())
    text = (ROOT / f"{script}.py").read_bytes()
    assert about["script"] == f"{script}.py" and about["device"] == "cpu"
    assert about["sha256"] == hashlib.sha256(text).hexdigest()
    assert (folder / f"{script}.py").read_bytes() == text
    assert {"python", "torch", "gymnasium", "numpy"} <= about["versions"].keys()
    assert script not in GAMES or "ale_py" in about["versions"]
    assert about["args"]["total_timesteps"] == 512 and about["args"]["gamma"] is not None
    assert {path.name for path in folder.iterdir()} == {
        "args.json",
        "checkpoint.pt",
        "metrics.jsonl",
        f"{script}.py",
    }


def varies(script, name):
    """Whether this is a loss; but TRPO's policy loss is a mean of normalised advantages: 0."""
    return "_loss" in name and (script, name) != ("trpo", "losses/policy_loss")


def test_an_update_happened_and_is_logged(script, finished):
    _, folder = finished(script)
    lines = training(folder)
    names = {name for line in lines for name in line}
    assert {"charts/episodic_return", "charts/episodic_length", "charts/episodes"} <= names
    assert {"charts/SPS", "charts/learning_rate"} <= names
    assert [line["global_step"] for line in lines] == sorted(
        {line["global_step"] for line in lines}
    )
    times = [line["wall_time"] for line in lines]
    assert times == sorted(times) and times[0] > 0
    losses = [x for line in lines for name, x in line.items() if varies(script, name)]
    assert len(set(losses)) == len(losses) > 1
    assert load(script).Args and checkpoint(folder)["global_step"] == 512


def test_every_step_of_the_optimizer_starts_from_a_zero_gradient(script, tmp_path, monkeypatch):
    zero_grad, calls = torch.optim.Optimizer.zero_grad, []

    def zeroed(optimizer, *arguments, **options):
        zero_grad(optimizer, *arguments, **options)
        calls.append("zero")

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", zeroed)
    hook = register_optimizer_step_pre_hook(lambda *arguments: calls.append("step"))
    run(script, "--run-dir", tmp_path / "r")
    hook.remove()
    assert len(calls) > 4 and calls == ["zero", "step"] * (len(calls) // 2)


@pytest.mark.parametrize("script", VECTORS)
def test_every_episode_that_ended_is_in_a_line(script, tmp_path):
    """Episodes of 50 steps of two environments."""
    run(script, "--run-dir", tmp_path / "r", "--env-id", probe(script, "Fifty"))
    lines = training(tmp_path / "r")
    ended = 2 * (lines[-1]["global_step"] // 2 // 50)
    assert sum(line.get("charts/episodes", 0) for line in lines) == ended >= 10
    assert all(line.get("charts/episodic_length", 50) == 50 for line in lines)
    assert all(line.get("charts/episodic_return", 50) == 50 for line in lines)


def test_ppo_logs_its_health(finished):
    _, folder = finished("ppo_continuous")
    assert any(line["losses/grad_norm"] > 0 for line in training(folder))
    names = "policy_loss value_loss entropy approx_kl clipfrac explained_variance values grad_norm"
    for line in training(folder):
        assert {f"losses/{name}" for name in names.split()} <= line.keys()
        assert 0 <= line["losses/clipfrac"] < 1 and line["losses/approx_kl"] > 0


def test_last_line_and_metrics_agree(script, finished):
    done, folder = finished(script)
    mean, std, episodes, step, run_dir = last_line(done)
    last = metrics(folder)[-1]
    assert float(mean) == pytest.approx(last["eval/episodic_return"], abs=1e-4)
    assert float(std) == pytest.approx(last["eval/episodic_return_std"], abs=1e-4)
    assert (int(episodes), int(step), run_dir) == (2, last["global_step"], str(folder))


def test_evaluate_repeats_the_final_evaluation_and_writes_nothing(script, finished):
    done, folder = finished(script)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run_process(script, "--evaluate", folder, quick=False)
    assert last_line(again) == last_line(done)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    other = run(script, "--evaluate", folder, "--eval-episodes", 3, quick=False)
    assert last_line(other)[2] == "3"


def test_evaluate_loads_no_part_of_training_alone(script, finished, tmp_path):
    """A replay memory takes gigabytes, and is not needed to act."""
    done, folder = finished(script)
    shutil.copytree(folder, tmp_path / "r")
    training_only = ("optimizer", "buffer", "rng")
    kept = {k: x for k, x in checkpoint(folder).items() if not k.endswith(training_only)}
    torch.save(kept | {"torch_rng": torch.get_rng_state()}, tmp_path / "r" / "checkpoint.pt")
    again = run(script, "--evaluate", tmp_path / "r", quick=False)
    assert last_line(again)[:2] == last_line(done)[:2]


def test_same_seed_same_run_and_evaluations_do_not_disturb(script, finished, tmp_path):
    """A run with evaluations in between ends in the same weights and logs the same numbers."""
    _, folder = finished(script)
    run(script, "--run-dir", tmp_path / "b", "--eval-frequency", 128)
    ours, theirs = training(folder), training(tmp_path / "b")
    assert without_times(ours) == without_times(theirs)
    evaluations = [x for x in metrics(tmp_path / "b") if "eval/episodic_return" in x]
    assert [line["global_step"] for line in evaluations] == [128, 256, 384, 512]
    assert without_times(evaluations)[-1] == without_times(metrics(folder))[-1]
    assert same(checkpoint(folder), checkpoint(tmp_path / "b"))


def test_every_evaluation_plays_the_same_episodes(tmp_path):
    """Returns that are the seed's alone do not change while the policy learns."""
    words = ["--env-id", "probes:Counting-v0", "--run-dir", tmp_path / "r"]
    run(ONE, *words, "--eval-frequency", 128, "--eval-episodes", 10)
    name = "eval/episodic_return"
    returns = [line[name] for line in metrics(tmp_path / "r") if name in line]
    assert len(returns) == 4 and len(set(returns)) == 1


def test_another_seed_is_another_run(script, finished, tmp_path):
    _, folder = finished(script)
    run(script, "--run-dir", tmp_path / "b", "--seed", 2)
    assert not same(checkpoint(folder), checkpoint(tmp_path / "b"))


def test_alone_in_an_empty_folder(script, tmp_path):
    """Copied and run there: it works, and writes into ./runs and nowhere else."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    shutil.copy(ROOT / f"{script}.py", here)
    words = command(script, "--env-id", env_id(script))[2:]
    arguments = [sys.executable, f"{script}.py", *words]
    outside = environ(HOME=str(home), PYTHONPATH="", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(arguments, cwd=here, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in here.iterdir()} == {f"{script}.py", "runs"}
    (folder,) = (here / "runs").iterdir()
    assert re.fullmatch(rf"{env_id(script).replace('/', '-')}__{script}__1__\d+", folder.name)
    assert not list(home.rglob("*"))
    assert json.loads((folder / "args.json").read_text())["git"] is None


def test_plain_progress_lines_in_a_pipe(tmp_path):
    done = run_process(ONE, "--run-dir", tmp_path / "r", "--total-timesteps", 1024)
    assert "\r" not in done.stderr and len(done.stderr.splitlines()) <= 3


def test_compiling_learns_the_same(script, finished, tmp_path):
    """The first updates' losses agree with eager ones, and they do change."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    run_process(script, "--run-dir", tmp_path, "--compile")
    eager, compiled = training(finished(script)[1]), training(tmp_path)
    for line, other in zip(eager, compiled, strict=True):
        for name in line:
            if name.startswith("losses/"):
                assert other[name] == pytest.approx(line[name], rel=0.02, abs=2e-3), name
    losses = [x for line in eager for name, x in line.items() if varies(script, name)]
    assert len(set(losses)) == len(losses) > 1


def test_video(tmp_path):
    pytest.importorskip("moviepy")
    arguments = ["--env-id", probe(ONE, "Drawn"), "--capture-video", "--run-dir", tmp_path / "r"]
    run(ONE, *arguments)
    (video,) = (tmp_path / "r" / "videos").glob("*.mp4")
    assert video.stat().st_size > 500


def test_counts_may_be_written_as_people_write_them(ppo):
    assert [ppo.parse_count(x) for x in ("1e6", "1_000_000", "1000000")] == [10**6] * 3
    assert ppo.parse_count("2.5e3") == 2500
    with pytest.raises(ValueError):
        ppo.parse_count("1.5")


@pytest.mark.parametrize(
    "tool", ["ppo_continuous.py", "-m benchmark.sweep", "-m benchmark.tune"]
)  # the other scripts have the same bytes there
def test_help_into_a_reader_that_ends_early(tool):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, *tool.split(), "--help"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=300)
    os.close(write)
    assert done.stderr == b"" and done.returncode in (0, -signal.SIGPIPE)


def test_importing_and_help_have_no_side_effect(script, tmp_path):
    done = run_process(script, "--help", quick=False, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    text = " ".join(done.stdout.split())
    assert "--total-timesteps INT" in text and "--anneal-lr, --no-anneal-lr" in text
    assert set(re.findall(r"(--[a-z-]+) \{None\}\|", text)) <= {
        "--target-kl",
        "--npg-step",
        "--target-entropy",
    }  # None means no limit
    if script in ATARI:
        total = "1_000_000" if script == "a2c" else "500_000"
        assert f"(default: {total}; on Atari 10_000_000)" in re.sub(r"[ │]+", " ", text)
