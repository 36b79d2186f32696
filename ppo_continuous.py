"""Proximal Policy Optimization (PPO) for continuous actions, complete in this one file.

PPO takes several epochs of gradient steps on one rollout. From the second step on, its actions are
those of an old policy. So the ratio pi(a|s) / pi_old(a|s) replaces log pi(a|s); at ratio 1, both
have the same gradient. L gains nothing where a ratio moves further out of [1 - eps, 1 + eps]: the
policy stays close to the data. Schulman et al. 2017, arXiv:1707.06347; equation numbers are theirs.

    for each iteration:
        run the policy for num_steps in each of num_envs environments           (Algorithm 1)
        for each epoch:
            delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                           (eq. 12)
            A_t = delta_t + gamma lambda A_{t+1}, R_t = A_t + V(s_t)            (eq. 11, recursive)
            (no V(s_{t+1}) after a termination, no A_{t+1} after the end of an episode or rollout)
            for each minibatch:
                ratio = pi(a|s) / pi_old(a|s)                                   (section 3)
                L = mean of min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)       (eq. 7)
                or: L = mean of ratio A - beta KL(pi_old, pi)                   (eq. 8)
                one Adam step on -L + c1 (V(s) - R)^2 / 2 - c2 entropy          (eq. 9)
            without the KL penalty: no more epochs if KL(pi_old, pi) was above 1.5 times its target
        with the KL penalty: double or halve beta to keep the KL at its target  (section 4)

    python ppo_continuous.py --env-id HalfCheetah-v5 --seed 1

Deviations from the paper:
- Where a time limit ends an episode, the return continues with V of its last observation
  (arXiv:1712.00378): the limit is not part of the task, so it must not change the values.
- Observations are normalised and rewards scaled by running statistics (arXiv:2005.12729), so that
  the same hyperparameters suit environments with very different units.
- Advantages are computed again before every epoch, with the newest critic (arXiv:2006.05990).
- As in most published code: normalised advantages, clipped gradients, orthogonal weights with a
  small last policy layer, Adam's epsilon 1e-5. Actions vary less at first (arXiv:2006.05990).
- The learning rate falls to 0 over the run. The epochs stop once the policy has moved too far
  (--target-kl): clipping is not always enough.
- The KL is estimated from the sampled actions: only old log-probabilities have to be stored.
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
from typing import Annotated, Any, BinaryIO, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # Algorithm
    learning_rate: float = 3e-4
    """Step size of Adam at the start."""
    anneal_lr: bool = True
    """Lower the learning rate linearly over the run, to 0 (arXiv:2006.05990, section 3.7)."""
    gamma: float = 0.99
    """Discount factor per step; below 1 where time limits end episodes, or values may diverge."""
    gae_lambda: float = 0.95
    """Lambda of GAE. 0: V after one reward; 1: V only at the rollout's end; arXiv:1506.02438."""
    num_steps: Count = 256
    """Steps of each environment per iteration."""
    num_minibatches: Count = 32
    """Minibatches per epoch; divides num_envs * num_steps."""
    update_epochs: Count = 10
    """Passes over the rollout per iteration."""
    recompute_advantages: bool = True
    """Compute advantages again before every epoch (arXiv:2006.05990, section 3.5: it helps)."""
    norm_adv: bool = True
    """Normalise advantages in each minibatch (arXiv:2006.05990, section 3.3: little effect)."""
    policy_objective: Literal["clip", "kl-penalty", "clip+kl-penalty"] = "clip"
    """Clip the ratio, or penalise the KL, or both (arXiv:1707.06347, eq. 7 and 8)."""
    clip_coef: float = 0.2
    """Epsilon of the clipping: no further gain from a ratio outside [1 - epsilon, 1 + epsilon]."""
    kl_coef: float = 1.0
    """Initial weight beta of the KL penalty; doubles when the KL is high, halves when low."""
    target_kl: float | None = 0.05
    """Target KL in nats; without a penalty, epochs stop above 1.5 times it (None: never)."""
    clip_vloss: bool = False
    """Clip the value loss by --clip-coef, as Baselines does (arXiv:2006.05990, 3.4: it hurts)."""
    vf_coef: float = 0.5
    """Weight c1 of the value loss, which is half the mean squared error."""
    ent_coef: float = 0.0
    """Weight c2 of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Largest norm of the whole gradient; a longer gradient is scaled down to it."""
    log_std_init: float = -1.0
    """Initial log std of actions, which are scaled to [-1, 1] (arXiv:2006.05990, section 3.2)."""

    # Environment
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment; "module:Name-v0" imports the module first."""
    num_envs: Count = 8
    """Environments stepped together."""
    env_kwargs: Json = field(default_factory=dict)
    """Arguments for gymnasium.make, such as '{"healthy_reward": 2}'."""
    async_envs: bool = False
    """One process per environment: faster if a step takes milliseconds, otherwise slower."""
    norm_obs: bool = True
    """Normalise observations by running mean and variance (arXiv:2005.12729)."""
    obs_clip: float = 50.0
    """Clip normalised observations to [-obs_clip, obs_clip]."""
    norm_reward: bool = True
    """Divide rewards by the running std of returns, clip to [-10, 10] (arXiv:2005.12729)."""

    # Run
    seed: Count = 1
    """Seed of everything random; on a CPU, a run repeats exactly with the same --torch-threads."""
    total_timesteps: Count = 1_000_000
    """Environment steps, rounded up to iterations; if a resume raises the total, schedules jump."""
    run_dir: Text = None
    """Folder of this run; by default runs/{env id}__{script}__{seed}__{unix time}."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
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

    def __post_init__(self) -> None:
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


