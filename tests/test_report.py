"""Reports: statistics against definitions, and nothing averaged that does not belong together."""

import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import OURS, ROOT, call, environ

sys.path.insert(0, str(ROOT))
from benchmark import plots, report, results, rows, stats, sweep


def fake(folder, env_id="Hopper-v5", seed=1, final=100.0, code="x = 1\n", end=None, **args):
    """A finished run folder; final=None: an unfinished one."""
    folder.mkdir(parents=True)
    script = args.pop("script", "ppo_continuous.py")
    args = {"env_id": env_id, "seed": seed, "total_timesteps": 1000, "gamma": 0.99} | args
    about = {"args": args | {"run_dir": str(folder)}, "script": script, "sha256": "0", "git": None}
    (folder / "args.json").write_text(json.dumps(about | {"versions": {}, "device": "cpu"}))
    (folder / script).write_text(code)
    lines = [
        {"charts/episodic_return": 10.0 * n, "charts/episodes": 1, "global_step": 100 * n}
        for n in range(1, 11 if final is not None else 6)
    ]
    if final is not None:
        last = {"eval/episodic_return": final, "eval/episodic_return_std": 1.0, "eval/episodes": 2}
        lines.append(last | {"global_step": end or args["total_timesteps"]})
    lines = [line | {"wall_time": 60.0} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make(*paths, out, code=0):
    """A report by its command line, in this process."""
    return call(report.main, *paths, "--out", out, code=code)


# ---- Statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3], 3), ([1, 2], 1.5), ([1, 2, 9], 3), ([9, 1, 2, 4], 3), ([1, 2, 3, 5, 100], 3.3)],
)
def test_iqm_by_hand(values, expected):
    weights = np.full(len(values), 1 / len(values))
    assert stats.iqm(np.array(values), weights) == pytest.approx(expected)
    assert stats.iqm(np.array([values, values]), weights) == pytest.approx([expected, expected])


def test_environments_weigh_the_same_whatever_their_seeds():
    """Runs repeated until every environment has as many, and a trimmed mean over all of them."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        scores = [rng.normal(size=n) for n in rng.integers(1, 6, 4)]
        equal = np.sort(np.concatenate([np.repeat(x, 240 // len(x)) for x in scores]))
        runs, weights = np.concatenate(scores), stats.equal_weights(scores)
        assert weights.sum() == pytest.approx(1)
        assert stats.iqm(runs, weights) == pytest.approx(equal[240:-240].mean())
        assert stats.mean(runs, weights) == pytest.approx(np.mean([x.mean() for x in scores]))
        profile = stats.performance_profile(scores, np.array([0.3]))
        assert profile == pytest.approx([(equal > 0.3).mean()])


@pytest.mark.parametrize("n", [3, 5, 10, 40])
def test_the_interval_of_a_mean_covers_it(n):
    """Normal runs: 95 % of the intervals hold the true mean (a bootstrap's: 76 % at three)."""
    low, high = stats.mean_interval(np.random.default_rng(n).normal(7, 3, (20_000, n)))
    assert 0.94 < np.mean((low < 7) & (high > 7)) < 0.96


def test_no_interval_of_two():
    assert all(np.isnan(x).all() for x in stats.mean_interval(np.array([[1.0, 2.0]])))
    low, high = stats.mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (high - low) / 2 == pytest.approx(4.303 / 3**0.5, abs=1e-3)


def test_bootstrap_interval_of_a_mean_is_the_textbooks():
    x = np.random.default_rng(3).normal(5, 2, 400)
    low, high = stats.interval([x], stats.mean)
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.03)
    assert (low, high) == stats.interval([x], stats.mean)  # again: the same


def test_the_interval_of_three_runs_is_students():
    """By hand: the standard deviation of all 27 resamples' means, without their factor 2 / 3."""
    x = np.array([1.0, 2.0, 4.0])
    means = [np.mean(drawn) for drawn in itertools.product(x, repeat=3)]
    assert stats.widening([x]) * np.std(means) == pytest.approx(4.303 * x.std(ddof=1) / 3**0.5)
    assert stats.interval([x], stats.mean) == pytest.approx(stats.mean_interval(x), abs=0.1)


def test_a_noisy_environment_has_its_own_degrees_of_freedom():
    """By hand, Satterthwaite: the quiet runs say nothing about the noisy ones, equal ones do."""
    noisy, quiet = np.array([0.0, 1.0, 2.0]), np.full(100, 1.0)
    assert stats.widening([noisy, quiet]) == pytest.approx(4.303 * (3 / 2) ** 0.5)
    assert stats.widening([noisy, noisy + 1]) == pytest.approx(2.776 * (3 / 2) ** 0.5)


@pytest.mark.parametrize(
    ("runs", "spreads"),
    [(3, [0.2] * 7), (5, [0.2] * 2), (10, [0.2] * 2), (3, [1] + [0.05] * 4), (5, [1, 0.05])],
)
@pytest.mark.parametrize("statistic", [stats.mean, stats.iqm])
def test_bootstrap_intervals_cover(runs, spreads, statistic, monkeypatch):
    """Percentiles of the plain bootstrap do so for 75 % at three runs and two environments."""
    monkeypatch.setattr(stats, "REPETITIONS", 500)
    rng, environments = np.random.default_rng(1), len(spreads)
    of = list(zip(np.linspace(0.2, 1, environments), spreads, strict=True))
    many = [rng.normal(centre, spread, 20_000) for centre, spread in of]
    truth = statistic(np.concatenate(many), stats.equal_weights(many))
    held = []
    for _ in range(600):
        scores = [rng.normal(centre, spread, runs) for centre, spread in of]
        low, high = stats.interval(scores, statistic)
        held.append(low <= truth <= high)
    same_spread = len(set(spreads)) == 1
    # An IQM leaves out most of what one noisy environment does, which no interval here knows.
    assert (0.92 if same_spread or statistic is stats.mean else 0.85) < np.mean(held) < 0.985


def test_resampling_is_stratified():
    """Runs never cross from one environment to another: equal runs leave no uncertainty."""
    scores = [np.full(5, 0.0), np.full(3, 100.0)]
    assert stats.interval(scores, stats.mean) == pytest.approx((50, 50))


def test_performance_profile_by_hand():
    scores = [np.array([0.1, 0.6, 0.9, 1.1]), np.array([0.5, 2.0])]
    profile = stats.performance_profile(scores, np.array([0.0, 0.5, 1.0, 3.0]))
    assert profile == pytest.approx([1, (3 / 4 + 1 / 2) / 2, (1 / 4 + 1 / 2) / 2, 0])
    low, high = stats.profile_band(scores, np.array([0.0, 0.5, 1.0, 3.0]))
    assert (low <= profile).all() and (profile <= high).all() and low[2] < high[2]


