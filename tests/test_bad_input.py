"""What a user gets wrong: one clear line, exit code 2, nothing written, nothing lost."""

import json
import math
import os
import resource
import shutil
import subprocess
from dataclasses import fields

import pytest
import torch
from conftest import (
    GAMES,
    ONE,
    ROOT,
    VECTORS,
    checkpoint,
    command,
    environ,
    load,
    metrics,
    probe,
    run,
    run_process,
)


@pytest.fixture
def copied(finished, tmp_path):
    def get(script):
        return shutil.copytree(finished(script)[1], tmp_path / "copy")

    return get


def assert_refused(done, says=()):
    assert "Traceback" not in done.stderr and not done.stdout
    for text in says:
        assert text in done.stderr, done.stderr
    return done.stderr


def refuse(script, *arguments, quick=True, says=()):
    return assert_refused(run(script, *arguments, quick=quick, code=2), says)


BAD_ARGUMENTS = [
    ("--env-id Nothing-v0", ["error: --env-id Nothing-v0"]),
    ("--env-id nomodule:Nothing-v0", ["error: --env-id nomodule:Nothing-v0"]),
    ("--env-id PROBE:Picture", ["error: --env-id", "Picture"]),
    ("--env-id ./probes:Probe-v0", ["--env-id", "module:Name-v0"]),
    ("--env-id probes:Probe:v0", ["--env-id", "module:Name-v0"]),
    ("--num-envs 0", ["--num-envs", "at least 1", "0"]),
    ("--num-envs -3", ["--num-envs", "-3"]),
    ("--total-timesteps 0", ["--total-timesteps"]),
    ("--total-timesteps 1.5", ["--total-timesteps"]),
    ("--gamma 1.5", ["--gamma", "between 0 and 1", "1.5"]),
    ("--gamma nan", ["--gamma"]),
    ("--torch-threads 1e13", ["--torch-threads", "at most 1024"]),
    ("--learning-rate nan", ["--learning-rate"]),
    ("--learning-rate 0", ["--learning-rate"]),
    ("--seed -1", ["--seed"]),
    ("--seed 100000000000000000000", ["--seed"]),
    ("--eval-episodes 0", ["--eval-episodes"]),
    ("--checkpoint-frequency -1", ["--checkpoint-frequency"]),
    ("--totl-timesteps 5", ["--total-timesteps"]),
    ("--env-id PROBE:Probe --capture-video --env-kwargs {}", ["error: --capture-video"]),
]


def test_bad_arguments(script, tmp_path):
    for arguments, says in BAD_ARGUMENTS:
        if script in GAMES and "--capture-video" in arguments:
            continue  # every game can be drawn
        for name in ("Picture", "Probe"):
            arguments = arguments.replace(f"PROBE:{name}", probe(script, name))
        refuse(script, *arguments.split(), "--run-dir", tmp_path / "r", says=says)
        assert not list(tmp_path.iterdir()), arguments


def test_every_number_is_checked(script):
    """Each flag of a count refuses -1, each of another number NaN, and names itself."""
    args = load(script).Args
    optional = [field.name for field in fields(args) if field.type == "float | None"]
    wrong = {int: -1, float: math.nan}  # bool is neither
    found = {name: wrong[type(x)] for name, x in vars(args()).items() if type(x) in wrong}
    for name, value in (found | dict.fromkeys(optional, math.nan)).items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
            args(**{name: value})


def test_a_refusal_in_a_process_of_its_own(tmp_path):
    done = run_process(ONE, "--gamma", "1.5", "--run-dir", tmp_path / "r", code=2)
    assert_refused(done, ["--gamma", "between 0 and 1"])
    done = run_process(ONE, "--env-id", "Nothing-v0", "--run-dir", tmp_path / "r", code=2)
    assert len(assert_refused(done, ["error: --env-id Nothing-v0"]).splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--env-id CartPole-v1", ["error: --env-id CartPole-v1", "Box"]),
        ("--num-minibatches 7", ["--num-minibatches", "divisor", "128"]),
        ("--num-minibatches 256", ["--num-minibatches"]),
        ("--num-steps 0", ["--num-steps"]),
        ("--policy-objective kl-penalty --target-kl None", ["--target-kl"]),
        ("--target-kl -1", ["--target-kl"]),
        ("--kl-coef 0", ["--kl-coef", "above 0"]),
        ("--policy-objective nonsense", ["clip"]),
        ("--wandb-project-name team/project", ["--wandb-project-name", "without /"]),
    ],
)
def test_bad_arguments_of_ppo(arguments, says, tmp_path):
    refuse("ppo_continuous", *arguments.split(), "--run-dir", tmp_path / "r", says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["a2c", "dqn", "double_dqn_per"])
