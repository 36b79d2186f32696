"""Training speed: beside a peer's, against --num-envs, and with several jobs at once.

    python -m benchmark.speed                 all three, as Markdown tables
    python -m benchmark.speed peers envs workers

Beside a peer: same work, same machine, one thread, alternating runs; the median over the pairs.
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


SCALING = {  # script -> its arguments in the tables about scaling
    "ppo_continuous.py": f"--env-id {ENV_ID} --total-timesteps {TOTAL} --checkpoint-frequency 0"
    " --eval-episodes 1",
}
NUM_ENVS = (1, 2, 4, 8, 16, 32, 64)


def start(*command: str) -> subprocess.Popen:
    """A process with one thread."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=one_thread, cwd=ROOT, **pipes)


def finish(process: subprocess.Popen) -> str:
    """Its standard output."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} failed:\n{errors}")
    return output


def our_speeds(script: str, arguments: str, copies: int = 1) -> list[float]:
    """Steps per second after the warm-up, from the runs' own metrics; logging is in it."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder, str(number)) for number in range(copies)]
        words = [sys.executable, script, *arguments.split(), "--run-dir"]
        for process in [start(*words, str(run)) for run in runs]:
            finish(process)
        speeds = []
        for run in runs:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            first = next(line for line in lines if line["global_step"] >= WARM_UP)
            last = [line for line in lines if "charts/SPS" in line][-1]  # before the evaluation
            seconds = last["wall_time"] - first["wall_time"]
            speeds.append((last["global_step"] - first["global_step"]) / seconds)
    return speeds


def peer_speed(peer: str) -> float:
    words = [sys.executable, f"benchmark/peers/{peer}", ENV_ID, str(TOTAL), str(WARM_UP)]
    return float(finish(start(*words)))


def peers(pairs: int) -> None:
    """The same work as a peer does, in alternating runs."""
    print(f"{ENV_ID}, 8 environments x 256 steps, 10 epochs, minibatches of 64, 64-64 tanh")
    print("networks, observations and rewards normalised, advantages computed once a rollout,")
    print(f"one thread, median of {pairs} alternating pairs.\n")
    print("| | our steps/s | Stable-Baselines3 steps/s | ratio (smallest to largest) |")
    print("|---|---|---|---|")
    for name, (script, arguments, peer) in ROWS.items():
        measured = [(our_speeds(script, arguments)[0], peer_speed(peer)) for _ in range(pairs)]
        ratios = sorted(ours / theirs for ours, theirs in measured)
        ours, theirs = (statistics.median(side) for side in zip(*measured, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {spread} |", flush=True)


def envs(pairs: int) -> None:
    """Steps per second against the number of environments of one process."""
    print(f"{ENV_ID}, defaults but for `--num-envs` and `--num-steps`, whose product stays 2048;")
    print(f"one thread, median of {pairs} rounds over all rows.\n")
    print("| script | --num-envs | steps/s | beside 1 environment |")
    print("|---|---|---|---|")
    measured = {(script, count): [] for script in SCALING for count in NUM_ENVS}
    for _ in range(pairs):
        for script, count in measured:
            more = f" --num-envs {count} --num-steps {2048 // count}"
            measured[script, count] += our_speeds(script, SCALING[script] + more)
    for (script, count), speeds in measured.items():
        speed, one = statistics.median(speeds), statistics.median(measured[script, 1])
        print(f"| `{script}` | {count} | {speed:,.0f} | {speed / one:.2f} |", flush=True)


def workers(pairs: int) -> None:
    """Steps per second of all jobs together against the number of jobs."""
    cores = os.cpu_count() or 1
    counts = sorted({1, 2, 4, 8, 16, 32, 64, cores} & set(range(1, cores + 1)))
    print(f"{ENV_ID}, defaults, {cores} cores: jobs at once, as a sweep runs them;")
    print(f"median of {pairs} rounds over all rows.\n")
    print("| script | jobs at once | steps/s of all together | of the ideal |")
    print("|---|---|---|---|")
    measured = {(script, count): [] for script in SCALING for count in counts}
    for _ in range(pairs):
        for script, count in measured:
            measured[script, count].append(sum(our_speeds(script, SCALING[script], count)))
    for (script, count), speeds in measured.items():
        speed, one = statistics.median(speeds), statistics.median(measured[script, 1])
        share = speed / one / count
        print(f"| `{script}` | {count} | {speed:,.0f} | {share:.0%} |", flush=True)


def main() -> None:
    tables = {"peers": peers, "envs": envs, "workers": workers}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=", ".join(tables) + "; all by default")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each row")
    options = parser.parse_args()
    if unknown := set(options.tables) - tables.keys():
        parser.error(f"no table {', '.join(unknown)}: there are {', '.join(tables)}")
    for number, name in enumerate(options.tables or tables):
        print() if number else None
        tables[name](options.pairs)


if __name__ == "__main__":
    main()
