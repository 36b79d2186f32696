"""From run folders to committed results: complete runs only, nothing lost in thinning."""

import json
import sys

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT))
from benchmark import report, results


def test_collecting_a_run(script, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    run(script, "--run-dir", tmp_path / "r", "--total-timesteps", 2048)
    results.collect(tmp_path / "r")
    loaded = results.load(script)["Pendulum-v1"][1]
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert loaded["eval"]["episodic_return"] == last["eval/episodic_return"]
    assert loaded["code_hash"] == results.code_hash(ROOT / f"{script}.py")
    assert loaded["curve"] and loaded["curve"][-1][0] <= 2048
    assert "run_dir" not in loaded["args"]


def test_an_unfinished_run_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    run(script, "--run-dir", tmp_path / "r")
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "r" / "metrics.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="final evaluation"):
        results.collect(tmp_path / "r")


def test_thinning_weighs_by_episodes():
    lines = [
        {"global_step": step, "charts/episodic_return": value, "charts/episodes": count}
        for step, value, count in [(1, 0.0, 3), (10, 4.0, 1), (11, 7.0, 1), (1000, 9.0, 2)]
    ]
    assert results.thin(lines, 1000) == [(10, 1.0), (20, 7.0), (1000, 9.0)]


def test_the_hash_ignores_prose_and_sees_code(tmp_path):
    texts = ['"""Doc."""\nx = 1  # why\n', '"""Other."""\nx = 1\n', '"""Doc."""\nx = 2\n']
    paths = [tmp_path / f"{n}.py" for n in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    first, prose, code = map(results.code_hash, paths)
    assert first == prose != code


def test_older_code_is_marked(monkeypatch):
    for script in report.ALGORITHMS:
        if results.load(script):
            monkeypatch.setattr(report, "code_hash", lambda path: "newer")
            assert "(older code)" in report.table(script)
