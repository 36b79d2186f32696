"""--track needs neither account nor network, never asks, and writes only into the run folder."""

import os
import pty
import subprocess

import pytest
import wandb_file
from conftest import ONE, command, environ, metrics, run_process

pytest.importorskip("wandb")


def assert_same_numbers(folder, history):
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]
    assert rows == metrics(folder)


def test_offline_run_holds_the_same_numbers(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "a run"
    home.mkdir()
    done = run_process(ONE, "--track", "--run-dir", folder, HOME=str(home), cwd=home)
    assert f"wandb sync '{folder}/wandb'/offline-run-*" in done.stderr
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    config, history = wandb_file.read(path)
    assert config["total_timesteps"] == 512 and config["gamma"] is not None
    assert_same_numbers(folder, history)
    assert not list(home.rglob("*"))


def test_no_key_on_a_terminal_does_not_ask(tmp_path):
    """wandb would prompt for ever here."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(ONE, "--track", "--run-dir", tmp_path / "r"),
        stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environ(HOME=str(tmp_path)),
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    os.close(leader)
    assert process.returncode == 0 and out.startswith("eval "), err


def test_a_key_without_a_network_logs_offline(tmp_path):
    nowhere = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_process(ONE, "--track", "--run-dir", tmp_path / "r", HOME=str(tmp_path), **nowhere)
    assert "wandb sync" in done.stderr and "Traceback" not in done.stderr
    (path,) = (tmp_path / "r").glob("wandb/offline-run-*/run-*.wandb")
    assert_same_numbers(tmp_path / "r", wandb_file.read(path)[1])


def test_a_resumed_run_keeps_its_identity(tmp_path):
    folder = tmp_path / "r"
    run_process(ONE, "--track", "--run-dir", folder)
    run_process(ONE, "--track", "--resume", folder, "--total-timesteps", 1024, quick=False)
    names = {path.name for path in folder.glob("wandb/offline-run-*/run-*.wandb")}
    assert len(names) == 1
