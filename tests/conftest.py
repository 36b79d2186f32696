"""What the tests share: the scripts, a cheap command line for each, ways to run and load them."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
OURS = """ppo_continuous ppo_atari a2c reinforce trpo ddpg sac dqn double_dqn_per""".split()

# A run of a second for every script; one of yours is tested as soon as it has a line here.
QUICK = {
    "ppo_continuous": "--env-id Pendulum-v1 --num-envs 2 --num-steps 64 --num-minibatches 4 "
    "--update-epochs 2 --total-timesteps 512 --eval-episodes 2",
    "dqn": "--env-id CartPole-v1 --num-envs 2 --log-frequency 128 --learning-starts 64 "
    "--buffer-size 400 --batch-size 16 --total-timesteps 512 --eval-episodes 2",
}
QUICK["double_dqn_per"] = QUICK["dqn"]
QUICK["a2c"] = (
    "--env-id Pendulum-v1 --num-envs 2 --num-steps 16 --critic-steps 2 --log-frequency 128 "
    "--total-timesteps 512 --eval-episodes 2"
)
QUICK["trpo"] = (
    "--env-id Pendulum-v1 --num-envs 2 --num-steps 64 --critic-steps 2 --total-timesteps 512 "
    "--eval-episodes 2"
)
QUICK["ddpg"] = (
    "--env-id Pendulum-v1 --num-envs 2 --log-frequency 128 --learning-starts 64 "
    "--updates-per-step 0.25 --buffer-size 400 --batch-size 16 --total-timesteps 512 "
    "--eval-episodes 2"
)
QUICK["sac"] = QUICK["ddpg"]
QUICK["reinforce"] = (  # episodes of 64 steps, so that an iteration has 128
    "--env-id Pendulum-v1 --num-envs 2 --critic-steps 4 --critic-batch-size 32 "
    '--env-kwargs {"max_episode_steps":64} --total-timesteps 512 --eval-episodes 2'
)
QUICK["ppo_atari"] = (  # games that end after 100 steps
    "--env-id ALE/Breakout-v5 --num-envs 2 --num-steps 64 --num-minibatches 4 --update-epochs 2 "
    '--env-kwargs {"max_num_frames_per_episode":400} --total-timesteps 512 --eval-episodes 2'
)
FOUND = {path.stem for path in ROOT.glob("*.py")}
SCRIPTS = sorted(FOUND & {*QUICK, *OURS})
GAMES = {x for x in SCRIPTS if "ALE/" in QUICK.get(x, "")}  # whose probes are test_ppo_atari.py's
VECTORS = [x for x in SCRIPTS if x not in GAMES]
DISCRETE = {x for x in VECTORS if "CartPole" in QUICK.get(x, "")}  # take no continuous actions
ON_POLICY = [x for x in SCRIPTS if x in ("reinforce", "a2c", "ppo_continuous", "trpo")]
# The infrastructure is the same bytes in every script (test_style.py), so what checks these bytes
# alone, and neither a script's `state` nor its spaces nor its loop, runs on this one.
ONE = "ppo_continuous"

torch.set_num_threads(1)
sys.path.insert(0, str(TESTS))  # so that gymnasium finds "probes:Name-v0"


def environ(**extra):
    """This process's environment, with the probes importable and no wandb account."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return clean | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"} | extra


def env_id(script):
    """An environment whose episodes end soon."""
    if script in GAMES:
        return "ALE/Breakout-v5"
    return "CartPole-v1" if script in DISCRETE else "InvertedPendulum-v5"


def probe(script, name):
    """A probe with actions that the script can handle."""
    return f"probes:{'Discrete' if script in DISCRETE else ''}{name}-v0"


def command(script, *arguments, quick=True):
    words = QUICK[script].split() if quick else []
    return [sys.executable, str(ROOT / f"{script}.py"), *words, *map(str, arguments)]


def run_process(script, *arguments, quick=True, code=0, cwd=None, **extra):
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


def run(script, *arguments, quick=True, code=0, module=None):
    """The same in this process, which saves the seconds that importing torch takes."""
    module = module or load(script)
    forget_warnings(module)
    words = command(script, *arguments, quick=quick)[1:]
    out, err, returncode = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            module.train(module.parse_args(module.Args))
        except SystemExit as stopped:
            returncode = stopped.code
        except Exception:  # as Python would at the top level
            traceback.print_exc()
            returncode = 1
        finally:
            module.CLOSING.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    done = SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue(), returncode=returncode)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def call(main, *arguments, code=0, cwd=ROOT):
    """Call a module's `main` with a command line, in this process: what it printed."""
    out, err, returncode = io.StringIO(), io.StringIO(), 0
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", [main.__module__, *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stopped:
            returncode = stopped.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert returncode == code, f"exit code {returncode}\n{out.getvalue()}\n{err.getvalue()}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def forget_warnings(*modules):
    for module in modules:
        with contextlib.suppress(AttributeError):  # not loaded, or replaced
            module.warn.cache_clear()


@functools.cache
def load(script):
    """The script as a module."""
    return load_file(ROOT / f"{script}.py")


def load_file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
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


def observe(envs):
    """The newest observations of a vector environment. Shapes: (num_envs, ...)."""
    return np.stack(envs.get_attr("obs"))


def assert_same_end(folder, reference):
    """Two runs, one of them interrupted, end in the same checkpoint and the same metrics."""
    assert same(checkpoint(folder), checkpoint(reference))
    assert without_times(metrics(folder)) == without_times(metrics(reference))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One more than cores, as some tests mostly wait: for signals, for Ray, for other processes."""
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", os.cpu_count() + 1))


def pytest_terminal_summary(terminalreporter):
    for name in sorted(FOUND - set(SCRIPTS)):
        terminalreporter.write_line(f"not tested: {name}.py, without a line in tests/conftest.py")


@pytest.fixture(autouse=True)
def say_everything_again():
    """Scripts print each warning once in a process, here once in a test or run."""
    forget_warnings(*map(sys.modules.get, SCRIPTS))


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn."""
    assert request.param in QUICK, f"{request.param} needs a line in QUICK in tests/conftest.py"
    return request.param


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One finished quick run per script, not to be changed: (what it printed, its folder)."""
    runs = {}

    def get(script):
        if script not in runs:
            folder = tmp_path_factory.mktemp(script) / "run"
            runs[script] = run(script, "--run-dir", folder), folder
        return runs[script]

    return get


@pytest.fixture(scope="session")
def ppo():
    return load("ppo_continuous")


@pytest.fixture
def weights(monkeypatch):
    """With what reinforce.py weights the actions, update by update."""
    module, found = load("reinforce"), []
    loss = module.policy_gradient_loss
    monkeypatch.setattr(
        module,
        "policy_gradient_loss",
        lambda log_probs, x: (found.append(x), loss(log_probs, x))[1],
    )
    return found