def test_flags_for_games_are_refused_elsewhere(script, tmp_path):
    """They would do nothing, and args.json would say that they had been used."""
    for flag, value in {"--precision": "bfloat16", "--sticky-actions": "0.25"}.items():
        says = [flag, "except on Atari", value]
        arguments = ["--env-id", "CartPole-v1", flag, value, "--run-dir", tmp_path / "r"]
        refuse(script, *arguments, says=says)
    assert not list(tmp_path.iterdir())
    args = load(script).Args(env_id="ALE/Pong-v5", precision="bfloat16", sticky_actions=0.25)
    assert args.precision == "bfloat16" and args.sticky_actions == 0.25


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(tmp_path):
    refuse(ONE, "--device", "cuda", "--run-dir", tmp_path / "r", says=["error: --device cuda"])


def test_a_folder_that_holds_a_run_is_refused(finished):
    folder = finished(ONE)[1]
    before = (folder / "args.json").read_bytes()
    refuse(ONE, "--run-dir", folder, says=["error: --run-dir", f"--resume {folder}"])
    assert (folder / "args.json").read_bytes() == before


def test_a_folder_that_holds_the_users_own_script_is_refused(tmp_path):
    """A copy that was changed; an empty file is what a killed run may have left."""
    mine = tmp_path / f"{ONE}.py"
    mine.write_text("# my own changes")
    refuse(ONE, "--run-dir", tmp_path, says=["error: --run-dir", f"another {ONE}.py"])
    assert mine.read_text() == "# my own changes" and len(list(tmp_path.iterdir())) == 1
    mine.write_text("")
    run(ONE, "--run-dir", tmp_path)
    assert "class Args" in mine.read_text()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refuse(ONE, "--run-dir", tmp_path / "file" / "run", says=["error: cannot write"])


def test_a_folder_whose_name_is_too_long(tmp_path):
    refuse(ONE, "--run-dir", tmp_path / ("r" * 300), says=["error: cannot write", "--run-dir"])


def test_resuming_with_other_arguments(script, finished):
    folder = finished(script)[1]
    for arguments in (
        ["--gamma", 0.5],
        ["--seed", 2],
        ["--num-envs", 4],
        ["--total-timesteps", 256],
        ["--no-anneal-lr" if load(script).Args().anneal_lr else "--anneal-lr"],
    ):
        flag = str(arguments[0]).replace("--no-", "--")
        refuse(script, "--resume", folder, *arguments, quick=False, says=["error:", flag])
    # the default value, given, is refused too where the run has another
    default = load(script).Args().num_envs
    refuse(script, "--resume", folder, "--num-envs", default, quick=False, says=["--num-envs"])
    refuse(script, "--evaluate", folder, "--gamma", 0.5, quick=False, says=["--gamma"])


def test_resume_and_evaluate_exclude_each_other(finished):
    folder = finished(ONE)[1]
    refuse(ONE, "--resume", folder, "--evaluate", folder, quick=False, says=["--evaluate"])
    refuse(ONE, "--resume", "", quick=False, says=["--resume", "run folder"])


def test_no_such_run(tmp_path):
    for flag in ("--resume", "--evaluate"):
        refuse(ONE, flag, tmp_path / "no", quick=False, says=[f"error: {flag}", "run folder"])


def test_another_scripts_run(copied):
    folder = copied(ONE)
    about = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(about | {"script": "other.py"}))
    refuse(ONE, "--resume", folder, quick=False, says=["error: --resume", "other.py"])


@pytest.mark.parametrize("text", ["", "[]", '{"args": 3}', "{", '{"script": "x.py"}'])
def test_a_broken_args_file(copied, text):
    folder = copied(ONE)
    (folder / "args.json").write_text(text)
    refuse(ONE, "--resume", folder, quick=False, says=["error: --resume"])


