"""The README tells the truth: its commands run, links lead somewhere, tables are the data's."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import OURS, ROOT, checkpoint, environ, load_file, run
from test_sweep import checkout, plan, step, wait_for

README = (ROOT / "README.md").read_text()


def commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_install_commands_name_files_that_exist():
    for path in re.findall(r"pip install -r (\S+)", README):
        assert (ROOT / path.rstrip("`):,.")).is_file(), path
    assert "pip install -r tests/requirements.txt && python -m pytest" in commands()


def test_every_script_command_runs(tmp_path, monkeypatch):
    """In order, in one folder, as a reader would type them; only shorter."""
    for script in OURS:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    modules = {}
    for line in commands():
        words = shlex.split(line.split("&&")[-1])
        if len(words) < 2 or not words[1].endswith(".py"):
            continue
        assert words[0] == "python"
        script = words[1].removesuffix(".py")
        if "--compile" in words:
            continue  # test_run.py does
        if "--resume" not in words and "--evaluate" not in words:
            words += ["--total-timesteps", "512", "--eval-episodes", "1"]
        elif "--total-timesteps" in words:
            words[words.index("--total-timesteps") + 1] = "4096"
        if "--evaluate" in words:
            words[words.index("--eval-episodes") + 1] = "2"
        if script not in modules:
            modules[script] = load_file(tmp_path / f"{script}.py")
            monkeypatch.setattr(modules[script], "LONGEST_EPISODE", 200)
        done = run(script, *words[2:], quick=False, module=modules[script])
        assert done.stdout.splitlines()[-1].startswith("eval mean_return="), line
    assert modules.keys() == set(OURS)


def test_every_sweep_command_is_sound():
    lines = [line.split("&&")[-1].split() for line in commands() if "benchmark.sweep" in line]
    assert lines
    for words in lines:
        assert words[:3] == ["python", "-m", "benchmark.sweep"]
        assert plan(*dict.fromkeys([*words[3:], "--dry-run"])).stdout.startswith("python ")


def test_flags_in_the_prose_exist():
    help_text = plan("--help").stdout
    for script in OURS:
        help_text += run(script, "--help", quick=False).stdout
    for name in ("report", "speed", "tune"):
        words = [sys.executable, "-m", f"benchmark.{name}", "--help"]
        help_text += subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert flag in help_text, flag


def block(start, language=""):
    """The one block of README that begins so."""
    before = f"{language}\n"
    (found,) = [text for text in README.split("```") if text.startswith(before + start)]
    return found.removeprefix(language)


def test_a_comparison_of_ones_own(tmp_path):
    """The page's commands and its suite, with fewer steps: a changed copy, and a sentence."""
    checkout(tmp_path)
    steps = block("cp ").splitlines()
    (tmp_path / "my_suite.toml").write_text(
        block("seeds = [1, 2, 3]").replace("100_000", "2048").replace(', "Inv', '] # "Inv')
    )
    output = ""
    for line in (line.partition(" #")[0] for line in steps if line.strip()):
        words = [sys.executable if word == "python" else word for word in shlex.split(line)]
        words = ["2048" if word == "20000" else word for word in words]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environ())
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        output += done.stdout
        if words[0] == "cp":
            copy = tmp_path / "my_algo.py"
            copy.write_text(copy.read_text().replace("gamma: float = 0.99", "gamma: float = 0.9"))
    assert "6 of 6 complete in runs/my_suite" in output
    text = (tmp_path / "report" / "report.md").read_text()
    assert "older code" not in text and "| `my_algo.py` | steps |" in text
    assert re.search(r"\| `my_algo.py` \| `ppo_continuous.py` \| \d\.\d\d \[.*\] \| 1 \|", text)
    assert (tmp_path / "report" / "curves.pdf").exists()


def test_a_trained_policy_in_ones_own_code(tmp_path, monkeypatch):
    """The action is the one that evaluation begins with, from the same observation."""
    monkeypatch.chdir(tmp_path)
    words = ["--env-id", "HalfCheetah-v5", "--total-timesteps", 2048, "--eval-episodes", 1]
    run("ppo_continuous", *words, "--run-dir", "runs/cheetah", quick=False)
    module, seen = load_file(tmp_path / "runs/cheetah/ppo_continuous.py"), []
    evaluate = module.Run.evaluate

    def look(self):
        seen.append(self.policy(module.gym.make("HalfCheetah-v5").reset(seed=1)[0]))
        evaluate(self)

    monkeypatch.setattr(module.Run, "evaluate", look)
    run("ppo_continuous", "--evaluate", "runs/cheetah", quick=False, module=module)
    code = block("import sys", "python")
    code = code.replace("    obs, reward,", "    print(action.tolist())\n    obs, reward,", 1)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ()
    )
    assert done.returncode == 0, done.stderr
    played = done.stdout.splitlines()
    assert len(played) == 1000 and json.loads(played[0]) == pytest.approx(seen[0].tolist())


