"""Proximal Policy Optimization (PPO) for Atari games, complete in this one file.

The PPO of `ppo_continuous.py` with what games need: one network that sees the last four frames and
gives both the policy and the value, rewards clipped to [-1, 1], and a lost life that counts as the
end of an episode. Schulman et al. 2017, arXiv:1707.06347; equation numbers are theirs.

    for each iteration:
        run the policy for num_steps in each of num_envs games                  (Algorithm 1)
        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                               (eq. 12)
        A_t = delta_t + gamma lambda A_{t+1}, R_t = A_t + V(s_t)                (eq. 11, recursive)
        (no V(s_{t+1}) after a termination, no A_{t+1} after the end of an episode or rollout)
        for each epoch and each minibatch:
            ratio = pi(a|s) / pi_old(a|s)                                       (section 3)
            L = mean of min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)           (eq. 7)
            one Adam step on -L + c1 (V(s) - R)^2 / 2 - c2 entropy              (eq. 9)

    python ppo_atari.py --env-id ALE/Pong-v5 --seed 1
    torchrun --nproc-per-node 2 ppo_atari.py --env-id ALE/Pong-v5 --seed 1

In the second command, each of two processes plays half of the games. The mean of their gradients is
that of the whole minibatch, so only rounding differs (which in a long run acts like another seed).

Deviations from the paper:
- Where a time limit ends an episode, the return continues with V of its last observation
  (arXiv:1712.00378): the limit is not part of the task, so it must not change the values.
- As in OpenAI Baselines: the network of DQN (Nature, 2015), orthogonal weights, normalised
  advantages, clipped gradients, a clipped value loss of a quarter of the paper's weight (c1 is 1/2,
  and the loss is half the squared error), 4 epochs instead of 3, and Adam's epsilon of 1e-5.
- In the paper, eps falls to 0; here it stays. A minibatch holds all games at random time steps,
  whichever process plays them. Evaluation takes the most probable action, not a sampled one.
- After a lost life, FIRE replaces an action that is still learned from, and the stack of frames
  goes on. A game begins with FIRE and then no-ops; in Baselines, FIRE comes last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import io
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
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # Algorithm
    learning_rate: float = 2.5e-4
    """Step size of Adam at the start."""
    anneal_lr: bool = True
    """Lower the learning rate linearly over the run, to 0 at its end."""
    precision: Literal["highest", "medium", "bfloat16"] = "highest"
    """Matrix products: highest (float32), medium (faster, less exact), bfloat16 (hidden layers)."""
    gamma: float = 0.99
    """Discount factor per step; below 1 where time limits end episodes, or values may diverge."""
    gae_lambda: float = 0.95
    """Lambda of GAE. 0: V after one reward; 1: V only at the rollout's end; arXiv:1506.02438."""
    num_steps: Count = 128
    """Steps of each environment per iteration."""
    num_minibatches: Count = 4
    """Minibatches per epoch; must divide --num-steps."""
    update_epochs: Count = 4
    """Passes over the rollout per iteration."""
    norm_adv: bool = True
    """Normalise advantages in each minibatch (arXiv:2006.05990, section 3.3: little effect)."""
    clip_coef: float = 0.1
    """Epsilon of the clipping: no further gain from a ratio outside [1 - epsilon, 1 + epsilon]."""
    clip_vloss: bool = True
    """Clip the value loss by --clip-coef, as Baselines does (arXiv:2006.05990, 3.4: it hurts)."""
    vf_coef: float = 0.5
    """Weight c1 of the value loss, which is half the mean squared error."""
    ent_coef: float = 0.01
    """Weight c2 of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Largest norm of the whole gradient; a longer gradient is scaled down to it."""

    # Environment
    env_id: str = "ALE/Pong-v5"
    """Atari game, "ALE/Name-v5"."""
    num_envs: Count = 8
    """Environments stepped together, counted over all processes of torchrun."""
    env_kwargs: Json = field(default_factory=dict)
    """Arguments for ale_py's AtariVectorEnv, such as '{"noop_max": 0}'."""
    async_envs: bool = False
    """One process per environment: faster if a step takes milliseconds, otherwise slower."""
    sticky_actions: float = 0.0
    """Atari: probability that a frame repeats the last action. DQN papers: 0, Gymnasium: 0.25."""
    clip_rewards: bool = True
    """Atari: learn from rewards clipped to [-1, 1]; logged returns are the game's own."""
    episodic_life: bool = True
    """Atari: learn as if a lost life ended the episode; the game goes on."""
    fire_reset: bool = True
    """Atari: press FIRE at the start of a game, and instead of an action after a lost life."""

    # Run
    seed: Count = 1
    """Seed of everything random; on a CPU, a run repeats exactly with the same --torch-threads."""
    total_timesteps: Count = 10_000_000
    """Environment steps, rounded up to iterations; if a resume raises the total, schedules jump."""
    run_dir: Text = None
    """Folder of this run; by default runs/{env id}__{script}__{seed}__{unix time}."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the networks live. auto: a GPU if there is one; small networks run faster on a CPU."""
    torch_threads: Count = 1
    """CPU threads of torch; this network gains from a second one."""
    compile: bool = False
    """Compile acting and learning: needs a C++ compiler, starts seconds later, is often faster."""
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

    def __post_init__(self) -> None:
        check_args(self)


