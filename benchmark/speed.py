"""Training speed: beside a peer's, against --num-envs, with several jobs at once; the sum tree's.

    python -m benchmark.speed                 all of them, as Markdown
    python -m benchmark.speed peers matrix parts ranks envs processes workers tree

Beside a peer: same work, same machine, as many threads, alternating runs; the median of the pairs.
The first iterations (imports, compilation, warm-up) are left out on both sides. Nothing else should
run on the machine. --only DQN measures the rows with that in their name.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    """The same work for a script and its peers; the first warm_up of total steps do not count."""

    script: str
    arguments: str
    peer: str
    env_id: str
    total: int
    warm_up: int
    threads: int = 1


PPO = """--num-envs 8 --num-steps 256 --update-epochs 10 --num-minibatches 32
--no-recompute-advantages --target-kl None"""
DQN = """--train-frequency 10 --batch-size 128 --buffer-size 10000 --learning-starts 10000
--target-frequency 500 --tau 1 --learning-rate 2.5e-4 --exploration-steps 30000
--epsilon-end 0.05 --loss huber"""
PONG = """--train-frequency 4 --batch-size 32 --buffer-size 10000 --learning-starts 1000
--target-frequency 1000 --optimizer adam --learning-rate 1e-4 --epsilon-start 0.1
--epsilon-end 0.1 --device cpu"""
A2C = "--num-steps 5 --gae-lambda 1 --critic-steps 1 --no-norm-adv --max-grad-norm 0.5"
GAMES = "--device cpu"
FAST = " --compile --precision bfloat16"
PPO_PONG = ("ppo.py", "ALE/Pong-v5", 12_288, 4096)
TRPO = "--critic-steps 20 --critic-batch-size 1024"
TRPO_CHEETAH = ("trpo.py", "HalfCheetah-v5", 81_920, 20_480)
SMALL_REPLAY = "--buffer-size 100000 --learning-starts 1000 --log-frequency 500"
FASTEST = SMALL_REPLAY + FAST
SAC_CHEETAH = ("actor_critic.py SAC", "HalfCheetah-v5", 5000, 2000)
DDPG_CHEETAH = ("actor_critic.py DDPG", "HalfCheetah-v5", 5000, 2000)
A2C_SMALL = " --num-envs 8 --no-norm-obs --no-norm-reward"
A2C_CHEETAH = ("a2c.py", "HalfCheetah-v5", 80_000, 20_000)
A2C_CARTPOLE = ("a2c.py", "CartPole-v1", 80_000, 20_000)
CHEETAH = ("ppo.py", "HalfCheetah-v5", 81_920, 20_480)
CARTPOLE, ATARI = (
    ("dqn.py", "CartPole-v1", 60_000, 20_000),
    ("dqn.py", "ALE/Pong-v5", 5000, 2000),
)
ROWS = {
    "PPO, HalfCheetah": Row("ppo_continuous.py", PPO, *CHEETAH),
    "PPO, HalfCheetah, --compile": Row("ppo_continuous.py", PPO + " --compile", *CHEETAH),
    "A2C, HalfCheetah": Row("a2c.py", A2C, *A2C_CHEETAH),
    "A2C, HalfCheetah, --compile": Row("a2c.py", A2C + " --compile", *A2C_CHEETAH),
    "A2C, CartPole": Row("a2c.py", A2C + A2C_SMALL, *A2C_CARTPOLE),
    "A2C, CartPole, --compile": Row("a2c.py", A2C + A2C_SMALL + " --compile", *A2C_CARTPOLE),
    "TRPO, HalfCheetah": Row("trpo.py", TRPO, *TRPO_CHEETAH),
    "TRPO, HalfCheetah, --compile": Row("trpo.py", f"{TRPO} --compile", *TRPO_CHEETAH),
    "SAC, HalfCheetah": Row("sac.py", SMALL_REPLAY, *SAC_CHEETAH),
    "SAC, HalfCheetah, --compile": Row("sac.py", SMALL_REPLAY + " --compile", *SAC_CHEETAH),
    "SAC, HalfCheetah, --compile, bfloat16": Row("sac.py", FASTEST, *SAC_CHEETAH),
    "DDPG, HalfCheetah": Row("ddpg.py", SMALL_REPLAY, *DDPG_CHEETAH),
    "DDPG, HalfCheetah, --compile": Row("ddpg.py", SMALL_REPLAY + " --compile", *DDPG_CHEETAH),
    "DDPG, HalfCheetah, --compile, bfloat16": Row("ddpg.py", FASTEST, *DDPG_CHEETAH),
    "DQN, CartPole": Row("dqn.py", DQN, *CARTPOLE),
    "DQN, CartPole, --compile": Row("dqn.py", DQN + " --compile", *CARTPOLE),
    "PPO, Pong": Row("ppo_atari.py", GAMES, *PPO_PONG, threads=2),
    "PPO, Pong, --compile": Row("ppo_atari.py", GAMES + " --compile", *PPO_PONG, threads=2),
    "PPO, Pong, --compile, bfloat16": Row("ppo_atari.py", GAMES + FAST, *PPO_PONG, threads=2),
    "DQN, Pong": Row("dqn.py", PONG, *ATARI),
    "DQN, Pong, --compile": Row("dqn.py", PONG + " --compile", *ATARI),
    "DQN, Pong, --compile, bfloat16": Row("dqn.py", PONG + FAST, *ATARI),
}
WORK = """PPO: 8 environments x 256 steps, 10 epochs, minibatches of 64, 64-64 tanh networks,
observations and rewards normalised, advantages computed once a rollout. A2C: 16 environments x 5
steps, on CartPole 8 x 5 and nothing normalised, one step on both networks. TRPO: 16 x 64 steps,
15 conjugate gradient steps, 20 of the critic on 1,024 samples; the peer is sb3-contrib's. SAC and
DDPG: a gradient step on 256 transitions every step, 256-256 networks. DQN, CartPole: one on 128
every 10 steps, 120-84 network. DQN, Pong: one on 32 every 4 steps of 4 frames, network of Mnih et
al. 2015, Adam. PPO, Pong: 8 games x 128 steps, 4 epochs, minibatches of 256, the same network, two
threads. Both sides of DQN use Huber's loss; the peers' also clip gradients. SBX is
Stable-Baselines3 in JAX, bound to one core."""
PEERS = {"stable_baselines3": "Stable-Baselines3", "sbx": "SBX"}


SCALING = {  # script -> its work in the tables about scaling
    "ppo_continuous.py": Row("ppo_continuous.py", "", *CHEETAH),
}
SLOW_ENV = "benchmark.slow:SlowPendulum-v0"
SLOW = {"ppo_continuous.py": "--num-steps 32 --num-minibatches 1 --update-epochs 1"}
NUM_ENVS = (1, 2, 4, 8, 16, 32, 64)


def start(*command: str, threads: int = 1) -> subprocess.Popen:
    """A process with so many threads."""
    few = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=few, cwd=ROOT, **pipes)


def finish(process: subprocess.Popen) -> str:
    """Its standard output."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} failed:\n{errors}")
    return output