def test_probability_of_improvement_by_hand():
    x, y = [np.array([1.0, 3.0]), np.array([0.0])], [np.array([1.0, 2.0, 2.5]), np.array([5.0])]
    first = (0.5 + 0 + 0 + 3) / 6  # one tie, and 3 beats all three
    value, low, high = stats.probability_of_improvement(x, y)
    assert value == pytest.approx((first + 0) / 2) and low <= value <= high
    always, low, high = stats.probability_of_improvement([np.ones(5)], [np.zeros(4)])
    assert always == high == 1 and 0.5 < low < 0.8  # nine runs do not prove it
    back, _, _ = stats.probability_of_improvement(y, x)
    assert back == pytest.approx(1 - value)


def test_probability_of_improvement_by_loops():
    """Random runs with ties and unequal numbers of seeds."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        x, y = ([rng.integers(0, 6, n) for n in rng.integers(1, 7, 4)] for _ in range(2))
        chances = []
        for a, b in zip(x, y, strict=True):
            wins = sum(1.0 if i > j else 0.5 if i == j else 0.0 for i in a for j in b)
            chances.append(wins / len(a) / len(b))
        value, low, high = stats.probability_of_improvement(x, y)
        assert value == pytest.approx(sum(chances) / 4) and 0 <= low <= value <= high <= 1


@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("chance", [0.5, 0.75, 0.95])
@pytest.mark.parametrize("environments", [1, 3])
def test_the_interval_of_a_probability_covers_it(runs, chance, environments):
    """Of normal runs. Percentiles of the bootstrap held 0.9 for 44 % of triples of runs."""
    rng, apart = np.random.default_rng(2), NormalDist().inv_cdf(chance) * 2**0.5
    held = []
    for _ in range(400):
        x, y = rng.normal(apart, 1, (environments, runs)), rng.normal(0, 1, (environments, runs))
        _, low, high = stats.probability_of_improvement(list(x), list(y))
        held.append(low <= chance <= high)
    assert np.mean(held) > (0.87 if runs == 3 else 0.92)


# ---- What is averaged, and what is not -----------------------------------------------------------


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("| Hopper-v5")]


def test_a_table_by_hand(tmp_path):
    for seed, final in enumerate([100, 200, 300, 400, 1000], 1):
        fake(tmp_path / "runs" / str(seed), seed=seed, final=final)
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    cells = [cell.strip() for cell in rows_of(text)[0].split("|")]
    assert cells[2] == "1k" and cells[3] == "400 ± 354" and cells[4] == "[-39, 839]"
    assert cells[5] == "5" and cells[6] == "2761 ± 927 (1M steps) <sup>1</sup>"
    assert cells[7].startswith("2370 ± 696") and cells[8].startswith("2383 ± 272")
    assert "\n1. Hopper-v2, 1M steps: best mean score over training evaluations, 3 seeds; " in text
    assert "\n2. Hopper-v3, 1M steps: final evaluation of the seeds, 10 seeds; " in text
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_bold_means_at_or_above_the_best_published(tmp_path):
    """Of three seeds at least, with no more steps."""
    for seed in (1, 2, 3):
        fake(tmp_path / "runs" / f"a{seed}", seed=seed, final=2762.0)
        fake(tmp_path / "runs" / f"b{seed}", seed=seed, final=2760.0, env_id="Walker2d-v5")
    for seed in (1, 2):
        fake(tmp_path / "runs" / f"c{seed}", seed=seed, final=2e4, env_id="HalfCheetah-v5")
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "**2762 ± 0**" in text and "| 2760 ± 0 |" in text and "| 20000 ± 0 |  |" in text
    for seed in (1, 2, 3):
        fake(tmp_path / "longer" / f"{seed}", seed=seed, final=1e4, total_timesteps=1_000_001)
    make(tmp_path / "longer", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 10000 ± 0 |" in text and "**" not in text


def test_what_the_suites_name_and_nobody_has_run(tmp_path, monkeypatch):
    """Complete rows of today's code are not listed; too few seeds, steps or older code are."""
    (tmp_path / "small.toml").write_text(
        "seeds = [1, 2]\n[[runs]]\nscripts = ['ppo_continuous']\n"
        "env_ids = ['Hopper-v5', 'Walker2d-v5', 'Ant-v5', 'Reacher-v5']\n"
        "args = ['--total-timesteps', '1_000']\n"
    )
    (tmp_path / "of_a_user.toml").write_text("[[runs]]\nscripts = ['mine']\nargs = []\n")
    monkeypatch.setattr(report, "SUITES", tmp_path)
    for seed in (1, 2):
        fake(tmp_path / f"a{seed}", seed=seed, final=1.0)
        fake(tmp_path / f"b{seed}", seed=seed, final=1.0, env_id="Ant-v5", total_timesteps=2000)
        fake(tmp_path / f"c{seed}", seed=seed, final=1.0, env_id="Reacher-v5")
    fake(tmp_path / "d", seed=1, final=1.0, env_id="Walker2d-v5")
    rows = report.group([results.read_run(x) for x in sorted(tmp_path.iterdir()) if x.is_dir()])
    reacher = property(lambda row: row.env_id == "Reacher-v5")
    monkeypatch.setattr(report.Row, "older", reacher)
    text = report.still_to_run(rows)
    assert "| small | `ppo_continuous.py` | Walker2d-v5; Ant-v5; Reacher-v5 |" in text
    assert "today's code: 3 of 4</summary>" in text


def test_a_column_of_published_numbers_is_not_empty(tmp_path):
    fake(tmp_path / "runs" / "a", final=1.0, env_id="Unknown-v0")
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| seeds |\n" in text and "published" not in text


def test_older_code_names_its_commit(tmp_path):
    """In the tables of results alone: pictures have one colour for all of it."""
    folder = fake(tmp_path / "runs" / "a", final=1.0, code="x = 3\n")
    about = json.loads((folder / "args.json").read_text()) | {"git": "0123456789abcdef"}
    (folder / "args.json").write_text(json.dumps(about))
    (row,) = report.group([results.read_run(folder)])
    assert row.heading.endswith("(older code: 0123456)") and row.label == " (older code)"


def test_a_script_of_another_folder_is_not_older(tmp_path):
    (row,) = report.group([results.read_run(fake(tmp_path / "a", script="not_here.py"))])
    assert row.label == ""