# ---- Networks ------------------------------------------------------------------------------------

Policy = Tensor  # logits (..., num_actions)


class AtariActorCritic(nn.Module):
    """Policy and value, from stacked frames; all layers but the last ones are shared.

    Shapes: obs (B, 4, 84, 84), grey levels from 0 to 255 -> logits (B, num_actions), values (B,).
    """

    def __init__(self, num_frames: int, num_actions: int, bfloat16: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16  # in the hidden layers; the last ones need float32
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.hidden = nn.Sequential(
            orthogonal(nn.Conv2d(num_frames, 32, 8, stride=4)), nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3)), nn.ReLU(),
            nn.Flatten(), orthogonal(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
        )
        self.logits, self.value = linear(512, num_actions, 0.01), linear(512, 1, 1.0)
        self.to(memory_format=torch.channels_last)  # convolutions are faster in this layout

    def forward(self, obs: Tensor) -> tuple[Policy, Tensor]:
        obs = obs.to(self.dtype, memory_format=torch.channels_last) / 255
        with torch.autocast(obs.device.type, self.dtype, self.bfloat16):
            hidden = self.hidden(obs)
        hidden = hidden.float()
        return self.logits(hidden), self.value(hidden).squeeze(-1)


def linear(in_dim: int, out_dim: int, gain: float) -> nn.Linear:
    """Linear layer with orthogonal weights of the given gain and zero bias."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def orthogonal(layer: nn.Module) -> nn.Module:
    """The layer with orthogonal weights of gain sqrt(2) and zero bias."""
    nn.init.orthogonal_(layer.weight, 2**0.5)
    nn.init.zeros_(layer.bias)
    return layer


# ---- Mathematics of PPO --------------------------------------------------------------------------


def categorical_log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of actions. Shapes: logits (..., num_actions), actions (...) -> (...)."""
    return logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, for each observation. Shapes: (..., num_actions) -> (...)."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminations: Tensor, dones: Tensor,
    gamma: float, gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates.

    A termination removes the value of the next observation. Any end of an episode, also by a time
    limit, cuts the recursion. next_values[t] is V of the observation that followed actions[t].

    Shapes: all (T, N) -> (T, N). Source: Schulman et al. 2016, eq. 16; 2017, eq. 11 and 12.
    """
    td_errors = rewards + gamma * next_values.masked_fill(terminations > 0, 0) - values
    decay = gamma * gae_lambda * (1 - dones)
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        next_advantage = td_errors[t] + decay[t] * next_advantage
        advantages[t] = next_advantage
    return advantages


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """KL(old, new) in nats, from old actions. Unbiased if new did not learn from them; 0 or more.

    log_ratio is log pi(a|s) - log pi_old(a|s); the gradient through it is unbiased as well.

    Shapes: log_ratio (B,) -> (). Source: Schulman 2020, joschu.net/blog/kl-approx.html, k3.
    """
    return (log_ratio.exp() - 1 - log_ratio).mean()


def ppo_policy_loss(
    log_ratio: Tensor, advantages: Tensor, clip_coef: float, kl_coef: Tensor | None
) -> Tensor:
    """Minus PPO's objective for the policy: the clipped surrogate, less a penalty on the KL.

    clip_coef = inf turns the clipping off, kl_coef = None the penalty.

    Shapes: log_ratio, advantages (B,) -> (). Source: Schulman et al. 2017, eq. 7 and 8.
    """
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    surrogate = torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    return -surrogate if kl_coef is None else -surrogate + kl_coef * approximate_kl(log_ratio)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """Half the mean of each sample's larger squared error: of V, or of V clipped near old_values.

    Shapes: values, old_values, returns (B,) -> (). Source: Engstrom et al. 2020, section 3.
    """
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square()).mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Share of the returns' variance that values predict, at most 1. Shapes: (...) -> ()."""
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0)


