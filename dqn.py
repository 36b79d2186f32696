"""Deep Q-Network (DQN), complete in this one file.

Q-learning with a neural network: Q(s, a) is trained towards the reward plus the discounted value of
the best next action. Two things keep it stable. Gradient steps use transitions sampled from a large
replay memory, which are nearly independent. Targets come from a second network, a copy of the first
that changes rarely or slowly. Mnih et al. 2015, Nature 518, doi:10.1038/nature14236; a first
version, without the second network, is arXiv:1312.5602.

    for each step:                                                              (Algorithm 1)
        with probability epsilon a random action, otherwise the argmax of Q(s, a)
        store (s, a, r, s') in the replay memory D
        every train_frequency steps:
            sample a minibatch from D
            y = r, if s' is terminal, else r + gamma max_a' Q_target(s', a')
            one gradient step on huber(y - Q(s, a))                             (Methods)
        every target_frequency steps: Q_target = Q (with tau < 1, a part of the way to Q)

    python dqn.py --env-id CartPole-v1 --seed 1
    python dqn.py --env-id ALE/Pong-v5 --seed 1

Deviations from the paper:
- A time limit does not end the task: the target uses the value of s' there (arXiv:1712.00378).
- The target network is copied every 10,000 steps of the agent, as in the authors' code; their table
  counts gradient steps. Where the table says frames, that code and this script count agent steps.
- Epsilon falls from step 1, not from the first gradient step. Atari runs have 10M steps, not 50M.
- With vector observations: a small network, Adam with a learning rate that falls to 0, a target
  network that follows in small steps, and the squared loss: rewards are not clipped there, and
  Huber's loss would limit the effect of rare failures so much that Q grows too high.
- FIRE, if a game has it, comes before the no-ops. After a lost life, FIRE replaces an action that
  is still learned from, and the stack of frames goes on; the authors' code clears the stack and
  plays no-ops there. Evaluation is greedy; the paper keeps an epsilon of 0.05.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from tqdm import tqdm


class Default:
    """Two defaults of a flag: for vectors, and for Atari (the published one, except as listed above
    and total_timesteps)."""

    def __init__(self, vectors: Any, atari: Any) -> None:
        self.vectors, self.atari = vectors, atari

    def __set_name__(self, owner: type, name: str) -> None:
        texts = [f"{x:_}" if type(x) is int else str(x) for x in (self.vectors, self.atari)]
        text = tyro.conf.arg(help_behavior_hint=f"(default: {texts[0]}; on Atari {texts[1]})")
        owner.__annotations__[name] = Annotated[owner.__annotations__[name], text]


@dataclass(frozen=True)
class Args:
    # Algorithm
    learning_rate: float = Default(1e-3, atari=2.5e-4)
    """Step size of the optimizer at the start."""
    anneal_lr: bool = Default(True, atari=False)
    """Lower the learning rate linearly over the run, to 0 at its end."""
    optimizer: Literal["adam", "rmsprop"] = Default("adam", atari="rmsprop")
    """Optimizer; rmsprop is centred and has no momentum, as in the code of Mnih et al. 2015."""
    loss: Literal["huber", "squared"] = Default("squared", atari="huber")
    """Loss of the TD error: its square, or huber, with the gradient clipped to [-1, 1]."""
    precision: Literal["highest", "medium", "bfloat16"] = "highest"
    """Matrix products: highest (float32), medium (faster, less exact), bfloat16 (Atari only)."""
    gamma: float = 0.99
    """Discount factor per step; below 1 where time limits end episodes, or values may diverge."""
    buffer_size: Count = Default(50_000, atari=1_000_000)
    """Transitions in the replay memory; on Atari a million take 7 GB, in a checkpoint, too."""
    learning_starts: Count = Default(1_000, atari=50_000)
    """Environment steps before the first gradient step."""
    train_frequency: Count = 4
    """Environment steps per gradient step."""
    batch_size: Count = Default(128, atari=32)
    """Transitions per gradient step."""
    target_frequency: Count = Default(4, atari=10_000)
    """Environment steps, not gradient steps, between updates of the target network."""
    tau: float = Default(0.02, atari=1.0)
    """Share of the way that a target network moves to the trained one each time; 1: a copy."""
    epsilon_start: float = 1.0
    """Probability of a random action at the start."""
    epsilon_end: float = Default(0.05, atari=0.1)
    """Probability of a random action after --exploration-steps."""
    exploration_steps: Count = Default(20_000, atari=1_000_000)
    """Environment steps over which epsilon falls."""
    log_frequency: Count = 1000
    """Environment steps per iteration; each iteration ends with a line of metrics."""

    # Environment
    env_id: str = "CartPole-v1"
    """Gymnasium environment; "module:Name-v0" imports the module first, "ALE/Name-v5" is Atari."""
    num_envs: Count = 1
    """Environments stepped together."""
    env_kwargs: Json = field(default_factory=dict)
    """Arguments for gymnasium.make: '{"sutton_barto_reward": true}'; on Atari AtariVectorEnv's."""
    async_envs: bool = False
    """One process per environment: faster if a step takes milliseconds, otherwise slower."""
    sticky_actions: float = 0.0
    """Atari: probability that a frame repeats the last action. DQN papers: 0, Gymnasium: 0.25."""
    clip_rewards: bool = True
    """Atari: learn from rewards clipped to [-1, 1]; logged returns are the game's own."""
    episodic_life: bool = True
    """Atari: learn as if a lost life ended the episode; the game goes on."""

    # Run
    seed: Count = 1
    """Seed of everything random; on a CPU, a run repeats exactly with the same --torch-threads."""
    total_timesteps: Count = Default(500_000, atari=10_000_000)
    """Environment steps, rounded up to iterations; if a resume raises the total, schedules jump."""
    run_dir: Text = None
    """Folder of this run; by default runs/{env id}__{script}__{seed}__{unix time}."""
    device: Literal["auto", "cpu", "cuda", "mps"] = Default("cpu", atari="auto")
    """Where the networks live. auto: a GPU if there is one; small networks run faster on a CPU."""
    torch_threads: Count = 1
    """CPU threads of torch; small networks gain nothing from a second one."""
    compile: bool = False
    """Compile the gradient step: needs a C++ compiler, starts seconds later, is often faster."""
    track: bool = False
    """Log to Weights & Biases too; without a key or network, to files that can be synced later."""
    wandb_project_name: str = "deep-rl"
    """Weights & Biases project."""
    wandb_entity: Text = None
    """Weights & Biases team or user; by default your own."""
    capture_video: bool = False
    """Record the first episode of every evaluation in the run folder's videos/."""
    checkpoint_frequency: Count = 100_000
    """Environment steps between checkpoints, in whole iterations; 0: at the end and on a signal."""
    resume: Text = None
    """Run folder to continue from its checkpoint and with its arguments; exact on a CPU."""
    evaluate: Text = None
    """Run folder whose checkpoint to evaluate; trains nothing and writes nothing but videos."""
    eval_frequency: Count = 0
    """Environment steps between evaluations, in whole iterations; 0: only at the end."""
    eval_episodes: Count = 10
    """Whole episodes per evaluation, played with the deterministic policy."""

    @property
    def atari(self) -> bool:
        """Whether the environment is a game, played from its pictures."""
        return self.env_id.startswith("ALE/")

    def __post_init__(self) -> None:
        resolve_defaults(self)
        check_args(self)


