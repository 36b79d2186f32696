"""How much each idea of reinforce.py lowers the variance of the gradient, on the same episodes.

python -m benchmark.baselines           trains, measures, writes benchmark/results/baselines.csv
python -m benchmark.baselines --draw    draws benchmark/results/baselines.png from that file
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmark.plots import COLORS, pyplot
from benchmark.results import RESULTS, ROOT

# Environment -> environment steps of training after which the policy is looked at.
STAGES = {"CartPole-v1": [1_000, 3_000, 10_000, 30_000], "Hopper-v5": [1_000, 10_000, 50_000]}
ESTIMATORS = {
    "whole return, no baseline": ("none", False),
    "reward to go, no baseline": ("none", True),
    "constant": ("constant", True),
    "optimal": ("optimal", True),
    "time": ("time", True),
    "value": ("value", True),
}
EPISODES, BATCH = 256, 8  # episodes played, and episodes in one estimate of the gradient
CSV, PNG = RESULTS / "baselines.csv", RESULTS / "baselines.png"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reinforce", ROOT / "reinforce.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reinforce"] = module
    spec.loader.exec_module(module)
    return module


def train(env_id: str, steps: int, folder: Path) -> None:
    """Begin a run, or go on with it, up to this step; the step size does not fall."""
    script = [sys.executable, str(ROOT / "reinforce.py")]
    if folder.exists():
        words = ["--resume", folder, "--total-timesteps", steps]
    else:
        words = ["--env-id", env_id, "--run-dir", folder, "--total-timesteps", steps]
        words += ["--no-anneal-lr", "--eval-episodes", 1]
    subprocess.run([*script, *map(str, words)], check=True, capture_output=True)


class Agent:
    """The networks of a run, as its checkpoint has them."""

    def __init__(self, module: ModuleType, folder: Path) -> None:
        about = json.loads((folder / "args.json").read_text())
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        self.module, self.step = module, saved["global_step"]
        self.args = module.Args(**about["args"])
        self.env = module.make_env(self.args)
        obs_dim, space = self.env.observation_space.shape[0], self.env.action_space
        if hasattr(space, "n"):
            self.to_env = module.ActionNumbers(space)
            self.actor = module.CategoricalActor(obs_dim, self.to_env.num_actions)
        else:
            self.to_env = module.ActionScaler(space)
            self.actor = module.GaussianActor(obs_dim, self.to_env.dim, 0.0)
        self.critic = module.ValueCritic(obs_dim)
        self.normalizer = module.ObsNormalizer(obs_dim, self.args.obs_clip)
        self.scaler = module.ReturnScaler(1)
        parts = {"actor": self.actor, "critic": self.critic, "return_scaler": self.scaler}
        for name, part in (parts | {"obs_normalizer": self.normalizer}).items():
            part.load_state_dict(saved[name])

    @torch.no_grad()
    def play(self, seed: int | None, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One episode, with what follows its last step. Shapes: (length, ...)."""
        (obs, _), over, steps = self.env.reset(seed=seed), False, []
        while not over:
            normed = self.normalizer(torch.from_numpy(obs).float())
            action = self.module.sample(self.actor(normed), rng)
            obs, reward, _, truncated, info = self.env.step(self.to_env(action))
            over = bool(info)
            steps.append((normed.numpy(), action.numpy(), reward))
        value = self.critic(self.normalizer(torch.from_numpy(obs).float())) * self.scaler.scale
        parts = zip(("obs", "actions", "rewards"), zip(*steps, strict=True), strict=True)
        return {k: np.stack(x) for k, x in parts} | {"cut_value": value.item() * truncated}

    def variance(self, episodes: list[dict], baseline: str, reward_to_go: bool) -> float:
        """Of the gradient from BATCH episodes: the sum over parameters of the variance."""
        module, estimates = self.module, []
        for first in range(0, len(episodes), BATCH):
            batch = episodes[first : first + BATCH]
            longest = max(len(x["rewards"]) for x in batch)

            def padded(name: str, batch: list = batch, longest: int = longest) -> torch.Tensor:
                arrays = [x[name] for x in batch]
                rest = [((0, longest - len(x)), *[(0, 0)] * (x.ndim - 1)) for x in arrays]
                columns = [np.pad(x, pad) for x, pad in zip(arrays, rest, strict=True)]
                return torch.from_numpy(np.stack(columns, axis=1))

            obs, actions, rewards = padded("obs"), padded("actions"), padded("rewards").float()
            lengths = torch.tensor([len(x["rewards"]) for x in batch])
            playing = (torch.arange(longest)[:, None] < lengths).float()
            dones = (torch.arange(longest)[:, None] == lengths - 1).float()
            cut = torch.tensor([x["cut_value"] for x in batch]) * (baseline == "value")
            returns = module.discounted_returns(rewards, cut * dones, dones, self.args.gamma)
            weights = returns if reward_to_go else returns[:1].expand_as(returns)
            subtracted = torch.zeros_like(returns)
            if baseline == "constant":
                subtracted = module.constant_baseline(weights, playing)
            elif baseline == "optimal":
                scores = module.episode_gradients(self.actor, obs, actions, playing)
                weighted = module.episode_gradients(self.actor, obs, actions, weights * playing)
                subtracted = module.optimal_baseline(scores, weighted)
            elif baseline == "time":
                subtracted = module.time_baseline(weights, playing)
            elif baseline == "value":
                subtracted = self.critic(obs).detach() * self.scaler.scale
            advantages = (weights - subtracted) * playing
            gradients = module.episode_gradients(self.actor, obs, actions, advantages)
            estimates.append(gradients.mean(0))
        return torch.stack(estimates).var(0).sum().item()


