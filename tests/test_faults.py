"""What happens to people: odd environments, copies, two processes, signals that come twice."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import probes
import pytest
import torch
from conftest import (
    DISCRETE,
    ONE,
    OURS,
    QUICK,
    ROOT,
    VECTORS,
    assert_same_end,
    checkpoint,
    command,
    env_id,
    environ,
    load,
    load_file,
    metrics,
    probe,
    run,
    run_process,
    same,
    training,
    without_times,
)
from test_resume import HUGE, RARE, start, wait_for_begin, wait_for_step


def go(script, name, folder, *arguments, **options):
    """A quick run on a probe."""
    return run(script, "--env-id", probe(script, name), "--run-dir", folder, *arguments, **options)


# ---- Odd environments ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", VECTORS)
def test_rewards_in_arrays_and_seeds_of_31_bits(script, tmp_path):
    for name in ("Boxed", "Wary"):
        go(script, name, tmp_path / name)
        assert metrics(tmp_path / name)[-1]["eval/episodic_return"] == 50


@pytest.mark.parametrize("script", VECTORS)
def test_an_observation_that_is_not_finite_at_a_termination(script, tmp_path):
    """Its value does not count, so that it spoils nothing; but it is said."""
    done = go(script, "FallingApart", tmp_path / "r")
    assert done.stderr.count("observation that is not finite") == 1  # not for every episode
    assert metrics(tmp_path / "r")[-1]["eval/episodic_return"] == 50


@pytest.mark.parametrize("script", VECTORS)
def test_observations_that_are_not_finite(script, tmp_path):
    done = go(script, "Broken", tmp_path / "r", code=3)
    *before, last = done.stderr.splitlines()
    says_whose = (
        " ".join(before) if script == "reinforce" else last
    )  # it warns at each episode's end
    assert "not finite" in last and "observation" in says_whose and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", VECTORS)
@pytest.mark.parametrize("when", [300, 380])  # its episode ends before the iteration, or goes on
def test_a_reward_that_is_not_finite(script, when, tmp_path, monkeypatch):
    """One is enough. It is said whose it is, and no replay memory with it is saved, even if nothing
    was learned from it yet: every resume would end where it is drawn."""
    numbers = iter(range(10**6))

    def reward(env, action):
        return float("nan") if next(numbers) == when else 1.0

    monkeypatch.setattr(probes.Fifty, "reward", reward)
    words = ["--learning-starts", 10**4] if hasattr(load(script).Args, "learning_starts") else []
    words += ["--checkpoint-frequency", 128, "--total-timesteps", 1024]
    done = go(script, "Fifty", tmp_path / "r", *words, code=3)
    assert "a reward of the environment not finite at step" in done.stderr
    assert when - 200 < checkpoint(tmp_path / "r")["global_step"] <= when


def test_a_single_number_as_action(tmp_path):
    go("ppo_continuous", "Scalar", tmp_path / "r")
    assert metrics(tmp_path / "r")[-1]["eval/episodic_return"] == 1


def test_an_action_that_is_not_finite_reaches_no_environment(ppo):
    scaler = ppo.ActionScaler(ppo.gym.spaces.Box(-1, 1, (2,)))
    with pytest.raises(SystemExit) as stopped:
        scaler(torch.tensor([0.0, np.nan]))
    assert stopped.value.code == 3


def test_a_return_that_is_not_finite(tmp_path):
    """The evaluation's; training on it ends with code 3, so the folder is made to look finished."""
    run(ONE, "--run-dir", tmp_path / "r")
    lines = metrics(tmp_path / "r")
    for name in ("eval/episodic_return", "eval/episodic_return_std"):
        del lines[-1][name]
    (tmp_path / "r" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for _ in range(2):
        done = run(ONE, "--resume", tmp_path / "r", quick=False)
        assert "eval mean_return=nan std=nan" in done.stdout


@pytest.mark.parametrize("script", VECTORS)
@pytest.mark.parametrize(("name", "says"), [("Pictures", "0 is Box"), ("Told", "mission is")])
def test_spaces_that_are_no_vectors(script, tmp_path, name, says):
    done = go(script, name, tmp_path / "r", code=2)
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", VECTORS)
def test_arguments_of_the_environment(script, tmp_path):
    folder = tmp_path / "r"
    go(script, "Tuned", folder, "--env-kwargs", '{"gain": 3}')
    assert json.loads((folder / "args.json").read_text())["args"]["env_kwargs"] == {"gain": 3}
    assert metrics(folder)[-1]["eval/episodic_return"] == 150
    done = run(script, "--evaluate", folder, quick=False)
    assert "mean_return=150.0000" in done.stdout
    for bad in ('{"gain": -1}', '{"nothing": 1}', "[1]", "gain=1"):
        done = go(script, "Tuned", tmp_path / "bad", "--env-kwargs", bad, code=2)
        assert "Traceback" not in done.stderr and "--env-kwargs" in done.stderr, done.stderr
        assert not (tmp_path / "bad").exists()


def test_a_module_in_the_working_directory(tmp_path):
    (tmp_path / "my_env.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
        "gymnasium.register('Mine-v0', PendulumEnv, max_episode_steps=20)\n"
    )
    run_process(ONE, "--env-id", "my_env:Mine-v0", cwd=tmp_path, PYTHONPATH="")
    (folder,) = (tmp_path / "runs").iterdir()
    assert ":" not in folder.name and metrics(folder)[-1]["eval/episodes"] == 2


@pytest.mark.parametrize("name", ["Timeless", "Flat", "Blank"])
def test_pictures_that_make_no_video(tmp_path, name):
    pytest.importorskip("moviepy")
    done = go(ONE, name, tmp_path / "r", "--capture-video", code=2)
    assert "error: --capture-video" in done.stderr and not (tmp_path / "r").exists()


def test_environments_are_closed_on_every_way_out(tmp_path):
    """And one that cannot be costs a line of warning."""
    marker = tmp_path / "closed"
    words = ["--env-id", "probes:Unclosable-v0", "--run-dir", tmp_path / "r"]
    done = run_process(ONE, *words, CLOSE_MARKER=str(marker))
    assert "eval mean_return=50.0000" in done.stdout and "the port is gone" in done.stderr
    assert "Traceback" not in done.stderr
    assert marker.read_text().count("closed") >= 3  # two to train, one to evaluate
    marker.unlink()
    words = ["--resume", tmp_path / "r", "--total-timesteps", 2048]
    shutil.rmtree(tmp_path / "r" / "args.json.tmp", ignore_errors=True)
    (tmp_path / "r" / "metrics.jsonl.tmp").mkdir()  # begin() fails
    run_process(ONE, *words, quick=False, code=2, CLOSE_MARKER=str(marker))
    assert marker.read_text().count("closed") >= 2


@pytest.mark.parametrize("script", ["ppo_continuous", "dqn"])
@pytest.mark.parametrize("tidy", [True, False])
def test_an_environment_with_a_process_of_its_own(script, tidy, tmp_path):
    """A process that it forks has the run's handlers of signals, and must end by SIGTERM."""
    words = ["--env-id", probe(script, "Forking"), "--env-kwargs", json.dumps({"tidy": tidy})]
    done = run_process(script, *words, "--run-dir", tmp_path / "r")
    assert "topp" not in done.stderr and metrics(tmp_path / "r")[-1]["eval/episodic_return"] == 50


def test_ctrl_c_leaves_such_a_process_to_its_environment(tmp_path):
    """A terminal sends it to both; the iteration must be finished, and saved."""
    folder = tmp_path / "r"
    words = ["--env-id", "probes:Forking-v0", "--run-dir", folder, "--total-timesteps", 10**7]
    process = subprocess.Popen(
        command(ONE, *words, *RARE), start_new_session=True, env=environ(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(process, folder, 128)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err, err
    assert checkpoint(folder)["global_step"] == metrics(folder)[-1]["global_step"]


@pytest.mark.parametrize("script", VECTORS)
def test_refused_environments_are_closed(script, tmp_path, monkeypatch):
    marker = tmp_path / "closed"
    monkeypatch.setenv("CLOSE_MARKER", str(marker))
    go(script, "Gallery", tmp_path / "r", code=2)
    assert marker.read_text() == "closed\n"
    if script in OURS and script not in ("reinforce", "a2c", "trpo"):  # which take any actions
        other = "Unclosable" if script in DISCRETE else "DiscreteUnclosable"
        run(script, "--env-id", f"probes:{other}-v0", "--run-dir", tmp_path / "r", code=2)
        assert marker.read_text() == "closed\n" * 2


@pytest.mark.parametrize("script", ["ppo_atari", "a2c", "dqn", "double_dqn_per"])
@pytest.mark.parametrize("kwargs", ['{"img_height": 42}', '{"continuous": true}'])
def test_games_that_the_network_cannot_play(script, kwargs, tmp_path):
    words = ["--env-id", "ALE/Pong-v5", "--env-kwargs", kwargs, "--run-dir", tmp_path / "r"]
    done = run(script, *words, quick=False, code=2)
    assert "84 x 84" in done.stderr and not (tmp_path / "r").exists()


@pytest.mark.parametrize("script", VECTORS)
def test_numbers_in_another_byte_order(script, tmp_path):
    go(script, "Foreign", tmp_path / "r", "--checkpoint-frequency", 128)
    run(script, "--resume", tmp_path / "r", quick=False)


def test_an_environment_that_goes_to_another_folder(tmp_path, monkeypatch):
    """All of the run stays where the user said."""
    (tmp_path / "assets").mkdir()
    kwargs = ["--env-kwargs", json.dumps({"folder": str(tmp_path / "assets")})]
    for words, shown in (
        (["--env-id", "probes:Wandering-v0", "--run-dir", "r", *kwargs], "r"),
        (["--resume", "r", "--total-timesteps", 1024], "r"),
        (["--evaluate", "r"], "r"),
        (["--env-id", "probes:Wandering-v0", *kwargs], "runs/probes-Wandering-v0__"),
    ):
        monkeypatch.chdir(tmp_path)
        done = run(ONE, *words, quick="--env-id" in words)
        assert f"run_dir={shown}" in done.stdout
    assert checkpoint(tmp_path / "r")["global_step"] == 1024
    assert len(list((tmp_path / "runs").glob("*/checkpoint.pt"))) == 1
    assert not list((tmp_path / "assets").iterdir())


def quitting(where, code=0):
    kwargs = json.dumps({"where": where, "code": code})
    return ["--env-id", "probes:Quitting-v0", "--env-kwargs", kwargs]


@pytest.mark.parametrize(
    "where, more", [("step", []), ("step", ["--async-envs"]), ("reset", []), ("make", [])]
)
@pytest.mark.parametrize("code", [0, 2])  # 2 would look like a mistake of the user's
def test_an_environment_that_ends_the_process(tmp_path, where, more, code):
    """An error, as if it had raised one."""
    done = run_process(ONE, *quitting(where, code), "--run-dir", tmp_path / "r", *more, code=1)
    assert "Traceback" in done.stderr and "called sys.exit()" in done.stderr
    assert "probes.py" in done.stderr


def test_an_environment_that_ends_the_process_when_it_is_closed(tmp_path):
    """The evaluations in training do that, too."""
    words = [*quitting("close"), "--run-dir", tmp_path / "r", "--eval-frequency", 256]
    done = run_process(ONE, *words)
    assert "could not be closed" in done.stderr and "eval mean_return=50" in done.stdout


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(now))
    run(ONE, "--run-dir", tmp_path / "r")
    lines = metrics(tmp_path / "r")
    assert all(x["wall_time"] > 0 and x.get("charts/SPS", 1) > 0 for x in lines)


@pytest.mark.parametrize("script", VECTORS)
def test_environments_that_seed_the_global_generators(script, tmp_path, monkeypatch):
    """Neither exploration nor initial weights repeat."""
    actions, step = [], probes.Reseeding.step

    def look(env, action):
        actions.append(np.ravel(action)[0])
        return step(env, action)

    monkeypatch.setattr(probes.Reseeding, "step", look)
    for seed in (1, 2):
        go(script, "Reseeding", tmp_path / f"{seed}", "--seed", seed, "--num-envs", 1)
    left, right = (checkpoint(tmp_path / f"{seed}") for seed in (1, 2))
    network = next(name for name in left if name in ("q_network", "agent", "actor"))
    assert not same(left[network], right[network])
    episodes = np.reshape(actions[:400], (8, 50)).astype(float)
    assert np.abs(np.corrcoef(episodes)[~np.eye(8, dtype=bool)]).max() < 0.7  # repeated: near 1


def test_global_generators_do_not_matter(script, finished, tmp_path):
    np.random.seed(7)
    torch.manual_seed(7)
    run(script, "--run-dir", tmp_path / "r")
    assert_same_end(tmp_path / "r", finished(script)[1])


# ---- Copies --------------------------------------------------------------------------------------


def changed(tmp_path, script, *pairs):
    """A copy of a script with other text."""
    text = (ROOT / f"{script}.py").read_text()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "changed_script.py").write_text(text)
    return load_file(tmp_path / "changed_script.py")


RUN = "    run = Run(args, device, envs, state, deterministic_policy)\n"


def test_evaluation_loads_what_is_no_module(tmp_path):
    """A number that only `state` knows, and that the policy adds to the action."""
    copy = changed(
        tmp_path, "ppo_continuous",
        ("        return to_env(mean)\n", "        return to_env(mean + loop.get('shift', 0))\n"),
        ("    run.finish()\n\n\ndef check_args", "    loop['shift'] = 0\n    run.finish()\n\n\n"
         "def check_args"),
        ("        run.end_iteration(", "        loop['shift'] = 0.7\n        run.end_iteration("),
    )  # fmt: skip
    words = ["--env-id", "probes:ObservedTarget-v0", "--run-dir", tmp_path / "r"]
    run("ppo_continuous", *words, module=copy)
    plain = metrics(tmp_path / "r")[-1]["eval/episodic_return"]
    done = run("ppo_continuous", "--evaluate", tmp_path / "r", quick=False, module=copy)
    shifted = float(re.search(r"mean_return=(\S+)", done.stdout)[1])
    assert abs(shifted - plain) > 0.05


def test_what_is_no_module_is_checked_for_nan(tmp_path):
    part = "    state['mine'] = LoopState(x=torch.tensor(float('nan')))\n"
    copy = changed(tmp_path, "ppo_continuous", (RUN, part + RUN))
    done = run("ppo_continuous", "--run-dir", tmp_path / "r", module=copy, code=3)
    assert "error: mine not finite at step 128" in done.stderr


def test_a_part_that_no_resume_could_load(tmp_path):
    """Such as a normaliser with NumPy arrays: known at the first checkpoint, not at the end."""
    part = "    state['mine'] = LoopState(x=np.zeros(3))\n"
    copy = changed(tmp_path, "ppo_continuous", (RUN, part + RUN))
    words = ["--run-dir", tmp_path / "r", "--checkpoint-frequency", 128]
    done = run("ppo_continuous", *words, module=copy, code=1)
    assert "numpy" in done.stderr and metrics(tmp_path / "r")[-1]["global_step"] == 128


def test_metrics_of_any_type_of_number(tmp_path):
    end = "        run.end_iteration("
    values = "{'a': np.float32(0.5), 'b': torch.tensor(2.0), 'c': np.int64(3)}"
    copy = changed(tmp_path, ONE, (end, f"        metrics |= {values}\n{end}"))
    run(ONE, "--run-dir", tmp_path / "r", module=copy)
    assert [training(tmp_path / "r")[-1][name] for name in "abc"] == [0.5, 2.0, 3.0]


def test_a_network_that_no_checkpoint_holds(tmp_path):
    copy = changed(tmp_path, "ppo_continuous", (RUN, "    del state['critic']\n" + RUN))
    done = run("ppo_continuous", "--run-dir", tmp_path / "r", module=copy)
    assert "is not in `state`" in done.stderr
    assert "`state`" not in run("ppo_continuous", "--run-dir", tmp_path / "s").stderr


# ---- Processes -----------------------------------------------------------------------------------


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(x) for x in found.stdout.split()]