# ---- Buffer and training -------------------------------------------------------------------------


def stack_steps(steps: list[tuple], device: torch.device) -> list[Tensor]:
    """Tensors (T, num_envs, ...) from T tuples of arrays (num_envs, ...); booleans as 0 and 1."""
    stacked = [torch.stack([torch.as_tensor(x) for x in part]) for part in zip(*steps, strict=True)]
    to_float32 = (torch.float64, torch.bool)
    return [x.to(device, torch.float32 if x.dtype in to_float32 else x.dtype) for x in stacked]


def train(args: Args) -> None:
    # Setup
    join_processes(args)
    device, rng = setup(args)
    envs = make_envs(args)
    torch.manual_seed(args.seed)  # for the initial weights; everything else draws from rng
    torch.set_float32_matmul_precision("medium" if args.precision == "medium" else "highest")
    num_frames, num_actions = envs.single_observation_space.shape[0], envs.single_action_space.n
    agent = AtariActorCritic(num_frames, int(num_actions), args.precision == "bfloat16").to(device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    value_clip = args.clip_coef if args.clip_vloss else math.inf
    batch_size = args.num_envs * args.num_steps
    mine = my_games(args)  # the other processes of torchrun, if any, play the rest

    @torch.no_grad()
    def deterministic_policy(obs: np.ndarray) -> np.ndarray:
        logits, _ = agent(torch.from_numpy(obs[None]).to(device))
        return logits.argmax(-1).cpu().numpy()[0]

    def gradient_step(obs, actions, old_log_probs, advantages, returns, old_values):
        """Compute the gradients of this process's games, for the next step of the optimizer."""
        logits, values = agent(obs)
        log_ratio = categorical_log_prob(logits, actions) - old_log_probs
        assert log_ratio.shape == values.shape == advantages.shape == returns.shape
        policy_loss = ppo_policy_loss(log_ratio, advantages, args.clip_coef, None)  # eq. 7
        critic_loss = value_loss(values, old_values, returns, value_clip)
        entropy = categorical_entropy(logits).mean()
        loss = policy_loss + args.vf_coef * critic_loss - args.ent_coef * entropy  # eq. 9
        loss.backward()
        clipped = (log_ratio.exp() - 1).abs() > args.clip_coef
        return {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": critic_loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/approx_kl": approximate_kl(log_ratio.detach()),
            "losses/clipfrac": clipped.float().mean(),
        }

    forward = agent
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward() in the same graph
        gradient_step = torch.compile(gradient_step, fullgraph=True)
        forward = torch.compile(agent, fullgraph=True)
    state = {"agent": agent, "optimizer": optimizer, "rng": rng}
    run = make_run(args, device, envs, state, deterministic_policy)
    global_step = run.restore() if args.resume or args.evaluate else 0
    if args.evaluate:
        run.finish()
        return
    run.begin()
    obs, lives = np.stack(envs.get_attr("obs")), np.array(envs.get_attr("lives"))

    while global_step < args.total_timesteps:
        remaining = 1 - global_step / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate

        steps = []
        for _ in range(args.num_steps):
            # 1. Act
            with torch.no_grad():
                logits, values = forward(torch.from_numpy(obs).to(device))
                # Gumbel's trick: this argmax is distributed as softmax(logits). Every process draws
                # the noise of all games, so that a game's noise is the same wherever it is played.
                noise = rng.gumbel(size=(args.num_envs, num_actions))[mine]
                actions = (logits + torch.from_numpy(noise).to(logits)).argmax(-1)
                log_probs = categorical_log_prob(logits, actions)

            # 2. Step the environments
            last_obs = obs
            obs, rewards, terminations, truncations, infos = envs.step(actions.cpu().numpy())
            global_step += args.num_envs
            dones = terminations | truncations
            cut_values = torch.zeros_like(values)  # V where a time limit has cut an episode
            if dones.any():
                ended = infos["final_info"]
                run.episodes += zip(ended["return"][dones], ended["length"][dones], strict=True)
            if truncations.any():  # there, obs already begins a new episode
                final_obs = np.stack(infos["final_obs"][truncations])
                with torch.no_grad():
                    cut_values[truncations] = agent(torch.from_numpy(final_obs).to(device))[1]
            if args.clip_rewards:  # to learn from; logged returns are the game's
                rewards = rewards.clip(-1, 1)
            if args.episodic_life:
                last_lives, lives = lives, np.array(envs.get_attr("lives"))
                terminations = terminations | ((lives < last_lives) & ~dones)
            ends = terminations | truncations
            step = last_obs, actions, log_probs, values, rewards, terminations, ends, cut_values
            steps.append(step)

        # 3. Targets
        stacked = stack_steps(steps, device)
        observed, actions, log_probs, values, rewards, terminations, ends, cut_values = stacked
        with torch.no_grad():
            _, last_values = forward(torch.from_numpy(obs).to(device))
        next_values = torch.cat([values[1:], last_values[None]])  # V(s_{t+1})
        next_values = torch.where(ends > 0, cut_values, next_values)  # 0 if no time limit cut it
        advantages = compute_gae(  # eq. 11, 12
            rewards, values, next_values, terminations, ends, args.gamma, args.gae_lambda
        )
        returns = advantages + values
        metrics = {
            "losses/values": values.mean(),
            "losses/explained_variance": explained_variance(values, returns),
        }  # of this process's games; averaged below

        # 4. Update
        observed = observed.movedim(2, -1).contiguous().movedim(-1, 2)  # layout: channels last
        batch = observed, actions, log_probs, advantages, returns, values
        for _ in range(args.update_epochs):
            times = rng.permutation(args.num_steps).reshape(args.num_minibatches, -1)
            minibatch_metrics = []
            for t in times:
                minibatch = [x[t].flatten(0, 1) for x in batch]
                if args.norm_adv and batch_size > args.num_minibatches:  # one alone becomes 0
                    minibatch[3] = normalize(minibatch[3])  # the advantages
                optimizer.zero_grad()
                step_metrics = gradient_step(*minibatch)
                average_over_processes([x.grad for x in parameters])
                norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                minibatch_metrics.append(step_metrics | {"losses/grad_norm": norm})
        for name in minibatch_metrics[0]:  # means over the last epoch, while the policy changes
            metrics[name] = torch.stack([x[name] for x in minibatch_metrics]).mean()

        # 5. Log, checkpoint, evaluate
        average_over_processes(list(metrics.values()))
        metrics = {name: x.item() for name, x in metrics.items()}
        metrics["charts/learning_rate"] = learning_rate
        run.end_iteration(global_step, metrics)
    run.finish()


def check_args(args: Args) -> None:
    """Raises: ValueError for values that make no sense."""
    check_run_args(args)
    require(args, "num_steps num_minibatches update_epochs", lambda x: x >= 1, "at least 1")
    require(args, "gamma gae_lambda sticky_actions", lambda x: 0 <= x <= 1, "between 0 and 1")
    positive = "learning_rate clip_coef max_grad_norm"
    require(args, positive, lambda x: 0 < x < math.inf, "above 0")
    require(args, "vf_coef ent_coef", lambda x: 0 <= x < math.inf, "0 or more")
    divides = f"a divisor of num_steps = {args.num_steps}"
    require(args, "num_minibatches", lambda x: args.num_steps % x == 0, divides)


# ---- Environments --------------------------------------------------------------------------------


def make_envs(args: Args) -> VectorEnv:
    """The games of this process. One whose episode ends is reset in the same step."""

    def env_fn() -> gym.Env:
        if apart and multiprocessing.parent_process():  # all get signals; the parent decides
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: None)  # programs it starts would keep SIG_IGN
        return make_env(args)

    apart = args.async_envs and not args.evaluate
    if apart:  # Python ends its children by SIGTERM, which they ignore
        CLOSING.callback(lambda: [child.kill() for child in multiprocessing.active_children()])
    seeds = np.random.SeedSequence([args.seed, 0]).generate_state(args.num_envs)
    seeds = [int(seed) for seed in seeds[my_games(args)]]
    vector_env = AsyncVectorEnv if apart else ParallelGames
    envs = vector_env([env_fn] * len(seeds), autoreset_mode=AutoresetMode.SAME_STEP)
    CLOSING.callback(close, envs)
    envs.reset(seed=seeds)
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
    """One game."""
    with making(args):
        import ale_py  # noqa: F401  registers the games
        name = args.env_id.split("NoFrameskip")[0].split("Deterministic")[0].split("-v")[0]
        if not args.env_id.startswith("ALE/"):
            game = name if f"ALE/{name}-v5" in gym.registry else "Pong"
            raise gym.error.NameNotFound(f"this script plays games, such as ALE/{game}-v5")
        fire_reset = {"use_fire_reset": args.fire_reset}
        game_args = dataclasses.replace(args, env_kwargs=fire_reset | args.env_kwargs)
        return ReplayableEnv(AtariGame(game_args, render_mode))


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


