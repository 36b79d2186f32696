"""What a user gets wrong: one clear line, exit code 2, nothing written, nothing lost."""

import json
import os
import resource
import shutil
import subprocess

import pytest
import torch
from conftest import checkpoint, command, environ, load, metrics, probe, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = {}

    def get(script):
        if script not in runs:
            runs[script] = tmp_path_factory.mktemp(script) / "run"
            run(script, "--run-dir", runs[script])
        return runs[script]

    return get


@pytest.fixture
def copied(finished, tmp_path):
    def get(script):
        return shutil.copytree(finished(script), tmp_path / "copy")

    return get


def refuse(script, *arguments, quick=True, says=(), **extra):
    done = run(script, *arguments, quick=quick, code=2, **extra)
    assert "Traceback" not in done.stderr and not done.stdout
    for text in says:
        assert text in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--env-id Nothing-v0", ["error: --env-id Nothing-v0"]),
        ("--env-id nomodule:Nothing-v0", ["error: --env-id nomodule:Nothing-v0"]),
        ("--env-id PROBE:Picture", ["error: --env-id", "Picture"]),
        ("--num-envs 0", ["--num-envs", "at least 1", "0"]),
        ("--num-envs -3", ["--num-envs", "-3"]),
        ("--total-timesteps 0", ["--total-timesteps"]),
        ("--total-timesteps 1.5", ["--total-timesteps"]),
        ("--gamma 1.5", ["--gamma", "between 0 and 1", "1.5"]),
        ("--gamma nan", ["--gamma"]),
        ("--learning-rate nan", ["--learning-rate"]),
        ("--learning-rate 0", ["--learning-rate"]),
        ("--seed -1", ["--seed"]),
        ("--seed 100000000000000000000", ["--seed"]),
        ("--eval-episodes 0", ["--eval-episodes"]),
        ("--checkpoint-frequency -1", ["--checkpoint-frequency"]),
        ("--totl-timesteps 5", ["--total-timesteps"]),
        ("--env-id PROBE:Probe --capture-video", ["--capture-video", "rendered"]),
    ],
)
def test_bad_arguments(script, arguments, says, tmp_path):
    if "PROBE:" in arguments:
        name = arguments.split("PROBE:")[1].split()[0]
        arguments = arguments.replace(f"PROBE:{name}", probe(script, name))
    says = ["error: --capture-video"] if "--capture-video" in arguments else says
    refuse(script, *arguments.split(), "--run-dir", tmp_path / "r", says=says)
    assert not list(tmp_path.iterdir())


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
    ],
)
def test_bad_arguments_of_ppo(arguments, says, tmp_path):
    refuse("ppo_continuous", *arguments.split(), "--run-dir", tmp_path / "r", says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(script, tmp_path):
    refuse(script, "--device", "cuda", "--run-dir", tmp_path / "r", says=["error: --device cuda"])


def test_a_folder_that_holds_a_run_is_refused(script, finished):
    folder = finished(script)
    before = (folder / "args.json").read_bytes()
    refuse(script, "--run-dir", folder, says=["error: --run-dir", f"--resume {folder}"])
    assert (folder / "args.json").read_bytes() == before


def test_a_folder_that_cannot_be_written(script, tmp_path):
    (tmp_path / "file").touch()
    refuse(script, "--run-dir", tmp_path / "file" / "run", says=["error: cannot write"])


def test_resuming_with_other_arguments(script, finished):
    folder = finished(script)
    for arguments in (
        ["--gamma", 0.5],
        ["--seed", 2],
        ["--num-envs", 4],
        ["--total-timesteps", 256],
    ):
        flag = str(arguments[0])
        refuse(script, "--resume", folder, *arguments, quick=False, says=["error:", flag])
    # the default value, given, is refused too where the run has another
    default = load(script).Args().num_envs
    refuse(script, "--resume", folder, "--num-envs", default, quick=False, says=["--num-envs"])
    refuse(script, "--evaluate", folder, "--gamma", 0.5, quick=False, says=["--gamma"])


def test_resume_and_evaluate_exclude_each_other(script, finished):
    folder = finished(script)
    refuse(script, "--resume", folder, "--evaluate", folder, quick=False, says=["--evaluate"])
    refuse(script, "--resume", "", quick=False, says=["--resume", "run folder"])


def test_no_such_run(script, tmp_path):
    for flag in ("--resume", "--evaluate"):
        refuse(script, flag, tmp_path / "no", quick=False, says=[f"error: {flag}", "run folder"])


def test_another_scripts_run(script, copied):
    folder = copied(script)
    about = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(about | {"script": "other.py"}))
    refuse(script, "--resume", folder, quick=False, says=["error: --resume", "other.py"])


@pytest.mark.parametrize("text", ["", "[]", '{"args": 3}', "{", '{"script": "x.py"}'])
def test_a_broken_args_file(script, copied, text):
    folder = copied(script)
    (folder / "args.json").write_text(text)
    refuse(script, "--resume", folder, quick=False, says=["error: --resume"])


def test_a_changed_script_warns(script, copied):
    folder = copied(script)
    about = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(about | {"sha256": "0"}))
    assert "warning" in run(script, "--evaluate", folder, quick=False).stderr


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


def test_evaluating_without_a_checkpoint(script, copied):
    folder = copied(script)
    (folder / "checkpoint.pt").unlink()
    refuse(script, "--evaluate", folder, quick=False, says=["error:", "checkpoint.pt"])


@pytest.mark.parametrize("limit", [60_000, 3_000, 100])
def test_a_full_disk(script, tmp_path, limit):
    """A limit on file sizes stands in for it: one line, exit code 2, what is there stays whole."""
    folder = tmp_path / "r"
    done = subprocess.run(
        command(script, "--run-dir", folder, "--checkpoint-frequency", 128),
        env=environ(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: cannot write") and len(done.stderr.splitlines()) == 1
    assert not (folder / "checkpoint.pt").exists()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(script, copied):
    folder = copied(script)
    before = (folder / "checkpoint.pt").read_bytes()
    arguments = ["--resume", folder, "--total-timesteps", 1024, "--checkpoint-frequency", 128]
    done = subprocess.run(
        command(script, *arguments, quick=False),
        env=environ(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )  # fmt: skip
    assert done.returncode == 2 and f"--resume {folder}" in done.stderr, done.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before
    run(script, *arguments, quick=False)
    assert checkpoint(folder)["global_step"] == 1024


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


def test_an_environments_own_error_keeps_its_traceback(script, tmp_path):
    done = run(script, "--env-id", probe(script, "Crashing"), "--run-dir", tmp_path / "r", code=1)
    assert "Traceback" in done.stderr and "the simulator fell over" in done.stderr


def test_tracking_without_wandb(script, tmp_path):
    """Neither a missing package nor a mere folder named wandb gets past the start."""
    (tmp_path / "hidden" / "sitecustomize").mkdir(parents=True)
    hide = "import sys\nsys.modules['wandb'] = None\n"
    (tmp_path / "hidden" / "sitecustomize.py").write_text(hide)
    shutil.rmtree(tmp_path / "hidden" / "sitecustomize")
    path = f"{tmp_path / 'hidden'}"
    stderr = refuse(script, "--track", "--run-dir", tmp_path / "r", PYTHONPATH=path)
    assert "pip install wandb" in stderr and not (tmp_path / "r").exists()