def test_a_changed_script_warns(copied):
    folder = copied(ONE)
    about = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(about | {"sha256": "0"}))
    assert "warning" in run(ONE, "--evaluate", folder, quick=False).stderr


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "shapes", "code"])
def test_a_corrupt_or_foreign_checkpoint(script, copied, damage):
    folder = copied(script)
    path = folder / "checkpoint.pt"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "shapes":
        saved = checkpoint(folder)
        first = next(name for name, part in saved.items() if isinstance(part, dict))
        saved[first] = {key: torch.zeros(3) for key in saved[first]}
        torch.save(saved, path)
    else:
        torch.save({"global_step": os.system}, path)
    before = path.read_bytes(), (folder / "metrics.jsonl").read_bytes()
    for flag in ("--resume", "--evaluate"):
        refuse(script, flag, folder, quick=False, says=["error:", "checkpoint.pt"])
    assert (path.read_bytes(), (folder / "metrics.jsonl").read_bytes()) == before


def test_evaluating_without_a_checkpoint(copied):
    folder = copied(ONE)
    (folder / "checkpoint.pt").unlink()
    refuse(ONE, "--evaluate", folder, quick=False, says=["error:", "checkpoint.pt"])


def limited(limit, *arguments, quick=True):
    """A limit on the size of files stands in for a full disk."""
    return subprocess.run(
        command(ONE, *arguments, quick=quick),
        env=environ(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip


def test_a_disk_that_is_full_after_a_part_of_the_script(tmp_path):
    """What the message says to do works, and completes the copy."""
    folder = tmp_path / "r"
    done = limited(20_000, "--run-dir", folder)
    assert done.returncode == 2 and f"--resume {folder}" in done.stderr, done.stderr
    assert (folder / f"{ONE}.py").stat().st_size == 20_000
    run(ONE, "--resume", folder, quick=False)
    assert (folder / f"{ONE}.py").read_bytes() == (ROOT / f"{ONE}.py").read_bytes()


@pytest.mark.parametrize("limit", [65_000, 3_000, 100])
def test_a_full_disk(tmp_path, limit):
    """One line, exit code 2, what is there stays whole."""
    folder = tmp_path / "r"
    done = limited(limit, "--run-dir", folder, "--checkpoint-frequency", 128)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: cannot write") and len(done.stderr.splitlines()) == 1
    assert not (folder / "checkpoint.pt").exists()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(copied):
    folder = copied(ONE)
    before = (folder / "checkpoint.pt").read_bytes()
    arguments = ["--resume", folder, "--total-timesteps", 1024, "--checkpoint-frequency", 128]
    done = limited(65_000, *arguments, quick=False)
    assert done.returncode == 2 and f"--resume {folder}" in done.stderr, done.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before
    run(ONE, *arguments, quick=False)
    assert checkpoint(folder)["global_step"] == 1024


@pytest.mark.parametrize("script", VECTORS)
def test_a_nan_stops_the_run_before_it_is_saved(script, tmp_path):
    """Exit code 3, the step named, and the last checkpoint still good."""
    arguments = ["--env-id", probe(script, "BadReward"), "--total-timesteps", 4096]
    folder = tmp_path / "r"
    done = run(script, *arguments, "--run-dir", folder, "--checkpoint-frequency", 128, code=3)
    assert "not finite at step" in done.stderr and "Traceback" not in done.stderr
    saved = checkpoint(folder)
    assert metrics(folder)[-1]["global_step"] == saved["global_step"] >= 128
    tensors = [x for part in saved.values() if isinstance(part, dict) for x in part.values()]
    assert all(x.isfinite().all() for x in tensors if isinstance(x, torch.Tensor))


def test_an_environments_own_error_keeps_its_traceback(tmp_path):
    arguments = ["--env-id", probe(ONE, "Crashing"), "--run-dir", tmp_path / "r"]
    done = run_process(ONE, *arguments, code=1)
    assert "Traceback" in done.stderr and "the simulator fell over" in done.stderr


def test_tracking_without_wandb(tmp_path):
    """Neither a missing package nor a mere folder named wandb gets past the start."""
    (tmp_path / "hidden").mkdir()
    hide = "import sys\nsys.modules['wandb'] = None\n"
    (tmp_path / "hidden" / "sitecustomize.py").write_text(hide)
    arguments = ["--track", "--run-dir", tmp_path / "r"]
    done = run_process(ONE, *arguments, code=2, PYTHONPATH=f"{tmp_path / 'hidden'}")
    assert "pip install wandb" in assert_refused(done) and not (tmp_path / "r").exists()