# ---- Several processes, which torchrun has started -----------------------------------------------


def join_processes(args: Args) -> None:
    """Join the other processes of this run, if there are any. The first one speaks for all."""
    if not dist.is_torchelastic_launched():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    if args.evaluate:
        if rank > 0:
            os._exit(0)  # sys.exit() would be taken for an environment's
        return
    if args.num_envs % world_size:
        stop(f"error: --num-envs {args.num_envs}: must be a multiple of {world_size} processes")
    if torch.backends.mps.is_available() and args.device in ("auto", "mps"):  # gloo cannot
        stop(f"error: --device {args.device}: several processes need --device cpu on a Mac")
    backend = "gloo"  # for what is on the CPU, such as the episodes of all games
    if torch.cuda.is_available() and args.device in ("auto", "cuda"):
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= gpus:
            stop(f"error: only {gpus} GPUs: start as many processes, or use --device cpu")
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    from torch import _dynamo  # noqa: F401  later, it would keep the group, whose threads abort
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7))  # evaluations take long


def my_games(args: Args) -> slice:
    """Which of the num_envs games this process plays."""
    if not dist.is_initialized():
        return slice(None)
    share = args.num_envs // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What needs all processes: turn the end of another one into a one-line exit."""
    try:
        yield
    except RuntimeError as error:
        reason = "perhaps because one of them has ended; then use --resume"
        stop(f"error: the processes cannot exchange data, {reason}: {error}", 1)


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over all processes."""
    if dist.is_initialized():
        flat = torch.cat([x.flatten() for x in tensors])
        with together():
            dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([x.numel() for x in tensors])
        for x, mean in zip(tensors, means, strict=True):
            x.copy_(mean.view(x.shape))


def normalize(advantages: Tensor) -> Tensor:
    """Subtract the mean, divide by the std, over all processes. Shapes: (B,) -> (B,)."""
    mean = advantages.mean()
    average_over_processes([mean])
    variance = (advantages - mean).square().mean()
    average_over_processes([variance])
    return (advantages - mean) / (variance.sqrt() + 1e-8)


def from_first(value: Any = None) -> Any:
    """The value of the first process, in all processes."""
    values = [value]
    with together():
        dist.broadcast_object_list(values)
    return values[0]


def to_first(value: Any) -> list[Any]:
    """The values of all processes, in the first process."""
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    with together():
        dist.gather_object(value, values)
    return values


class AllGames:
    """The games of all processes, which the first one saves and restores.

    It tells the others what to do. (name, None): send this attribute of your games;
    (name, values): set it, each its own part; None: there is no more to do, go on.
    """

    def __init__(self, envs: VectorEnv) -> None:
        self.mine = envs

    def get_attr(self, name: str) -> list[Any]:
        from_first((name, None))
        return [value for values in to_first(self.mine.get_attr(name)) for value in values]

    def set_attr(self, name: str, values: list[Any]) -> None:
        from_first((name, values))
        self.mine.set_attr(name, values[: self.mine.num_envs])

    def close(self) -> None:
        close(self.mine)


class LeadingRun(Run):
    """The run in the first process, which alone writes, prints and evaluates."""

    def __init__(self, args: Args, device: Any, envs: VectorEnv, state: dict, policy: Any) -> None:
        super().__init__(args, device, AllGames(envs), state, policy)

    def again(self, flag: str = "--resume") -> str:
        launcher = f"torchrun --nproc-per-node {dist.get_world_size()}"
        return super().again(flag).replace("python", launcher, 1)

    def restore(self) -> int:
        super().restore()
        from_first(None)
        return from_first(self.global_step)

    def begin(self) -> None:
        super().begin()
        saved = io.BytesIO()  # not the state itself: tensors would stay on this process's GPU
        torch.save({name: part.state_dict() for name, part in self.state.items()}, saved)
        from_first(saved.getvalue())

    def end_iteration(self, global_step: int, metrics: dict[str, float]) -> None:
        found = to_first((self.episodes, self.signal))
        self.episodes = [episode for episodes, _ in found for episode in episodes]
        if not self.signal and any(number for _, number in found):
            self.on_signal(max(number for _, number in found), None)
        super().end_iteration(global_step, metrics)
        from_first(None)

    def finish(self) -> None:
        super().finish()
        dist.destroy_process_group()


class FollowingRun:
    """The run in any other process, which does what the first one asks for."""

    def __init__(self, args: Args, device: Any, envs: VectorEnv, state: dict, _: Any) -> None:
        self.args, self.state = args, state
        self.envs = envs
        self.episodes, self.signal = [], 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        self.signal = number

    def obey(self) -> None:
        """Give and take attributes of the games until the first process goes on."""
        while (order := from_first()) is not None:
            name, values = order
            if values is None:
                to_first(self.envs.get_attr(name))
            else:
                self.envs.set_attr(name, values[my_games(self.args)])

    def restore(self) -> int:
        self.obey()
        return from_first()

    def begin(self) -> None:
        saved = torch.load(io.BytesIO(from_first()), map_location="cpu", weights_only=True)
        for name, part in self.state.items():
            part.load_state_dict(saved[name])

    def end_iteration(self, global_step: int, metrics: dict[str, float]) -> None:
        to_first((self.episodes, self.signal))
        self.episodes = []
        self.obey()

    def finish(self) -> None:
        dist.destroy_process_group()
        close(self.envs)


def make_run(args: Args, *parts: Any) -> Run | FollowingRun:
    """The run as this process takes part in it."""
    if not dist.is_initialized():
        return Run(args, *parts)
    return (FollowingRun if dist.get_rank() > 0 else LeadingRun)(args, *parts)


if __name__ == "__main__":
    with CLOSING:  # ends before Python waits for threads, which environments may have
        train(parse_args(Args))
