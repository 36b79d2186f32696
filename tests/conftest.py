"""What the tests share: the scripts, a cheap command line for each, ways to run and load them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# A run of a few seconds for every script; a script without a line here fails the tests below.
QUICK = {
    "ppo_continuous": "--env-id Pendulum-v1 --num-envs 2 --num-steps 64 --num-minibatches 4 "
    "--update-epochs 2 --total-timesteps 512 --eval-episodes 2",
    "dqn": "--env-id CartPole-v1 --num-envs 2 --log-frequency 128 --learning-starts 64 "
    "--buffer-size 400 --batch-size 16 --total-timesteps 512 --eval-episodes 2",
}
QUICK["double_dqn_per"] = QUICK["dqn"]
DISCRETE = {"dqn", "double_dqn_per"}  # scripts whose actions are numbers

torch.set_num_threads(1)
sys.path.insert(0, str(TESTS))  # so that gymnasium finds "probes:Name-v0"


def environ(**extra):
    """This process's environment, with the probes importable and no wandb account."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return clean | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"} | extra


def env_id(script):
    """An environment whose episodes end soon."""
    return "CartPole-v1" if script in DISCRETE else "InvertedPendulum-v5"


def probe(script, name):
    """A probe with actions that the script can handle."""
    return f"probes:{'Discrete' if script in DISCRETE else ''}{name}-v0"


def command(script, *arguments, quick=True):
    words = QUICK[script].split() if quick else []
    return [sys.executable, str(ROOT / f"{script}.py"), *words, *map(str, arguments)]


def run(script, *arguments, quick=True, code=0, cwd=None, **extra):
    """Run a script to its end in a process of its own and check its exit code."""
    done = subprocess.run(
        command(script, *arguments, quick=quick),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environ(**extra),
        timeout=300,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def load(script):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    return module


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def training(folder):
    """The lines of iterations, without those of evaluations."""
    return [line for line in metrics(folder) if "charts/SPS" in line]


def without_times(lines):
    return [{k: v for k, v in x.items() if k not in ("wall_time", "charts/SPS")} for x in lines]


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def same(left, right):
    """Deep equality of checkpoints, bit for bit; wall time and wandb id apart."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        skip = {"wall_time", "wandb_id"}
        keys = left.keys() - skip
        return keys == right.keys() - skip and all(same(left[key], right[key]) for key in keys)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn."""
    assert request.param in QUICK, f"{request.param} needs a line in QUICK in tests/conftest.py"
    return request.param


@pytest.fixture(scope="session")
def ppo():
    return load("ppo_continuous")