# ---- Networks ------------------------------------------------------------------------------------


def vector_q_network(obs_shape: tuple[int, ...], num_actions: int) -> nn.Sequential:
    """Q of every action. Shapes: obs (B, obs_dim) -> (B, num_actions)."""
    hidden = [nn.Linear(*obs_shape, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(84, num_actions))


class AtariQNetwork(nn.Module):
    """Q of every action, from stacked frames. Source: Mnih et al. 2015, Methods.

    Shapes: obs (B, 4, 84, 84), grey levels from 0 to 255 -> (B, num_actions).
    """

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, bfloat16: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16  # in the hidden layers; the last one needs float32
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.hidden = nn.Sequential(
            nn.Conv2d(obs_shape[0], 32, 8, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(),
        )
        self.last = nn.Linear(512, num_actions)
        self.to(memory_format=torch.channels_last)  # convolutions are faster in this layout

    def forward(self, obs: Tensor) -> Tensor:
        obs = obs.to(self.dtype, memory_format=torch.channels_last) / 255
        with torch.autocast(obs.device.type, self.dtype, self.bfloat16):
            hidden = self.hidden(obs)
        return self.last(hidden.float())


# ---- Mathematics of DQN --------------------------------------------------------------------------


def td_target(rewards: Tensor, terminations: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """Reward plus the discounted value of the next observation, which is 0 after a termination.

    Shapes: all (B,) -> (B,). Source: Mnih et al. 2015, Algorithm 1.
    """
    return rewards + gamma * next_values.masked_fill(terminations > 0, 0)


# ---- Buffer and training -------------------------------------------------------------------------


Batch = namedtuple("Batch", "obs actions rewards next_obs terminations")  # tensors (B, ...)


class ReplayBuffer:
    """The newest transitions: actions[i], taken in obs[i], led to rewards[i] and next_obs[i].

    Each step stores one frame: the observation, or on Atari the newest of its four pictures. A
    ring with stacks of four, after a time limit has cut episode a:

        row  frame  action  age  obs            next_obs       can be sampled
        0    a0     2       0    .  .  .  a0    .  .  a0 a1    yes
        1    a1     0       1    .  .  a0 a1    .  a0 a1 a2    yes
        2    a2     -1      2                                  no: the last frame of a, no action
        3    b0     1       0    .  .  .  b0    .  .  b0 b1    yes
        4    b1     3       1    .  .  b0 b1                   no: the next frame is to come
        5-7  old                                               no: older frames are lost; 8: yes

    `ages` count the earlier frames of the episode, up to the size of a stack; frames from
    before it are read as 0 (dots). A terminated episode needs no row for its last observation.
    A row is `valid` while it can be sampled. With n environments, row i + n follows row i.

    Shapes: (size, ...) for arrays of rows, (num_envs,) for next_row and next_age.
    """

    ARRAYS = "frames actions rewards terminations ages valid next_row next_age".split()

    def __init__(self, size: int, num_envs: int, obs_shape: tuple[int, ...], stacked: bool) -> None:
        self.size, self.num_envs = size // num_envs * num_envs, num_envs
        self.obs_shape, self.stack = obs_shape, obs_shape[0] if stacked else 1
        frame_shape, dtype = (obs_shape[1:], np.uint8) if stacked else (obs_shape, np.float32)
        self.frames = np.zeros((self.size, *frame_shape), dtype)  # takes memory when written to
        self.actions = np.full(self.size, -1)
        self.rewards = np.zeros(self.size, np.float32)
        self.terminations = np.zeros(self.size, np.float32)
        self.ages = np.zeros(self.size, np.uint8)
        self.valid = np.zeros(self.size, np.bool_)
        self.next_row = np.arange(num_envs)
        self.next_age = np.zeros(num_envs, np.int64)  # of the frame that next_row will hold
        self.filled = 0  # rows up to the last one written

    def add(self, obs, actions, rewards, next_obs, terminations, dones) -> None:
        """Add one step of all environments. Shapes: (num_envs, ...)."""
        self.write(np.arange(self.num_envs), obs, actions, rewards, terminations)
        cut = np.flatnonzero(dones & ~terminations)  # by a time limit
        if len(cut):
            self.write(cut, next_obs[cut], -1, 0, 0)
        self.next_age[dones] = 0

    def write(self, env_ids, obs, actions, rewards, terminations) -> None:
        """Write one row for each of these environments."""
        i = self.next_row[env_ids]
        self.frames[i] = obs.reshape(len(i), self.stack, *self.frames.shape[1:])[:, -1]
        self.actions[i], self.rewards[i] = actions, rewards
        self.terminations[i] = terminations
        self.ages[i] = self.next_age[env_ids]
        overlapping = (i + (self.stack - 1) * self.num_envs) % self.size
        self.valid[overlapping] = False  # row i was its stack's oldest frame
        previous = i - self.num_envs
        self.valid[previous] = self.actions[previous] >= 0  # its next frame is there now
        self.next_row[env_ids] = (i + self.num_envs) % self.size
        self.next_age[env_ids] = np.minimum(self.next_age[env_ids] + 1, self.stack)
        self.filled = max(self.filled, int(i.max()) + 1)

    def sample(self, batch_size: int, rng: Rng) -> Batch:
        """Transitions, uniformly sampled with replacement. Shapes: (batch_size, ...)."""
        indices = rng.integers(self.filled, size=batch_size)
        while len(wrong := np.flatnonzero(~self.valid[indices])):
            indices[wrong] = rng.integers(self.filled, size=len(wrong))
        return self.read(indices)

    def read(self, i: np.ndarray) -> Batch:
        """The transitions in these rows. Shapes: i (B,) -> (B, ...)."""
        steps_back = np.arange(self.stack - 1, -2, -1)  # -1: the next frame
        frames = self.frames[(i[:, None] - steps_back * self.num_envs) % self.size]
        frames[steps_back > self.ages[i, None]] = 0
        obs = frames[:, :-1].reshape(len(i), *self.obs_shape)
        next_obs = frames[:, 1:].reshape(len(i), *self.obs_shape)
        parts = obs, self.actions[i], self.rewards[i], next_obs, self.terminations[i]
        return Batch(*map(torch.from_numpy, parts))

    def state_dict(self) -> dict[str, Any]:
        written = max(self.filled, self.num_envs)  # next_row and next_age have num_envs entries
        arrays = {name: torch.from_numpy(getattr(self, name)[:written]) for name in self.ARRAYS}
        return arrays | {"filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.filled = state["filled"]
        for name in self.ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name].numpy()


def train(args: Args) -> None:
    # Setup
    device, rng = setup(args)
    envs = make_envs(args)
    torch.manual_seed(args.seed)  # for the initial weights; everything else draws from rng
    obs_shape, action_space = envs.single_observation_space.shape, envs.single_action_space
    num_actions, first_action = int(action_space.n), int(action_space.start)
    q_network = make_q_network(args, obs_shape, num_actions).to(device)
    target_network = copy.deepcopy(q_network)
    optimizer = make_optimizer(args, q_network)
    td_loss = nn.functional.huber_loss if args.loss == "huber" else nn.functional.mse_loss
    buffer = make_buffer(args, obs_shape)

    @torch.no_grad()
    def greedy_actions(obs: np.ndarray) -> np.ndarray:
        """Shapes: obs (B, ...) -> (B,)."""
        return q_network(torch.from_numpy(obs).float().to(device)).argmax(1).cpu().numpy()

    def deterministic_policy(obs: np.ndarray) -> np.ndarray:
        return greedy_actions(obs[None])[0] + first_action

    def gradient_step(obs, actions, targets):
        """Compute the gradients for the next step of the optimizer."""
        q_values = q_network(obs).gather(1, actions[:, None]).squeeze(1)
        assert q_values.shape == targets.shape
        loss = td_loss(q_values, targets)
        loss.backward()
        return {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward() in the same graph
        gradient_step = torch.compile(gradient_step, fullgraph=True)
    state = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer}
    state |= {"buffer": buffer, "rng": rng}
    run = Run(args, device, envs, state, deterministic_policy)
    global_step = run.restore() if args.resume or args.evaluate else 0
    if args.evaluate:
        run.finish()
        return
    end_episodes(buffer, np.array(envs.get_attr("lost_episode")))
    run.begin()
    obs, lives = np.stack(envs.get_attr("obs")), count_lives(args, envs)
    update_metrics = []
    iteration_steps = math.ceil(args.log_frequency / args.num_envs) * args.num_envs
    last_step = math.ceil(args.total_timesteps / iteration_steps) * iteration_steps

    while global_step < last_step:
        # 1. Act
        epsilon = linear_schedule(
            global_step, args.exploration_steps, args.epsilon_start, args.epsilon_end
        )
        explore = rng.random(args.num_envs) < epsilon
        actions = rng.integers(num_actions, size=args.num_envs)
        if not explore.all():
            actions = np.where(explore, actions, greedy_actions(obs))

        # 2. Step the environments
        last_obs = obs
        obs, rewards, terminations, truncations, infos = envs.step(actions + first_action)
        dones = terminations | truncations
        next_obs = obs.copy()  # where an episode ended, obs already begins a new one
        if dones.any():
            next_obs[dones] = np.stack(infos["final_obs"][dones])
            ended = infos["final_info"]
            run.episodes += zip(ended["return"][dones], ended["length"][dones], strict=True)
        if args.atari and args.clip_rewards:  # only to learn from; logged returns are the game's
            rewards = rewards.clip(-1, 1)
        if args.atari and args.episodic_life:
            last_lives, lives = lives, count_lives(args, envs)
            terminations = terminations | ((lives < last_lives) & ~dones)
        buffer.add(last_obs, actions, rewards, next_obs, terminations, dones)

        # Single steps, so that frequencies hold for any num_envs.
        for _ in range(args.num_envs):
            global_step += 1
            learns = global_step >= args.learning_starts and buffer.valid.any()
            if learns and due(global_step, args.train_frequency):
                # 3. Targets
                batch = Batch(*(part.to(device) for part in buffer.sample(args.batch_size, rng)))
                with torch.no_grad():
                    next_values = target_network(batch.next_obs).amax(1)  # Algorithm 1
                targets = td_target(batch.rewards, batch.terminations, next_values, args.gamma)

                # 4. Update
                if args.anneal_lr:
                    remaining = linear_schedule(global_step, args.total_timesteps, 1, 0)
                    optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
                optimizer.zero_grad()
                update_metrics.append(gradient_step(batch.obs, batch.actions, targets))
                optimizer.step()
            if due(global_step, args.target_frequency):
                polyak_update(target_network, q_network, args.tau)

        # 5. Log, checkpoint, evaluate
        if due(global_step, iteration_steps):
            metrics = {"charts/epsilon": epsilon}
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            for name in update_metrics[0] if update_metrics else ():
                metrics[name] = torch.stack([x[name] for x in update_metrics]).mean().item()
            update_metrics = []
            run.end_iteration(global_step, metrics)
    run.finish()


def resolve_defaults(args: Args) -> None:
    """Replace the defaults that depend on the environment by their values."""
    for name, value in list(vars(args).items()):
        if isinstance(value, Default):
            chosen = value.atari if args.atari else value.vectors
            object.__setattr__(args, name, chosen)  # as Args are frozen


def check_args(args: Args) -> None:
    """Raises: ValueError for values that make no sense."""
    check_run_args(args)
    counts = "train_frequency batch_size target_frequency exploration_steps"
    require(args, f"{counts} log_frequency", lambda x: x >= 1, "at least 1")
    require(args, "learning_starts", lambda x: x >= 0, "0 or more")
    unit = "gamma epsilon_start epsilon_end sticky_actions"
    require(args, unit, lambda x: 0 <= x <= 1, "between 0 and 1")
    require(args, "tau", lambda x: 0 < x <= 1, "above 0 and at most 1")
    require(args, "learning_rate", lambda x: 0 < x < math.inf, "above 0")
    least = 8 * args.num_envs
    require(args, "buffer_size", lambda x: x >= least, f"at least 8 * num_envs = {least}")
    if not args.atari:
        require(args, "sticky_actions", lambda x: x == 0, "0, except on Atari")
        require(args, "precision", lambda x: x != "bfloat16", "highest or medium, except on Atari")


# ---- Schedules, optimizer, target network --------------------------------------------------------


def linear_schedule(step: int, duration: int, start: float, end: float) -> float:
    """From start to end in the first `duration` steps, then end."""
    return start + (end - start) * min(1.0, step / duration)


def due(step: int, frequency: int) -> bool:
    """Whether something that happens every `frequency` steps happens at this step."""
    return step % frequency == 0


def make_q_network(args: Args, obs_shape: tuple[int, ...], num_actions: int) -> nn.Module:
    """The network that fits the observations, in the chosen precision."""
    torch.set_float32_matmul_precision("medium" if args.precision == "medium" else "highest")
    if args.atari:
        return AtariQNetwork(obs_shape, num_actions, args.precision == "bfloat16")
    return vector_q_network(obs_shape, num_actions)


def make_optimizer(args: Args, q_network: nn.Module) -> torch.optim.Optimizer:
    """Adam, or RMSProp as in Mnih et al. 2015.

    Their loss is the sum over the minibatch, with an epsilon of 0.01; here it is the mean.
    """
    parameters, learning_rate = list(q_network.parameters()), args.learning_rate
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    return CentredRMSprop(parameters, learning_rate, alpha=0.95, eps=0.01 / args.batch_size**2)


class CentredRMSprop(torch.optim.Optimizer):
    """RMSProp as in the code of Mnih et al. 2015: a step is lr * gradient / sqrt(var + eps).

    Mean and variance of each gradient are exponential averages. The variance has its own recursion:
    torch.optim.RMSprop's E[g^2] - E[g]^2 can fall below 0 by rounding, whose root is NaN.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, alpha: float, eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alpha, eps = group["alpha"], group["eps"]
            for x in (x for x in group["params"] if x.grad is not None):
                state = self.state[x]
                if not state:
                    state.update(mean=torch.zeros_like(x), var=torch.zeros_like(x))
                mean, var = state["mean"], state["var"]
                error = x.grad - mean
                mean.add_(error, alpha=1 - alpha)
                var.addcmul_(error, error, value=1 - alpha).mul_(alpha)
                root = torch.add(var, eps, out=error).sqrt_()  # a new tensor would be slow
                x.addcdiv_(x.grad, root, value=-group["lr"])


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move the target's parameters towards the source's by the share tau; copy the buffers."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.lerp_(new, tau)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):
        old.copy_(new)


# ---- Environments and replay memory --------------------------------------------------------------


def make_envs(args: Args) -> VectorEnv:
    """`num_envs` environments. One whose episode ends is reset in the same step."""

    def env_fn() -> gym.Env:
        if apart and multiprocessing.parent_process():  # all get signals; the parent decides
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: None)  # programs it starts would keep SIG_IGN
        return make_env(args)

    apart = args.async_envs and not args.evaluate
    if apart:  # Python ends its children by SIGTERM, which they ignore
        CLOSING.callback(lambda: [child.kill() for child in multiprocessing.active_children()])
    together = ParallelGames if args.atari else SyncVectorEnv
    vector_env = AsyncVectorEnv if apart else together
    envs = vector_env([env_fn] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    CLOSING.callback(close, envs)
    seeds = np.random.SeedSequence([args.seed, 0]).generate_state(args.num_envs)
    envs.reset(seed=[int(seed) for seed in seeds])
    return envs


class ParallelGames(SyncVectorEnv):
    """Games that step at the same time, each in a thread of its own."""

    def step(self, actions: np.ndarray) -> tuple:
        for env, action in zip(self.envs, actions, strict=True):
            env.unwrapped.send(action)
        return super().step(actions)


class AtariGame(gym.Env):
    """One game of ale-py's C++ vector environment, which makes and stacks the pictures.

    Observations: the 4 newest grey frames of 84 x 84 bytes, each the pixel-wise maximum of the last
    two of 4 emulated ones. A game starts with FIRE and 0 to 28 no-ops, or 0 to 29 without FIRE.
    After a lost life, FIRE is pressed whatever the action, as Breakout would wait for it.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, args: Args, render_mode: str | None) -> None:
        from ale_py.vector_env import AtariVectorEnv

        options = {"reward_clipping": False, "repeat_action_probability": args.sticky_actions}
        game = gym.spec(args.env_id).kwargs["game"]
        self.game = AtariVectorEnv(game, num_envs=1, num_threads=1, **options, **args.env_kwargs)
        self.observation_space = self.game.single_observation_space
        self.action_space, self.render_mode = self.game.single_action_space, render_mode
        discrete = isinstance(self.action_space, gym.spaces.Discrete)
        if self.observation_space.shape != (4, 84, 84) or not discrete:
            raise gym.error.Error("pictures must be 4 grey ones of 84 x 84, and actions discrete")
        names = [action.name for action in self.game.ale.get_action_set()]
        fires = args.env_kwargs.get("use_fire_reset", True) and "FIRE" in names
        self.fire = names.index("FIRE") if fires else None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        obs, info = self.game.reset(seed=seed)
        self.frames, self.lives = obs[0], int(info["lives"][0])
        self.begun = self.lost_life = False
        return self.frames, {}

    def send(self, action: np.ndarray) -> None:
        """Begin a step; `step` waits for its end."""
        fires = self.lost_life and self.fire is not None
        self.game.send(np.array([self.fire if fires else action]))
        self.begun = True

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        if not self.begun:
            self.send(action)
        self.begun = False
        obs, rewards, terminations, truncations, info = self.game.recv()
        self.lost_life = int(info["lives"][0]) < self.lives
        self.frames, self.lives = obs[0], int(info["lives"][0])
        return self.frames, float(rewards[0]), bool(terminations[0]), bool(truncations[0]), {}

    def render(self) -> np.ndarray:
        return np.repeat(self.frames[-1][:, :, None], 3, axis=2)


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with discrete actions, and vectors or Atari's pictures to observe."""
    old_name = args.env_id.split("NoFrameskip")[0].split("Deterministic")[0].split("-v")[0]
    render = {"render_mode": render_mode} if render_mode else {}
    with making(args):
        if args.atari or importlib.util.find_spec("ale_py"):
            __import__("ale_py")  # registers the games
        if args.atari:
            return ReplayableEnv(AtariGame(args, render_mode))
        registered = gym.registry.get(args.env_id)  # Blackjack-v1, say, is no old name of a game
        is_old = not registered or "ale_py" in str(registered.entry_point)
        if is_old and f"ALE/{old_name}-v5" in gym.registry:
            raise gym.error.NameNotFound(f"this game is ALE/{old_name}-v5 today")
        env = gym.make(args.env_id, **(args.env_kwargs | render))
    action_space = env.action_space
    if not isinstance(action_space, gym.spaces.Discrete):
        close(env)
        stop(f"error: --env-id {args.env_id}: needs Discrete actions, this one has {action_space}")
    return ReplayableEnv(flatten_observations(args, env))


def end_episodes(buffer: Any, lost: np.ndarray) -> None:
    """Never sample the newest transition of a lost episode: it has no next observation."""
    buffer.actions[buffer.next_row[lost] - buffer.num_envs] = -1
    buffer.next_age[lost] = 0


def count_lives(args: Args, envs: VectorEnv) -> np.ndarray:
    """Lives that are left in each game; 0 if not on Atari. Shapes: (num_envs,)."""
    return np.array(envs.get_attr("lives") if args.atari else [0] * args.num_envs)


def make_buffer(args: Args, obs_shape: tuple[int, ...]) -> ReplayBuffer:
    """The replay memory. One that will not fit is refused now, not hours later when it fills."""
    small = ReplayBuffer(1000, 1, obs_shape, args.atari)
    gigabytes = args.buffer_size / 1e12 * sum(getattr(small, x).nbytes for x in small.ARRAYS)
    memory, free = f"{args.buffer_size:,} transitions in {gigabytes:.1f} GB", math.inf
    with contextlib.suppress(OSError, IndexError):  # only on Linux
        kilobytes = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        free = int(kilobytes) * 1024 / 1e9
    if args.learning_starts > args.total_timesteps and not args.evaluate:
        warn(f"--learning-starts {args.learning_starts} is after the end: it may learn nothing")
    if args.atari and not args.evaluate:
        print(f"{args.env_id}: published values for flags not given; {memory}", flush=True)
    if gigabytes > free and not args.evaluate:
        stop(f"error: --buffer-size: {memory}, but only {free:.1f} GB of memory are free")
    return ReplayBuffer(args.buffer_size, args.num_envs, obs_shape, args.atari)


# ---- Run infrastructure: the same bytes in every script ------------------------------------------

SCRIPT = Path(__file__).resolve()
SHA256 = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
CLOSING = contextlib.ExitStack()  # what is closed at the end, however that comes
LONGEST_EPISODE = 50_000  # most steps that a resume repeats or an evaluation plays


def parse_count(text: str) -> int:
    """Read a whole number that may be written 1000000, 1_000_000 or 1e6."""
    if not float(text).is_integer():
        raise ValueError(f"not a whole number: {text}")
    return int(float(text)) if "e" in text.lower() or "." in text else int(text)


def flag_type(kind: type, metavar: str, parse: Callable, show: Callable) -> Any:
    """Annotation of a flag that is read by `parse` and printed by `show`."""
    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=lambda texts: parse(texts[0]),
        is_instance=lambda x: isinstance(x, kind), str_from_instance=lambda x: [show(x)],
    )
    return Annotated[kind, spec]


Count = flag_type(int, "INT", parse_count, "{:_}".format)
Json = flag_type(dict, "JSON", json.loads, json.dumps)
Text = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]