# ---- Mathematics of PPO --------------------------------------------------------------------------


def gaussian_log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log-density of actions under independent Gaussians, summed over the action dimensions.

    Shapes: mean, actions (..., action_dim), log_std (action_dim,) -> (...).
    """
    z = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of independent Gaussians. Shapes: log_std (action_dim,) -> ()."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


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


def adapt_kl_coef(kl_coef: float, kl: float, target_kl: float) -> float:
    """Weight of the KL penalty for the next iteration. Source: Schulman et al. 2017, section 4.

    Within 1e-6 and 1e6, so that it comes back soon after many changes in one direction.
    """
    if kl > 1.5 * target_kl:
        return min(kl_coef * 2, 1e6)
    return max(kl_coef / 2, 1e-6) if kl < target_kl / 1.5 else kl_coef


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


class RolloutBuffer:
    """One iteration's transitions: actions[t], taken in obs[t], led to rewards[t] and next_obs[t].

    terminations[t] says that the task ended with transition t, dones[t] that the episode ended,
    by a termination or by a time limit. Shapes: (num_steps, num_envs, ...).
    """

    def __init__(
        self, num_steps: int, num_envs: int, obs_dim: int, action_dim: int, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros((num_steps, num_envs, *shape), device=device)

        self.obs = zeros(obs_dim)
        self.actions = zeros(action_dim)
        self.log_probs = zeros()
        self.rewards = zeros()
        self.next_obs = zeros(obs_dim)
        self.terminations = zeros()
        self.dones = zeros()


def train(args: Args) -> None:
    # Setup
    device, rng = setup(args)
    envs = make_envs(args)
    torch.manual_seed(args.seed)  # for the initial weights; everything else draws from rng
    to_env = ActionScaler(envs.single_action_space)
    obs_dim, action_dim = envs.single_observation_space.shape[0], to_env.dim

    actor = GaussianActor(obs_dim, action_dim, args.log_std_init).to(device)
    critic = ValueCritic(obs_dim).to(device)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    obs_normalizer = ObsNormalizer(obs_dim, args.obs_clip) if args.norm_obs else nn.Identity()
    obs_normalizer.to(device)
    reward_scaler = RewardScaler(args.num_envs, args.gamma).to(device)
    buffer = RolloutBuffer(args.num_steps, args.num_envs, obs_dim, action_dim, device)
    penalised = "kl-penalty" in args.policy_objective
    policy_clip = args.clip_coef if "clip" in args.policy_objective else math.inf
    value_clip = args.clip_coef if args.clip_vloss else math.inf
    loop = LoopState(kl_coef=args.kl_coef if penalised else 0.0)

    @torch.no_grad()
    def deterministic_policy(obs: np.ndarray) -> np.ndarray:
        mean, _ = actor(obs_normalizer(torch.from_numpy(obs).float().to(device)))
        return to_env(mean)

    def gradient_step(obs, actions, old_log_probs, advantages, returns, old_values, kl_coef):
        """Compute the gradients for the next step of the optimizer, and clip their norm."""
        mean, log_std = actor(obs)
        log_ratio = gaussian_log_prob(mean, log_std, actions) - old_log_probs
        values = critic(obs)
        assert log_ratio.shape == values.shape == advantages.shape == returns.shape
        if args.norm_adv and len(advantages) > 1:  # the std of one sample is not defined
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = ppo_policy_loss(log_ratio, advantages, policy_clip, kl_coef)  # eq. 7, 8
        critic_loss = value_loss(values, old_values, returns, value_clip)
        entropy = gaussian_entropy(log_std)
        loss = policy_loss + args.vf_coef * critic_loss - args.ent_coef * entropy  # eq. 9
        loss.backward()
        metrics = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": critic_loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/grad_norm": nn.utils.clip_grad_norm_(parameters, args.max_grad_norm),
        }
        return metrics, log_ratio.detach()

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward() in the same graph
        gradient_step = torch.compile(gradient_step, fullgraph=True)
    state = {"actor": actor, "critic": critic, "optimizer": optimizer, "rng": rng, "loop": loop}
    state |= {"obs_normalizer": obs_normalizer, "reward_scaler": reward_scaler}
    run = Run(args, device, envs, state, deterministic_policy)
    global_step = run.restore() if args.resume or args.evaluate else 0
    if args.evaluate:
        run.finish()
        return
    reward_scaler.running_return[np.array(envs.get_attr("lost_episode"))] = 0
    run.begin()
    obs = np.stack(envs.get_attr("obs"))

    while global_step < args.total_timesteps:
        remaining = 1 - global_step / args.total_timesteps if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        for t in range(args.num_steps):
            # 1. Act
            with torch.no_grad():
                buffer.obs[t] = torch.from_numpy(obs)
                mean, log_std = actor(obs_normalizer(buffer.obs[t]))
                noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32)).to(device)
                buffer.actions[t] = mean + log_std.exp() * noise
                buffer.log_probs[t] = gaussian_log_prob(mean, log_std, buffer.actions[t])

            # 2. Step the environments
            obs, rewards, terminations, truncations, infos = envs.step(to_env(buffer.actions[t]))
            global_step += args.num_envs
            dones = terminations | truncations
            next_obs = obs.copy()  # where an episode ended, obs already begins a new one
            if dones.any():
                next_obs[dones] = np.stack(infos["final_obs"][dones])
                ended = infos["final_info"]
                run.episodes += zip(ended["return"][dones], ended["length"][dones], strict=True)
            buffer.next_obs[t] = torch.from_numpy(next_obs)
            buffer.rewards[t] = torch.from_numpy(rewards)
            buffer.terminations[t] = torch.from_numpy(terminations)
            buffer.dones[t] = torch.from_numpy(dones)

        normed_obs = obs_normalizer(buffer.obs)
        normed_next_obs = obs_normalizer(buffer.next_obs)
        scaled_rewards, reward_scale = buffer.rewards, 1.0
        if args.norm_reward:
            reward_scaler.observe(buffer.rewards, buffer.dones)
            scaled_rewards, reward_scale = reward_scaler(buffer.rewards), reward_scaler.scale

        for epoch in range(args.update_epochs):
            # 3. Targets
            if epoch == 0 or args.recompute_advantages:
                with torch.no_grad():
                    values, next_values = critic(normed_obs), critic(normed_next_obs)
                advantages = compute_gae(  # eq. 11, 12
                    scaled_rewards, values, next_values, buffer.terminations, buffer.dones,
                    args.gamma, args.gae_lambda,
                )
                returns = advantages + values
            if epoch == 0:  # before the critic learns; for the clipped value loss and the log
                old_values = values
                metrics = {
                    "losses/values": (values.mean() * reward_scale).item(),  # reward units
                    "losses/explained_variance": explained_variance(values, returns).item(),
                }

            # 4. Update
            batch = normed_obs, buffer.actions, buffer.log_probs, advantages, returns, old_values
            permutation = rng.permutation(args.num_envs * args.num_steps)
            shuffled = [x.flatten(0, 1)[permutation].chunk(args.num_minibatches) for x in batch]
            kl_coef = torch.tensor(loop["kl_coef"], device=device) if penalised else None
            minibatch_metrics, log_ratios = [], []
            for minibatch in zip(*shuffled, strict=True):
                optimizer.zero_grad()
                step_metrics, log_ratio = gradient_step(*minibatch, kl_coef)
                optimizer.step()
                minibatch_metrics.append(step_metrics)
                log_ratios.append(log_ratio)
            for name in step_metrics:  # means over the last epoch, while the policy changes
                metrics[name] = torch.stack([x[name] for x in minibatch_metrics]).mean().item()
            log_ratio = torch.cat(log_ratios)
            metrics["losses/approx_kl"] = approximate_kl(log_ratio).item()
            clipped = (log_ratio.exp() - 1).abs() > args.clip_coef
            metrics["losses/clipfrac"] = clipped.float().mean().item()
            too_far = args.target_kl and metrics["losses/approx_kl"] > 1.5 * args.target_kl
            if too_far and not penalised:
                break

        if penalised:  # section 4
            with torch.no_grad():
                mean, log_std = actor(normed_obs)
                log_probs = gaussian_log_prob(mean, log_std, buffer.actions)
                kl = approximate_kl(log_probs - buffer.log_probs).item()
            loop["kl_coef"] = adapt_kl_coef(loop["kl_coef"], kl, args.target_kl)
        if args.norm_obs:  # last, so that old and new log-probabilities use the same normalisation
            obs_normalizer.update(buffer.obs.flatten(0, 1))

        # 5. Log, checkpoint, evaluate
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/kl_coef"] = loop["kl_coef"]
        run.end_iteration(global_step, metrics)
    run.finish()


def check_args(args: Args) -> None:
    """Raises: ValueError for values that make no sense."""
    check_run_args(args)
    require(args, "num_steps num_minibatches update_epochs", lambda x: x >= 1, "at least 1")
    require(args, "gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1")
    positive = "learning_rate clip_coef kl_coef max_grad_norm obs_clip"
    require(args, positive, lambda x: 0 < x < math.inf, "above 0")
    require(args, "vf_coef ent_coef", lambda x: 0 <= x < math.inf, "0 or more")
    require(args, "target_kl", lambda x: x is None or 0 < x < math.inf, "above 0, or None")
    require(args, "log_std_init", lambda x: -20 <= x <= 2, "between -20 and 2")
    clips = args.policy_objective == "clip"
    require(args, "target_kl", lambda x: clips or x, "given, say 0.01, for a penalty")
    transitions = args.num_envs * args.num_steps
    divides = f"a divisor of num_envs * num_steps = {transitions}"
    require(args, "num_minibatches", lambda x: transitions % x == 0, divides)


# ---- Running statistics, environments, action scaling --------------------------------------------


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


class LoopState(dict):
    """Plain numbers of the training loop that must survive a kill."""

    state_dict = dict.copy
    load_state_dict = dict.update


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
    vector_env = AsyncVectorEnv if apart else SyncVectorEnv
    envs = vector_env([env_fn] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    CLOSING.callback(close, envs)
    seeds = np.random.SeedSequence([args.seed, 0]).generate_state(args.num_envs)
    envs.reset(seed=[int(seed) for seed in seeds])
    return envs


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with Box actions; observations are flattened, pictures refused."""
    with contextlib.suppress(Exception):  # not installed, or it finds no way to render
        __import__("mujoco").set_mju_user_warning(lambda message: None)  # no MUJOCO_LOG.TXT
    render = {"render_mode": render_mode} if render_mode else {}
    with making(args):
        env = gym.make(args.env_id, **(args.env_kwargs | render))
    action_space = env.action_space
    if not isinstance(action_space, gym.spaces.Box):
        close(env)
        stop(f"error: --env-id {args.env_id}: needs Box actions, this one has {action_space}")
    return ReplayableEnv(flatten_observations(args, env))


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
