"""Sweeps: nothing is lost and nothing is run twice, whatever is killed."""

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
from collections import Counter
from pathlib import Path

import pytest
import wandb_file
from conftest import ROOT, TESTS, call, checkpoint, environ, metrics, same, without_times

from benchmark import jobs, rows
from benchmark.results import read_run
from benchmark.sweep import main

SHORT = "--num-envs 2 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 2"
JOBS = int(os.environ.get("JOBS", 2))  # the full trial: JOBS=24 python -m pytest -k kill


def suite(folder, env_ids=("Pendulum-v1",), seeds=(1, 2), steps=512, more=""):
    """A suite file of short jobs."""
    path = Path(folder) / "small.toml"
    args = f"{SHORT} --total-timesteps {steps} {more}".split()
    path.write_text(
        f"seeds = {list(seeds)}\n[[runs]]\nscripts = ['ppo_continuous']\n"
        f"env_ids = {list(env_ids)}\nargs = {args}\n"
    )
    return path


def words(*arguments):
    return [sys.executable, "-m", "benchmark.sweep", *map(str, arguments)]


def environment(**extra):
    return environ(PYTHONPATH=f"{TESTS}{os.pathsep}{ROOT}", **extra)


def sweep(*arguments, code=0, cwd=ROOT, **extra):
    done = subprocess.run(
        words(*arguments), capture_output=True, text=True, cwd=cwd, env=environment(**extra)
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def plan(*arguments, code=0, cwd=ROOT):
    """A sweep that starts no job, in this process: what it printed."""
    return call(main, *arguments, code=code, cwd=cwd)


def begin(*arguments, **extra):
    return subprocess.Popen(
        words(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(**extra),
    )


def wait_for(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def folders(root):
    return sorted(path.parent for path in Path(root).glob("*/args.json") if ".old" not in str(path))


def step(folder):
    try:
        return metrics(folder)[-1]["global_step"]
    except (OSError, IndexError, ValueError):
        return 0


def assert_same_runs(left, right):
    assert [f.name for f in folders(left)] == [f.name for f in folders(right)]
    for a, b in zip(folders(left), folders(right), strict=True):
        assert without_times(metrics(a)) == without_times(metrics(b)), a.name
        assert same(checkpoint(a), checkpoint(b)), a.name


def starts(root, name=""):
    """How often each job was started, from its log."""
    logs = Path(root, "logs").glob(f"{name}*.log")
    return Counter({p.stem: p.read_text().count("$ ") for p in logs})


def processes(root):
    """Ids of the running scripts of a sweep."""
    found = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True).stdout
    lines = [line.split(None, 1) for line in found.splitlines()]
    return [int(pid) for pid, text in lines if str(root) in text and "ppo_continuous.py" in text]


def test_a_wrong_command_line_leaves_sigpipe_as_it_was(monkeypatch):
    before = signal.getsignal(signal.SIGPIPE)
    monkeypatch.setattr(sys, "argv", ["sweep", "smoke", "--nothing"])
    with pytest.raises(SystemExit):
        main()
    assert signal.getsignal(signal.SIGPIPE) == before != signal.SIG_DFL


def test_a_sweep_completes_and_a_second_one_has_nothing_to_do(tmp_path):
    first = sweep(suite(tmp_path), "--run-root", tmp_path / "r")
    assert "2 of 2 complete" in first.stdout
    before = {f: (f / "metrics.jsonl").read_bytes() for f in folders(tmp_path / "r")}
    again = sweep(suite(tmp_path), "--run-root", tmp_path / "r")
    assert "2 complete, 0 to resume, 0 to start" in again.stdout
    assert before == {f: (f / "metrics.jsonl").read_bytes() for f in folders(tmp_path / "r")}
    assert set(starts(tmp_path / "r").values()) == {1}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for folder in folders(tmp_path / "r"):  # which is in no repository
        about = json.loads((folder / "args.json").read_text())
        assert about["git"] == (git.stdout.strip() or None)
        assert "cores" in (folder / "hardware.txt").read_text()


def test_commands_of_a_dry_run_can_be_pasted(tmp_path):
    root = tmp_path / "r"
    printed = plan(suite(tmp_path), "--run-root", root, "--dry-run", "--num-seeds", 2).stdout
    lines = printed.splitlines()
    assert len(lines) == 2 and not root.exists()
    for line in lines:
        assert line.startswith("python ppo_continuous.py --env-id Pendulum-v1 --seed ")
        pasted = [sys.executable, *shlex.split(line)[1:]]
        subprocess.run(pasted, cwd=ROOT, env=environ(), check=True, capture_output=True)
    again = plan(suite(tmp_path), "--run-root", root, "--dry-run", "--num-seeds", 2).stdout
    assert again.splitlines() == [f"# complete: {line}" for line in lines]
    assert "2 of 2 complete" in plan(suite(tmp_path), "--run-root", root, "--num-seeds", 2).stdout
    assert not (root / "logs").exists()  # nothing was started


def test_overrides(tmp_path):
    def commands(*arguments):
        return plan(suite(tmp_path, seeds=(4, 9)), "--dry-run", *arguments).stdout.splitlines()

    def seeds(*arguments):
        return [int(shlex.split(line)[5]) for line in commands(*arguments)]

    assert seeds() == [4, 9]
    assert seeds("--num-seeds", "1") == [4]
    assert seeds("--num-seeds", "4") == [4, 9, 10, 11]
    assert seeds("--seeds", "21") == [21]  # one seed, not so many
    assert seeds("--seeds", "11-13,20") == [11, 12, 13, 20]
    assert all("--env-id probes:" in x for x in commands("--env-ids", "probes:Probe-v0"))
    assert all(line.endswith("--gamma 0.5") for line in commands("--args=--gamma 0.5"))
    assert all("--track" in line for line in commands("--track"))


def test_a_group_can_have_a_name(tmp_path):
    """It tells two groups apart that have script and environment in common."""
    group = "[[runs]]\nscripts = ['ppo_continuous']\nenv_ids = ['Pendulum-v1']\n"
    path, root = tmp_path / "two.toml", tmp_path / "r"
    short = f"args = {f'{SHORT} --total-timesteps 512'.split()}\n"
    named = group + "name = 'long view'\n" + short.replace("]", ", '--gamma', '0.999']")
    path.write_text(f"seeds = [1]\n{group}{short}{named}")
    lines = plan(path, "--run-root", root, "--dry-run").stdout.splitlines()
    assert len(lines) == 2 and "'Pendulum-v1, long view__ppo_continuous__1'" in shlex.join(
        [Path(word).name for word in shlex.split(lines[1])]
    )
    sweep(path, "--run-root", root)
    runs = [read_run(folder) for folder in folders(root)]
    titles = ["Pendulum-v1", "Pendulum-v1, long view"]
    assert sorted(run["title"] for run in runs) == titles
    assert [row.title + row.label for row in rows.group(runs)] == titles
    path.write_text(f"seeds = [1]\n{group}{group}")
    done = plan(path, "--run-root", root, "--dry-run", code=2)
    assert "ppo_continuous on Pendulum-v1 stands there twice" in done.stderr
    path.write_text(f"seeds = [1]\n{group}name = '../x'\n")
    assert "name ../x" in plan(path, "--run-root", root, "--dry-run", code=2).stderr


def test_a_grid_is_a_named_group_for_each_combination(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        "seeds = [1, 2]\n[[runs]]\nscripts = ['ppo_continuous']\nenv_ids = ['Pendulum-v1']\n"
        "name = 'my'\nargs = ['--num-envs', '2']\n"
        "grid = {gamma = [0.9, 0.99], norm-obs = [true, false]}\n"
    )
    lines = plan(path, "--run-root", tmp_path / "r", "--dry-run").stdout.splitlines()
    assert len(lines) == 8 and all("--num-envs 2 --gamma 0.9" in line for line in lines)
    first, last = shlex.split(lines[0]), shlex.split(lines[-1])
    assert "Pendulum-v1, my gamma 0.9 norm-obs__ppo_continuous__1" in first[7]
    assert first[-3:] == ["--gamma", "0.9", "--norm-obs"]
    assert "Pendulum-v1, my gamma 0.99 no-norm-obs__ppo_continuous__2" in last[7]
    assert last[-3:] == ["--gamma", "0.99", "--no-norm-obs"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arg = ['--gamma', '0.9']", "unknown arg: there are name, scripts, env_ids, args, grid"),
        ("seeds = [3]", "unknown seeds"),
        ("grid = {gamma = 0.9}", "grid has a list of values"),
        ("grid = {--gamma = [0.9]}", "grid has a list of values"),
        ("grid = {gamma = []}", "grid has a list of values"),
        ("grid = [0.9]", "grid"),
        ("grid = {gama = [0.9]}", "refuses"),
        ("scripts = []", "scripts and env_ids must not be empty"),
        ("scripts = 'ppo_continuous'", "lists of strings"),
        ("scripts = ['ppo_continous']", "there is no"),
        ("scripts = ['tests/conftest']", "there is no tests/conftest.py"),
        ("name = 'a__b'", "without __"),
        ("""grid = {env-kwargs = ['{"a__b": 1}']}""", "without __"),
    ],
)
def test_mistakes_in_a_suite(tmp_path, text, said):
    path, scripts = tmp_path / "mine.toml", "scripts = ['ppo_continuous']\n"
    group = ("" if "scripts" in text else scripts) + f"env_ids = ['Pendulum-v1']\n{text}\n"
    path.write_text(f"seeds = [1]\n[[runs]]\n{group}")
    done = plan(path, "--run-root", tmp_path / "r", "--dry-run", code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds = [-1]\n[[runs]]\nGROUP", "from 0 to"),
        ("seeds = []\n[[runs]]\nGROUP", "from 0 to"),
        ("seeds = [1, 2, 1]\n[[runs]]\nGROUP", "a seed stands twice"),
        ("[[runs]]\nGROUP", "seeds is missing"),
        ("seeds = [1]\n", "runs is missing"),
        ("seeds = [1]\n[runs]\nGROUP", "each below a line [[runs]]"),
        ("seeds = [1]\nruns = []\n", "each below a line [[runs]]"),
        ("seeds = [1]\n[[runs]]\nscripts = ['ppo_continuous']\n", "env_ids is missing"),
    ],
)
def test_mistakes_in_the_form_of_a_suite(tmp_path, text, said):
    path, group = (
        tmp_path / "mine.toml",
        "scripts = ['ppo_continuous']\nenv_ids = ['Pendulum-v1']\n",
    )
    path.write_text(text.replace("GROUP", group))
    last = plan(path, "--dry-run", code=2).stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: suite {path}: ") and said in last


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["nowhere"],
            "no suite nowhere: there are atari, classic, mujoco, npg, off_policy, pong, smoke",
        ),
        (["SUITE", "--scripts", "sac2"], "--scripts sac2"),
        (["SUITE", "--env-ids", "NoSuchEnv-v0"], "NoSuchEnv"),
        (["SUITE", "--env-ids", "no_module:Env-v0"], "no_module"),
        (["SUITE", "--seeds", "few"], "--seeds few"),
        (["SUITE", "--seeds", "5-3"], "--seeds 5-3"),
        (["SUITE", "--seeds", "1-999999999"], "from 1,000,000 on"),
        (["SUITE", "--seeds", "1-99999999999"], "--seeds 1-9"),
        (["SUITE", "--num-seeds", "0"], "--num-seeds 0"),
        (["SUITE", "--num-seeds", "99999999999"], "--num-seeds 9"),
        (["SUITE", "--num-seeds", "2", "--seeds", "3"], "--num-seeds 2"),
        (["SUITE", "--workers", "0"], "--workers"),
        (["SUITE", "--gpus-per-job", "-1"], "--gpus-per-job"),
        (["SUITE", "--gpus-per-job", "1"], "for --engine ray"),
        (["SUITE", "--ray-address", "auto"], "for --engine ray"),
        (["SUITE", "--job", "9", "--dry-run"], "--job 9: there are 2"),
        (["SUITE", "--env-ids", "wrong_module:Env-v0"], "ZeroDivisionError"),
        (["SUITE", "--env-ids", "..:Env-v0"], "--env-ids ..:Env-v0"),
        (["SUITE", "--args=--gamma '0.9"], "--args --gamma '0.9: No closing quotation"),
        (["SUITE", "--args=--no-such-flag 1"], "refuses"),
        (["SUITE", "--args=--gamma 7"], "refuses"),
        (["SUITE", "--args=--seed 7"], "--seed among the arguments"),
        (["SUITE", "--args=--run-dir here"], "--run-dir among the arguments"),
        (["SUITE", "--args=--env-id CartPole-v1"], "--env-id among the arguments"),
        (["broken.toml"], "broken.toml"),
        (["empty.toml"], "empty.toml"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(tmp_path, arguments, said, monkeypatch):
    (tmp_path / "broken.toml").write_text("seeds = [1\n")
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "wrong_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = suite(tmp_path)
    arguments = [str(path) if word == "SUITE" else word for word in arguments]
    done = plan(*arguments, "--run-root", tmp_path / "r", code=2, cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last and "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_run_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = plan(suite(tmp_path), "--run-root", tmp_path / "file" / "r", code=2)
    assert done.stderr.splitlines()[-1].startswith("error: --run-root ")
    assert "Traceback" not in done.stderr


def test_a_disk_without_locks_is_one_line(tmp_path, monkeypatch):
    """Some file systems of clusters have none. Two sweeps would train in one folder there."""

    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    done = plan(suite(tmp_path), "--run-root", tmp_path / "r", code=1)
    assert "Function not implemented; go on: " in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(OSError, match="not implemented"):  # not "somebody has it"
        jobs.is_locked(tmp_path / "small.toml")


def test_a_damaged_folder_holds_another_run(tmp_path):
    folder = tmp_path / "r" / "Pendulum-v1__ppo_continuous__1"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text('{"args": [], "script": "ppo_continuous.py"}')
    done = plan(suite(tmp_path), "--run-root", tmp_path / "r", "--dry-run")
    assert f"{folder.name} holds another run (not a whole one)" in done.stderr


def test_the_suites_that_come_with_it_are_sound():
    for path in sorted((ROOT / "benchmark" / "suites").glob("*.toml")):
        here = {p.stem for p in ROOT.glob("*.py")}
        if any(f'"{name}"' in path.read_text() for name in here):
            assert plan(path.stem, "--dry-run").stdout.startswith("python ")


def test_kill_9_of_the_sweep_and_of_jobs(tmp_path):
    """All complete in the end, each equal to one that nobody disturbed."""
    path = suite(tmp_path, seeds=range(1, JOBS + 1), steps=8192, more="--checkpoint-frequency 512")
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    sweep(path, "--run-root", calm)
    for _ in range(1 if JOBS < 6 else 2):
        running = begin(path, "--run-root", rough)
        begun = [sum(map(step, folders(rough)))]
        wait_for(lambda: sum(map(step, folders(rough))) >= begun[0] + 2048)  # noqa: B023
        running.kill()
        running.wait()
        running.stdout.close()
        if sys.platform == "linux":
            wait_for(lambda: not processes(rough), 30)  # they checkpoint and follow it
    running = begin(path, "--run-root", rough)
    wait_for(lambda: processes(rough))
    time.sleep(3)
    for pid in processes(rough):
        os.kill(pid, signal.SIGKILL)
    output, _ = running.communicate(timeout=900)
    assert running.returncode == 0, output
    assert f"{JOBS} of {JOBS} complete" in output
    assert sum(starts(rough).values()) > JOBS
    assert_same_runs(calm, rough)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_jobs_checkpoint(tmp_path, number, code):
    path, root = suite(tmp_path, steps=100_000), tmp_path / "r"
    running = begin(path, "--run-root", root, "--workers", 2)
    wait_for(lambda: len(folders(root)) == 2 and all(map(step, folders(root))))
    running.send_signal(number)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == code, output
    assert "0 of 2 complete" in output and "the same command again" in output
    for folder in folders(root):
        assert checkpoint(folder)["global_step"] == step(folder) > 0
    assert not processes(root)
    printed = plan(path, "--run-root", root, "--dry-run").stdout.splitlines()
    assert all("--resume" in line for line in printed)


def test_signals_to_everybody_at_once(tmp_path):
    """As a cancelled batch job and a reboot send them: to the sweep and its jobs, twice."""
    path, root = suite(tmp_path, steps=100_000), tmp_path / "r"
    running = begin(path, "--run-root", root, "--workers", 2)
    wait_for(lambda: len(folders(root)) == 2 and all(map(step, folders(root))))
    everybody = [running.pid, *processes(root)]
    assert len(everybody) >= 3
    for _ in range(2):
        for pid in everybody:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.05)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 143 and "the same command again" in output, output
    for folder in folders(root):
        assert checkpoint(folder)["global_step"] == step(folder) > 0


def test_a_later_second_signal_ends_at_once(tmp_path):
    path, root = suite(tmp_path, env_ids=["probes:Slow-v0"], seeds=(1,)), tmp_path / "r"
    running = begin(path, "--run-root", root, SLOW_SECONDS="20")
    wait_for(lambda: folders(root))
    running.terminate()
    time.sleep(2.5)
    assert running.poll() is None  # its job is in a step of the simulator
    running.terminate()
    running.communicate(timeout=5)
    assert running.returncode == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_jobs_follow_a_killed_sweep(tmp_path):
    """They checkpoint and end, and do not go on unseen."""
    path, root = suite(tmp_path, seeds=(1,), steps=10_000_000), tmp_path / "r"
    running = begin(path, "--run-root", root)
    wait_for(lambda: any(map(step, folders(root))))
    running.kill()
    running.communicate()
    wait_for(lambda: not processes(root), 30)
    (folder,) = folders(root)
    assert 0 < checkpoint(folder)["global_step"] < 10_000_000


def test_two_sweeps_at_once_share_the_work(tmp_path):
    path, root = suite(tmp_path, seeds=(1, 2, 3, 4), steps=2048), tmp_path / "r"
    both = [begin(path, "--run-root", root, "--workers", 1) for _ in range(2)]
    for running in both:
        output, _ = running.communicate(timeout=200)
        assert running.returncode == 0, output
    assert set(starts(root).values()) == {1} and len(starts(root)) == 4


def test_a_running_job_is_waited_for(tmp_path):
    path, root = suite(tmp_path, seeds=(1,)), tmp_path / "r"
    log = root / "logs" / "Pendulum-v1__ppo_continuous__1.log"
    log.parent.mkdir(parents=True)
    with open(log, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        running = begin(path, "--run-root", root)
        time.sleep(6)
        assert not folders(root)
    output, _ = running.communicate(timeout=100)
    assert running.returncode == 0, output


def test_failures_are_retried_then_reported(tmp_path):
    """A job that crashes once is completed; one that always crashes fails, and hides no other."""
    ids = ["probes:CrashingOnce-v0", "probes:Crashing-v0", "Pendulum-v1"]
    path, root = suite(tmp_path, env_ids=ids, seeds=(1,)), tmp_path / "r"
    marker = {"CRASH_MARKER": str(tmp_path / "crashed")}
    done = sweep(path, "--run-root", root, code=1, **marker)
    assert "2 of 3 complete" in done.stdout
    missing = [line for line in done.stdout.splitlines() if line.startswith("missing")]
    assert len(missing) == 1 and "probes-Crashing-v0" in missing[0] and "exit code 1" in missing[0]
    assert "the simulator fell over" in missing[0]  # the exception itself
    assert starts(root)["probes-CrashingOnce-v0__ppo_continuous__1"] == 2
    assert starts(root)["probes-Crashing-v0__ppo_continuous__1"] == 3
    sweep(path, "--run-root", root, "--retries", 0, code=1, **marker)
    assert starts(root)["probes-Crashing-v0__ppo_continuous__1"] == 4  # a new sweep tries again


def test_what_would_fail_again_is_not_retried(tmp_path):
    path, root = suite(tmp_path, env_ids=["probes:Picture-v0"], seeds=(1,)), tmp_path / "r"
    done = sweep(path, "--run-root", root, code=1)
    assert "exit code 2" in done.stdout and set(starts(root).values()) == {1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of five jobs that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    sweep(suite(folder, seeds=range(1, 6)), "--run-root", folder / "r")
    return folder


def test_another_run_in_the_folder_is_kept_aside(tmp_path, finished):
    """Complete: these arguments, this algorithm. What is there instead is never overwritten."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    old = {}
    kinds = ("arguments", "algorithm", "script", "torn args", "array")
    for folder, what in zip(folders(tmp_path / "r"), kinds, strict=True):
        about = json.loads((folder / "args.json").read_text())
        if what == "arguments":
            about["args"]["gamma"] = 0.5
        elif what == "script":
            about["script"] = "other.py"
        elif what == "algorithm":
            copy = folder / "ppo_continuous.py"
            copy.write_text(copy.read_text().replace("surrogate = torch.min(", "surrogate = max("))
        text = json.dumps([] if what == "array" else about)
        (folder / "args.json").write_text(text[:-5] if what == "torn args" else text)
        old[folder] = (folder / "metrics.jsonl").read_bytes()
    done = sweep(suite(tmp_path, seeds=range(1, 6)), "--run-root", tmp_path / "r")
    assert done.stdout.count("holds another run") == 5 and "5 of 5 complete" in done.stdout
    for folder, lines in old.items():
        assert (folder.with_name(f"{folder.name}.old-1") / "metrics.jsonl").read_bytes() == lines


def test_what_was_set_aside_is_found_again(tmp_path, finished):
    """A quick trial of other arguments, and then the first command again: nothing is trained."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    first = [suite(tmp_path, seeds=(1, 2)), "--run-root", tmp_path / "r"]
    other = [*first, "--args=--gamma 0.9"]
    before = {f.name: (f / "metrics.jsonl").read_bytes() for f in folders(tmp_path / "r")}
    printed = plan(*other, "--dry-run")
    said = printed.stderr.splitlines()
    assert len(said) == 2 and all("another run (gamma 0.99, now 0.9)" in line for line in said)
    assert len(printed.stdout.splitlines()) == 2
    assert not list((tmp_path / "r").glob("*.old-*"))  # nothing was touched
    sweep(*other)
    printed = plan(*first, "--dry-run")
    assert printed.stderr.count("it will be brought back") == 2
    assert printed.stdout.count("# complete: ") == 2
    assert "2 of 2 complete" in plan(*first).stdout
    assert before == {f.name: (f / "metrics.jsonl").read_bytes() for f in folders(tmp_path / "r")}
    assert "2 complete, 0 to resume, 0 to start" in plan(*other).stdout
    assert len(list((tmp_path / "r").glob("*.old-*"))) == 2


def checkout(folder):
    """A copy of what a sweep needs, to edit."""
    hidden = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "benchmark", folder / "benchmark", ignore=hidden)
    shutil.copy(ROOT / "ppo_continuous.py", folder)
    return folder / "ppo_continuous.py"


def test_a_script_that_is_edited_while_its_sweep_runs(tmp_path):
    """Every job runs the code that was planned."""
    script, root = checkout(tmp_path), tmp_path / "r"
    words_of = words(suite(tmp_path, seeds=(1, 2, 3)), "--run-root", root, "--workers", "1")
    extra = {"cwd": tmp_path, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = subprocess.Popen(words_of, env=environ(), **extra)
    wait_for(lambda: folders(root))
    planned = script.read_text()
    script.write_text(planned.replace("surrogate = torch.min(", "surrogate = torch.max("))
    output, _ = running.communicate(timeout=100)
    assert running.returncode == 0 and set(starts(root).values()) == {1}, output
    assert {(f / script.name).read_text() for f in folders(root)} == {planned}
    again = subprocess.run([*words_of, "--dry-run"], env=environ(), **extra).stdout
    assert again.count("holds another run (another algorithm)") == 3


def test_a_good_end_without_a_result_is_not_tried_again(tmp_path):
    script, root = checkout(tmp_path), tmp_path / "r"
    script.write_text(script.read_text().replace("train(parse_args(Args))", "parse_args(Args)"))
    words_of = words(suite(tmp_path, seeds=(1,)), "--run-root", root)
    done = subprocess.run(words_of, env=environ(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "exit code 0, but" in done.stdout, done.stdout + done.stderr
    assert set(starts(root).values()) == {1}


def test_a_run_that_was_started_by_hand_is_left_alone(tmp_path):
    """Neither renamed, although its arguments are others, nor joined; but waited for."""
    path, root = suite(tmp_path, seeds=(1,), steps=100_000), tmp_path / "r"
    (line,) = plan(path, "--run-root", root, "--dry-run").stdout.splitlines()
    by_hand = subprocess.Popen([sys.executable, *shlex.split(line)[1:]], cwd=ROOT, env=environ())
    (folder,) = [root / "Pendulum-v1__ppo_continuous__1"]
    wait_for(lambda: step(folder))
    running = begin(path, "--run-root", root, "--args=--total-timesteps 512 --gamma 0.9")
    time.sleep(8)
    assert running.poll() is None and [f.name for f in root.glob("Pend*")] == [folder.name]
    by_hand.terminate()
    by_hand.wait()
    output, _ = running.communicate(timeout=100)
    assert running.returncode == 0, output
    aside = folder.with_name(f"{folder.name}.old-1")
    assert checkpoint(aside)["global_step"] > 0
    assert read_run(aside)["args"]["gamma"] == 0.99 and read_run(folder)["args"]["gamma"] == 0.9


def test_nohup_survives_a_logout(tmp_path):
    path, root = suite(tmp_path, seeds=(1,), steps=2048), tmp_path / "r"
    words_of = shlex.join(words(path, "--run-root", root))
    running = subprocess.Popen(
        ["bash", "-c", f"trap '' HUP; exec {words_of}"], cwd=ROOT, env=environment()
    )
    wait_for(lambda: folders(root))
    running.send_signal(signal.SIGHUP)
    assert running.wait(100) == 0


def test_what_reads_the_output_may_end(tmp_path):
    """head, or tee that Ctrl-C ends as well."""
    path, root = suite(tmp_path, seeds=(1, 2)), tmp_path / "r"
    words_of = shlex.join(words(path, "--run-root", root))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words_of} | head -1"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(folders(root)) == 2


def test_one_job_of_the_plan(tmp_path):
    path, root = suite(tmp_path, seeds=(1, 2, 3)), tmp_path / "r"
    assert "1 of 1 complete" in sweep(path, "--run-root", root, "--job", 2).stdout
    assert [folder.name for folder in folders(root)] == ["Pendulum-v1__ppo_continuous__2"]
    done = plan(path, "--run-root", root, "--job", 4, code=2)
    assert "error: --job 4: there are 3" in done.stderr


def test_a_resumed_job_takes_the_flags_that_may_change(tmp_path, finished):
    """They leave the numbers alone, so that the run goes on; evaluations are wanted from now on."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = folders(tmp_path / "r")[0] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    more = "--args=--eval-frequency 256 --capture-video --checkpoint-frequency 64"
    arguments = [suite(tmp_path, seeds=(1,)), "--run-root", tmp_path / "r", "--dry-run"]
    (line,) = plan(*arguments, more).stdout.splitlines()
    flags = "--capture-video --eval-frequency 256 --checkpoint-frequency 64"
    assert "--resume" in line and line.endswith(flags)
    (line,) = plan(*arguments).stdout.splitlines()
    assert "--resume" in line and line.split()[-1].endswith("__1")


def test_two_nodes_keep_a_script_at_once(tmp_path, monkeypatch):
    """Processes of two nodes may have the same id."""
    names = []
    monkeypatch.setattr(Path, "rename", lambda part, whole: names.append(part.name))
    for _ in range(2):
        jobs.Source("mine", "x = 1\n").keep(tmp_path)
    assert len(set(names)) == 2


def test_names_that_folders_cannot_have(tmp_path):
    path = suite(tmp_path, seeds=(1,))
    grid = """grid = {env-kwargs = ['{"g": 9.0}', '{"render_mode": null, "g": 3.0}']}\n"""
    path.write_text(path.read_text() + grid)
    lines = plan(path, "--run-root", tmp_path / "r", "--dry-run").stdout.splitlines()
    names = {Path(shlex.split(line)[7]).name for line in lines}
    assert len(names) == 2 and not any(set(name) & set('{}":/') for name in names)
    for name in ("a__b", "a.old-1"):
        path.write_text(suite(tmp_path).read_text() + f"name = '{name}'\n")
        assert f"name {name}" in plan(path, "--dry-run", code=2).stderr


def test_a_script_that_cannot_be_imported_is_one_line(tmp_path):
    script = checkout(tmp_path)
    script.write_text("def broken(:\n")
    words_of = words(suite(tmp_path), "--run-root", tmp_path / "r")
    done = subprocess.run(words_of, cwd=tmp_path, env=environ(), capture_output=True, text=True)
    assert done.returncode == 2 and "error: ppo_continuous.py cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


def test_which_of_several_groups_a_new_environment_takes_is_said():
    done = plan("classic", "--scripts", "dqn", "--env-ids", "MountainCar-v0", "--dry-run")
    assert done.stderr.count("warning: dqn on MountainCar-v0 fits several groups") == 1
    taken = done.stderr.strip().rpartition("as in the first, ")[2]
    assert taken and all(line.endswith(taken) for line in done.stdout.splitlines())


def test_a_new_environment_is_for_the_groups_without_a_name():
    words_of = ["mujoco", "--scripts", "ppo_continuous", "--env-ids", "Pendulum-v1", "--dry-run"]
    assert len(plan(*words_of).stdout.splitlines()) == 5  # one for each seed


def test_folders_of_different_environments_are_different(tmp_path):
    ids = ["probes:here/Short-v0", "probes:here-Short-v0", "Pendulum-v1"]
    path, root = suite(tmp_path, env_ids=ids, seeds=(1,)), tmp_path / "r"
    assert "3 of 3 complete" in sweep(path, "--run-root", root).stdout
    names = [folder.name for folder in folders(root)]
    assert len(names) == 3 and not any(":" in name for name in names)
    assert {read_run(folder)["title"] for folder in folders(root)} == set(ids)


def test_incomplete_runs_are_resumed(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    whole = {}
    kinds = ("no evaluation", "torn line", "no metrics", "no checkpoint", "early evaluation")
    for folder, what in zip(folders(tmp_path / "r"), kinds, strict=True):
        path = folder / "metrics.jsonl"
        whole[folder, what], lines = metrics(folder), path.read_text().splitlines(keepends=True)
        if what == "no evaluation":
            path.write_text("".join(lines[:-1]))
        elif what == "torn line":
            path.write_text("".join(lines)[:-9])
        elif what == "no metrics":
            path.unlink()
        else:
            early = json.dumps(json.loads(lines[-1]) | {"global_step": 256}) + "\n"
            path.write_text("".join(lines[:2]) + (early if what == "early evaluation" else ""))
            (folder / "checkpoint.pt").unlink()
    sweep(suite(tmp_path, seeds=range(1, 6)), "--run-root", tmp_path / "r")
    for (folder, what), lines in whole.items():
        lost = len(lines) - 1 if what == "no metrics" else 0  # only the evaluation comes back
        assert without_times(metrics(folder)) == without_times(lines)[lost:], what


def test_the_live_table(tmp_path):
    """In a terminal: a table with every state, and the summary after it."""
    pty = pytest.importorskip("pty")
    path, root = suite(tmp_path, steps=8_000), tmp_path / "r"
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        words(path, "--run-root", root, "--workers", 1),
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment(TERM="xterm", COLUMNS="120", LINES="30"),
    )
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while part := os.read(ours, 65536):
            output += part
    os.close(ours)
    assert running.wait() == 0, output.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())  # colours, cursor movements
    assert "1 running, 1 queued, 0 failed" in text and "2 of 2 complete" in text
    assert re.search(r"Pendulum-v1__ppo_continuous__1 +running +\d+% +[\d,]+/s +-\d+", text)


def test_tracked_jobs_are_grouped(tmp_path):
    """wandb draws mean and spread of a group: one for each script, environment and name."""
    path, root = suite(tmp_path, seeds=(1,)), tmp_path / "r"
    sweep(path, "--run-root", root, "--track", WANDB_MODE="offline")
    (file,) = root.glob("*/wandb/offline-run-*/*.wandb")
    assert wandb_file.group(file) == "ppo_continuous__Pendulum-v1"
    path.write_text(path.read_text() + "name = 'long view'\n")
    for given, expected in (
        ({}, "ppo_continuous__Pendulum-v1, long view"),
        ({"WANDB_RUN_GROUP": "mine"}, "mine"),
    ):
        extra = {"WANDB_MODE": "offline"} | given
        sweep(path, "--run-root", tmp_path / str(len(given)), "--track", **extra)
        (file,) = (tmp_path / str(len(given))).glob("*/wandb/offline-run-*/*.wandb")
        assert wandb_file.group(file) == expected
    begun = sweep(suite(tmp_path, seeds=(1,)), "--run-root", root, WANDB_MODE="offline")
    assert "1 complete" in begun.stdout  # with or without --track it is the same run