def require(args: Any, names: str, allowed: Callable[[Any], bool], text: str) -> None:
    """Check fields of the arguments. Raises: ValueError, which tyro reports with exit code 2."""
    for name in names.split():
        value = getattr(args, name)
        if not allowed(value):
            raise ValueError(f"--{name.replace('_', '-')} must be {text}, got {value}")


def check_run_args(args: Any) -> None:
    """Check the arguments that every script has. Raises: ValueError."""
    counts = "total_timesteps num_envs eval_episodes torch_threads"
    require(args, counts, lambda x: x >= 1, "at least 1")
    require(args, "torch_threads", lambda x: x <= 1024, "at most 1024")
    require(args, "checkpoint_frequency eval_frequency", lambda x: x >= 0, "0 or more")
    require(args, "seed", lambda x: 0 <= x < 2**32, "between 0 and 2**32 - 1")
    require(args, "env_kwargs", lambda x: isinstance(x, dict), "a JSON object")
    is_name = '"Name-v0" or "module:Name-v0"'
    require(args, "env_id", lambda x: x.count(":") < 2 and x[:1] not in (".", ":", ""), is_name)
    require(args, "run_dir resume evaluate", lambda x: x != "", "the path of a run folder")
    barred = set("/\\#?%:")  # by wandb
    require(args, "wandb_project_name", barred.isdisjoint, "a name without / \\ # ? % :")
    require(args, "evaluate", lambda x: x is None or args.resume is None, "without --resume")