def test_a_script_of_ones_own_fails_no_test(tmp_path):
    """It is said to be left out, and is tested with a line of its own in conftest.py."""
    hidden = shutil.ignore_patterns("results", "__pycache__")
    for name in ("tests", "benchmark"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=hidden)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), ROOT / "README.md"]:
        shutil.copy(path, tmp_path)
    shutil.copy(ROOT / "ppo_continuous.py", tmp_path / "my_algo.py")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-o", "addopts="]

    def tests(*which):
        done = subprocess.run(
            [*words, *which], cwd=tmp_path, capture_output=True, text=True, env=environ()
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    output = tests("tests/test_style.py", "tests/test_report.py::test_every_script_is_known")
    assert "not tested: my_algo.py, without a line in tests/conftest.py" in output
    with open(tmp_path / "tests" / "conftest.py") as file:
        text = file.read().replace("FOUND = {", 'QUICK["my_algo"] = QUICK["a2c"]\nFOUND = {', 1)
    (tmp_path / "tests" / "conftest.py").write_text(text.replace('["a2c"]\nF', '["trpo"]\nF'))
    output = tests("tests/test_style.py", "tests/test_run.py", "--collect-only")
    assert "[my_algo]" in output.split("test_run.py", 1)[1] and "not tested" not in output
    assert "[my_algo]" not in output.split("test_run.py", 1)[0]


def test_a_task_of_a_job_array(tmp_path):
    """Slurm's part is played by a script. Its signal: a checkpoint, and into the queue again."""
    script = checkout(tmp_path)
    (tmp_path / "small.toml").write_text(
        "seeds = [1]\n[[runs]]\nscripts = ['ppo_continuous']\nenv_ids = ['Pendulum-v1']\n"
        "args = ['--total-timesteps', '20480', '--num-envs', '2', '--num-steps', '256']\n"
    )
    array = (
        block("#!/bin/bash\n#SBATCH --array").lstrip().replace("sweep mujoco", "sweep small.toml")
    )
    (tmp_path / "array.sh").write_text(array)
    stub, here = tmp_path / "bin" / "scontrol", f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    stub.parent.mkdir()
    stub.write_text('#!/bin/bash\necho "$@" > queued\n')
    stub.chmod(0o755)
    (stub.parent / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (stub.parent / "python").chmod(0o755)
    extra = {"PATH": here, "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "77"}
    folder = tmp_path / "runs" / "small" / "Pendulum-v1__ppo_continuous__1"

    def begin():
        return subprocess.Popen(["bash", "array.sh"], cwd=tmp_path, env=environ(**extra))

    task = begin()
    wait_for(lambda: step(folder))
    task.terminate()
    assert task.wait(60) == 0 and (tmp_path / "queued").read_text() == "requeue 77\n"
    assert 0 < checkpoint(folder)["global_step"] < 20_480
    assert begin().wait(200) == 0 and checkpoint(folder)["global_step"] == 20_480
    assert begin().wait(60) == 0 and script.exists()  # complete: nothing to do
    assert (
        "#SBATCH --array=1-345 " in array
        and len(plan("mujoco", "--dry-run").stdout.splitlines()) == 345
    )


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_script_is_in_the_table():
    for script in OURS:
        assert f"| [`{script}.py`]({script}.py) |" in README


def test_the_difference_of_two_scripts_is_as_long_as_it_says(tmp_path):
    for first, second, said in re.findall(
        r"From `(\w+)\.py` to `(\w+)\.py`, (\d+)\s+lines change", README
    ):
        for script in (first, second):
            text = (ROOT / f"{script}.py").read_text()
            (tmp_path / script).write_text(text[: text.index("# ---- Run infrastructure")])
        words = ["git", "diff", "--no-index", "--numstat", first, second]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        added, removed, _ = done.stdout.split("\t")
        assert int(said) == int(added) + int(removed)
    assert said


def test_results_are_what_the_committed_data_gives():
    sys.path.insert(0, str(ROOT))
    from benchmark import plots, report

    assert report.readme_with_results() == README, "python -m benchmark.report"
    Image = pytest.importorskip("PIL.Image")
    found = report.collected()
    pictures = {script: rows for script, rows in found.items()}
    everything = [row for rows in found.values() for row in rows]
    if any(map(report.has_scores, report.families(everything))):
        pictures["profiles"] = [row for part in report.families(everything) for row in part]
    assert pictures
    for name, rows in pictures.items():
        image = Image.open(report.RESULTS / f"{name}.png")
        assert image.info["Data"] == plots.data_hash(rows), "python -m benchmark.report"
