"""Double DQN with prioritised experience replay, complete in this one file.

Deep Q-learning (Mnih et al. 2015) with two changes. Its target is the maximum of noisy estimates,
too high on average: here one network chooses the next action and another says what it is worth.
And transitions are not drawn uniformly but the more often, the more wrong Q was about them, with
importance weights against the bias of that. van Hasselt et al. 2016, arXiv:1509.06461 (A), and
Schaul et al. 2016, arXiv:1511.05952 (B); --no-double and --no-prioritized leave either out.

    for each step:
        with probability epsilon a random action, otherwise the argmax of Q(s, a)
        store (s, a, r, s') in the replay memory D, with the largest p so far  (B, Algorithm 1)
        every train_frequency steps:
            draw k of the N transitions, P(i) = p_i^alpha / sum of p^alpha     (B, eq. 1)
                one from each of k equal ranges of the sum                     (B, appendix B.2.1)
            w_i = (N P(i))^-beta / max w                                       (B, section 3.4)
            y = r, if s' is terminal, else r + gamma Q_target(s', argmax_a' Q(s', a'))  (A, eq. 4)
            one gradient step on the mean of w huber(y - Q(s, a))
            p_i = |y - Q(s, a)| before that step, and a little                 (B, section 3.3)
        every target_frequency steps: Q_target = Q

    python double_dqn_per.py --env-id CartPole-v1 --seed 1
    python double_dqn_per.py --env-id ALE/Pong-v5 --seed 1

Deviations from the papers:
- A time limit is no terminal state: the target bootstraps through it (arXiv:1712.00378).
- The maximum of the weights is that of the minibatch; priorities come from unclipped TD errors.
- The loss is the mean over the minibatch, where the papers' code sums; RMSProp's constant, 0.01
  inside of the root, makes up for that: sqrt(0.01) / batch_size outside of it, as in PyTorch.
- The tuned network of (A) shares one bias between all actions; this one does not.
- Vector observations get a small fully connected network, Adam, whose learning rate falls to 0, a
  target network that follows in small steps, and the squared loss: where rewards are not clipped,
  huber's clipped gradient lets rare failures, whose errors are large, count too little, and Q
  grows too high.
- A game begins with FIRE, where it has that button, before the papers' random number of no-ops.
- Epsilon falls from the first step on, not the first update; in evaluations it is 0.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from tqdm import tqdm


def require(args: Any, names: str, allowed: Callable[[Any], bool], text: str) -> None:
    """Check fields of the arguments. Raises: ValueError, which tyro reports with exit code 2."""
    for name in names.split():
        if not allowed(value := getattr(args, name)):
            raise ValueError(f"--{name.replace('_', '-')} must be {text}, got {value}")


def parse_count(text: str) -> int:
    """Read a whole number that may be written 1000000, 1_000_000 or 1e6."""
    if not float(text).is_integer():
        raise ValueError(f"not a whole number: {text}")
    return int(float(text)) if "e" in text.lower() or "." in text else int(text)


Count = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda texts: parse_count(texts[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True)
class Args:
    DEFAULTS: ClassVar[dict[str, tuple[Any, Any]]] = {
        "total_timesteps": (500_000, 10_000_000),
        "device": ("cpu", "auto"),
        "learning_rate": (1e-3, 6.25e-5),
        "anneal_lr": (True, False),
        "optimizer": ("adam", "rmsprop"),
        "loss": ("squared", "huber"),
        "buffer_size": (50_000, 1_000_000),
        "learning_starts": (1_000, 50_000),
        "train_frequency": (2, 4),
        "batch_size": (128, 32),
        "priority_alpha": (0.4, 0.6),
        "target_frequency": (4, 30_000),
        "tau": (0.01, 1.0),
        "epsilon_end": (0.05, 0.01),
        "exploration_steps": (20_000, 1_000_000),
    }
    """Of flags that are not given: for vectors, and on Atari, where they are the paper's, but for
    the deviations above and for 10M steps, which are a fifth."""

    # Run
    seed: Count = 1
    """Seed of everything random; a run repeats exactly on the same machine and threads."""
    total_timesteps: Count | None = None
    """Environment steps over all environments together, rounded up to whole --log-frequency; by
    default 500_000, on Atari 10_000_000."""
    run_dir: str | None = None
    """Folder of this run; by default runs/{env id}__{script}__{seed}__{unix time}."""
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    """Where the networks live; by default cpu, on Atari auto, which is a GPU if there is one."""
    torch_threads: Count = 1
    """CPU threads of torch; small networks gain nothing from a second one."""
    compile: bool = False
    """Compile the gradient step: needs a C++ compiler, starts seconds later, then runs faster."""
    track: bool = False
    """Log to Weights & Biases too; without key or network into the run folder, to sync later."""
    wandb_project_name: str = "deep-rl"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team or user; by default your own."""
    capture_video: bool = False
    """Record the first episode of every evaluation in the run folder's videos/."""
    checkpoint_frequency: Count = 100_000
    """Environment steps between checkpoints; 0: only at the end and when interrupted."""
    resume: str | None = None
    """Run folder to go on with, exactly from its checkpoint and with its arguments."""
    evaluate: str | None = None
    """Run folder whose checkpoint to evaluate; trains nothing and writes nothing but videos."""
    eval_frequency: Count = 0
    """Environment steps between evaluations; 0: only at the end."""
    eval_episodes: Count = 10
    """Whole episodes per evaluation, played with the deterministic policy."""

    # Environment
    env_id: str = "CartPole-v1"
    """Gymnasium environment; "module:Name-v0" imports the module first, "ALE/Name-v5" is Atari."""
    num_envs: Count = 1
    """Environments stepped together in this process."""
    sticky_actions: float = 0.0
    """Atari: probability that a frame repeats the last action: 0 as in the paper, where Gymnasium
    takes 0.25 (arXiv:1709.06009)."""
    clip_rewards: bool = True
    """Atari: learn from rewards clipped to [-1, 1]; logged returns are the game's own."""
    episodic_life: bool = True
    """Atari: learn as if a lost life ended the episode; the game goes on."""

    # Algorithm
    double: bool = True
    """The online network chooses the next action of the target (arXiv:1509.06461)."""
    prioritized: bool = True
    """Draw transitions by priority (arXiv:1511.05952); without, uniformly."""
    priority_alpha: float | None = None
    """Exponent of the priorities: 0 draws uniformly; by default 0.4, on Atari 0.6."""
    priority_beta: float = 0.4
    """Exponent of the importance weights; rises from here to 1 at --total-timesteps."""
    learning_rate: float | None = None
    """Step size of the optimizer; by default 1e-3, on Atari 6.25e-5."""
    anneal_lr: bool | None = None
    """Lower the learning rate linearly to 0 at the end, once every --log-frequency (False: keep
    it); by default yes, on Atari no."""
    optimizer: Literal["adam", "rmsprop"] | None = None
    """By default adam, on Atari rmsprop (centred, as in the paper)."""
    loss: Literal["huber", "squared"] | None = None
    """Of the TD error. huber: its gradient is the error clipped to [-1, 1]; squared: twice the
    error. By default squared, on Atari huber."""
    gamma: float = 0.99
    """Discount factor per environment step."""
    buffer_size: Count | None = None
    """Transitions in the replay memory; by default 50_000, on Atari 1_000_000 (7 GB)."""
    learning_starts: Count | None = None
    """Environment steps before the first gradient step; by default 1_000, on Atari 50_000."""
    train_frequency: Count | None = None
    """Environment steps per gradient step; by default 2, on Atari 4."""
    batch_size: Count | None = None
    """Transitions per gradient step; by default 128, on Atari 32."""
    target_frequency: Count | None = None
    """Environment steps between updates of the target network; by default 4, on Atari 30_000."""
    tau: float | None = None
    """Share of the network in an update of its target: 1 copies, less is Polyak averaging; by
    default 0.01, on Atari 1."""
    epsilon_start: float = 1.0
    """Probability of a random action at the start."""
    epsilon_end: float | None = None
    """Probability of a random action after --exploration-steps; by default 0.05, on Atari 0.01."""
    exploration_steps: Count | None = None
    """Environment steps over which epsilon falls; by default 20_000, on Atari 1_000_000."""
    log_frequency: Count = 1000
    """Environment steps between lines of metrics; Ctrl-C waits for the next."""

    @property
    def atari(self) -> bool:
        """Whether the environment is a game, played from its pictures."""
        return self.env_id.startswith("ALE/")

    @property
    def iteration_steps(self) -> int:
        """Environment steps per iteration: --log-frequency, in whole steps of all environments."""
        return -(-self.log_frequency // self.num_envs) * self.num_envs

    def __post_init__(self) -> None:
        for name, default in self.DEFAULTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default[self.atari])
        counts = "total_timesteps num_envs buffer_size train_frequency batch_size target_frequency"
        counts += " exploration_steps log_frequency eval_episodes torch_threads"
        require(self, counts, lambda x: x >= 1, "at least 1")
        frequencies = "checkpoint_frequency eval_frequency learning_starts"
        require(self, frequencies, lambda x: x >= 0, "0 or more")
        require(self, "seed", lambda x: 0 <= x < 2**32, "between 0 and 2**32 - 1")
        unit = "gamma epsilon_start epsilon_end sticky_actions priority_alpha priority_beta"
        require(self, unit, lambda x: 0 <= x <= 1, "between 0 and 1")
        require(self, "tau", lambda x: 0 < x <= 1, "above 0 and at most 1")
        require(self, "learning_rate", lambda x: 0 < x < math.inf, "above 0")
        require(self, "resume evaluate", lambda x: x != "", "the path of a run folder")
        require(self, "evaluate", lambda x: x is None or self.resume is None, "without --resume")
        least = 8 * self.num_envs
        require(self, "buffer_size", lambda x: x >= least, f"at least 8 * num_envs = {least}")