def alive(pid):
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    return False


def test_environments_in_processes_of_their_own(script, finished, tmp_path, monkeypatch):
    """The same weights and metrics, and an exact resume."""
    module, folder = load(script), tmp_path / "r"
    end_iteration, calls = module.Run.end_iteration, []

    def crash(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("crash")
        end_iteration(*arguments)

    monkeypatch.setattr(module.Run, "end_iteration", crash)
    run(script, "--run-dir", folder, "--async-envs", "--checkpoint-frequency", 128, code=1)
    monkeypatch.setattr(module.Run, "end_iteration", end_iteration)
    run(script, "--resume", folder, quick=False)
    assert_same_end(folder, finished(script)[1])


def test_an_error_in_a_process_of_its_own(tmp_path):
    words = ["--env-id", "probes:Crashing-v0", "--run-dir", tmp_path / "r", "--async-envs"]
    done = run_process(ONE, *words, code=1)
    assert "probes.py" in done.stderr and "the simulator fell over" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left(tmp_path, number):
    """Killed alone; or Ctrl-C, a cancelled job: the whole group gets the signal."""
    folder = tmp_path / "r"
    process = start(ONE, "--run-dir", folder, *RARE, "--async-envs", "--total-timesteps", 10**6)
    wait_for_step(process, folder, 256)
    processes = children(process.pid)
    assert len(processes) >= 2
    if number == signal.SIGKILL:
        process.kill()
    else:
        for pid in (process.pid, *processes):
            os.kill(pid, number)
    _, err = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, err
        assert checkpoint(folder)["global_step"] >= 256
    for _ in range(100):
        if not any(map(alive, processes)):
            return
        time.sleep(0.1)
    raise AssertionError("processes are left")


def test_two_processes_in_one_folder(tmp_path):
    folder = tmp_path / "r"
    process = start(ONE, "--run-dir", folder, "--total-timesteps", 10**7, *HUGE)
    wait_for_begin(process, folder)
    done = run(ONE, "--resume", folder, quick=False, code=2)
    assert "another process" in done.stderr and str(folder) in done.stderr
    process.kill()
    process.communicate()
    words = ["--total-timesteps", 10**7, *HUGE]  # what it was; the lock is gone with its process
    written, deadline = (folder / "args.json").stat().st_mtime_ns, time.monotonic() + 100
    resumed = start(ONE, "--resume", folder, *words, quick=False)
    while (folder / "args.json").stat().st_mtime_ns == written:  # until the folder is its own
        assert resumed.poll() is None, resumed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    resumed.kill()
    resumed.communicate()


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """Some file systems of clusters have none; to train there is better than not to train."""

    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run(ONE, "--run-dir", tmp_path / "r")


@pytest.mark.parametrize("script", ["ppo_continuous", "dqn"])
def test_an_evaluation_leaves_the_global_generators_alone(script, tmp_path):
    """Environments may use them in training too."""
    often = ["--eval-frequency", 128, "--checkpoint-frequency", 128]
    go(script, "Sharing", tmp_path / "often", *often)
    go(script, "Sharing", tmp_path / "once")
    assert same(checkpoint(tmp_path / "often"), checkpoint(tmp_path / "once"))


def test_a_look_at_a_frame_leaves_them_alone_too(tmp_path):
    pytest.importorskip("moviepy")
    go(ONE, "Sketched", tmp_path / "filmed", "--capture-video")
    go(ONE, "Sketched", tmp_path / "plain")
    assert same(checkpoint(tmp_path / "filmed"), checkpoint(tmp_path / "plain"))


def test_a_thread_of_an_environment_does_not_keep_a_failed_run(tmp_path):
    """Python waits for threads before it calls what is registered with atexit."""
    words = ["--env-id", probe(ONE, "Threaded"), "--run-dir", tmp_path / "r"]
    done = run_process(ONE, *words, "--total-timesteps", 2000, code=1)
    assert done.stderr.strip().endswith("the simulator fell over")
    assert done.stdout.count("closed") == 2


def test_the_result_is_the_last_line(tmp_path):
    """Whatever environments print when they are closed."""
    out = go(ONE, "Chatty", tmp_path / "r").stdout.splitlines()
    assert out[0] == "closed" and out[-1].startswith("eval mean_return=")


def test_standard_error_is_closed(tmp_path):
    words = shlex.join([*map(str, command(ONE)), "--run-dir", str(tmp_path / "r")])
    done = subprocess.run(["sh", "-c", f"{words} 2>&-"], capture_output=True, env=environ())
    assert done.returncode == 0 and done.stdout.startswith(b"eval mean_return=")


def test_a_checkpoint_without_its_arguments_is_no_new_folder(tmp_path):
    """A run that was killed early would be resumed from it."""
    folder = tmp_path / "r"
    run(ONE, "--run-dir", folder)
    (folder / "args.json").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    assert "holds a run" in run(ONE, "--run-dir", folder, code=2).stderr
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_an_environment_that_fails_in_a_resume_shows_its_error(tmp_path, monkeypatch):
    """It is not the checkpoint that is to blame."""
    go(ONE, "BrokenReset", tmp_path / "r", "--num-envs", 1)
    monkeypatch.setenv("BROKEN", "1")
    monkeypatch.setattr(sys.modules["probes"].BrokenReset, "resets", 0)
    words = ["--resume", tmp_path / "r", "--total-timesteps", 1024]
    assert "the second reset failed" in run(ONE, *words, quick=False, code=1).stderr


def test_what_to_paste_goes_where_the_environment_is(tmp_path, monkeypatch):
    module = load(ONE)
    folder, args = tmp_path / "it's here", module.Args(env_id="my_env:Mine-v0", run_dir="r")
    folder.mkdir()
    monkeypatch.setenv("PWD", str(folder))  # where the run began
    begun = module.Run.__new__(module.Run)
    begun.args, begun.dir = args, folder / "r"
    line = shlex.split(begun.again())
    assert line[:3] == ["cd", str(folder), "&&"] and line[-2:] == ["--resume", str(folder / "r")]
    begun.args = module.Args(run_dir="r")
    assert shlex.split(begun.again())[0] == "python"


def test_mujoco_that_cannot_be_imported_is_in_nobodys_way(tmp_path, monkeypatch):
    """It raises whatever it likes where there is no EGL, and most environments need none."""

    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("no EGL")

    monkeypatch.setitem(sys.modules, "mujoco", Broken())
    load("reinforce").make_env(load("reinforce").Args(env_id="CartPole-v1")).close()


def test_runs_that_begin_in_the_same_second(tmp_path, monkeypatch):
    begin = time.monotonic()

    def now():  # goes on for ever, but never reaches the next second
        return 1e9 + 0.9 - 0.9 / (1 + time.monotonic() - begin)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", now)
    for _ in range(3):
        run(ONE)
    names = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert names == [f"Pendulum-v1__{ONE}__1__1000000000{x}" for x in ("", "__2", "__3")]
    for name in names:
        assert metrics(tmp_path / "runs" / name)[-1]["eval/episodes"] == 2


def test_a_folder_that_another_process_makes_first(tmp_path, monkeypatch):
    """Between a look at what exists and making it."""
    taken, mkdir = [], Path.mkdir

    def late(path, *args, **kwargs):
        if path.name.startswith("Pendulum-v1__") and not taken:
            taken.append(path)
            mkdir(path, parents=True)
        return mkdir(path, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", late)
    run(ONE)
    assert not list(taken[0].iterdir())
    assert metrics(taken[0].with_name(f"{taken[0].name}__2"))[-1]["eval/episodes"] == 2


@pytest.mark.parametrize("pause", [0.002, 0.05])
def test_a_signal_that_is_delivered_twice(tmp_path, pause):
    """By a parent that forwards it, and to the whole group: that is one wish."""
    folder = tmp_path / "stopped"
    process = start(ONE, "--run-dir", folder, *RARE, "--total-timesteps", 10**7)
    wait_for_step(process, folder, 128)
    process.send_signal(signal.SIGTERM)
    time.sleep(pause)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    # Once Python has put its handlers away, the repeat ends the process: 143 to a shell, too.
    assert process.returncode in (143, -signal.SIGTERM) and "--resume" in err, err
    assert checkpoint(folder)["global_step"] == metrics(folder)[-1]["global_step"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_run_exists(tmp_path, number):
    marker, words = tmp_path / "sleeps", ["--env-id", "probes:Sleepy-v0", "--run-dir"]
    process = subprocess.Popen(
        command(ONE, *words, tmp_path / "r"),
        env=environ(SLEEP_MARKER=str(marker)), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and err == "stopped before it began\n"
    assert not (tmp_path / "r").exists()


def test_a_signal_in_an_evaluation_between(tmp_path):
    """It ends after its step; the resumed run makes it again, at the same place."""
    often = ["--env-id", env_id(ONE), "--eval-frequency", 256]
    run(ONE, "--run-dir", tmp_path / "calm", *often)
    folder = tmp_path / "stopped"
    process = start(ONE, "--run-dir", folder, *often[2:], "--eval-episodes", 10**6)
    wait_for_step(process, folder, 256)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130, err
    assert checkpoint(folder)["global_step"] == 256
    run(ONE, "--resume", folder, "--eval-episodes", 2, quick=False)
    assert_same_end(folder, tmp_path / "calm")


def test_a_signal_ends_an_evaluation_after_its_step(finished, monkeypatch):
    """And not after its episode, which may take hours."""
    folder, steps = finished(ONE)[1], []
    step = load(ONE).ReplayableEnv.step

    def count(env, action):
        steps.append(action)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(env, action)

    monkeypatch.setattr(load(ONE).ReplayableEnv, "step", count)
    run(ONE, "--evaluate", folder, quick=False, code=143)
    assert len(steps) <= 4


def test_an_evaluation_that_fails_costs_nothing(tmp_path, monkeypatch):
    """What was trained before is saved."""
    module = load(ONE)

    def crash(self):
        raise OSError("the simulator fell over")

    monkeypatch.setattr(module.Run, "evaluate", crash)
    words = ["--eval-frequency", 256, "--checkpoint-frequency", 0]
    done = run(ONE, "--run-dir", tmp_path / "r", *words, code=1)
    assert "fell over" in done.stderr and checkpoint(tmp_path / "r")["global_step"] == 256
    monkeypatch.undo()
    run(ONE, "--resume", tmp_path / "r", quick=False)
    run(ONE, "--run-dir", tmp_path / "calm", *words)
    assert_same_end(tmp_path / "r", tmp_path / "calm")


def test_a_printed_command_can_be_pasted(tmp_path):
    folder = tmp_path / "a folder"
    process = start(ONE, "--run-dir", folder, *RARE)
    wait_for_step(process, folder, 128)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    words = shlex.split(re.search(r"go on: python (.*)", err)[1])
    subprocess.run(
        [sys.executable, *words], cwd="/", env=environ(), check=True, capture_output=True
    )
    assert metrics(folder)[-1]["eval/episodes"] == 2


def test_without_git(tmp_path):
    run_process(ONE, "--run-dir", tmp_path / "r", PATH=str(tmp_path))
    assert json.loads((tmp_path / "r" / "args.json").read_text())["git"] is None


# ---- Resumes -------------------------------------------------------------------------------------


def test_a_schedule_that_jumps_is_said(finished, tmp_path):
    folder = shutil.copytree(finished(ONE)[1], tmp_path / "r")
    done = run(ONE, "--resume", folder, "--total-timesteps", 1024, quick=False)
    assert "warning" in done.stderr and "learning rate" in done.stderr
    assert "warning" not in run(ONE, "--resume", folder, quick=False).stderr


@pytest.mark.parametrize("script", sorted(DISCRETE))
def test_an_episode_that_cannot_be_restored_leads_nowhere(script, tmp_path, monkeypatch):
    """No transition from its last observation to the first of the next episode."""
    module, folder = load(script), tmp_path / "r"
    begun = module.Run.begin

    def crash(self):
        begun(self)
        write_metrics, self.count = self.write_metrics, 0

        def write(line):
            self.count += 1
            if self.count == 2:
                raise OSError("crash")
            write_metrics(line)

        self.write_metrics = write

    monkeypatch.setattr(module.Run, "begin", crash)
    often = ["--checkpoint-frequency", 128]
    go(script, "Unseeded", folder, *often, code=1)
    saved = checkpoint(folder)
    monkeypatch.undo()
    done = run(script, "--resume", folder, quick=False)
    assert done.stderr.count("environment not restored") == 1  # of both
    last = (saved["buffer"]["next_row"] - 2).tolist()
    assert checkpoint(folder)["buffer"]["actions"][last].tolist() == [-1, -1]
    assert (saved["buffer"]["actions"][last] >= 0).all()


@pytest.mark.parametrize("script", sorted(DISCRETE))
def test_a_memory_of_lost_episodes_alone_is_not_sampled(script, tmp_path, monkeypatch):
    """Stopped after the first steps of all environments, of which none could be restored."""
    monkeypatch.setattr(load(script), "warn", load(script).warn.__wrapped__)  # for each of them
    eager = ["--log-frequency", 2, "--learning-starts", 0, "--train-frequency", 1]
    go(script, "Unseeded", tmp_path / "r", *eager, "--total-timesteps", 2)
    for steps in (4, 20):
        words = ["--resume", tmp_path / "r", "--total-timesteps", steps]
        done = run(script, *words, quick=False)
        assert done.stderr.count("environment not restored") == 2
    assert any("losses/td_loss" in line for line in training(tmp_path / "r"))


@pytest.mark.parametrize("script", ["dqn", "double_dqn_per", "ddpg", "sac"])
def test_a_machine_that_does_not_say_how_much_memory_is_free(script, tmp_path, monkeypatch):
    """Linux before 3.14, and some sandboxes: the replay memory is made all the same."""
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path: "" if path == Path("/proc/meminfo") else read(path)
    )
    run(script, "--run-dir", tmp_path / "r", "--total-timesteps", 2)


def lose_the_second(folder):
    """Change what its environment's episode has to come to, so that repeating it fails."""
    saved = checkpoint(folder)
    saved["envs"][1]["obs"] += 1
    torch.save(saved, folder / "checkpoint.pt")


def at_the_start(module, monkeypatch, look):
    """What `look` finds in the state when a run goes on."""
    seen, begin = [], module.Run.begin

    def look_and_begin(self):
        seen.append(look(self.state).flatten().tolist())
        begin(self)

    monkeypatch.setattr(module.Run, "begin", look_and_begin)
    return seen


@pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "trpo"])
def test_nor_does_its_return_go_on(script, tmp_path, monkeypatch):
    """Rewards are scaled by a discounted return, which starts from 0 in the new episode."""
    go(script, "Tuned", tmp_path / "r", "--total-timesteps", 256)
    lose_the_second(tmp_path / "r")
    kept, _ = checkpoint(tmp_path / "r")["reward_scaler"]["running_return"].tolist()
    seen = at_the_start(load(script), monkeypatch, lambda x: x["reward_scaler"].running_return)
    words = ["--resume", tmp_path / "r", "--total-timesteps", 512]
    assert run(script, *words, quick=False).stderr.count("environment not restored") == 1
    assert seen == [[kept, 0]] and kept > 0
    assert (checkpoint(tmp_path / "r")["reward_scaler"]["running_return"] > 0).all()


def test_nor_does_its_noise(tmp_path, monkeypatch):
    """An Ornstein-Uhlenbeck process, which starts from 0 in the new episode."""
    go("ddpg", "Tuned", tmp_path / "r", "--noise", "ou")
    lose_the_second(tmp_path / "r")
    kept, _ = checkpoint(tmp_path / "r")["noise"]["values"].flatten().tolist()
    seen = at_the_start(load("ddpg"), monkeypatch, lambda x: x["noise"].values)
    run("ddpg", "--resume", tmp_path / "r", "--total-timesteps", 640, quick=False)
    assert seen == [[kept, 0]] and kept != 0


def test_an_episode_too_long_to_repeat_is_not_taken_for_another(ppo, capsys, monkeypatch):
    """Where neither observation nor reward tell the steps apart, the length does."""
    monkeypatch.setattr(ppo, "LONGEST_EPISODE", 3)
    args = {"env_id": "probes:Tuned-v0", "env_kwargs": {"gain": 0.0}, "num_envs": 1}
    envs = ppo.make_envs(ppo.Args(**args))
    for _ in range(5):
        envs.step(np.zeros((1, 1), np.float32))
    envs.set_attr("snapshot", envs.get_attr("snapshot"))
    assert "not restored" in capsys.readouterr().err


# ---- Nothing learned -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["ddpg", "sac", *sorted(DISCRETE)])
def test_a_run_that_learns_nothing_says_so_first(script, tmp_path):
    words = ["--learning-starts", 10_000]
    done = run(script, "--run-dir", tmp_path / "r", *words)
    assert "warning" in done.stderr and "--learning-starts" in done.stderr
    assert "warning" not in run(script, "--run-dir", tmp_path / "s").stderr


def test_progress_stays_within_its_bounds(tmp_path):
    done = run("dqn", "--run-dir", tmp_path / "r", "--total-timesteps", 300, quick=False)
    steps, total, left = re.search(r"(\d+)/(\d+) steps, .*, (\S+) s left", done.stderr).groups()
    assert int(steps) <= int(total) and int(left) >= 0
    assert without_times(metrics(tmp_path / "r"))[0]["global_step"] == 1000


def test_a_run_through_a_link_to_the_script_leaves_it_whole(tmp_path):
    """The folder is the link's: the copy that a run makes would be the script itself."""
    (tmp_path / "exp").mkdir()
    shutil.copyfile(ROOT / f"{ONE}.py", tmp_path / f"{ONE}.py")
    (tmp_path / "exp" / f"{ONE}.py").symlink_to(tmp_path / f"{ONE}.py")
    before = (tmp_path / f"{ONE}.py").read_bytes()
    words = [sys.executable, f"{ONE}.py", *QUICK[ONE].split(), "--run-dir", "."]
    subprocess.run(words, cwd=tmp_path / "exp", env=environ(), check=True, capture_output=True)
    assert (tmp_path / f"{ONE}.py").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_dead_process_of_an_environment_ends_the_run(tmp_path):
    folder = tmp_path / "r"
    process = start(ONE, "--run-dir", folder, *RARE, "--async-envs", "--total-timesteps", 10**6)
    wait_for_step(process, folder, 256)
    processes = children(process.pid)
    os.kill(processes[-1], signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 1 and not any(map(alive, processes))


def test_an_environment_that_its_process_cannot_make(tmp_path):
    """The other processes must not keep the run from ending."""
    words = ["--env-id", "probes:Stillborn-v0", "--run-dir", tmp_path / "r", "--async-envs"]
    run_process(ONE, *words, code=1, BIRTH_MARKER=str(tmp_path / "born"))


def test_what_reads_the_messages_may_be_gone(tmp_path):
    """Ctrl-C ends `tee`, too; the checkpoint is saved all the same."""
    folder = tmp_path / "r"
    process = start(ONE, "--run-dir", folder, *RARE, "--total-timesteps", 10**7)
    wait_for_step(process, folder, 128)
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert process.returncode == 143
    assert checkpoint(folder)["global_step"] == metrics(folder)[-1]["global_step"]


def test_a_result_that_cannot_be_printed(tmp_path):
    """One line, exit code 2, and the run is over all the same."""
    words = command(ONE, "--run-dir", tmp_path / "r")
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=environ())
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "steps," not in line]
    assert line.startswith("error: stdout: No space left on device: eval mean_return=")
    assert metrics(tmp_path / "r")[-1]["eval/episodes"] == 2


def test_a_warning_that_nobody_reads_ends_no_run(tmp_path):
    words = command(ONE, "--env-id", "probes:FallingApart-v0", "--run-dir", tmp_path / "r")
    with open("/dev/full", "w") as full:  # raises as a pipe does whose reader is gone
        subprocess.run(words, stderr=full, stdout=subprocess.PIPE, env=environ(), check=True)
    assert metrics(tmp_path / "r")[-1]["eval/episodes"] == 2