def parse_flags(args_class: type, default: Any) -> Any:
    """The arguments as tyro reads them; help and mistakes end here, as they should."""
    try:
        return tyro.cli(args_class, default=default)
    except BrokenPipeError:  # what read --help, such as head, has enough
        os._exit(0)
    except SystemExit as error:
        raise Stop(error.code) from None


def parse_args(args_class: type) -> Any:
    """Read the command line. --resume and --evaluate take most arguments from the run folder."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  daemons may have closed it
    CLOSING.push(refuse_exit)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget_signals)
    args = parse_flags(args_class, args_class())
    flag, folder = ("--resume", args.resume) if args.resume else ("--evaluate", args.evaluate)
    if folder is None:  # again, as defaults may depend on the environment
        return parse_flags(args_class, args_class(env_id=args.env_id))
    try:
        about = json.loads(Path(folder, "args.json").read_text())
        if about["script"] != SCRIPT.name:
            stop(f"error: {flag} {folder}: a run of {about['script']}: use that script")
        if about["sha256"] != SHA256:
            warn(f"{SCRIPT.name} has changed since {folder} began")
        names = {field.name for field in fields(args_class)} & about["args"].keys()
        here = {"run_dir": folder, "resume": args.resume, "evaluate": args.evaluate}
        old = args_class(**{name: about["args"][name] for name in names} | here)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        stop(f"error: {flag} {folder}: not a complete run folder: {error!r}")
    args = parse_flags(args_class, old)
    free = "device torch_threads track capture_video eval_episodes "
    free += "eval_frequency checkpoint_frequency total_timesteps" if args.resume else "seed"
    for name, was in asdict(old).items():
        now = getattr(args, name)
        if now != was and (name not in free.split() or (name == "total_timesteps" and now < was)):
            name = name.replace("_", "-")
            stop(f"error: {flag} {folder}: --{name} is {was} there and cannot become {now}")
    if args.total_timesteps > old.total_timesteps:
        warn("schedules, such as that of the learning rate, jump: they end at the new total")
    return args


def stop(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr. Code 2: the user's mistake, 3: not finite, 128 + n: signal n."""
    with contextlib.suppress(OSError):  # Ctrl-C may have ended its reader, such as tee
        tqdm.write(message, file=sys.stderr)
    raise Stop(code)


