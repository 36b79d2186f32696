"""Training speed beside a peer's: same work, same machine, one thread, alternating runs.

    python -m benchmark.speed

Prints a Markdown table: our steps/s, the peer's, and the ratio, each the median over the pairs.
The first iterations (imports, compilation, warm-up) are left out on both sides. Nothing else should
run on the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV_ID, TOTAL, WARM_UP = "HalfCheetah-v5", 81_920, 20_480
PPO = f"""--env-id {ENV_ID} --total-timesteps {TOTAL} --num-envs 8 --num-steps 256
--update-epochs 10 --num-minibatches 32 --no-recompute-advantages --target-kl None
--checkpoint-frequency 0 --eval-episodes 1"""
ROWS = {  # name -> (script, its arguments, the peer's script)
    "PPO": ("ppo_continuous.py", PPO, "sb3_ppo.py"),
    "PPO, --compile": ("ppo_continuous.py", PPO + " --compile", "sb3_ppo.py"),
}


def call(*command: str) -> str:
    """Standard output of a process with one thread."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def our_speed(script: str, arguments: str) -> float:
    """Steps per second after the warm-up, from the run's own metrics; logging is in it."""
    with tempfile.TemporaryDirectory() as folder:
        call(sys.executable, script, *arguments.split(), "--run-dir", f"{folder}/run")
        text = Path(folder, "run", "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    first = next(line for line in lines if line["global_step"] >= WARM_UP)
    last = lines[-1]  # its time is the last iteration's, before the evaluation
    seconds = last["wall_time"] - first["wall_time"]
    return (last["global_step"] - first["global_step"]) / seconds


def peer_speed(peer: str) -> float:
    return float(call(sys.executable, f"benchmark/peers/{peer}", ENV_ID, str(TOTAL), str(WARM_UP)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="alternating runs of each side")
    pairs = parser.parse_args().pairs
    print(f"{ENV_ID}, 8 environments x 256 steps, 10 epochs, minibatches of 64, 64-64 tanh")
    print("networks, observations and rewards normalised, advantages computed once a rollout,")
    print(f"one thread, median of {pairs} alternating pairs.\n")
    print("| | our steps/s | Stable-Baselines3 steps/s | ratio (smallest to largest) |")
    print("|---|---|---|---|")
    for name, (script, arguments, peer) in ROWS.items():
        measured = [(our_speed(script, arguments), peer_speed(peer)) for _ in range(pairs)]
        ratios = sorted(ours / theirs for ours, theirs in measured)
        ours, theirs = (statistics.median(side) for side in zip(*measured, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
