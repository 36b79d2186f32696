"""Advantage actor-critic (A2C), complete in this one file.

A policy gradient that does not wait for the end of the episode: it takes a gradient step after a
few steps in each of many environments. The critic V serves twice: as the baseline that says which
returns are better than expected, and as an estimate of what comes after these few steps
(bootstrapping). Mnih et al. 2016, arXiv:1602.01783; equation numbers are those of the paper on GAE,
arXiv:1506.02438. Its lambda sets how many rewards are added before V stands for the rest: with 1
all up to num_steps, as in Mnih et al. (n-step returns), with 0 one, else a mixture of all lengths.

    for each update:
        run the policy for num_steps in each of num_envs environments
        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                     (eq. 11)
        A_t = delta_t + gamma lambda A_{t+1}                                           (eq. 16)
        R_t = A_t + V(s_t), the return that V(s_t) is moved to
        (no V(s_{t+1}) after a termination, no A_{t+1} after the end of an episode or rollout)
        one step on the mean of -log pi(a_t|s_t) A_t + c1 (V(s_t) - R_t)^2 / 2 - c2 entropy
        critic_steps - 1 further steps on the mean of c1 (V(s_t) - R_t)^2 / 2

    python a2c.py --env-id HalfCheetah-v5 --seed 1
    python a2c.py --env-id ALE/Pong-v5 --seed 1

The paper's A3C has many workers that send gradients to one network without waiting for each other,
so a gradient may belong to an older policy than the newest. Here one policy acts in all
environments, and waits for all of them: this learns at least as well, and uses GPUs better
(openai.com/index/openai-baselines-acktr-a2c). This synchronous form is called A2C.

Deviations from the paper:
- Where a time limit ends an episode, the return continues with V of its last observation
  (arXiv:1712.00378): the limit is not part of the task, so it must not change the values.
- Losses are means; (V - R)^2 weighs 1/4, and gradients are clipped, as in the first Baselines.
- With vector observations: on each batch one step of the policy (its gradient is right only for the
  policy that acted: on-policy), but several of the critic; lambda of 0.95; normalised observations
  and scaled rewards as in arXiv:2005.12729, scaled advantages; one std for all observations; no
  entropy bonus, as it gains little (arXiv:2006.05990). On Atari: DQN's network (Nature, 2015),
  Baselines' step size; after a lost life, FIRE replaces an action that is still learned from.
"""

from __future__ import annotations

import contextlib
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
    learning_rate: float = Default(1e-3, atari=7e-4)
    """Step size at the start: of the policy, on Atari of the whole network."""
    critic_learning_rate: float = Default(1e-3, atari=7e-4)
    """Step size for the critic at the start; unused on Atari, where one network serves both."""
    anneal_lr: bool = True
    """Lower the learning rates linearly over the run, to 0 at its end."""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """Optimizer; rmsprop in TensorFlow's form, as in OpenAI Baselines."""
    precision: Literal["highest", "medium", "bfloat16"] = "highest"
    """Matrix products: highest (float32), medium (faster, less exact), bfloat16 (Atari only)."""
    gamma: float = 0.99
    """Discount factor per step; below 1 where time limits end episodes, or values may diverge."""
    gae_lambda: float = Default(0.95, atari=1.0)
    """Lambda of GAE. 0: V after one reward; 1: V only at the rollout's end; arXiv:1506.02438."""
    num_steps: Count = Default(8, atari=5)
    """Steps of each environment per update."""
    critic_steps: Count = Default(10, atari=1)
    """Gradient steps of the critic for each gradient step of the policy."""
    norm_adv: bool = Default(True, atari=False)
    """Divide advantages by the std of all so far; that of a small batch would amplify noise."""
    vf_coef: float = 0.5
    """Weight c1 of the value loss, which is half the mean squared error."""
    ent_coef: float = Default(0.0, atari=0.01)
    """Weight c2 of the entropy bonus."""
    max_grad_norm: float = Default(1.0, atari=0.5)
    """Largest norm of a network's gradient; a longer gradient is scaled down to it."""
    log_std_init: float = -1.0
    """Initial log std of continuous actions, which are scaled to [-1, 1] (arXiv:2006.05990)."""
    log_frequency: Count = 2000
    """Environment steps per iteration; each iteration ends with a line of metrics."""

    # Environment
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment; "module:Name-v0" imports the module first, "ALE/Name-v5" is Atari."""
    num_envs: Count = 16
    """Environments stepped together."""
    env_kwargs: Json = field(default_factory=dict)
    """Arguments for gymnasium.make, such as '{"healthy_reward": 2}'; on Atari AtariVectorEnv's."""
    async_envs: bool = False
    """One process per environment: faster if a step takes milliseconds, otherwise slower."""
    norm_obs: bool = Default(True, atari=False)
    """Normalise observations by running mean and variance (arXiv:2005.12729)."""
    obs_clip: float = 50.0
    """Clip normalised observations to [-obs_clip, obs_clip]."""
    norm_reward: bool = Default(True, atari=False)
    """Divide rewards by the running std of returns, clip to [-10, 10] (arXiv:2005.12729)."""
    sticky_actions: float = 0.0
    """Atari: probability that a frame repeats the last action. DQN papers: 0, Gymnasium: 0.25."""
    clip_rewards: bool = True
    """Atari: learn from rewards clipped to [-1, 1]; logged returns are the game's own."""
    episodic_life: bool = True
    """Atari: learn as if a lost life ended the episode; the game goes on."""

    # Run
    seed: Count = 1
    """Seed of everything random; on a CPU, a run repeats exactly with the same --torch-threads."""
    total_timesteps: Count = Default(1_000_000, atari=10_000_000)
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


