"""The measurement behind the picture of reinforce.py's baselines."""

import csv

from PIL import Image

from benchmark import baselines


def test_the_committed_picture_shows_the_committed_numbers():
    assert Image.open(baselines.PNG).info["Data"] == baselines.data_hash()


def test_every_estimator_is_measured_and_drawn(tmp_path, monkeypatch):
    """On a policy that has hardly learned: the weighting by the whole return is the worst."""
    monkeypatch.setattr(baselines, "STAGES", {"CartPole-v1": [200]})
    monkeypatch.setattr(baselines, "EPISODES", 64)
    monkeypatch.setattr(baselines, "CSV", tmp_path / "baselines.csv")
    baselines.measure()
    baselines.draw(tmp_path / "baselines.png")
    rows = list(csv.DictReader((tmp_path / "baselines.csv").read_text().splitlines()))
    assert [row["estimator"] for row in rows] == list(baselines.ESTIMATORS)
    variance = {row["estimator"]: float(row["variance"]) for row in rows}
    worst = variance.pop("whole return, no baseline")
    assert all(0 < x < worst for x in variance.values())
    assert Image.open(tmp_path / "baselines.png").info["Data"] == baselines.data_hash()