def measure() -> None:
    module, rows = load_script(), []
    for env_id, stages in STAGES.items():
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "run"
            for stage in stages:
                train(env_id, stage, folder)
                agent, rng = Agent(module, folder), module.Rng(np.random.PCG64(0))
                episodes = [agent.play(None if i else 0, rng) for i in range(EPISODES)]
                for name, (baseline, to_go) in ESTIMATORS.items():
                    variance = agent.variance(episodes, baseline, to_go)
                    rows.append([env_id, agent.step, name, f"{variance:.6g}"])
                    print(*rows[-1], flush=True)
    with open(CSV, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["env_id", "step", "estimator", "variance"], *rows]
        )


def data_hash() -> str:
    """Of what the picture shows; it stands in the picture."""
    return hashlib.sha256(CSV.read_bytes()).hexdigest()


def draw(path: Path = PNG) -> None:
    """A panel an environment: variance of each estimator over training, relative to the first."""
    with open(CSV) as file:
        rows = list(csv.DictReader(file))
    plt = pyplot()
    env_ids = list(dict.fromkeys(row["env_id"] for row in rows))
    figure, axes = plt.subplots(1, len(env_ids), figsize=(4.2 * len(env_ids), 3.6), squeeze=False)
    for axis, env_id in zip(axes.flat, env_ids, strict=True):
        mine = [row for row in rows if row["env_id"] == env_id]
        first, *others = dict.fromkeys(row["estimator"] for row in mine)
        unit = {row["step"]: float(row["variance"]) for row in mine if row["estimator"] == first}
        for name, color in zip((first, *others), COLORS, strict=False):
            points = [row for row in mine if row["estimator"] == name]
            steps = [int(row["step"]) for row in points]
            ratios = [float(row["variance"]) / unit[row["step"]] for row in points]
            axis.plot(steps, ratios, marker="o", color=color, label=name)
        axis.set(xscale="log", yscale="log", title=env_id, xlabel="environment steps of training")
        axis.set_xticks(steps, [f"{step:,}" for step in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes.flat[0].set_ylabel("variance of the gradient, relative")
    labels = axes.flat[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.legend(*labels, loc="lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Data": data_hash(), "Software": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw the picture, measure nothing")
    if not parser.parse_args().draw:
        measure()
    draw()