class Stop(SystemExit):
    """An end of our own making."""


def refuse_exit(kind: Any, error: Any, trace: Any) -> None:
    """Whoever else calls sys.exit(), such as an environment, must not end a run in silence."""
    if kind is SystemExit:
        raise RuntimeError("something called sys.exit(), such as the environment") from error


@functools.cache  # each line once, though every episode may cause it
def warn(message: str) -> None:
    with contextlib.suppress(OSError):
        tqdm.write(f"warning: {message}", file=sys.stderr)


def setup(args: Any) -> tuple[torch.device, Rng]:
    """Prepare this process. Returns the device and the generator of this run."""
    found = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    if args.device not in ["auto", *found]:
        stop(f"error: --device {args.device}: torch finds none here; use auto or cpu")
    device = torch.device(found[0] if args.device == "auto" else args.device)
    compiles = args.compile and not args.evaluate and device.type == "cpu"
    if compiles and not shutil.which(os.environ.get("CXX", "g++")):
        stop("error: --compile needs a C++ compiler, such as g++, and found none")
    if args.capture_video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # lets MuJoCo render without a display
    sys.path.append("")  # so that "module:Name-v0" is found in the working directory, too
    os.environ["PWD"] = os.getcwd()  # for the run folder: environments may leave the directory
    for number in (signal.SIGINT, signal.SIGTERM):  # until the run can save anything
        signal.signal(number, lambda number, _: stop("stopped before it began", 128 + number))
    if args.capture_video:  # before the training environments: it may draw what they draw
        try:
            import moviepy  # noqa: F401  RecordVideo needs it
            with contextlib.closing(make_env(args, "rgb_array")) as env:
                env.reset(seed=0)
                frame, rate = env.render(), env.metadata.get("render_fps", 30)
            if np.ndim(frame) != 3 or not rate:
                raise ValueError(f"{rate} frames per second, shape {np.shape(frame)}")
        except Exception as error:  # each renderer raises its own
            stop(f"error: --capture-video: cannot render {args.env_id} here: {error!r}")
    torch.set_num_threads(args.torch_threads)
    return device, Rng(np.random.PCG64(args.seed))


