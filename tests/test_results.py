"""From run folders to committed results: complete runs only, nothing lost in thinning."""

import json
import sys

from conftest import OURS, ROOT, run
from test_report import fake

sys.path.insert(0, str(ROOT))
from benchmark import results


def test_a_real_run_is_read(script, tmp_path):
    run(script, "--run-dir", tmp_path / "r", "--total-timesteps", 2048)
    found = results.read_run(tmp_path / "r")
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["eval"]["episodic_return"] == last["eval/episodic_return"]
    assert found["code_hash"] == results.code_hash(ROOT / f"{script}.py")
    assert found["curve"] and found["curve"][-1][0] <= 2048
    assert "run_dir" not in found["args"] and found["steps"] == last["global_step"]
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "r" / "metrics.jsonl").write_text("\n".join(lines[:-1]))
    assert results.read_run(tmp_path / "r")["eval"] is None


def test_thinning_weighs_by_episodes():
    lines = [
        {"global_step": step, "charts/episodic_return": value, "charts/episodes": count}
        | {"wall_time": 6.0 * step}
        for step, value, count in [(1, 0.0, 3), (10, 4.0, 1), (11, 7.0, 1), (1000, 9.0, 2)]
    ]
    assert results.thin(lines, 1000) == [(10, 1.0, 1.0), (20, 7.0, 1.1), (1000, 9.0, 100.0)]


def test_small_returns_are_not_rounded_away():
    """An environment of a user may pay thousandths."""
    line = {"charts/episodes": 3, "charts/episodic_return": 0.00123456789, "wall_time": 60.0}
    assert results.thin([line | {"global_step": 100}], 100) == [(100, 0.00123457, 1.0)]


def test_a_script_saved_on_windows(tmp_path):
    """With a mark of its encoding at the beginning, which is no part of the code."""
    (tmp_path / "plain.py").write_text("x = 1\n", "utf-8")
    (tmp_path / "marked.py").write_text("x = 1\n", "utf-8-sig")
    codes = {results.code_hash(tmp_path / name) for name in ("plain.py", "marked.py")}
    assert len(codes) == 1 and (tmp_path / "marked.py").read_bytes()[:1] == b"\xef"


def test_the_hash_is_the_same_in_every_version_of_python():
    """Trees of 3.12 have a new field, for type parameters; 3.13 prints no empty fields."""
    text = (
        "class A(B):\n    x: int = None\n\n    def f(self, *a, k=1.5):\n        return f'{a!r}'\n"
    )
    assert results.hash_of_text(text).startswith("7a1d2fdcf547")


def test_only_todays_scripts_stand_with_runs_of_other_code():
    """Once a script changes again, its lines have to go."""
    today = {results.code_hash(ROOT / f"{name}.py") for name in OURS}
    assert set(results.SAME.values()) <= today and not set(results.SAME) & today


def test_runs_of_other_code_that_makes_the_same_numbers(tmp_path, monkeypatch):
    """Otherwise they would have a row of their own beside the runs that they equal."""
    old, new = "x = 1\n", "x = 2\n"
    before, today = results.hash_of_tree(old), results.hash_of_tree(new)
    monkeypatch.setattr(results, "SAME", {before: today})
    folders = [fake(tmp_path / "a", seed=1, code=old), fake(tmp_path / "b", seed=2, code=new)]
    assert {results.read_run(folder)["code_hash"] for folder in folders} == {today}


def test_the_hash_is_of_the_algorithm(script, tmp_path):
    """Not of prose, messages, logs; of what acts, learns, steps, seeds and evaluates."""
    text = (ROOT / f"{script}.py").read_text()

    def hash_with(old, new):
        assert text.count(old) >= 1, old
        (tmp_path / "changed.py").write_text(text.replace(old, new))
        return results.code_hash(tmp_path / "changed.py")

    same = hash_with("at least 1", "at least one")
    assert same == results.code_hash(ROOT / f"{script}.py")
    for old, new in {
        "complete in this one file": "whole in this file",
        "Discount factor per step;": "Gamma;",
        "error: --capture-video": "--capture-video",
        'console="off"': 'console="wrap"',
        "no episode yet": "none yet",
        "needs": "wants",
    }.items():
        assert hash_with(old, new) == same, old
    for old, new in {
        "gamma: float = 0.99": "gamma: float = 0.98",
        "generate_state(1)[0]": "generate_state(2)[0]",
        "np.random.PCG64": "np.random.SFC64",
        "returns[-1] += float(reward)": "returns[-1] += 2 * float(reward)",
        "LONGEST_EPISODE = 50_000": "LONGEST_EPISODE = 10_000",
        "optimizer.step()": "optimizer.step() or optimizer.step()",
    }.items():
        assert hash_with(old, new) != same, old
    main = 'if __name__ == "__main__":'
    for added in (
        f"def my_helper():\n    return 1\n\n\n{main}",  # wherever somebody puts it
        f"torch.set_default_dtype(torch.float64)\n\n\n{main}",
        f"{main}\n    print(1)",
    ):
        assert hash_with(main, added) != same, added
    assert hash_with("import hashlib\n", "import hashlib\ntorch.manual_seed(1)\n") != same
