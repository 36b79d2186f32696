"""The README tells the truth: its commands run, links lead somewhere, tables are the data's."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import OURS, ROOT, load_file, run
from test_sweep import plan

README = (ROOT / "README.md").read_text()


def commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_install_commands_name_files_that_exist():
    for path in re.findall(r"pip install -r (\S+)", README):
        assert (ROOT / path.rstrip("`)")).is_file(), path
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
            words += ["--total-timesteps", "2048", "--eval-episodes", "1"]
        elif "--total-timesteps" in words:
            words[words.index("--total-timesteps") + 1] = "4096"
        if "--evaluate" in words:
            words[words.index("--eval-episodes") + 1] = "2"
        if script not in modules:
            modules[script] = load_file(tmp_path / f"{script}.py")
            monkeypatch.setattr(modules[script], "LONGEST_EPISODE", 1000)
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
    for name in ("report", "speed"):
        words = [sys.executable, "-m", f"benchmark.{name}", "--help"]
        help_text += subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert flag in help_text, flag


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
        pictures["profiles"] = everything
    assert pictures
    for name, rows in pictures.items():
        image = Image.open(report.RESULTS / f"{name}.png")
        assert image.info["Data"] == plots.data_hash(rows), "python -m benchmark.report"