def forget_signals() -> None:
    """In a process that an environment has started: it must not answer for the run."""
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches it too, and the run goes on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what its terminate() sends


class Rng(np.random.Generator):
    """The run's own random numbers; an environment may seed or use NumPy's global ones."""

    def state_dict(self) -> dict[str, Any]:
        return self.bit_generator.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bit_generator.state = state


def describe(device: torch.device) -> dict[str, Any]:
    """Which code runs, and on what."""
    names = ("torch", "gymnasium", "numpy", "mujoco", "ale_py")
    versions = {name: sys.modules[name].__version__ for name in names if name in sys.modules}
    about = {"script": SCRIPT.name, "sha256": SHA256, "git": None, "device": str(device)}
    with contextlib.suppress(OSError):  # without git, the commit is None
        git = ["git", "-C", str(SCRIPT.parent), "rev-parse", "--verify", "HEAD"]
        about["git"] = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return about | {"versions": versions | {"python": sys.version.split()[0]}}


@contextlib.contextmanager
def making(args: Any) -> Iterator[None]:
    """If the environment cannot be made, end with one line that says why."""
    try:
        yield
    except Exception as error:  # environments refuse --env-kwargs in many ways
        if not args.env_kwargs and not isinstance(error, gym.error.Error | ImportError):
            raise
        kwargs = f" --env-kwargs '{json.dumps(args.env_kwargs)}'" if args.env_kwargs else ""
        stop(f"error: --env-id {args.env_id}{kwargs}: {str(error) or repr(error)}")


def flatten_observations(args: Any, env: gym.Env) -> gym.Env:
    """The environment with flat vectors as observations. Pictures and texts are refused."""
    space, numbers = env.observation_space, (gym.spaces.Box, gym.spaces.Discrete)
    numbers += (gym.spaces.MultiBinary, gym.spaces.MultiDiscrete)
    parts = {"it": space}
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        parts = dict(space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space))
    for key, part in parts.items():
        if not isinstance(part, numbers) or len(part.shape) > 2:
            close(env)
            stop(f"error: --env-id {args.env_id}: needs vectors to observe, but {key} is {part}")
    is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    return env if is_vector else gym.wrappers.FlattenObservation(env)


