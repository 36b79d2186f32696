"""From run folders to committed results: complete runs only, nothing lost in thinning."""

import json
import sys

from conftest import ROOT, run

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