# ---- Networks ------------------------------------------------------------------------------------


def vector_q_network(obs_shape: tuple[int, ...], num_actions: int) -> nn.Sequential:
    """Q of every action. Shapes: obs (B, obs_dim) -> (B, num_actions)."""
    hidden = [nn.Linear(*obs_shape, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(84, num_actions))


class AtariQNetwork(nn.Module):
    """Q of every action, from stacked frames. Source: Mnih et al. 2015, Methods.

    Shapes: obs (B, 4, 84, 84), grey levels from 0 to 255 -> (B, num_actions).
    """

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(obs_shape[0], 32, 8, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(),
            nn.Linear(512, num_actions),
        )
        self.to(memory_format=torch.channels_last)  # as obs below: faster convolutions

    def forward(self, obs: Tensor) -> Tensor:
        return self.layers(obs.contiguous(memory_format=torch.channels_last) / 255)


# ---- Replay memory -------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions for one gradient step. Shapes: (B, ...)."""

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    terminations: Tensor


class SumTree:
    """Numbers as leaves of a tree in which every node is the sum of its WIDTH children.

    Changing some, or finding where their cumulative sum passes given values, takes one step per
    level for a whole batch at once; three levels hold 2 million. Source: Schaul et al.
    2016, appendix B.2.1, with more children a node.
    """

    WIDTH = 128

    def __init__(self, size: int) -> None:
        self.levels = [np.zeros((-(-size // self.WIDTH), self.WIDTH))]  # leaves; parents go before
        while (nodes := len(self.levels[0])) > 1:
            self.levels.insert(0, np.zeros((-(-nodes // self.WIDTH), self.WIDTH)))
        self.leaves = self.levels[-1].reshape(-1)

    def update(self, indices: np.ndarray, numbers: np.ndarray | float) -> None:
        """Set the numbers at these indices. Shapes: (B,)."""
        for level in reversed(self.levels):
            level.reshape(-1)[indices] = numbers
            indices = indices // self.WIDTH
            numbers = level[indices].sum(1)

    def find(self, sums: np.ndarray) -> np.ndarray:
        """First indices whose cumulative sum is above these. Shapes: (B,) in [0, total) -> (B,)."""
        indices = np.zeros(len(sums), np.int64)
        for level in self.levels:
            above = level[indices].cumsum(1)
            sums = np.minimum(sums, np.nextafter(above[:, -1], 0))  # rounding must not pass the end
            child = (above <= sums[:, None]).sum(1)
            indices = indices * self.WIDTH + child
            sums = sums - np.where(child > 0, above[np.arange(len(child)), child - 1], 0)
        return indices


class PrioritizedReplayBuffer:
    """The newest transitions: actions[i], taken in obs[i], led to rewards[i] and next_obs[i].

    A ring of rows, interleaved by environment: row i + num_envs follows row i, and environment n
    writes next_row[n], over its oldest. An observation is one frame, or a stack of the newest ones.
    frames[i] is the newest of obs[i], and that of next_obs[i] is in the row that follows; after a
    termination it may be another episode's, but then no target looks at it. The last frame of an
    episode that a time limit cut does matter: it takes a row without a transition, of action -1.
    ages[i] counts the frames before frames[i] in its episode, up to the size of a stack; where a
    stack would reach further back it is zero. next_age[n] is the age of what comes to next_row[n].
    numbers[i] is p^alpha if i is a transition, its next frame there and its stack not overwritten,
    else 0; `largest` is the largest yet, from 1 on. No row from `filled` on has been written.

    Shapes: (size, ...) for what is a row's, with numbers padded by zeros to whole nodes of the
    tree, (num_envs,) for next_row and next_age, (1,) for largest.
    """

    ARRAYS = "frames actions rewards terminations ages next_row next_age numbers largest".split()

    def __init__(
        self, size: int, num_envs: int, obs_shape: tuple[int, ...], stacked: bool, alpha: float
    ) -> None:
        self.size, self.num_envs, self.filled = size // num_envs * num_envs, num_envs, 0
        self.obs_shape, self.stack = obs_shape, obs_shape[0] if stacked else 1
        frame_shape, dtype = (obs_shape[1:], np.uint8) if stacked else (obs_shape, np.float32)
        self.frames = np.zeros((self.size, *frame_shape), dtype)  # takes memory when written to
        self.actions = np.full(self.size, -1)
        self.rewards, self.terminations = np.zeros((2, self.size), np.float32)
        self.ages, self.alpha = np.zeros(self.size, np.uint8), alpha
        self.next_row, self.next_age = np.arange(num_envs), np.zeros(num_envs, np.int64)
        self.tree, self.largest = SumTree(self.size), np.ones(1)
        self.numbers = self.tree.leaves

    def add(self, obs, actions, rewards, next_obs, terminations, dones) -> None:
        """Take in one step of all environments. Shapes: (num_envs, ...)."""
        self.write(np.arange(self.num_envs), obs, actions, rewards, terminations)
        if len(cut := np.flatnonzero(dones & ~terminations)):  # by a time limit
            self.write(cut, next_obs[cut], -1, 0, 0)
        self.next_age[dones] = 0

    def write(self, n, obs, actions, rewards, terminations) -> None:
        """Write a row of each of the environments n."""
        i, age = self.next_row[n], self.next_age[n]
        self.frames[i] = obs[:, -1] if self.stack > 1 else obs
        self.actions[i], self.rewards[i], self.terminations[i] = actions, rewards, terminations
        self.ages[i] = age
        before, broken = i - self.num_envs, (i + (self.stack - 1) * self.num_envs) % self.size
        self.tree.update(broken, 0.0)  # its stack began in row i; nearer ones broke before
        self.tree.update(before % self.size, self.largest * (self.actions[before] >= 0))
        self.next_row[n] = (i + self.num_envs) % self.size
        self.next_age[n] = np.minimum(age + 1, self.stack)
        self.filled = max(self.filled, int(i.max()) + 1)

    def draw(self, size: int) -> tuple[np.ndarray, Tensor]:
        """Indices, one from each of `size` equal ranges of the sum, and their probabilities."""
        total = self.tree.levels[0].sum()
        indices = self.tree.find((np.arange(size) + np.random.random(size)) / size * total)
        return indices, torch.from_numpy(self.numbers[indices] / total)

    def set_priorities(self, indices: np.ndarray, td_errors: np.ndarray) -> None:
        """p = |TD error| and a little more, so that it is never zero. Shapes: (B,)."""
        numbers = (np.abs(td_errors) + 1e-6) ** self.alpha
        self.largest = np.maximum(self.largest, numbers.max())
        self.tree.update(indices, numbers)

    def gather(self, i: np.ndarray) -> Batch:
        """The transitions of these indices. Shapes: (B,)."""
        back = np.arange(self.stack - 1, -2, -1)  # -1: the next frame
        frames = self.frames[(i[:, None] - back * self.num_envs) % self.size]
        frames[back > self.ages[i, None]] = 0
        shape = len(i), *self.obs_shape
        obs, next_obs = frames[:, :-1].reshape(shape), frames[:, 1:].reshape(shape)
        parts = obs, self.actions[i], self.rewards[i], next_obs, self.terminations[i]
        return Batch(*map(torch.from_numpy, parts))

    def state_dict(self) -> dict[str, Any]:
        written = max(self.filled, self.num_envs)  # next_row is whole, even before the first
        arrays = {name: torch.from_numpy(getattr(self, name)[:written]) for name in self.ARRAYS}
        return arrays | {"filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.filled = state["filled"]
        for name in self.ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name].numpy()
        first = np.arange(0, len(self.numbers), SumTree.WIDTH)  # one a node renews all sums
        self.tree.update(first, self.numbers[first])


# ---- Pure functions: the mathematics of Double DQN and PER ---------------------------------------


def linear_schedule(step: int, duration: int, start: float, end: float) -> float:
    """From start to end in the first `duration` steps, then end."""
    return start + (end - start) * min(1.0, step / duration)


def td_target(rewards: Tensor, terminations: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """Reward plus the discounted value of what follows; nothing follows a termination.

    Shapes: all (B,) -> (B,). Source: Mnih et al. 2015, Algorithm 1.
    """
    return rewards + gamma * (1 - terminations) * next_values


def double_q_target(
    rewards: Tensor, terminations: Tensor, online_q: Tensor, target_q: Tensor, gamma: float
) -> Tensor:
    """TD target whose next action the online network chooses, and the target network evaluates.

    Shapes: rewards, terminations (B,), online_q, target_q of next_obs (B, num_actions) -> (B,).
    Source: van Hasselt et al. 2016, section "Double DQN".
    """
    chosen = online_q.argmax(1, keepdim=True)
    return td_target(rewards, terminations, target_q.gather(1, chosen).squeeze(1), gamma)


def importance_weights(probabilities: Tensor, beta: float) -> Tensor:
    """(N P)^-beta over its maximum, in which N cancels: 1 for the rarest, less for the others.

    Shapes: probabilities (B,) -> (B,). Source: Schaul et al. 2016, section 3.4.
    """
    weights = probabilities**-beta
    return weights / weights.max()


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move the target's parameters towards the source's by the share tau; 1 copies them."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.lerp_(new, tau)


# ---- Environments --------------------------------------------------------------------------------


class ReplayableVectorEnv(SyncVectorEnv):
    """Environments stepped in turn; one that ends is reset in the same step. Resumable."""

    def __init__(self, env_fns: list[Callable[[], gym.Env]]) -> None:
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

    @property
    def obs(self) -> np.ndarray:
        """What to act on next. Shapes: (num_envs, ...)."""
        return np.stack([env.obs for env in self.envs])

    def state_dict(self) -> dict[str, Any]:
        return {"envs": [env.state_dict() for env in self.envs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for env, env_state in zip(self.envs, state["envs"], strict=True):
            env.load_state_dict(env_state)


class AtariGame(gym.Env):
    """One game of ale-py's C++ vector environment, which makes, stacks and resets the pictures.

    Observations: 4 grey frames, 84 x 84 bytes, each the pixel-wise maximum of the last two of 4
    emulated ones; zero before the first, taken after FIRE and up to 30 no-ops. Rewards are the
    game's own. `lives` counts what is left.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, game: str, sticky_actions: float, render_mode: str | None) -> None:
        from ale_py.vector_env import AtariVectorEnv

        options = {"reward_clipping": False, "repeat_action_probability": sticky_actions}
        self.game = AtariVectorEnv(game, num_envs=1, num_threads=1, **options)
        self.observation_space = self.game.single_observation_space
        self.action_space, self.render_mode = self.game.single_action_space, render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        obs, info = self.game.reset(seed=None if seed is None else seed % 2**31)
        self.frames, self.lives = obs[0], int(info["lives"][0])
        return self.frames, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        obs, rewards, terminations, truncations, info = self.game.step(np.array([action]))
        self.frames, self.lives = obs[0], int(info["lives"][0])
        return self.frames, float(rewards[0]), bool(terminations[0]), bool(truncations[0]), {}

    def render(self) -> np.ndarray:
        """The newest frame, as the agent sees it. Shapes: (84, 84, 3)."""
        return np.repeat(self.frames[-1][:, :, None], 3, axis=2)


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with discrete actions, and vectors or Atari's pictures to observe."""
    try:
        if args.atari:
            __import__("ale_py")  # registers the games
            game = gym.spec(args.env_id).kwargs["game"]
            return ReplayableEnv(AtariGame(game, args.sticky_actions, render_mode))
        env = gym.make(args.env_id, **({"render_mode": render_mode} if render_mode else {}))
    except (gym.error.Error, ImportError) as error:
        stop(f"error: --env-id {args.env_id}: {error}")
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(action_space, gym.spaces.Discrete):
        stop(f"error: --env-id {args.env_id}: needs Discrete actions, this one has {action_space}")
    parts = obs_space.values() if isinstance(obs_space, gym.spaces.Dict) else [obs_space]
    if not obs_space.is_np_flattenable or any(len(part.shape or ()) > 2 for part in parts):
        needs = "vectors to observe, or a Dict, or a game such as ALE/Pong-v5"
        stop(f"error: --env-id {args.env_id}: needs {needs}, not {obs_space}")
    if obs_space.shape is None or len(obs_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return ReplayableEnv(env)


def make_envs(args: Args) -> ReplayableVectorEnv:
    """`num_envs` environments stepped together, each started with a seed of its own."""
    envs = ReplayableVectorEnv([lambda: make_env(args)] * args.num_envs)
    seeds = np.random.SeedSequence([args.seed, 0]).generate_state(args.num_envs)
    envs.reset(seed=[int(seed) for seed in seeds])
    return envs


def make_buffer(args: Args, obs_shape: tuple[int, ...]) -> PrioritizedReplayBuffer:
    """The replay memory; one that will not fit is refused now, not hours later when it fills."""
    alpha = args.priority_alpha if args.prioritized else 0.0  # 0: all priorities are the same
    few = PrioritizedReplayBuffer(1000, 1, obs_shape, args.atari, alpha)
    size = args.buffer_size / 1000 * sum(getattr(few, name).nbytes for name in few.ARRAYS)
    memory, free = f"{args.buffer_size:,} transitions in {size / 1e9:.1f} GB", math.inf
    with contextlib.suppress(OSError):  # only Linux tells
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    if args.atari and not args.evaluate:
        print(f"{args.env_id}: the paper's hyperparameters where not given; {memory}", flush=True)
    if size > free and not args.evaluate:
        stop(f"error: --buffer-size: {memory}, but only {free / 1e9:.1f} GB of memory are free")
    return PrioritizedReplayBuffer(args.buffer_size, args.num_envs, obs_shape, args.atari, alpha)


# ---- Training ------------------------------------------------------------------------------------


def train(args: Args) -> None:
    # Setup
    device = setup(args)
    envs = make_envs(args)
    obs_shape, action_space = envs.single_observation_space.shape, envs.single_action_space
    num_actions, first_action = int(action_space.n), int(action_space.start)

    make_network = AtariQNetwork if args.atari else vector_q_network
    q_network = make_network(obs_shape, num_actions).to(device)
    target_network = copy.deepcopy(q_network)
    parameters = list(q_network.parameters())
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
    else:
        optimizer = torch.optim.RMSprop(
            parameters, lr=args.learning_rate, alpha=0.95, eps=0.1 / args.batch_size, centered=True
        )
    td_loss = nn.functional.huber_loss if args.loss == "huber" else nn.functional.mse_loss
    buffer = make_buffer(args, obs_shape)

    @torch.no_grad()
    def greedy_actions(obs: np.ndarray) -> np.ndarray:
        """Shapes: obs (B, ...) -> (B,)."""
        return q_network(torch.from_numpy(obs).float().to(device)).argmax(1).cpu().numpy()

    def deterministic_policy(obs: np.ndarray) -> np.ndarray:
        return greedy_actions(obs[None])[0] + first_action

    def count_lives() -> np.ndarray:
        return np.array([getattr(env.unwrapped, "lives", 0) for env in envs.envs])

    def gradient_step(obs, actions, targets, weights):
        """Gradient of the loss on one minibatch, TD errors, and metrics."""
        q_values = q_network(obs).gather(1, actions[:, None]).squeeze(1)
        assert q_values.shape == targets.shape == weights.shape
        loss = (weights * td_loss(q_values, targets, reduction="none")).mean()
        metrics = {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}
        return torch.autograd.grad(loss, parameters), (targets - q_values).detach(), metrics

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad in the same graph
        gradient_step = torch.compile(gradient_step, fullgraph=True)
    state = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer}
    state |= {"envs": envs, "buffer": buffer}
    run = Run(args, device, state, deterministic_policy, make_env)  # --resume: restores the state
    obs, lives = envs.obs, count_lives()

    while not run.finished:
        remaining = 1 - run.global_step / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        global_step, steps = run.global_step, []
        while global_step < run.global_step + args.iteration_steps:
            # 1. Act
            epsilon = linear_schedule(
                global_step, args.exploration_steps, args.epsilon_start, args.epsilon_end
            )
            explore = np.random.random(args.num_envs) < epsilon
            actions = np.random.randint(num_actions, size=args.num_envs)
            if not explore.all():
                actions = np.where(explore, actions, greedy_actions(obs))

            # 2. Step the environments
            last_obs = obs
            obs, rewards, terminations, truncations, infos = envs.step(actions + first_action)
            dones = terminations | truncations
            next_obs = obs.copy()  # what the actions led to, while obs may begin a new episode
            if dones.any():
                next_obs[dones] = np.stack(infos["final_obs"][dones])
                ended = infos["final_info"]
                run.episodes += zip(ended["return"][dones], ended["length"][dones], strict=True)
            if args.atari:  # what is learned from; returns and episodes above are the game's own
                rewards = rewards.clip(-1, 1) if args.clip_rewards else rewards
                lives, before = count_lives(), lives
                terminations = terminations | (args.episodic_life & (lives < before) & ~dones)
            buffer.add(last_obs, actions, rewards, next_obs, terminations, dones)

            for _ in range(args.num_envs):  # a tick for each environment's step
                global_step += 1
                learns = global_step >= args.learning_starts and buffer.filled > args.num_envs
                if learns and global_step % args.train_frequency == 0:
                    # 3. Targets
                    indices, probabilities = buffer.draw(args.batch_size)
                    batch = Batch(*(part.to(device) for part in buffer.gather(indices)))
                    with torch.no_grad():
                        target_q = target_network(batch.next_obs)
                        online_q = q_network(batch.next_obs) if args.double else target_q
                    rewards, terminations = batch.rewards, batch.terminations
                    targets = double_q_target(rewards, terminations, online_q, target_q, args.gamma)
                    beta = linear_schedule(global_step, args.total_timesteps, args.priority_beta, 1)
                    weights = importance_weights(probabilities, beta).float().to(device)

                    # 4. Update
                    step = gradient_step(batch.obs, batch.actions, targets, weights)
                    gradients, td_errors, step_metrics = step
                    buffer.set_priorities(indices, td_errors.cpu().numpy())
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                    steps.append(step_metrics)
                if global_step % args.target_frequency == 0:
                    polyak_update(target_network, q_network, args.tau)

        # 5. Log, checkpoint, evaluate
        metrics = {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate}
        for name in steps[0] if steps else ():
            metrics[name] = torch.stack([step[name] for step in steps]).mean().item()
        run.end_iteration(global_step, metrics)
    run.finish()


# ---- Run infrastructure: the same bytes in every script ------------------------------------------

SCRIPT = Path(__file__).resolve()
SHA256 = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
LONGEST_EPISODE = 50_000  # steps that a resume replays and an evaluation plays, where none ends


def stop(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr. Code 2: the user's mistake, 3: not finite, 128 + n: signal n."""
    tqdm.write(message, file=sys.stderr)
    sys.exit(code)


def parse_args(args_class: type) -> Any:
    """The command line's arguments; with --resume or --evaluate what it lacks is the folder's."""
    args = tyro.cli(args_class)
    flag, folder = ("--resume", args.resume) if args.resume else ("--evaluate", args.evaluate)
    if folder is None:
        return args
    try:
        about = json.loads(Path(folder, "args.json").read_text())
        if about["script"] != SCRIPT.name:
            stop(f"error: {flag} {folder}: a run of {about['script']}: use that script")
        if about["sha256"] != SHA256:
            tqdm.write(f"warning: {SCRIPT.name} has changed since {folder} began", file=sys.stderr)
        names = {field.name for field in fields(args_class)} & about["args"].keys()
        here = {"run_dir": folder, "resume": args.resume, "evaluate": args.evaluate}
        old = args_class(**{name: about["args"][name] for name in names} | here)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        stop(f"error: {flag} {folder}: not a whole run folder: {error!r}")
    args = tyro.cli(args_class, default=old)
    free = "device torch_threads track capture_video eval_episodes "
    free += "eval_frequency checkpoint_frequency total_timesteps" if args.resume else "seed"
    for name, was in asdict(old).items():
        now = getattr(args, name)
        if now != was and (name not in free.split() or (name == "total_timesteps" and now < was)):
            name = name.replace("_", "-")
            stop(f"error: {flag} {folder}: --{name} is {was} there and cannot become {now}")
    return args


def setup(args: Any) -> torch.device:
    """Seed every generator, set the threads, and return the device."""
    if args.compile and not args.evaluate and not shutil.which(os.environ.get("CXX", "g++")):
        stop("error: --compile needs a C++ compiler, such as g++, which is not here")
    if args.capture_video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo renders without a display only when told
    torch.set_num_threads(args.torch_threads)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    found = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    if args.device not in ["auto", *found]:
        stop(f"error: --device {args.device}: torch finds none here; use auto or cpu")
    return torch.device(found[0] if args.device == "auto" else args.device)


def rng_state() -> dict[str, Any]:
    """State of all global generators, in types that torch.load(weights_only=True) accepts."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return state | {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


class ReplayableEnv(gym.Wrapper):
    """An environment whose whole state is small: its episode's own seed, and the actions since.

    Restoring resets with that seed and repeats the actions. That is exact if reset(seed) fixes the
    episode; where observation or return come out otherwise, the episode restarts, and says so.
    `info` keeps only the episode's return and length, on its last step.
    """

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        if seed is not None:
            self.seed, self.episode = seed, 0
        episode_seed = np.random.SeedSequence([self.seed, self.episode]).generate_state(1)[0]
        self.episode, self.actions, self.length, self.episodic_return = self.episode + 1, [], 0, 0.0
        self.obs = np.array(self.env.reset(seed=int(episode_seed), options=options)[0])
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        if self.length < LONGEST_EPISODE:
            self.actions.append(np.array(action))  # copies: some environments write into arrays
        obs, reward, termination, truncation, _ = self.env.step(action)
        self.obs = np.array(obs)
        self.length, self.episodic_return = self.length + 1, self.episodic_return + float(reward)
        ended = {"return": self.episodic_return, "length": self.length}
        return self.obs, reward, termination, truncation, ended if termination or truncation else {}

    def state_dict(self) -> dict[str, Any]:
        names = ("seed", "episode", "length", "episodic_return")
        tensors = {"actions": torch.tensor(np.array(self.actions)), "obs": torch.tensor(self.obs)}
        return {name: getattr(self, name) for name in names} | tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.episode = state["seed"], state["episode"] - 1
        exact = False
        with contextlib.suppress(Exception):  # what it raises where it went another way
            self.reset()
            for action in state["actions"].numpy():
                self.step(action)
            same_obs = np.array_equal(self.obs, state["obs"].numpy(), equal_nan=True)
            exact = same_obs and self.episodic_return == state["episodic_return"]
        if not exact:
            tqdm.write("warning: environment not restored, its episode restarts", sys.stderr)
            self.reset()


class Run:
    """A run and its folder; knows nothing of the algorithm.

    `state` names all that must survive a kill; each part has state_dict() and load_state_dict().
    `policy` maps one observation to the deterministic action.
    """

    SAVED = ("global_step", "wall_time", "wandb_id")

    def __init__(self, args: Any, device: Any, state: dict, policy: Callable, make_env: Callable):
        self.args, self.device, self.state = args, str(device), state
        self.policy, self.make_env = policy, make_env
        name = f"{args.env_id.replace('/', '-')}__{SCRIPT.stem}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.run_dir or f"runs/{name}")
        self.global_step, self.wall_time, self.wandb_id = 0, 0.0, uuid.uuid4().hex[:8]
        self.episodes, self.recent, self.result = [], "no episode yet", {}
        self.signal, self.wandb, self.bar, self.last_line = 0, None, tqdm(disable=True), 0.0
        self.refuse_what_would_fail()
        if args.resume or args.evaluate:
            self.load_checkpoint()
        self.start_time = time.time() - self.wall_time
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        if args.evaluate:
            return
        with self.writing():
            self.open_folder()
        if args.track:
            self.start_wandb()
        total, begun = args.total_timesteps, self.global_step
        self.bar = tqdm(total=total, initial=begun, unit=" steps", disable=None)  # None: if no tty

    @property
    def finished(self) -> bool:
        return bool(self.args.evaluate) or self.global_step >= self.args.total_timesteps

    def refuse_what_would_fail(self) -> None:
        """The user's mistakes that can be seen before any file is written."""
        if (self.dir / "args.json").exists() and not (self.args.resume or self.args.evaluate):
            stop(f"error: --run-dir {self.dir} holds a run: name another, or --resume {self.dir}")
        tracks = self.args.track and not self.args.evaluate
        if tracks and not getattr(importlib.util.find_spec("wandb"), "origin", None):
            stop("error: --track needs wandb: pip install wandb, or leave it out")
        if self.args.capture_video:
            try:
                import moviepy  # noqa: F401  RecordVideo needs it

                env = self.make_env(self.args, "rgb_array")
                env.reset(seed=0)
                env.render()
                env.close()
            except Exception as error:  # each renderer has its own
                stop(f"error: --capture-video: cannot render {self.args.env_id} here: {error!r}")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A full or read-only disk ends the run in one line, and what was whole stays whole."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of an OSError
            begun, reason = (self.dir / "args.json").exists(), error.__context__ or error
            go_on = f"then --resume {self.dir}" if begun else "or name another --run-dir"
            stop(f"error: cannot write {self.dir}: {reason}: make room, {go_on}")

    def write_whole(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        """Write a file so that a kill at any instant leaves the old one or the new one."""
        temporary = self.dir / f"{name}.tmp"
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.dir / name)

    def open_folder(self) -> None:
        """Make the folder of a new run, or cut a resumed one's metrics back to its checkpoint."""
        self.dir.mkdir(parents=True, exist_ok=True)
        about, lines = self.describe(), []
        if self.args.resume:
            about = json.loads((self.dir / "args.json").read_text())
            with contextlib.suppress(FileNotFoundError, ValueError):  # ValueError: a torn last line
                for text in (self.dir / "metrics.jsonl").read_text().splitlines():
                    lines.append(json.loads(text))
        lines = [line for line in lines if line["global_step"] <= self.global_step]
        if self.finished and (lines or [{}])[-1].get("eval/episodes") == self.args.eval_episodes:
            self.result = {key: x for key, x in lines[-1].items() if key.startswith("eval/")}
        about["args"] = asdict(self.args) | {"resume": None, "evaluate": None}
        metrics = "".join(json.dumps(line) + "\n" for line in lines)
        self.write_whole("args.json", lambda file: file.write(json.dumps(about, indent=2).encode()))
        self.write_whole("metrics.jsonl", lambda file: file.write(metrics.encode()))
        if not self.args.resume and self.dir.resolve() != SCRIPT.parent:
            shutil.copyfile(SCRIPT, self.dir / SCRIPT.name)

    def describe(self) -> dict[str, Any]:
        """Which code runs, and on what."""
        names = ("torch", "gymnasium", "numpy", "mujoco")
        versions = {name: sys.modules[name].__version__ for name in names if name in sys.modules}
        versions["python"] = sys.version.split()[0]
        git = [shutil.which("git") or "false", "-C", str(SCRIPT.parent), "rev-parse", "--verify"]
        commit = subprocess.run([*git, "HEAD"], capture_output=True, text=True).stdout.strip()
        about = {"script": SCRIPT.name, "sha256": SHA256, "git": commit or None}
        return about | {"versions": versions, "device": self.device}

    def start_wandb(self) -> None:
        """Track online where a key and the network allow it, offline otherwise; never ask."""
        import wandb

        os.environ["WANDB_CACHE_DIR"] = os.environ["WANDB_DATA_DIR"] = str(self.dir.resolve())
        args, settings = self.args, wandb.Settings(silent=True, console="off", x_disable_stats=True)
        for mode in (os.environ.get("WANDB_MODE", "online"), "offline"):
            with contextlib.suppress(wandb.Error):  # no network, a wrong key, an unknown entity
                if mode != "online" or wandb.login(prompt=False):
                    self.wandb = wandb.init(
                        project=args.wandb_project_name, entity=args.wandb_entity, mode=mode,
                        name=self.dir.name, group=f"{SCRIPT.stem}__{args.env_id}", dir=self.dir,
                        id=self.wandb_id, resume="allow", config=asdict(args), settings=settings,
                    )
                    break
        if mode == "offline":
            tqdm.write(f"offline; later: wandb sync {self.dir}/wandb/offline-run-*", sys.stderr)
        self.wandb.define_metric("global_step")
        self.wandb.define_metric("*", step_metric="global_step")

    def on_signal(self, number: int, frame: Any) -> None:
        self.signal = number
        os.write(2, b"\nfinishing what must be finished; once more ends at once\n")
        signal.signal(number, signal.SIG_DFL)

    def save_checkpoint(self) -> None:
        checkpoint = {name: part.state_dict() for name, part in self.state.items()}
        checkpoint |= {name: getattr(self, name) for name in self.SAVED} | {"rng": rng_state()}
        with self.writing():
            self.write_whole("checkpoint.pt", lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self) -> None:
        path = self.dir / "checkpoint.pt"
        if self.args.resume and not path.exists():
            return  # killed before its first checkpoint: from step 0
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self.state.items():
                if self.args.resume or isinstance(part, nn.Module):
                    part.load_state_dict(checkpoint[name])
            vars(self).update({name: checkpoint[name] for name in self.SAVED})
            set_rng_state(checkpoint["rng"])
        except Exception as error:  # a file can be wrong in any way
            stop(f"error: {path} is no checkpoint of this run: {error!r:.200}")

    def end_iteration(self, global_step: int, metrics: dict[str, float]) -> None:
        """Do what is due at this step: metrics, evaluation, checkpoint, and what a signal asked."""
        previous, self.global_step = self.global_step, global_step

        def due(frequency: int) -> bool:
            return frequency > 0 and global_step // frequency > previous // frequency

        self.stop_unless_finite(metrics)
        if self.episodes:
            means = np.mean(self.episodes, axis=0).tolist()
            metrics["charts/episodic_return"], metrics["charts/episodic_length"] = means
            metrics["charts/episodes"], self.episodes = len(self.episodes), []
            self.recent = f"return {means[0]:.1f}"
        self.wall_time = time.time() - self.start_time
        metrics["charts/SPS"] = global_step / self.wall_time
        self.write_metrics(metrics)
        self.result = {}
        if due(self.args.eval_frequency) and not self.finished:
            self.evaluate()
        signalled = self.signal
        if self.finished or signalled or due(self.args.checkpoint_frequency):
            self.save_checkpoint()
        self.show_progress(metrics["charts/SPS"])
        if signalled and not self.finished:
            self.bar.close()
            stop(f"stopped; go on: python {SCRIPT.name} --resume {self.dir}", 128 + signalled)

    def stop_unless_finite(self, metrics: dict[str, float]) -> None:
        """A NaN ends the run while its last checkpoint is still good."""
        bad = [name for name, x in metrics.items() if "_loss" in name and not math.isfinite(x)]
        for name, part in self.state.items():
            tensors = part.state_dict().values() if isinstance(part, nn.Module) else []
            bad += [name for tensor in tensors if not tensor.isfinite().all()]
        if bad:
            kept = "is kept" if (self.dir / "checkpoint.pt").exists() else "was not due yet"
            stop(f"error: {bad[0]} not finite at step {self.global_step}; a checkpoint {kept}", 3)

    def write_metrics(self, metrics: dict[str, float]) -> None:
        line = {"global_step": self.global_step, "wall_time": self.wall_time}
        line |= {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self.writing(), open(self.dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.wandb:
            self.wandb.log(line)

    def show_progress(self, speed: float) -> None:
        step, total = self.global_step, self.args.total_timesteps
        self.bar.set_postfix_str(self.recent, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.time() > self.last_line + 10:
            self.last_line, left = time.time(), f"{(total - step) / speed:.0f} s left"
            print(f"{step}/{total} steps, {speed:.0f}/s, {left}, {self.recent}", file=sys.stderr)

    def evaluate(self) -> None:
        """Play whole episodes, the same every time, and log them; training does not notice."""
        before, video = rng_state(), self.args.capture_video
        env = self.make_env(self.args, "rgb_array" if video else None)
        if video:
            folder, name = str(self.dir / "videos"), f"step-{self.global_step}"
            gym.logger.min_level = gym.logger.ERROR  # RecordVideo warns of videos already there
            env = gym.wrappers.RecordVideo(
                env, folder, lambda episode: episode == 0, name_prefix=name, disable_logger=True
            )
        seed = int(np.random.SeedSequence([self.args.seed, 1]).generate_state(1)[0])
        returns = []
        for _ in range(self.args.eval_episodes):
            obs, _ = env.reset(seed=None if returns else seed)
            returns.append(0.0)
            for _ in range(LONGEST_EPISODE):
                obs, reward, termination, truncation, _ = env.step(self.policy(obs))
                returns[-1] += float(reward)
                if termination or truncation:
                    break
            if self.signal and self.finished:
                stop(f"stopped; again: python {SCRIPT.name} --resume {self.dir}", 128 + self.signal)
        env.close()
        if video and self.wandb:
            from wandb import Video

            clip = Video(f"{folder}/{name}-episode-0.mp4", format="mp4")
            self.wandb.log({"global_step": self.global_step, "eval/video": clip})
        set_rng_state(before)
        self.result = {"eval/episodic_return": np.mean(returns)}
        self.result |= {"eval/episodic_return_std": np.std(returns), "eval/episodes": len(returns)}
        if not self.args.evaluate:
            self.write_metrics(self.result)

    def finish(self) -> None:
        """Print the final evaluation as the last line of stdout; the checkpoint is safe by now."""
        if not self.result:
            self.evaluate()
        mean, std, episodes = self.result.values()
        self.bar.close()
        result = f"eval mean_return={mean:.4f} std={std:.4f} episodes={episodes}"
        print(f"{result} global_step={self.global_step} run_dir={self.dir}")


if __name__ == "__main__":
    train(parse_args(Args))