def our_speeds(row: Row, more: str = "", copies: int = 1, ranks: int = 0) -> list[float]:
    """Steps per second after the warm-up, from the runs' own metrics; logging is in it.

    ranks: how many processes of torchrun share a run; 0 starts it without torchrun.
    """
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}" if ranks else ""
    more += f" --torch-threads {row.threads}"
    arguments = f"--env-id {row.env_id} --total-timesteps {row.total} {row.arguments} {more}"
    arguments += " --checkpoint-frequency 0 --eval-episodes 1 --run-dir"
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder, str(number)) for number in range(copies)]
        words = [sys.executable, *torchrun.split(), row.script, *arguments.split()]
        for process in [start(*words, str(run)) for run in runs]:
            finish(process)
        speeds = []
        for run in runs:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            first = next(line for line in lines if line["global_step"] >= row.warm_up)
            last = [line for line in lines if "charts/SPS" in line][-1]  # before the evaluation
            seconds = last["wall_time"] - first["wall_time"]
            speeds.append((last["global_step"] - first["global_step"]) / seconds)
    return speeds


def peer_speed(row: Row, library: str) -> float:
    words = [*row.peer.split(), library, row.env_id, str(row.total), str(row.warm_up)]
    command = [sys.executable, f"benchmark/peers/{words[0]}", *words[1:]]
    return float(finish(start(*command, threads=row.threads)))