def linear(in_dim: int, out_dim: int, gain: float) -> nn.Linear:
    """Linear layer with orthogonal weights of the given gain and zero bias."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def tanh_mlp(in_dim: int, out_dim: int, out_gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units. Shapes: (..., in_dim) -> (..., out_dim)."""
    hidden = [linear(in_dim, 64, 2**0.5), nn.Tanh(), linear(64, 64, 2**0.5), nn.Tanh()]
    return nn.Sequential(*hidden, linear(64, out_dim, out_gain))


class CategoricalActor(nn.Module):
    """Policy over discrete actions. Shapes: obs (..., obs_dim) -> logits (..., num_actions)."""

    def __init__(self, obs_dim: int, num_actions: int) -> None:
        super().__init__()
        self.logits = tanh_mlp(obs_dim, num_actions, out_gain=0.01)  # nearly uniform at the start

    def forward(self, obs: Tensor) -> Tensor:
        return self.logits(obs)


class GaussianActor(nn.Module):
    """Policy: independent Gaussians. The mean depends on the observation, the std does not.

    Shapes: obs (..., obs_dim) -> mean (..., action_dim), log_std (action_dim,).
    """

    def __init__(self, obs_dim: int, action_dim: int, log_std_init: float) -> None:
        super().__init__()
        self.mean = tanh_mlp(obs_dim, action_dim, out_gain=0.01)  # means start close to 0
        self.log_std = nn.Parameter(torch.zeros(action_dim) + log_std_init)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(obs), self.log_std