def test_a_collapse_in_training_is_shown(tmp_path):
    """By hand: two seeds whose mean rises to 80 and falls to 20 at the end."""
    for seed, shift in ((1, -10), (2, 10)):
        folder = fake(tmp_path / "runs" / f"{seed}", seed=seed, total_timesteps=10_000)
        returns = [min(2 * n, 80, 140 - 1.2 * n) + shift for n in range(1, 101)]
        lines = [
            {"global_step": 100 * n, "charts/episodic_return": value, "charts/episodes": 1}
            for n, value in enumerate(returns, 1)
        ]
        lines += [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])]
        text = "".join(json.dumps(line | {"wall_time": 60.0}) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    make(tmp_path / "runs", out=tmp_path / "out")
    (line,) = read_csv(tmp_path / "out" / "results.csv")
    assert float(line["training_highest"]) == pytest.approx(80)
    assert float(line["training_end"]) == pytest.approx(140 - 1.2 * 98)  # from 95 % on
    assert "| 80.0, 22.4 |" in (tmp_path / "out" / "report.md").read_text()


def test_versions_and_arguments_are_never_mixed(tmp_path):
    """Another code or another argument is another row, and the row says which."""
    fake(tmp_path / "runs" / "a", seed=1, final=100)
    fake(tmp_path / "runs" / "b", seed=2, final=300, code="x = 2\n")
    fake(tmp_path / "runs" / "c", seed=3, final=500, gamma=0.5)
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    rows = rows_of(text)[:3]
    assert len(rows_of(text)) == 6  # each in both tables
    assert all(f" {number} |" in "".join(rows) for number in (100, 300, 500))
    assert sum("gamma=0.5" in row for row in rows) == 1
    assert len({row.split("code ")[1][:8] for row in rows}) == 2
    assert not any("±" in row.split("|")[2] for row in rows)


def test_library_versions_are_never_mixed(tmp_path):
    for seed, version in enumerate(("3.3.0", "4.0.0"), 1):
        folder = fake(tmp_path / "runs" / version, seed=seed, final=100.0 * seed)
        about = json.loads((folder / "args.json").read_text())
        about["versions"] = {"mujoco": version, "torch": "2.13.0"}
        (folder / "args.json").write_text(json.dumps(about))
    make(tmp_path / "runs", out=tmp_path / "out")
    rows = rows_of((tmp_path / "out" / "report.md").read_text())[:2]
    assert "mujoco 3.3.0" in rows[0] and "| 100 |" in rows[0] and "torch" not in rows[0]
    assert "mujoco 4.0.0" in rows[1] and "| 200 |" in rows[1]


def test_prose_and_neutral_arguments_do_not_split_a_row(tmp_path):
    fake(tmp_path / "runs" / "a", seed=1, final=100, track=True)
    fake(tmp_path / "runs" / "b", seed=2, final=300, track=False, code="x = 1  # why\n")
    make(tmp_path / "runs", out=tmp_path / "out")
    assert "200 ± 141" in rows_of((tmp_path / "out" / "report.md").read_text())[0]


def test_unfinished_runs_are_shown(tmp_path):
    fake(tmp_path / "runs" / "a", seed=1)
    fake(tmp_path / "runs" / "b", seed=2, final=None)
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 of 2 |" in rows_of(text)[0]
    assert "seed 2: unfinished at step 500 of 1,000" in text


def test_a_return_that_is_not_finite_is_a_failure(tmp_path):
    """Metrics leave out what is not finite; the run is over all the same."""
    folder = fake(tmp_path / "run") / "metrics.jsonl"
    text = folder.read_text().replace('"eval/episodic_return": 100.0, ', "")
    folder.write_text(text)
    make(tmp_path / "run", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 0 of 1 |" in rows_of(text)[0] and "unfinished" not in text
    assert "seed 1: the return of its evaluation is not finite" in text


def test_an_evaluation_in_between_is_not_the_final_one(tmp_path):
    fake(tmp_path / "run", total_timesteps=2000, end=1000)
    make(tmp_path / "run", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 0 of 1 |" in rows_of(text)[0] and "unfinished at step 1,000 of 2,000" in text


def test_a_corrupt_line_is_named_and_the_rest_reported(tmp_path):
    fake(tmp_path / "runs" / "a", seed=1)
    bad = fake(tmp_path / "runs" / "b", seed=2) / "metrics.jsonl"
    lines = bad.read_text().splitlines()
    lines[3] = lines[3][:20]
    bad.write_text("\n".join(lines) + "\n")
    done = make(tmp_path / "runs", out=tmp_path / "out", code=1)
    assert f"{bad} line 4 is corrupt" in done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "metrics.jsonl line 4 is corrupt" in text and "| 1 |" in rows_of(text)[0]


def test_a_repeated_run_counts_once(tmp_path):
    fake(tmp_path / "runs" / "a", final=100)
    fake(tmp_path / "runs" / "b", final=300)
    done = make(tmp_path / "runs", out=tmp_path / "out", code=1)
    assert "the same run as" in done.stderr
    assert "| 100 |" in rows_of((tmp_path / "out" / "report.md").read_text())[0]


def test_an_iteration_without_a_finite_return(tmp_path):
    """Scripts leave out a mean that is not finite, but not the number of episodes."""
    path = fake(tmp_path / "run") / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[3]["charts/episodic_return"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = results.read_run(tmp_path / "run")["curve"]
    assert [step for step, _ in curve] == [100, 200, 300, 500, 600, 700, 800, 900, 1000]


ARGUMENTS = b"""{"args": {"env_id": "Hopper-v5", "total_timesteps": 1000, "seed": "2"},
"script": "ppo_continuous.py"}"""
EVALUATION = (
    b'{"global_step": 1000, "wall_time": 1, "eval/episodes": 2, "eval/episodic_return": %s}\n'
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", b"\xff\xfe"),
        ("args.json", b"[]"),
        ("args.json", b'{"args": {"total_timesteps": "x"}, "script": "ppo_continuous.py"}'),
        ("args.json", ARGUMENTS),
        ("metrics.jsonl", EVALUATION % b'"x"'),
        ("metrics.jsonl", EVALUATION % b"NaN"),
        ("ppo_continuous.py", b"x = '\xff'"),
        ("hardware.txt", b"\xff"),
        ("metrics.jsonl", b'{"global_step": null, "wall_time": 1}\n'),
        ("args.json", None),  # a folder
    ],
)
def test_whatever_is_damaged_is_named_and_the_rest_reported(tmp_path, name, content):
    fake(tmp_path / "runs" / "a", seed=1)
    path = fake(tmp_path / "runs" / "b", seed=2) / name
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    done = make(tmp_path / "runs", out=tmp_path / "out", code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("not used: ") and str(path.parent) in line
    assert "| 1 |" in rows_of((tmp_path / "out" / "report.md").read_text())[0]


def test_a_report_leaves_nothing_of_the_last_one(tmp_path):
    fakes(tmp_path / "two", ["mine", "yours"], ["Hopper-v5", "Reacher-v5"])
    make(tmp_path / "two", out=tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("the user's")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    assert before == {*report.MADE, "notes.txt"}
    fake(tmp_path / "one")
    make(tmp_path / "one", out=tmp_path / "out")
    assert not {"pairs.csv", "scores.csv", "profiles.png"} & set(
        map(str, (tmp_path / "out").iterdir())
    )
    assert (tmp_path / "out" / "notes.txt").exists() and not (
        tmp_path / "out" / "pairs.csv"
    ).exists()


@pytest.mark.parametrize("words", [["--out", "x"], ["--smooth", "3"], ["--smooth", "0", "runs"]])
def test_options_without_runs_do_not_touch_the_readme(words, monkeypatch):
    monkeypatch.setattr(report, "write_readme", lambda: pytest.fail("README written"))
    assert "error: " in call(report.main, *words, code=2).stderr


@pytest.mark.parametrize("what", ["missing", "empty", "args torn", "script gone"])
def test_folders_that_are_no_runs(tmp_path, what):
    folder = tmp_path / "run"
    if what in ("args torn", "script gone"):
        fake(folder)
        name = "args.json" if what == "args torn" else "ppo_continuous.py"
        (folder / name).write_text("{") if what == "args torn" else (folder / name).unlink()
        done = make(folder, out=tmp_path / "out", code=1)
        assert done.stderr.startswith(f"not used: {folder}")
    else:
        if what == "empty":
            folder.mkdir()
        done = make(folder, out=tmp_path / "out", code=2)
        said = "is not there" if what == "missing" else "holds no run"
        assert done.stderr == f"error: {folder} {said}\n"
        assert not (tmp_path / "out").exists()


def test_normalised_scores_and_pairs(tmp_path):
    """Two scripts on two environments: 0 is random, 1 the best published of any algorithm."""
    known = results.references()
    for env_id in ("Hopper-v5", "Reacher-v5"):
        zero = float(known["any", env_id, "random"]["mean"])
        one = max(float(r["mean"]) for (_, e, w), r in known.items() if (e, w) == (env_id, "best"))
        for seed in (1, 2, 3):
            for script, score in (("ppo_continuous", 0.5), ("sac", 1.5)):
                final = zero + score * (one - zero)
                name, code = f"{script}.py", f"y = '{script}'\n"
                folder = tmp_path / "runs" / f"{env_id}{seed}{script}"
                fake(folder, env_id, seed, final, code, script=name)
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `ppo_continuous.py` | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0% |" in text
    assert "| `sac.py` | 1.50 [1.50, 1.50] | 1.50 [1.50, 1.50] | 100% |" in text
    assert "| `ppo_continuous.py` | `sac.py` | 0.00 [0.00, 0.33] | 2 |" in text
    assert (tmp_path / "out" / "profiles.png").exists()


def test_scores_are_compared_within_a_kind_of_environments(tmp_path):
    """Scripts that share no environment: each kind has numbers of its own."""
    for script, env_ids in (
        ("ppo_continuous", ("Hopper-v5", "Reacher-v5")),
        ("dqn", ("Acrobot-v1", "LunarLander-v3")),
    ):
        for env_id in env_ids:
            folder = tmp_path / "runs" / f"{env_id}{script}"
            fake(folder, env_id, 1, 1.0, f"y = '{script}'\n", script=f"{script}.py")
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Over 2 environments (Hopper-v5, Reacher-v5)" in text
    assert "Over 2 environments (Acrobot-v1, LunarLander-v3)" in text
    assert "beats one of Y" not in text


def test_any_two_scripts_of_one_environment_are_compared(tmp_path):
    """Without a published number, with unequal seeds; what no measure has is named."""
    for script, seeds in (("ppo_continuous", 3), ("mine", 4)):
        for seed in range(1, seeds + 1):
            for env_id in ("Mine-v0", "Hopper-v5", "Reacher-v5"):
                if env_id != "Mine-v0" and (script, seed) == ("mine", 4):
                    continue
                final = seed + 10.0 * (script == "mine")
                folder = tmp_path / "runs" / f"{env_id}{seed}{script}"
                fake(folder, env_id, seed, final, f"y = '{script}'\n", script=f"{script}.py")
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| environment | `mine.py` | `ppo_continuous.py` |" in text
    assert "| Mine-v0 | 12.5 ± 1.3 (4) | 2.00 ± 1.00 (3) (older code) |" in text
    ((low, count),) = re.findall(
        r"\| `mine.py` \| `ppo_continuous.py` \| 1.00 \[(0\.\d\d), 1.00\] \| (\d) \|", text
    )
    assert count == "3" and 0.7 < float(low) < 0.8


def test_unequal_seeds_and_what_is_left_out_are_named(tmp_path):
    known = [("Hopper-v5", 3), ("Reacher-v5", 1), ("Walker2d-v5", 3), ("Swimmer-v5", 3)]
    for script in ("ppo_continuous", "sac"):
        for env_id, seeds in known:
            if (script, env_id) == ("sac", "Swimmer-v5"):
                continue
            for seed in range(1, seeds + 1):
                folder = tmp_path / "runs" / f"{env_id}{seed}{script}"
                fake(folder, env_id, seed, 1.0, f"y = '{script}'\n", script=f"{script}.py")
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Numbers of seeds differ: ppo_continuous.py 1 or 3, sac.py 1 or 3." in text
    assert "Left out: Swimmer-v5 (not of sac.py)." in text
    assert re.search(r"\| `sac.py` \| -?\d\.\d\d \| -?\d\.\d\d \| 33% \|", text)


def test_why_an_environment_has_no_scores_is_said(tmp_path):
    """Mine-v0 has no published result; Pendulum-v1 has one, and none of random actions."""
    env_ids = ["Hopper-v5", "Reacher-v5", "Pendulum-v1", "Mine-v0"]
    make(fakes(tmp_path / "runs", ["sac", "ppo_continuous"], env_ids, (1,)), out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Pendulum-v1 (no score of random actions)" in text
    assert "Mine-v0 (no published result)" in text


def test_environments_without_a_table_of_scores_are_named(tmp_path):
    fakes(tmp_path / "runs", ["ppo_continuous"], ["Hopper-v5", "Reacher-v5"], (1,))
    fakes(tmp_path / "runs", ["dqn"], ["Acrobot-v1", "LunarLander-v3", "CartPole-v1"], (1,))
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Over 2 environments (Acrobot-v1, LunarLander-v3)" in text
    (line,) = [line for line in text.splitlines() if line.startswith("In no table")]
    assert line.endswith(": CartPole-v1.")


def test_the_best_published_result_may_have_other_flags(tmp_path):
    """Of a named group, which is of the same environment; its scores would be too high else."""
    run = results.read_run(variant(tmp_path, "gamma 0.9999", 1, 1.0, "Swimmer-v5", gamma=0.9999))
    best = rows.best_published("Swimmer-v5", report.group([run]))
    assert best > rows.best_published("Swimmer-v5", [])
    assert rows.best_published("Ant-v5", report.group([run])) == rows.best_published("Ant-v5", [])


def test_a_script_with_few_environments_does_not_hide_the_others(tmp_path):
    for script, env_ids in (
        ("ppo_continuous", ("Hopper-v5", "Reacher-v5", "Walker2d-v5")),
        ("sac", ("Hopper-v5", "Reacher-v5", "Walker2d-v5")),
        ("ddpg", ("Hopper-v5",)),
    ):
        for env_id in env_ids:
            folder = tmp_path / "runs" / f"{env_id}{script}"
            fake(folder, env_id, 1, 1.0, f"y = '{script}'\n", script=f"{script}.py")
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Over 3 environments" in text and "Left out: ddpg.py (too few environments)." in text


def test_an_environment_of_two_suites_counts_once():
    here = [SimpleNamespace(environment=name) for name in ("ALE/Pong-v5", "Hopper-v5", "Mine-v0")]
    assert rows.families(here) == [[here[0]], [here[1]], [here[2]]]


def variant(folder, name, seed, final, env_id="Hopper-v5", **args):
    """A run of a named group of a suite."""
    title = f"{env_id}, {name}" if name else env_id
    return fake(folder / f"{title}__ppo_continuous__{seed}", env_id, seed, final, **args)


def test_variants_of_a_script_are_compared(tmp_path):
    """Ablations stand in one panel and side by side; another environment stays another one."""
    for seed in (1, 2, 3):
        variant(tmp_path, "", seed, 10.0 + seed)
        variant(tmp_path, "gamma 0.5", seed, 20.0 + seed, gamma=0.5)
        variant(tmp_path, "heavy", seed, 30.0 + seed, env_kwargs={"gravity": 20})
    make(tmp_path, out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| environment | `ppo_continuous.py` | `ppo_continuous.py`, gamma 0.5 |" in text
    assert "| Hopper-v5 | 12.0 ± 1.0 (3) (older code) | 22.0 ± 1.0 (3) (older code) |" in text
    assert (
        "| `ppo_continuous.py` | `ppo_continuous.py`, gamma 0.5 | 0.00 [0.00, 0.50] | 1 |" in text
    )
    assert "| Hopper-v5, heavy (older code) |" in text
    found = rows.group([results.read_run(f) for f in results.run_folders([tmp_path])])
    assert [(row.environment, row.contender) for row in found] == [
        ("Hopper-v5", "ppo_continuous.py"),
        ("Hopper-v5", "ppo_continuous.py, gamma 0.5"),
        ("Hopper-v5, heavy", "ppo_continuous.py"),
    ]


def test_arguments_of_an_environment_make_it_another_one(tmp_path):
    """Named or not; and neither is compared with the one that others published results on."""
    for seed in (1, 2, 3):
        fake(tmp_path / "runs" / f"a{seed}", seed=seed, script="mine.py")
        fake(tmp_path / "runs" / f"b{seed}", seed=seed, final=9e3, env_kwargs={"gravity": 2})
        for name, gamma in (("gamma 0.5", 0.5), ("gamma 0.9", 0.9)):
            kwargs = {"env_kwargs": {"gravity": 3}, "gamma": gamma}
            variant(tmp_path / "runs", name, seed, 1.0, **kwargs)
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert '| Hopper-v5 {"gravity": 2} (older code) | 1k | 9000 ± 0 |' in text
    assert (
        "| environment | `ppo_continuous.py`, gamma 0.5 | `ppo_continuous.py`, gamma 0.9 |" in text
    )
    assert '| Hopper-v5 {"gravity": 3} | 1.00 ± 0.00 (3)' in text
    assert "`mine.py` | `ppo_continuous.py`" not in text


def test_what_is_mixed_or_not_compared_is_named(tmp_path):
    for script, env_id, args in (
        ("mine.py", "Hopper-v5", {}),
        ("mine.py", "Reacher-v5", {"gamma": 0.5}),
        ("yours.py", "Hopper-v5", {"total_timesteps": 500}),
        ("yours.py", "Reacher-v5", {"code": "x = 2\n", "gamma": 0.7}),
        ("mine.py", "Mine-v0", {}),
        ("yours.py", "Mine-v0", {}),
        ("yours.py", "Mine-v0", {"gamma": 0.1}),
        ("mine.py", "Swimmer-v5", {"tau": 0.1}),
    ):
        folder = tmp_path / "runs" / f"{script}{env_id}{len(args)}{args}".replace("/", "")
        fake(folder, env_id, script=script, **args)
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    careful = [line for line in text.splitlines() if line.startswith("Careful")]
    line, of_scores = careful  # above what is compared, and above what is averaged
    assert "mine.py does not have the same gamma on all environments" in line  # tau: not compared
    assert "mine.py does not have the same gamma on all environments" in of_scores
    assert "yours.py does not have the same code, gamma on all environments" in line
    assert "total_timesteps on Hopper-v5: mine.py 1000, yours.py 500" in line
    assert "Not compared, as there are several rows: yours.py on Mine-v0." in text


def test_another_task_is_named(tmp_path):
    """Of the same name, in one script with other arguments of the environment."""
    for script, healthy, sticky in (("mine.py", 1, 0.0), ("yours.py", 9, 0.25)):
        name = f"Ant-v5, hard__{script[:-3]}__1"
        kwargs = {"env_kwargs": {"healthy_reward": healthy}}
        fake(tmp_path / "runs" / name, "Ant-v5", script=script, **kwargs)
        name = f"ALE-Pong-v5__{script[:-3]}__1"
        fake(tmp_path / "runs" / name, "ALE/Pong-v5", script=script, sticky_actions=sticky)
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    said = "env_kwargs on Ant-v5, hard: mine.py {'healthy_reward': 1}, yours.py {'healthy_reward':"
    assert said in text
    assert "sticky_actions on ALE/Pong-v5: mine.py 0.0, yours.py 0.25" in text


def test_published_results_are_of_the_same_task(tmp_path):
    for sticky, found in ((0.0, True), (0.25, False)):
        arguments = {"script": "ppo_atari.py", "sticky_actions": sticky}
        run = results.read_run(fake(tmp_path / str(sticky), "ALE/Pong-v5", **arguments))
        (row,) = report.group([run])
        assert bool(row.published("best")) == found


def test_only_what_is_compared_is_said_to_differ(tmp_path):
    fakes(tmp_path / "runs", ["mine", "yours"], ["Hopper-v5"], (1,))
    fake(tmp_path / "runs" / "more", "Mine-v0", script="alone.py", total_timesteps=500)
    fake(tmp_path / "runs" / "most", "Yours-v0", script="alone.py", gamma=0.1)
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "beats one of Y" in text and "Careful" not in text


def test_only_libraries_that_both_have_loaded_can_differ(tmp_path):
    for script, versions in (
        ("mine.py", {"torch": "2.12.0", "mujoco": "4.0.0"}),
        ("yours.py", {"torch": "2.13.0"}),
    ):
        folder = fake(tmp_path / "runs" / script, script=script)
        about = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(about | {"versions": versions}))
    make(tmp_path / "runs", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "torch on Hopper-v5: mine.py 2.12.0, yours.py 2.13.0" in text
    assert "mujoco on" not in text


def test_of_two_runs_of_a_seed_the_longer_one_counts(tmp_path):
    """But runs that differ in a library's version, or in their group's name, are two runs."""
    fake(tmp_path / "runs" / "a", final=None)
    fake(tmp_path / "runs" / "b", final=300.0)
    done = make(tmp_path / "runs", out=tmp_path / "out", code=1)
    assert f"{tmp_path / 'runs' / 'a'}: the same run as {tmp_path / 'runs' / 'b'}" in done.stderr
    assert "| 300 |" in rows_of((tmp_path / "out" / "report.md").read_text())[0]
    about = json.loads((tmp_path / "runs" / "b" / "args.json").read_text())
    about["versions"] = {"torch": "3.0.0"}
    (tmp_path / "runs" / "b" / "args.json").write_text(json.dumps(about))
    variant(tmp_path / "runs", "my name", 1, 7.0)
    make(tmp_path / "runs", out=tmp_path / "out")
    assert len(rows_of((tmp_path / "out" / "report.md").read_text())) == 6


def test_a_script_that_somebody_is_editing_does_not_stop_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    (tmp_path / "ppo_continuous.py").write_text("def broken(:\n")
    (row,) = rows.group([results.read_run(fake(tmp_path / "run"))])
    assert row.older


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_tables_as_csv(tmp_path):
    """The same numbers, unrounded."""
    for seed, final in enumerate([100.123, 200, 301], 1):
        fake(tmp_path / "runs" / str(seed), seed=seed, final=final)
        fake(tmp_path / "runs" / f"mine{seed}", seed=seed, final=0.0, script="mine.py")
    fake(tmp_path / "runs" / "4", seed=4, final=None)
    make(tmp_path / "runs", out=tmp_path / "out")
    mine, ours = read_csv(tmp_path / "out" / "results.csv")
    assert mine["script"] == "mine.py"
    assert mine["best_published"] == mine["best_published_final"] == ""
    finals = np.array([100.123, 200, 301])
    low, high = stats.mean_interval(finals)
    expected = {"mean": finals.mean(), "std": finals.std(ddof=1), "low": low, "high": high}
    assert {key: float(ours[key]) for key in expected} == pytest.approx(expected)
    assert (ours["seeds"], ours["runs"]) == ("3", "4")
    runs = [run for run in read_csv(tmp_path / "out" / "runs.csv") if run["script"] != "mine.py"]
    assert [run["final_return"] for run in runs] == ["100.123", "200", "301", ""]
    assert runs[3]["state"] == "unfinished at step 500"
    (pair,) = read_csv(tmp_path / "out" / "pairs.csv")
    assert (pair["x"], pair["y"], float(pair["probability"])) == ("mine.py", "ppo_continuous.py", 0)


# ---- Pictures ------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Draws the curves of run folders. Returns the figure, which nothing closes."""
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: kept.append(figure))

    def draw(folder, **options):
        found = rows.group([results.read_run(f) for f in results.run_folders([folder])])
        plots.draw_curves(found, folder / "unused.png", **options)
        kept[-1].canvas.draw()
        return kept[-1]

    yield draw
    for figure in kept:
        plots.pyplot().close(figure)


def fakes(folder, scripts, env_ids, seeds=(1, 2, 3)):
    for script, env_id, seed in itertools.product(scripts, env_ids, seeds):
        name = folder / f"{script}{env_id}{seed}"
        fake(name, env_id, seed, code=f"y = '{script}'\n", script=f"{script}.py")
    return folder


@pytest.mark.parametrize(("panels", "scripts"), [(1, 1), (1, 8), (2, 2), (4, 8), (9, 1), (9, 8)])
def test_every_name_is_in_the_picture(tmp_path, drawn, panels, scripts):
    names = [f"a_script_with_a_long_name_{n}" for n in range(scripts)]
    env_ids = [f"Environment{n}-v0" for n in range(panels)]
    figure = drawn(fakes(tmp_path, names, env_ids, seeds=(1,)))
    (legend,), bounds = figure.legends, figure.bbox
    texts = [*legend.get_texts(), *figure.texts]
    labels = [text.get_text().removesuffix(" (older code)") for text in legend.get_texts()]
    assert labels == [f"{name}.py" for name in names]
    boxes = [text.get_window_extent() for text in texts]
    assert all(bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and box.y0 >= 0 for box in boxes)
    lowest = min(axes.get_tightbbox().y0 for axes in figure.axes if axes.axison)
    assert max(box.y1 for box in boxes) <= lowest
    styles = {(h.get_color(), str(h.get_linestyle())) for h in legend.legend_handles}
    assert len(styles) == scripts


def test_a_picture_says_how_many_seeds(tmp_path, drawn):
    fakes(tmp_path, ["one"], ["Mine-v0"], seeds=(1, 2, 3))
    fakes(tmp_path, ["two"], ["Mine-v0"], seeds=(1,))
    fakes(tmp_path, ["one"], ["Yours-v0"], seeds=(1, 2))
    titles = [axes.get_title() for axes in drawn(tmp_path).axes]
    assert titles == ["Mine-v0 (n = 1 to 3)", "Yours-v0 (n = 2)"]


def test_a_picture_says_of_how_many_curves_its_mean_is(tmp_path, drawn):
    """Of three finished runs, two were evaluated on the way."""
    for seed in (1, 2, 3):
        path = fake(tmp_path / f"{seed}", seed=seed) / "metrics.jsonl"
        early = {"eval/episodic_return": 1.0, "global_step": 100, "wall_time": 1.0}
        if seed < 3:
            path.write_text(json.dumps(early) + "\n" + path.read_text())
    (axes,) = drawn(tmp_path, returns="evaluation").axes
    assert "(n = 2" in axes.get_title()
    (axes,) = drawn(tmp_path).axes
    assert "(n = 3" in axes.get_title()


def test_one_line_for_the_best_published(tmp_path, drawn):
    figure = drawn(fakes(tmp_path, ["sac", "ddpg"], ["Swimmer-v5"], seeds=(1,)))
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    heights = [line.get_ydata()[0] for line in lines]
    assert heights == [rows.best_published("Swimmer-v5", [])]


def test_a_published_result_far_above_is_written(tmp_path, drawn):
    """Its line would leave no room for the curves, which begin at 10 and end at 100."""
    figure = drawn(fakes(tmp_path, ["sac", "ddpg"], ["Hopper-v5"], seeds=(1,)))
    (axes,), best = figure.axes, rows.best_published("Hopper-v5", [])
    assert best > 1000 and axes.get_ylim()[1] < 120
    assert f"best published of any algorithm: {best:.4g}" in [x.get_text() for x in axes.texts]
    (legend,) = figure.legends
    assert "published" not in "".join(text.get_text() for text in legend.get_texts())


def test_axes_and_smoothing_of_curves(tmp_path, drawn):
    """By hand: returns of 10, 20, ... 100 at steps 100 to 1000, an evaluation of 100 at the end."""
    folder = fake(tmp_path / "run", total_timesteps=1000) / "metrics.jsonl"
    lines = [json.loads(line) for line in folder.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["wall_time"] = 120.0 * number
    lines[4] |= {"eval/episodic_return": 70.0, "eval/episodes": 2}
    folder.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def curve(**options):
        figure = drawn(tmp_path, **options)
        return figure.axes[0].lines[0].get_xydata().T, figure

    (x, y), _ = curve()
    assert np.allclose(x * 1e6, np.arange(100, 1001, 100)) and np.allclose(y, x * 1e5)
    (x, y), figure = curve(smooth=3)
    assert np.allclose(y, [10, 15, 20, 30, 40, 50, 60, 70, 80, 90])
    assert "mean of the 3 up to it" in figure.texts[-1].get_text()
    (x, y), figure = curve(axis="time")
    assert np.allclose(x, 2 * np.arange(10)) and figure.axes[0].get_xlabel() == "minutes"
    (x, y), figure = curve(returns="evaluation")
    assert np.allclose(x, [500e-6, 1000e-6]) and np.allclose(y, [70, 100])
    assert figure.axes[0].get_ylabel() == "evaluated return"


def test_an_axis_is_cut_only_if_it_says_so(tmp_path, drawn):
    low = fake(tmp_path / "low") / "metrics.jsonl"
    low.write_text(low.read_text().replace('return": 10.0', 'return": -5000.0'))
    fake(tmp_path / "flat", "Mine-v0")
    figure = drawn(tmp_path)
    for axes in figure.axes:
        cut = axes.get_ylim()[0] > min(min(line.get_ydata()) for line in axes.lines)
        assert cut == ("cut" in axes.get_title()) == ("Hopper" in axes.get_title())
    assert "Cut: " in figure.texts[-1].get_text()


def test_rounding_is_no_range_of_the_axis(tmp_path):
    """All returns are 1000 but for the first ones, and the last digits of a mean."""
    steps = np.arange(1.0, 101)
    curve = np.array([steps, np.where(steps > 5, 1000 + 1e-13 * (steps % 2), 20)])
    low, high = plots.interesting([curve], [1000.0])
    assert 900 < low < 1000 - 1 and 1000 + 1 < high < 1100


def test_profiles_fit_their_scores(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: kept.append(figure))
    fakes(tmp_path, ["sac", "ddpg"], ["Hopper-v5", "Walker2d-v5", "Reacher-v5"])
    found = rows.group([results.read_run(f) for f in results.run_folders([tmp_path])])
    plots.draw_profiles([found], tmp_path / "unused.png")
    scores = [x for envs in rows.normalised(found).values() for part in envs.values() for x in part]
    low, high = kept[0].axes[0].get_xlim()
    assert 0 <= min(0, *scores) - low < 0.2 and 0 <= high - max(1, *scores) < 0.2
    plots.pyplot().close(kept[0])


def test_titles_of_profiles_are_in_the_picture(tmp_path, monkeypatch):
    kept, comparable = [], plots.comparable
    monkeypatch.setattr(plots, "save", lambda figure, *_: kept.append(figure))
    fakes(tmp_path, ["sac", "ddpg"], ["Hopper-v5", "Walker2d-v5"])
    found = rows.group([results.read_run(f) for f in results.run_folders([tmp_path])])

    def long_names(rows):
        scores, shared = comparable(rows)
        long = {name: f"{name}, without the forces of contacts" for name in shared}
        scores = {x: {long[name]: envs[name] for name in shared} for x, envs in scores.items()}
        return scores, [*long.values()]

    monkeypatch.setattr(plots, "comparable", long_names)
    plots.draw_profiles([found, found], tmp_path / "unused.png")
    (figure,) = kept
    figure.canvas.draw()
    left, right = (panel.title.get_window_extent() for panel in figure.axes)
    assert figure.bbox.x0 <= left.x0 < left.x1 < right.x0 < right.x1 <= figure.bbox.x1
    assert right.y1 <= figure.bbox.y1
    label = figure.axes[0].yaxis.label.get_window_extent()
    assert not label.overlaps(left) and label.x0 >= 0
    plots.pyplot().close(figure)


def test_pictures_come_as_png_and_pdf(tmp_path):
    fakes(tmp_path / "runs", ["sac", "ddpg"], ["Hopper-v5", "Walker2d-v5"], seeds=(1,))
    words = ["--xaxis", "time", "--smooth", "5", "--returns", "training"]
    make(tmp_path / "runs", *words, out=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"curves.png", "curves.pdf", "profiles.png", "profiles.pdf", "scores.csv"}


# ---- The committed results -----------------------------------------------------------------------


@pytest.fixture
def collected(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    for seed in (1, 2):
        results.collect(fake(tmp_path / f"run{seed}", seed=seed, final=100.0 * seed))
    return tmp_path


def test_collecting_is_reading(collected):
    runs = results.load("ppo_continuous")
    for seed, run in enumerate(runs, 1):
        fresh = results.read_run(collected / f"run{seed}")
        shown = {key: fresh[key] for key in fresh.keys() - {"minutes", "evaluations"}}
        assert {key: run[key] for key in shown} == shown
        assert run["eval"]["episodic_return"] == 100 * seed


def test_a_committed_run_of_other_arguments_is_not_replaced(collected):
    meta = collected / "results" / "ppo_continuous" / "Hopper-v5" / "meta.json"
    before = meta.read_text()
    with pytest.raises(ValueError, match=r"another run of this seed: gamma 0\.99 there, 0\.5 here"):
        results.collect(fake(collected / "other", seed=1, gamma=0.5))
    assert meta.read_text() == before
    results.collect(fake(collected / "again", seed=1, final=7.0, code="x = 2\n"))
    assert json.loads(meta.read_text())["1"]["eval"]["episodic_return"] == 7


def test_a_finished_run_is_not_replaced_by_an_unfinished_one(collected, monkeypatch, capsys):
    meta = collected / "results" / "ppo_continuous" / "Hopper-v5" / "meta.json"
    before = meta.read_text()
    with pytest.raises(ValueError, match="a finished run of this seed, this one is not"):
        results.collect(fake(collected / "again", seed=1, final=None))
    assert meta.read_text() == before


def test_a_run_of_todays_code_is_not_replaced_by_an_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    today = (ROOT / "sac.py").read_text()
    fake(tmp_path / "new", code=today, script="sac.py", final=100.0)
    fake(tmp_path / "old", code="x = 1\n", script="sac.py", final=5.0)
    meta = results.collect(tmp_path / "old") / "meta.json"
    results.collect(tmp_path / "new")
    with pytest.raises(ValueError, match=r"a run of today's sac\.py, this one not"):
        results.collect(tmp_path / "old")
    assert json.loads(meta.read_text())["1"]["eval"]["episodic_return"] == 100


def test_one_bad_folder_does_not_keep_others_from_being_collected(tmp_path):
    """With the module's command line, on a copy."""
    shutil.copytree(
        ROOT / "benchmark", tmp_path / "benchmark", ignore=shutil.ignore_patterns("results")
    )
    (fake(tmp_path / "runs" / "a", seed=1) / "args.json").write_text("{")
    fake(tmp_path / "runs" / "b", seed=2)
    fake(tmp_path / "runs" / "c.old-1", seed=3)
    words = [sys.executable, "-m", "benchmark.results"]
    extra = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environ()}
    done = subprocess.run([*words, "runs"], **extra)
    assert done.returncode == 1 and "not collected" in done.stderr
    found = tmp_path / "benchmark" / "results" / "ppo_continuous" / "Hopper-v5" / "meta.json"
    assert json.loads(found.read_text()).keys() == {"2"}
    assert subprocess.run(words, **extra).returncode == 2
    assert subprocess.run([*words, "nowhere"], **extra).returncode == 2


def test_older_code_is_marked(collected, monkeypatch):
    (row,) = rows.group(results.load("ppo_continuous"))
    assert "(older code)" in report.table([row], [])
    monkeypatch.setattr(rows, "code_hash", lambda path: row.code)
    assert "older code" not in report.table([row], [])


def test_the_readme_folds_sources_and_compares_from_three_seeds_on(collected, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", collected / "results")
    for seed in (1, 2, 3):
        results.collect(fake(collected / f"trpo{seed}", seed=seed, script="trpo.py"))
    text = report.readme_with_results()
    text = text[text.index(report.BEGIN) : text.index(report.END)]
    assert "Not compared, with fewer than 3 seeds: `ppo_continuous.py` on Hopper-v5.\n" in text
    assert "side by side" not in text
    source = text.index("1. Hopper")
    folded = text.rindex("<details>", 0, source)
    assert source < text.index("</details>", folded) and "<sup>1</sup> |" in text[:folded]
    results.collect(fake(collected / "run3", seed=3))
    text = report.readme_with_results()
    assert "Not compared" not in text and "side by side:" not in text  # with one environment
    fakes(collected / "more", ["ppo_continuous", "trpo"], ["Walker2d-v5"])
    for folder in (collected / "more").iterdir():
        results.collect(folder)
    text = report.readme_with_results()
    assert "side by side:" in text and "Not compared" not in text
    assert "Not in the numbers" not in text
    results.collect(fake(collected / "run4", seed=4, final=None))
    text = report.readme_with_results()
    assert "Not in the numbers:\n\n- ppo_continuous.py Hopper-v5" in text
    assert " seed 4: unfinished at step " in text


def test_rows_have_the_flags_of_their_suite():
    """What README says of its tables; a row of other flags is not the suite's."""
    suites = [sweep.read_suite(path.stem) for path in sorted(report.SUITES.glob("*.toml"))]
    made = {}
    for row in (row for of in report.collected().values() for row in of if not row.older):
        made.setdefault((row.script, row.title), []).append(row.arguments)
    for part in (part for suite in suites for part in suite["runs"]):
        for script, env_id in itertools.product(part["scripts"], part["env_ids"]):
            found = made.get((script, sweep.title(env_id, part["name"])), [])
            ours = rows.same_for_all_seeds({"args": sweep.resolve(script, env_id, part["args"])})
            total = ours["total_timesteps"]
            found = [x for x in found if x["total_timesteps"] == total]
            for name in ours if found else ():
                assert ours[name] in [x.get(name) for x in found], f"{script} {env_id}: {name}"


def test_every_suite_with_results_is_in_the_readme():
    """Its commands make all rows again."""
    text = (ROOT / "README.md").read_text()
    done = {(row.script, row.title) for of in report.collected().values() for row in of}
    for path in sorted(report.SUITES.glob("*.toml")):
        for part in sweep.read_suite(path.stem)["runs"] if path.stem != "smoke" else []:
            titles = [sweep.title(env_id, part["name"]) for env_id in part["env_ids"]]
            if path.stem != "atari" and set(itertools.product(part["scripts"], titles)) & done:
                assert f"benchmark.sweep {path.stem}" in text and f"runs/{path.stem}" in text


def test_every_script_is_known():
    """Its published results would be left out without a word."""
    assert set(OURS) == rows.ALGORITHMS.keys()
    assert set(rows.ALGORITHMS.values()) <= {algorithm for algorithm, *_ in results.references()}


def test_results_of_a_users_script_stand_in_the_readme(collected, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", collected / "results")
    results.collect(fake(collected / "mine", script="my_algo.py"))
    assert list(report.collected()) == ["ppo_continuous", "my_algo"]
    assert "| `my_algo.py` | steps |" in report.readme_with_results()


def test_results_of_another_script_are_refused(collected):
    meta = collected / "results" / "ppo_continuous" / "Hopper-v5" / "meta.json"
    meta.write_text(meta.read_text().replace("ppo_continuous.py", "sac.py"))
    with pytest.raises(ValueError, match=r"a run of sac\.py in the folder of ppo_continuous\.py"):
        results.load("ppo_continuous")


@pytest.mark.parametrize("what", ["curve gone", "meta torn", "curve torn"])
def test_damaged_results_are_named(collected, what):
    folder = collected / "results" / "ppo_continuous" / "Hopper-v5"
    if what == "curve gone":
        (folder / "2.csv").unlink()
    elif what == "curve torn":
        (folder / "2.csv").write_text("global_step,episodic_return\n12")
    else:
        (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"Hopper-v5.meta\.json"):
        results.load("ppo_continuous")


def test_pictures_know_their_data(collected):
    here = rows.group(results.load("ppo_continuous"))
    plots.draw_curves(here, collected / "a.png")
    Image = pytest.importorskip("PIL.Image")
    before = Image.open(collected / "a.png").info["Data"]
    assert before == plots.data_hash(here)
    here[0].runs[0]["curve"][0] = (10, 11.0)
    assert before != plots.data_hash(here)