def peers(pairs: int, only: str) -> None:
    """The same work as peers do, in alternating runs."""
    print(f"{WORK} One thread elsewhere; median of {pairs} alternating rounds.\n")
    names = PEERS.values()
    print(f"| | our steps/s | {' | '.join(f'{x} steps/s | ours / {x}' for x in names)} |")
    print("|---|---|" + "---|---|" * len(names))
    for title, row in ROWS.items():
        if only not in title:
            continue
        without_sbx = row.peer in ("a2c.py", "trpo.py") or "ALE/" in row.env_id  # it has neither
        libraries = [x for x in PEERS if x != "sbx" or not without_sbx]
        rounds = [
            (our_speeds(row)[0], *(peer_speed(row, library) for library in libraries))
            for _ in range(pairs)
        ]
        ours, *theirs = zip(*rounds, strict=True)
        cells = [f"{statistics.median(ours):,.0f}"]
        for speeds in theirs:
            ratios = sorted(a / b for a, b in zip(ours, speeds, strict=True))
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            cells += [f"{statistics.median(speeds):,.0f}", spread]
        cells += [""] * 2 * (len(PEERS) - len(libraries))
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def matrix(pairs: int, only: str) -> None:
    """How much of the machine's rate of matrix products a training run reaches."""
    sys.path.insert(0, str(ROOT))
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    rates = {}
    for precision, dtype in (("highest", torch.float32), ("bfloat16", torch.bfloat16)):
        left, right = torch.randn(2, 1024, 1024, dtype=dtype)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - begin)
        rates[precision] = 2 * 1024**3 / statistics.median(times) / 1e9
        print(f"{precision}: {rates[precision]:.0f} GFLOP/s in products of 1024 x 1024 matrices.")
    print(f"\nHalfCheetah-v5, compiled, one thread; median of {pairs} runs.\n")
    print("| script | --precision | steps/s | MFLOP a step | GFLOP/s | of the matrix rate |")
    print("|---|---|---|---|---|---|")
    for script in ("sac", "ddpg"):
        module = importlib.import_module(script)
        with tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
            words = "--total-timesteps 200 --learning-starts 100 --log-frequency 100".split()
            sys.argv = [script, *words, "--eval-episodes", "1", "--run-dir", f"{folder}/run"]
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                module.train(module.parse_args(module.Args))
        flops = counter.get_total_flops() / 100  # acting and evaluating are below 1 %
        for precision in rates:
            row = ROWS[f"{script.upper()}, HalfCheetah, --compile"]
            runs = [our_speeds(row, f"--precision {precision}")[0] for _ in range(pairs)]
            speed = statistics.median(runs)
            reached = flops * speed / 1e9
            cells = [f"`{script}.py`", precision, f"{speed:,.0f}", f"{flops / 1e6:.0f}"]
            cells += [f"{reached:.0f}", f"{reached / rates[precision]:.0%}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def parts(pairs: int, only: str) -> None:
    """Where the time of a step of ppo_atari.py goes; median of the iterations but the first."""
    sys.path.insert(0, str(ROOT))
    import torch

    import ppo_atari

    times = dict.fromkeys(("emulator", "action", "copy"), 0.0)

    def timed(name: str, function: Callable, counts: Callable = lambda: True) -> Callable:
        def call(*arguments, **options):
            begin = time.perf_counter()
            result = function(*arguments, **options)
            times[name] += (time.perf_counter() - begin) * counts()
            return result

        return call

    ppo_atari.ParallelGames.step = timed("emulator", ppo_atari.ParallelGames.step)
    ppo_atari.stack_steps = timed("copy", ppo_atari.stack_steps)
    network = ppo_atari.AtariActorCritic
    network.forward = timed("action", network.forward, lambda: not torch.is_grad_enabled())
    end_iteration, iterations = ppo_atari.Run.end_iteration, []

    def note(run, *arguments):
        end_iteration(run, *arguments)
        iterations.append({"whole": run.wall_time, **times})

    ppo_atari.Run.end_iteration = note
    print("Pong, 8 games x 128 steps, in microseconds for each environment step, not compiled.\n")
    print(
        "| --torch-threads | --precision | all | emulator | action | copy | update and the rest |"
    )
    print("|---|---|---|---|---|---|---|")
    for threads in (1, 2):
        for precision in ("highest", "bfloat16"):
            iterations.clear()
            with tempfile.TemporaryDirectory() as folder:
                words = f"--total-timesteps {1024 * (pairs + 1)} --precision {precision}"
                words += f" --torch-threads {threads} --eval-episodes 1 --run-dir {folder}/run"
                sys.argv = ["ppo_atari", *GAMES.split(), *words.split()]
                with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                    ppo_atari.train(ppo_atari.parse_args(ppo_atari.Args))
            spent = [
                {name: (after[name] - before[name]) / 1024 * 1e6 for name in after}
                for before, after in itertools.pairwise(iterations)
            ]
            medians = {name: statistics.median(x[name] for x in spent) for name in spent[0]}
            rest = medians["whole"] - sum(medians[name] for name in times)
            cells = [str(threads), precision, *(f"{x:.0f}" for x in [*medians.values(), rest])]
            print(f"| {' | '.join(cells)} |", flush=True)


def ranks(pairs: int, only: str) -> None:
    """Two processes of torchrun beside one process with two threads."""
    print("Pong, 8 games x 128 steps: one process with two threads, or two of torchrun with one")
    print(f"each; median of {pairs} alternating pairs.\n")
    print("| --precision | one process, steps/s | two processes, steps/s | ratio |")
    print("|---|---|---|---|")
    for precision in ("highest", "bfloat16"):
        row = Row("ppo_atari.py", f"{GAMES} --precision {precision}", *PPO_PONG)
        measured = [
            (our_speeds(row._replace(threads=2))[0], our_speeds(row, ranks=2)[0])
            for _ in range(pairs)
        ]
        one, two = (statistics.median(side) for side in zip(*measured, strict=True))
        ratio = statistics.median(b / a for a, b in measured)
        print(f"| {precision} | {one:,.0f} | {two:,.0f} | {ratio:.2f} |", flush=True)


def median_speeds(
    rounds: int, counts: Sequence[int], only: str, measure: Callable[[Row, int], float]
) -> dict[tuple[str, int], float]:
    """(script, count) -> steps per second, from rounds that go through all of them."""
    measured = {(script, count): [] for script in SCALING if only in script for count in counts}
    for _ in range(rounds):
        for script, count in measured:
            measured[script, count].append(measure(SCALING[script], count))
    return {key: statistics.median(speeds) for key, speeds in measured.items()}


def envs(pairs: int, only: str) -> None:
    """Steps per second against the number of environments of one process."""

    def measure(row: Row, count: int) -> float:
        return our_speeds(row, f" --num-envs {count} --num-steps {2048 // count}")[0]

    print(
        "HalfCheetah-v5, defaults but for `--num-envs` and `--num-steps`, whose product stays 2048;"
    )
    print(f"one thread, median of {pairs} rounds over all rows.\n")
    print("| script | --num-envs | steps/s | beside 1 environment |")
    print("|---|---|---|---|")
    speeds = median_speeds(pairs, NUM_ENVS, only, measure)
    for (script, count), speed in speeds.items():
        print(f"| `{script}` | {count} | {speed:,.0f} | {speed / speeds[script, 1]:.2f} |")


def processes(pairs: int, only: str) -> None:
    """Slow environments in turn, and in processes of their own."""
    print("Pendulum-v1 whose steps take 5 ms: environments in turn, or in processes of their own;")
    print(f"median of {pairs} alternating pairs.\n")
    print("| script | --num-envs | steps/s | steps/s with --async-envs | ratio |")
    print("|---|---|---|---|---|")
    for script, arguments in SLOW.items():
        for count in (2, 8) if only in script else ():
            row = Row(script, f"{arguments} --num-envs {count}", "", SLOW_ENV, 1536, 512)
            measured = [
                (our_speeds(row)[0], our_speeds(row, "--async-envs")[0]) for _ in range(pairs)
            ]
            plain, apart = (statistics.median(side) for side in zip(*measured, strict=True))
            ratio = statistics.median(b / a for a, b in measured)
            print(
                f"| `{script}` | {count} | {plain:,.0f} | {apart:,.0f} | {ratio:.2f} |", flush=True
            )


def workers(pairs: int, only: str) -> None:
    """Steps per second of all jobs together against the number of jobs."""
    cores = os.cpu_count() or 1
    counts = sorted({1, 2, 4, 8, 16, 32, 64, cores} & set(range(1, cores + 1)))
    print(f"HalfCheetah-v5, defaults, {cores} cores: jobs at once, as a sweep runs them;")
    print(f"median of {pairs} rounds over all rows.\n")
    print("| script | jobs at once | steps/s of all together | of the ideal |")
    print("|---|---|---|---|")
    speeds = median_speeds(pairs, counts, only, lambda row, n: sum(our_speeds(row, copies=n)))
    for (script, count), speed in speeds.items():
        share = speed / speeds[script, 1] / count
        print(f"| `{script}` | {count} | {speed:,.0f} | {share:.0%} |")


def tree(pairs: int, only: str) -> None:
    """Microseconds to draw a batch from a million priorities, and to change them."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from double_dqn_per import SumTree

    size, batch, repeats = 1_000_000, 32, 2000
    tree, times = SumTree(size), []
    leaves = tree.levels[-1].reshape(-1)
    leaves[:size] = np.random.default_rng(0).exponential(size=size)
    first = np.arange(0, size, SumTree.WIDTH)  # one of each node renews the sums
    tree.update(first, leaves[first])
    for _ in range(pairs):
        begin = time.perf_counter()
        for _ in range(repeats):
            sums = (np.arange(batch) + np.random.random(batch)) / batch * tree.levels[0].sum()
            indices = tree.find(sums)
            tree.update(indices, np.random.random(batch))
        times.append((time.perf_counter() - begin) / repeats * 1e6)
    print(
        f"Sum tree of {size:,} priorities: {statistics.median(times):.0f} microseconds to draw and"
    )
    print(f"change {batch}; median of {pairs} rounds of {repeats:,}.")


def main() -> None:
    tables = {"peers": peers, "matrix": matrix, "parts": parts, "ranks": ranks, "envs": envs}
    tables |= {"processes": processes, "workers": workers, "tree": tree}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=", ".join(tables) + "; all by default")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each row")
    parser.add_argument("--only", default="", help="rows with this in their name, such as DQN")
    options = parser.parse_args()
    if unknown := set(options.tables) - tables.keys():
        parser.error(f"no table {', '.join(unknown)}: there are {', '.join(tables)}")
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    if not any(options.only in title for title in [*ROWS, *SCALING]):
        parser.error(f"--only {options.only}: the rows are {'; '.join([*ROWS, *SCALING])}")
    for number, name in enumerate(options.tables or tables):
        if number:
            print()
        tables[name](options.pairs, options.only)


if __name__ == "__main__":
    main()