class ValueCritic(nn.Module):
    """State value V(s), in the units of its targets. Shapes: obs (..., obs_dim) -> (...)."""

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.value = tanh_mlp(obs_dim, 1, out_gain=1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.value(obs).squeeze(-1)


# ---- Mathematics of the policy gradient ----------------------------------------------------------

# What an actor returns: logits (..., num_actions), or mean (..., action_dim) and log_std.
Policy = Tensor | tuple[Tensor, Tensor]


def gaussian_log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log-density of actions under independent Gaussians, summed over the action dimensions.

    Shapes: mean, actions (..., action_dim), log_std (action_dim,) -> (...).
    """
    z = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of independent Gaussians. Shapes: log_std (action_dim,) -> ()."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


def log_prob(policy: Policy, actions: Tensor) -> Tensor:
    """Log-probability of discrete actions, log-density of continuous ones.

    Shapes: actions (...) or (..., action_dim) -> (...).
    """
    if isinstance(policy, tuple):
        return gaussian_log_prob(*policy, actions)
    return policy.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


def entropy(policy: Policy) -> Tensor:
    """Entropy in nats, for each observation. Shapes: (...)."""
    if isinstance(policy, tuple):
        mean, log_std = policy
        return gaussian_entropy(log_std).expand(mean.shape[:-1])
    log_probs = policy.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def sample(policy: Policy, rng: Rng) -> Tensor:
    """Actions drawn from the policy. Shapes: (...) or (..., action_dim)."""
    if isinstance(policy, tuple):
        mean, log_std = policy
        noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32)).to(mean.device)
        return mean + log_std.exp() * noise
    noise = torch.from_numpy(rng.gumbel(size=policy.shape)).to(policy)
    return (policy + noise).argmax(-1)  # Gumbel's trick: distributed as softmax(logits)


def mode(policy: Policy) -> Tensor:
    """The most probable actions. Shapes: (...) or (..., action_dim)."""
    return policy[0] if isinstance(policy, tuple) else policy.argmax(-1)


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
    device, rng = setup(args)
    envs = make_envs(args)
    torch.manual_seed(args.seed)  # for the initial weights; everything else draws from rng
    obs_shape, action_space = envs.single_observation_space.shape, envs.single_action_space
    discrete = isinstance(action_space, gym.spaces.Discrete)
    to_env = ActionNumbers(action_space) if discrete else ActionScaler(action_space)
    agent = make_agent(args, obs_shape, to_env).to(device)  # actor and critic in one module
    optimizer = make_optimizer(args, agent)
    networks = [group["params"] for group in optimizer.param_groups]  # each is clipped by itself
    obs_normalizer = ObsNormalizer(*obs_shape, args.obs_clip) if args.norm_obs else nn.Identity()
    obs_normalizer.to(device)
    reward_scaler = RewardScaler(args.num_envs, args.gamma).to(device)
    adv_moments = RunningMoments(1).to(device)

    def to_network(obs: np.ndarray | Tensor) -> Tensor:
        """Observations as the networks take them. Shapes: (..., obs_dim), or Atari's bytes."""
        obs = torch.as_tensor(obs)
        return obs.to(device) if args.atari else obs_normalizer(obs.float().to(device))

    @torch.no_grad()
    def deterministic_policy(obs: np.ndarray) -> np.ndarray:
        policy, _ = agent(to_network(obs[None]))
        return to_env(mode(policy))[0]

    def gradient_step(obs, actions, advantages, returns):
        """Compute the gradients for the next step of the optimizer, and clip their norms."""
        policy, values = agent(obs)
        log_probs = log_prob(policy, actions)
        assert log_probs.shape == values.shape == advantages.shape == returns.shape
        policy_loss = -(log_probs * advantages).mean()  # eq. 1
        critic_loss = 0.5 * (values - returns).square().mean()
        bonus = entropy(policy).mean()
        loss = policy_loss + args.vf_coef * critic_loss - args.ent_coef * bonus
        loss.backward()
        norms = [nn.utils.clip_grad_norm_(network, args.max_grad_norm) for network in networks]
        return {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": critic_loss.detach(),
            "losses/entropy": bonus.detach(),
            "losses/grad_norm": norms[0],  # of the policy; on Atari of all
        }

    def critic_step(obs, returns):
        """The same for the critic alone. The policy has no gradient then, and stays as it is."""
        loss = args.vf_coef * 0.5 * (agent.critic(obs) - returns).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(networks[1], args.max_grad_norm)

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward() in the same graph
        gradient_step = torch.compile(gradient_step, fullgraph=True)
        critic_step = torch.compile(critic_step, fullgraph=True)
    state = {"agent": agent, "optimizer": optimizer, "rng": rng, "adv_moments": adv_moments}
    state |= {"obs_normalizer": obs_normalizer, "reward_scaler": reward_scaler}
    run = Run(args, device, envs, state, deterministic_policy)
    global_step = run.restore() if args.resume or args.evaluate else 0
    if args.evaluate:
        run.finish()
        return
    reward_scaler.running_return[np.array(envs.get_attr("lost_episode"))] = 0
    run.begin()
    obs, lives = np.stack(envs.get_attr("obs")), count_lives(args, envs)
    update_metrics = []
    batch_size = args.num_envs * args.num_steps
    iteration_steps = math.ceil(args.log_frequency / batch_size) * batch_size
    last_step = math.ceil(args.total_timesteps / iteration_steps) * iteration_steps

    while global_step < last_step:
        remaining = max(0, 1 - global_step / args.total_timesteps) if args.anneal_lr else 1
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * remaining
        steps = []
        for _ in range(args.num_steps):
            # 1. Act
            with torch.no_grad():  # the loss takes V in A_t and R_t as constants
                policy, values = agent(to_network(obs))
                actions = sample(policy, rng)

            # 2. Step the environments
            last_obs = obs
            obs, rewards, terminations, truncations, infos = envs.step(to_env(actions))
            global_step += args.num_envs
            dones = terminations | truncations
            cut_values = torch.zeros_like(values)  # V where a time limit has cut an episode
            if dones.any():
                ended = infos["final_info"]
                run.episodes += zip(ended["return"][dones], ended["length"][dones], strict=True)
            if truncations.any():  # there, obs already begins a new episode
                final_obs = np.stack(infos["final_obs"][truncations])
                with torch.no_grad():
                    cut_values[truncations] = agent(to_network(final_obs))[1]
            if args.atari and args.clip_rewards:  # to learn from; logged returns are the game's
                rewards = rewards.clip(-1, 1)
            if args.atari and args.episodic_life:
                last_lives, lives = lives, count_lives(args, envs)
                terminations = terminations | ((lives < last_lives) & ~dones)
            ends = terminations | truncations  # dones, and lost lives on Atari
            step = last_obs, actions, values, rewards, terminations, ends, cut_values
            steps.append(step)

        # 3. Targets
        stacked = stack_steps(steps, device)
        observed, actions, values, rewards, terminations, ends, cut_values = stacked
        if args.norm_reward:
            reward_scaler.observe(rewards, ends)
            rewards = reward_scaler(rewards)
        with torch.no_grad():
            _, last_values = agent(to_network(obs))
        next_values = torch.cat([values[1:], last_values[None]])  # V(s_{t+1})
        next_values = torch.where(ends > 0, cut_values, next_values)  # not of the next episode
        advantages = compute_gae(  # eq. 11, 16
            rewards, values, next_values, terminations, ends, args.gamma, args.gae_lambda
        )
        returns = advantages + values
        metrics = {
            "losses/values": values.mean() * reward_scaler.scale,  # in units of the reward
            "losses/explained_variance": explained_variance(values, returns),
        }
        if args.norm_adv:
            adv_moments.update(advantages.reshape(-1, 1))
            advantages = advantages / (adv_moments.var + 1e-8).sqrt()

        # 4. Update
        inputs, targets = to_network(observed).flatten(0, 1), returns.flatten()
        optimizer.zero_grad()
        step_metrics = gradient_step(inputs, actions.flatten(0, 1), advantages.flatten(), targets)
        update_metrics.append(metrics | step_metrics)
        optimizer.step()
        for _ in range(args.critic_steps - 1):
            optimizer.zero_grad()
            critic_step(inputs, targets)
            optimizer.step()
        if args.norm_obs:  # last, so that acting and learning use the same normalisation
            obs_normalizer.update(observed.flatten(0, 1).float())

        # 5. Log, checkpoint, evaluate
        finite = update_metrics[-1]["losses/policy_loss"].isfinite()
        if due(global_step, iteration_steps) or not finite:  # end_iteration stops if not finite
            metrics = {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
            for name in update_metrics[0]:
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
    counts = "num_steps critic_steps log_frequency"
    require(args, counts, lambda x: x >= 1, "at least 1")
    require(args, "gamma gae_lambda sticky_actions", lambda x: 0 <= x <= 1, "between 0 and 1")
    positive = "learning_rate critic_learning_rate max_grad_norm obs_clip"
    require(args, positive, lambda x: 0 < x < math.inf, "above 0")
    require(args, "vf_coef ent_coef", lambda x: 0 <= x < math.inf, "0 or more")
    require(args, "log_std_init", lambda x: -20 <= x <= 2, "between -20 and 2")
    if not args.atari:
        require(args, "sticky_actions", lambda x: x == 0, "0, except on Atari")
        require(args, "precision", lambda x: x != "bfloat16", "highest or medium, except on Atari")


# ---- Networks and optimizer ----------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Policy and value, from separate networks. Shapes: obs (B, obs_dim) -> policy, values (B,)."""

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, obs: Tensor) -> tuple[Policy, Tensor]:
        return self.actor(obs), self.critic(obs)


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


def make_agent(args: Args, obs_shape: tuple[int, ...], to_env: Any) -> nn.Module:
    """The networks that fit the observations and actions, in the chosen precision."""
    torch.set_float32_matmul_precision("medium" if args.precision == "medium" else "highest")
    if args.atari:
        if args.critic_steps > 1 or args.norm_obs:
            stop("error: on Atari, --critic-steps must be 1, and --no-norm-obs is needed")
        return AtariActorCritic(obs_shape[0], to_env.num_actions, args.precision == "bfloat16")
    if isinstance(to_env, ActionNumbers):
        actor = CategoricalActor(*obs_shape, to_env.num_actions)
    else:
        actor = GaussianActor(*obs_shape, to_env.dim, args.log_std_init)
    return ActorCritic(actor, ValueCritic(*obs_shape))


def make_optimizer(args: Args, agent: nn.Module) -> torch.optim.Optimizer:
    """One group of parameters for each network; initial_lr is what its learning rate falls from."""
    groups = [{"params": list(agent.parameters()), "initial_lr": args.learning_rate}]
    if not args.atari:
        groups = [
            {"params": list(agent.actor.parameters()), "initial_lr": args.learning_rate},
            {"params": list(agent.critic.parameters()), "initial_lr": args.critic_learning_rate},
        ]
    for group in groups:
        group["lr"] = group["initial_lr"]
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, eps=1e-5, fused=True)
    return RMSpropTF(groups, alpha=0.99, eps=1e-5)


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as in TensorFlow: the mean square of gradients starts at 1, epsilon is in the root.

    Most gradients are far below 1, so the first steps are short. A parameter without a gradient
    stays as it is. Source: tensorflow.org, tf.compat.v1.train.RMSPropOptimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], alpha: float, eps: float) -> None:
        super().__init__(groups, {"alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [x for x in group["params"] if x.grad is not None]
            if not parameters:
                continue
            gradients = [x.grad for x in parameters]
            for x in parameters:
                if not self.state[x]:
                    self.state[x]["mean_square"] = torch.ones_like(x)
            mean_squares = [self.state[x]["mean_square"] for x in parameters]
            torch._foreach_mul_(mean_squares, group["alpha"])
            torch._foreach_addcmul_(mean_squares, gradients, gradients, 1 - group["alpha"])
            roots = torch._foreach_add(mean_squares, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_addcdiv_(parameters, gradients, roots, -group["lr"])


def orthogonal(layer: nn.Module) -> nn.Module:
    """The layer with orthogonal weights of gain sqrt(2) and zero bias."""
    nn.init.orthogonal_(layer.weight, 2**0.5)
    nn.init.zeros_(layer.bias)
    return layer


def due(step: int, frequency: int) -> bool:
    """Whether something that happens every `frequency` steps happens at this step."""
    return step % frequency == 0


# ---- Running statistics, environments, actions ---------------------------------------------------


class RunningMoments(nn.Module):
    """Mean and variance of what `update` has seen; at first 0 and 1. Shapes: mean, var (dim,)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.tensor(1e-4))

    def update(self, batch: Tensor) -> None:
        """Add a batch to the statistics. Shapes: batch (B, dim). Source: Chan et al. 1979, 2.1."""
        size = len(batch)
        delta = batch.mean(0) - self.mean
        total = self.count + size
        squares = self.var * self.count + batch.var(0, correction=0) * size
        self.var = (squares + delta.square() * self.count * size / total) / total
        self.mean = self.mean + delta * size / total
        self.count = total


class ObsNormalizer(RunningMoments):
    """Shifts and scales observations to mean 0, variance 1. Shapes: (..., obs_dim) -> the same."""

    def __init__(self, obs_dim: int, clip: float) -> None:
        super().__init__(obs_dim)
        self.clip = clip

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) * (self.var + 1e-8).rsqrt()).clamp(-self.clip, self.clip)


class RewardScaler(RunningMoments):
    """Divides rewards by the running std of discounted returns, then clips to [-10, 10].

    Subtracting a mean would change which behaviour is best. If returns hardly vary, it divides by
    their mean's size: the clip would make all rewards the same. Shapes: rewards (T, N) -> the same.
    """

    def __init__(self, num_envs: int, gamma: float) -> None:
        super().__init__(1)
        self.gamma = gamma
        self.register_buffer("running_return", torch.zeros(num_envs))

    def observe(self, rewards: Tensor, dones: Tensor) -> None:
        """Add a rollout to the statistics. Shapes: rewards, dones (T, N)."""
        returns = torch.zeros_like(rewards)
        for t in range(len(rewards)):
            returns[t] = self.running_return * self.gamma + rewards[t]
            self.running_return = returns[t].masked_fill(dones[t] > 0, 0)  # a new episode
        self.update(returns.reshape(-1, 1))

    @property
    def scale(self) -> Tensor:
        std, size = (self.var + 1e-8).sqrt(), self.mean.abs()
        return torch.where(std > size / 10, std, size)

    def forward(self, rewards: Tensor) -> Tensor:
        return (rewards / self.scale).clamp(-10, 10)


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
    """One environment with Box or Discrete actions, and vectors or Atari's pictures to observe."""
    old_name = args.env_id.split("NoFrameskip")[0].split("Deterministic")[0].split("-v")[0]
    render = {"render_mode": render_mode} if render_mode else {}
    with contextlib.suppress(Exception):  # not installed, or it finds no way to render
        __import__("mujoco").set_mju_user_warning(lambda message: None)  # no MUJOCO_LOG.TXT
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
    space = env.action_space
    if not isinstance(space, gym.spaces.Box | gym.spaces.Discrete):
        close(env)
        stop(f"error: --env-id {args.env_id}: needs Box or Discrete actions, this one has {space}")
    return ReplayableEnv(flatten_observations(args, env))


def count_lives(args: Args, envs: VectorEnv) -> np.ndarray:
    """Lives that are left in each game; 0 if not on Atari. Shapes: (num_envs,)."""
    return np.array(envs.get_attr("lives") if args.atari else [0] * args.num_envs)


class ActionNumbers:
    """Shifts actions that count from 0 to a Discrete space's start. Shapes: tensor -> array."""

    def __init__(self, space: gym.spaces.Discrete) -> None:
        self.num_actions, self.start = int(space.n), int(space.start)

    def __call__(self, actions: Tensor) -> np.ndarray:
        return actions.cpu().numpy() + self.start


class ActionScaler:
    """Clips actions into a Box. In bounded dimensions, [-1, 1] is first mapped to [low, high].

    Shapes: tensor (..., dim) -> array (..., *box.shape) of the box's dtype.
    """

    def __init__(self, box: gym.spaces.Box) -> None:
        float_dtype = np.result_type(box.dtype, np.float32)  # integers would overflow
        self.low, self.high = (x.flatten().astype(float_dtype) for x in (box.low, box.high))
        self.bounded = (box.bounded_below & box.bounded_above).flatten()
        self.box, self.dim = box, len(self.low)

    def __call__(self, actions: Tensor) -> np.ndarray:
        unscaled = actions.cpu().numpy()
        if not np.isfinite(unscaled).all():
            stop("error: the policy or an observation is not finite; any checkpoint is kept", 3)
        low, high = self.low, self.high
        with np.errstate(invalid="ignore", over="ignore"):  # np.where drops what is not finite
            scaled = low + (np.clip(unscaled, -1, 1) + 1) * 0.5 * (high - low)
            bounded = self.bounded & np.isfinite(high - low)  # their difference may be too large
            inside = np.clip(np.where(bounded, scaled, unscaled), low, high)
        if not np.issubdtype(self.box.dtype, np.floating):
            inside = np.rint(inside)
        return inside.astype(self.box.dtype).reshape((*actions.shape[:-1], *self.box.shape))


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