class ReplayableEnv(gym.Wrapper):
    """An environment that is saved as the seed of its current episode and the actions since.

    Restoring repeats the actions, which is exact if reset(seed) determines the episode; if it comes
    out different, a new one starts. `info` holds return and length on an episode's last step.
    """

    SAVED = ("seed", "episode", "length", "episodic_return", "actions", "obs")
    lost_episode = False  # whether the last restoring came out different

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        if seed is not None:
            self.seed, self.episode = seed, 0
        episode_seed = np.random.SeedSequence([self.seed, self.episode]).generate_state(1)[0]
        obs, _ = self.env.reset(seed=int(episode_seed) // 2, options=options)  # below 2**31
        self.episode += 1
        self.actions, self.length = [], 0
        self.episodic_return = 0.0
        self.obs = np.array(obs, self.observation_space.dtype)
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        action = np.asarray(action, self.action_space.dtype)[()]  # some refuse another dtype
        if self.length < LONGEST_EPISODE:
            self.actions.append(np.array(action))  # a copy: some environments change their action
        try:
            obs, reward, termination, truncation, _ = self.env.step(action)
        except SystemExit as error:  # perhaps its window was closed
            raise RuntimeError("the environment called sys.exit()") from error
        reward = np.asarray(reward).item()  # some environments return an array of one number
        self.obs = np.array(obs, self.observation_space.dtype)
        self.length += 1
        self.episodic_return += float(reward)
        if not (termination or truncation):
            return self.obs, reward, termination, truncation, {}
        if not (math.isfinite(self.episodic_return) and np.isfinite(self.obs).all()):
            warn("the environment sent a reward or an observation that is not finite")
        ended = {"return": self.episodic_return, "length": self.length}
        return self.obs, reward, termination, truncation, ended

    @property
    def snapshot(self) -> dict[str, np.ndarray]:
        """The saved state; assigning one restores it."""
        return {name: np.array(getattr(self, name)) for name in self.SAVED}

    @snapshot.setter
    def snapshot(self, saved: dict[str, np.ndarray]) -> None:
        self.seed, self.episode = int(saved["seed"]), int(saved["episode"]) - 1
        self.lost_episode = True
        with contextlib.suppress(Exception):  # an episode that differs may raise anything
            self.reset()
            for action in saved["actions"].copy():  # some environments change their action
                self.step(action)
            now = self.snapshot
            same = (np.array_equal(now[x], saved[x], equal_nan=True) for x in self.SAVED)
            self.lost_episode = not all(same)
        if self.lost_episode:
            warn("environment not restored, a new episode starts")
            self.reset()


def close(envs: gym.Env | VectorEnv) -> None:
    """Close environments, once. An error in closing is only a warning."""
    if not getattr(envs, "closed", False):
        for env in getattr(envs, "envs", [envs]):
            try:  # without waiting for a process that is dead or in the middle of a step
                env.close(**({"timeout": 0} if hasattr(env, "processes") else {}))
            except (Exception, SystemExit) as error:
                warn(f"an environment could not be closed: {error!r}")
        envs.closed = True  # so that neither Gymnasium nor the end of the process does it again


class Run:
    """A run and its folder. It depends on no algorithm.

    `state` names all else that a checkpoint must hold; each part has state_dict() and
    load_state_dict(). Evaluation needs all parts but those whose names end as in TRAINING_ONLY.
    `policy` maps one observation to the deterministic action.
    """

    SAVED = ("global_step", "wall_time", "eval_due", "wandb_id")
    TRAINING_ONLY = ("optimizer", "buffer", "rng")

    def __init__(self, args: Any, device: Any, envs: VectorEnv, state: dict, policy: Any) -> None:
        self.args, self.device = args, device
        self.envs, self.state = envs, state
        self.policy = policy
        name = f"{args.env_id}__{SCRIPT.stem}__{args.seed}__{int(time.time())}"
        name = args.run_dir or f"runs/{name.replace('/', '-').replace(':', '-')}"
        self.dir = Path(os.environ["PWD"], name)
        self.global_step, self.wall_time = 0, 0.0  # at the end of the last iteration
        self.eval_due = False  # whether an evaluation at this step is still to come
        self.wandb, self.wandb_id = None, None
        self.episodes = []  # (return, length) of those that ended since the last line of metrics
        self.recent_return = "no episode yet"
        self.result = {}  # the last evaluation, if nothing was learned since
        self.bar, self.last_line = tqdm(disable=True), 0.0
        self.signal, self.signal_time = 0, 0.0
        with self.writing():
            self.refuse_what_would_fail()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def again(self, flag: str = "--resume") -> str:
        """A command that can be pasted anywhere."""
        command = shlex.join(["python", str(SCRIPT), flag, str(self.dir.resolve())])
        has_module = ":" in self.args.env_id  # perhaps in the working directory
        return f"cd {shlex.quote(os.environ['PWD'])} && {command}" if has_module else command

    def refuse_what_would_fail(self) -> None:
        """Report the user's mistakes that can be seen before any file is written."""
        new = self.args.run_dir and not self.args.resume and not self.args.evaluate
        if new and any((self.dir / name).exists() for name in ("args.json", "checkpoint.pt")):
            stop(f"error: --run-dir {self.dir} holds a run: name another, or --resume {self.dir}")
        tracks = self.args.track and not self.args.evaluate
        if tracks and not getattr(importlib.util.find_spec("wandb"), "origin", None):
            stop("error: --track needs wandb: pip install wandb, or leave it out")
        own_copy = self.dir / SCRIPT.name
        if new and own_copy.is_file() and own_copy.read_bytes() not in (b"", SCRIPT.read_bytes()):
            stop(f"error: --run-dir {self.dir} holds another {SCRIPT.name}: name another folder")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """If writing fails, end with one line; complete files stay intact."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
            begun = os.path.exists(self.dir / "args.json")  # False, too, if the name is too long
            way_out = "free space" + (f", then {self.again()}," if begun else "")
            way_out += " or name another --run-dir"
            stop(f"error: cannot write {self.dir}: {error.__context__ or error}: {way_out}")

    def write_whole(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        """Write a file so that a kill at any instant leaves the old one or the new one."""
        temporary = self.dir / f"{name}.tmp"
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.dir / name)

    def begin(self) -> None:
        """Start the clock, the run folder, wandb and the progress bar."""
        self.start_time = time.monotonic() - self.wall_time
        with self.writing():
            self.claim_folder()
            self.open_folder()
        if self.args.track:
            self.start_wandb()
        modules = nn.ModuleList(x for x in self.state.values() if isinstance(x, nn.Module))
        groups = [group for x in self.state.values() for group in getattr(x, "param_groups", ())]
        if not {weight for x in groups for weight in x["params"]} <= set(modules.parameters()):
            warn("a network that is trained is not in `state`: a resume would lose it")
        total, begun = self.args.total_timesteps, self.global_step
        self.bar = tqdm(total=total, initial=begun, unit=" steps", disable=None)  # None: if no tty
        if self.eval_due and not self.result:
            self.evaluate()

    def claim_folder(self) -> None:
        """Make the folder, if that is left to do, and keep other processes from training in it."""
        name, tries = self.dir.name, 1
        while tries:
            try:
                self.dir.mkdir(parents=True, exist_ok=self.args.run_dir is not None)
                tries = 0
            except FileExistsError:
                if self.args.run_dir or not self.dir.exists():  # a link that leads nowhere
                    raise
                tries += 1
                self.dir = self.dir.with_name(f"{name}__{tries}")  # begun in the same second
        self.script = CLOSING.enter_context(open(self.dir / SCRIPT.name, "ab"))  # noqa: SIM115
        with contextlib.suppress(ImportError, OSError):  # Windows has no fcntl, some disks no locks
            import fcntl
            try:
                fcntl.flock(self.script, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stop(f"error: --run-dir {self.dir}: another process trains in it")

    def open_folder(self) -> None:
        """Begin the files of a new run, or cut a resumed one's metrics back to its checkpoint."""
        about, lines = describe(self.device), []
        if self.args.resume:
            about = json.loads((self.dir / "args.json").read_text())
            with contextlib.suppress(FileNotFoundError, ValueError):  # ValueError: half a last line
                for text in (self.dir / "metrics.jsonl").read_bytes().splitlines():
                    lines.append(json.loads(text))
        lines = [line for line in lines if line["global_step"] <= self.global_step]
        last = lines[-1] if lines else {}
        if last.get("eval/episodes") == self.args.eval_episodes:
            names = ("eval/episodic_return", "eval/episodic_return_std", "eval/episodes")
            self.result = {name: last.get(name, math.nan) for name in names}
        about["args"] = asdict(self.args) | {"resume": None, "evaluate": None}
        metrics = "".join(json.dumps(line) + "\n" for line in lines)
        self.write_whole("args.json", lambda file: file.write(json.dumps(about, indent=2).encode()))
        text, own_copy = SCRIPT.read_bytes(), self.dir / SCRIPT.name
        if about["sha256"] == SHA256 and own_copy.read_bytes() != text:  # a resume: if cut short
            self.script.truncate(0)
            self.script.write(text)
            self.script.flush()
        self.write_whole("metrics.jsonl", lambda file: file.write(metrics.encode()))

    def start_wandb(self) -> None:
        """Log online where a key and the network allow it, otherwise offline; never ask."""
        import wandb
        os.environ["WANDB_CACHE_DIR"] = os.environ["WANDB_DATA_DIR"] = str(self.dir.resolve())
        args, settings = self.args, wandb.Settings(silent=True, console="off", x_disable_stats=True)
        for mode in (os.environ.get("WANDB_MODE") or "online", "offline"):
            with contextlib.suppress(wandb.Error):  # no network, a wrong key, an unknown entity
                if mode != "online" or wandb.login(prompt=False):
                    self.wandb_id = self.wandb_id or os.urandom(4).hex()
                    self.wandb = wandb.init(
                        project=args.wandb_project_name, entity=args.wandb_entity, mode=mode,
                        name=self.dir.name, dir=self.dir,
                        group=os.environ.get("WANDB_RUN_GROUP", f"{SCRIPT.stem}__{args.env_id}"),
                        id=self.wandb_id, resume="allow", config=asdict(args), settings=settings,
                    )
                    break
        if mode == "offline":
            folder = shlex.quote(f"{self.dir}/wandb")
            tqdm.write(f"offline; later: wandb sync {folder}/offline-run-*", sys.stderr)
        self.wandb.define_metric("global_step")
        self.wandb.define_metric("*", step_metric="global_step")

    def on_signal(self, number: int, frame: Any) -> None:
        """Note the first signal. A repeat within 2 s is ignored; a later signal ends at once."""
        if self.signal and time.monotonic() > self.signal_time + 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this iteration; press Ctrl-C again to quit now.\n")

    def stop_if_asked(self) -> None:
        """End here if a signal came."""
        if self.signal:
            self.bar.close()
            again = self.again("--evaluate" if self.args.evaluate else "--resume")
            stop(f"stopped; go on: {again}", 128 + self.signal)

    def save_checkpoint(self) -> None:
        checkpoint = {name: part.state_dict() for name, part in self.state.items()}
        snapshots = self.envs.get_attr("snapshot")
        checkpoint["envs"] = [{k: torch.from_numpy(x) for k, x in s.items()} for s in snapshots]
        checkpoint |= {name: getattr(self, name) for name in self.SAVED}
        checkpoint["torch_rng"] = torch.get_rng_state()  # for copies of this script that use it
        with self.writing():
            self.write_whole("checkpoint.pt", lambda file: torch.save(checkpoint, file))
        torch.load(self.dir / "checkpoint.pt", weights_only=True, mmap=True)  # refuses NumPy arrays

    def restore(self) -> int:
        """Load the checkpoint; --evaluate omits TRAINING_ONLY parts. Returns its global step."""
        path = self.dir / "checkpoint.pt"
        if self.args.resume and not path.exists():
            return 0  # killed before its first checkpoint
        try:  # mmap: a replay memory is copied from the file, and never twice in memory
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for name, part in self.state.items():
                if self.args.resume or not name.endswith(self.TRAINING_ONLY):
                    part.load_state_dict(checkpoint[name])
            vars(self).update({name: checkpoint[name] for name in self.SAVED})
            if self.args.resume:
                torch.set_rng_state(checkpoint["torch_rng"].clone())
                snapshots = [{k: x.numpy() for k, x in s.items()} for s in checkpoint["envs"]]
        except Exception as error:  # a damaged file can raise anything
            stop(f"error: {path} is no checkpoint of this run: {error!r:.200}")
        if self.args.resume:
            self.envs.set_attr("snapshot", snapshots)
        return self.global_step

    def end_iteration(self, global_step: int, metrics: dict[str, float]) -> None:
        """Log; save and evaluate where it is due; end the run if a signal asked for it."""
        previous, self.global_step = self.global_step, global_step
        finished = global_step >= self.args.total_timesteps

        def passed(frequency: int) -> bool:
            return frequency > 0 and global_step // frequency > previous // frequency

        self.stop_unless_finite(metrics)
        if self.episodes:
            mean_return, mean_length = np.mean(self.episodes, axis=0).tolist()
            metrics["charts/episodic_return"] = mean_return
            metrics["charts/episodic_length"] = mean_length
            metrics["charts/episodes"] = len(self.episodes)
            self.recent_return = f"return {mean_return:.1f}"
            self.episodes = []
        self.wall_time = time.monotonic() - self.start_time
        metrics["charts/SPS"] = global_step / self.wall_time
        self.write_metrics(metrics)
        self.result = {}
        self.eval_due = passed(self.args.eval_frequency) and not finished
        due = finished or self.eval_due or passed(self.args.checkpoint_frequency)
        if saved := bool(due or self.signal):
            self.save_checkpoint()  # first, as evaluations take long and environments fail
        self.show_progress(metrics["charts/SPS"])
        if self.eval_due:
            self.evaluate()
        if saved and not finished:
            self.stop_if_asked()

    def stop_unless_finite(self, metrics: dict[str, float]) -> None:
        """A NaN or infinity ends the run while its last checkpoint is still good."""
        returns = [*self.envs.get_attr("episodic_return"), *(x for x, _ in self.episodes)]
        sent = {"an observation": self.envs.get_attr("obs"), "a reward": returns}
        bad = [f"{name} of the environment" for name, x in sent.items() if not np.isfinite(x).all()]
        bad += [name for name, x in metrics.items() if "_loss" in name and not math.isfinite(x)]
        for name, part in self.state.items():
            tensors = () if name.endswith(self.TRAINING_ONLY) else part.state_dict().values()
            bad += [name for x in tensors if isinstance(x, Tensor) and not x.isfinite().all()]
        if bad:
            kept = "is kept" if (self.dir / "checkpoint.pt").exists() else "was not due yet"
            stop(f"error: {bad[0]} not finite at step {self.global_step}; a checkpoint {kept}", 3)

    def write_metrics(self, metrics: dict[str, float]) -> None:
        line = {"global_step": self.global_step, "wall_time": self.wall_time}
        line |= {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self.writing(), open(self.dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line, default=float) + "\n")
        if self.wandb:
            self.wandb.log(line)

    def show_progress(self, speed: float) -> None:
        step, total = self.global_step, max(self.args.total_timesteps, self.global_step)
        self.bar.set_postfix_str(self.recent_return, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.monotonic() > self.last_line + 10:
            self.last_line = time.monotonic()
            times = f"{speed:.0f}/s, {(total - step) / speed:.0f} s left"
            with contextlib.suppress(OSError):
                print(f"{step}/{total} steps, {times}, {self.recent_return}", file=sys.stderr)

    def evaluate(self) -> None:
        """Play whole episodes, each time from the same seed, and log them unless a signal came."""
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        env = make_env(self.args, "rgb_array" if self.args.capture_video else None)
        if self.args.capture_video:
            folder, name = str(self.dir / "videos"), f"step-{self.global_step}"
            gym.logger.min_level = gym.logger.ERROR  # RecordVideo warns of videos already there
            env = gym.wrappers.RecordVideo(
                env, folder, lambda episode: episode == 0, name_prefix=name, disable_logger=True
            )
        seed = int(np.random.SeedSequence([self.args.seed, 1]).generate_state(1)[0])
        returns = []
        try:
            while len(returns) < self.args.eval_episodes and not self.signal:
                obs, _ = env.reset(seed=None if returns else seed)
                returns.append(0.0)
                for _ in range(LONGEST_EPISODE):
                    obs, reward, termination, truncation, _ = env.step(self.policy(obs))
                    returns[-1] += float(reward)
                    if termination or truncation or self.signal:
                        break
        finally:
            close(env)
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # environments may share the global generators
        random.setstate(before[2])
        self.stop_if_asked()
        if self.args.capture_video and self.wandb:
            from wandb import Video
            clip = Video(f"{folder}/{name}-episode-0.mp4", format="mp4")
            self.wandb.log({"global_step": self.global_step, "eval/video": clip})
        self.result = {"eval/episodic_return": np.mean(returns)}
        self.result |= {"eval/episodic_return_std": np.std(returns), "eval/episodes": len(returns)}
        if not self.args.evaluate:
            self.write_metrics(self.result)

    def finish(self) -> None:
        """Evaluate, unless that is done, and print the result as the last line of stdout."""
        if not self.result:
            self.evaluate()
        mean, std, episodes = self.result.values()
        self.bar.close()
        close(self.envs)
        result = f"eval mean_return={mean:.4f} std={std:.4f} episodes={episodes}"
        folder = self.args.run_dir or self.dir.relative_to(os.environ["PWD"])
        result += f" global_step={self.global_step} run_dir={folder}"
        try:
            print(result, flush=True)
        except OSError as error:  # a full disk, or a reader that is gone
            stop(f"error: stdout: {error.strerror}: {result}")


if __name__ == "__main__":
    with CLOSING:  # ends before Python waits for threads, which environments may have
        train(parse_args(Args))
