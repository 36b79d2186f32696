"""The sweep on a real Ray cluster of two nodes on this machine; skipped where Ray is missing."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_sweep import (
    assert_same_runs,
    begin,
    environment,
    folders,
    starts,
    step,
    suite,
    sweep,
    wait_for,
)

pytest.importorskip("ray")

JOBS = int(os.environ.get("JOBS", 2))  # more for the full trial, as in test_sweep.py
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def call(*words, **extra):
    done = subprocess.run(
        [*RAY, *words], env=environment(**extra), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def raylets(folder):
    """Process ids of the nodes' daemons, oldest first."""
    found = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True).stdout
    lines = [line.split(None, 1) for line in found.splitlines()]
    return sorted(int(pid) for pid, text in lines if "/raylet/raylet " in text and folder in text)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with one core each. Yields (address, environment variables, folder)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # paths of sockets have 107 characters
        extra = {"HOME": short, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        port = 20_000 + os.getpid() % 20_000
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}/r"]
        call("get-auth-token", "--generate", **extra)
        for words in (head, [f"--address=127.0.0.1:{port}"]):
            call("start", *words, "--num-cpus=1", "--disable-usage-stats", **extra)
        try:
            yield f"127.0.0.1:{port}", extra, short
        finally:
            found = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True)
            for line in found.stdout.splitlines():
                if re.search(rf"{short}|:{port}", line) and "ray" in line:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(line.split()[0]), signal.SIGKILL)


def test_a_signal_stops_the_jobs_of_a_cluster(tmp_path, cluster):
    address, extra, _ = cluster
    path, root = suite(tmp_path, steps=200_000), tmp_path / "r"
    words = ["--engine", "ray", "--ray-address", address]
    running = begin(path, "--run-root", root, *words, **extra)
    wait_for(lambda: len(folders(root)) == 2 and all(map(step, folders(root))))
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=100)
    assert running.returncode == 143, output
    assert all(Path(folder, "checkpoint.pt").exists() for folder in folders(root))


def test_a_wrong_address_is_one_line(tmp_path):
    words = ["--engine", "ray", "--ray-address", "127.0.0.1:1", "--run-root", tmp_path / "r"]
    done = sweep(suite(tmp_path), *words, code=2, RAY_AUTH_MODE="disabled", HOME=str(tmp_path))
    assert "error: --ray-address 127.0.0.1:1" in done.stderr
    assert not folders(tmp_path / "r")


@pytest.mark.parametrize("given", [True, False])
def test_a_head_that_does_not_answer_is_one_line(tmp_path, given):
    """A port that takes connections and says nothing, as of a head that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = "127.0.0.1:{1}".format(*deaf.getsockname())
        words = [suite(tmp_path), "--engine", "ray", "--run-root", tmp_path / "r"]
        words += ["--ray-address", address] if given else []
        extra = {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
        begun = time.time()
        done = sweep(*words, code=2, **extra, **({} if given else {"RAY_ADDRESS": address}))
    assert time.time() - begun < 40  # 15 s, and what importing takes on a busy machine
    assert f"error: --ray-address {address}: no answer" in done.stderr


def test_a_demand_that_no_node_meets_is_one_line(tmp_path, cluster):
    address, extra, _ = cluster
    words = ["--engine", "ray", "--ray-address", address, "--gpus-per-job", 1]
    done = sweep(suite(tmp_path), *words, "--run-root", tmp_path / "r", code=2, **extra)
    said = "error: --cpus-per-job 1 --gpus-per-job 1: no node has as many"
    assert said in done.stderr and "1 and 0; 1 and 0" in done.stderr


def test_a_node_is_killed_and_every_job_completes(tmp_path, cluster):
    """Its jobs go on elsewhere, from their checkpoints; all equal an undisturbed sweep.

    The last test of the cluster, as it leaves only one node of it."""
    address, extra, short = cluster
    more = "--checkpoint-frequency 2048"
    path = suite(tmp_path, seeds=range(JOBS), steps=40_960, more=more)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    sweep(path, "--run-root", calm)
    nodes = raylets(short)
    assert len(nodes) == 2
    running = begin(path, "--run-root", rough, "--engine", "ray", "--ray-address", address, **extra)
    # Two jobs at work, not merely begun, so each of the two cores has one; and with far to go, as
    # it takes a node's workers a while to notice that it is gone.
    wait_for(lambda: sum(0 < step(folder) < 10_000 for folder in folders(rough)) == 2)
    os.kill(nodes[1], signal.SIGKILL)
    output, _ = running.communicate(timeout=900)
    assert running.returncode == 0, output
    assert f"{JOBS} of {JOBS} complete" in output
    assert sum(starts(rough).values()) > JOBS, "the killed node ran nothing"
    assert_same_runs(calm, rough)
