"""Trust region policy optimization (TRPO), complete in this one file.

The policy gradient says in which direction to change the parameters, but not how far: a small
change of them can be a large one of the policy. TRPO limits the change of the policy itself: the
mean KL divergence between the old and the new policy is at most max_kl. For a small change d of the
parameters, this KL is about d^T F d / 2, where F, the Fisher matrix, is its second derivative. Then
the best direction is not the gradient g but the natural gradient F^-1 g. The conjugate gradient
method finds it from products of F with vectors, without storing F. As all this holds only for small
changes, a line search shortens the step until the true KL is small enough and L (below) is better.
Schulman et al. 2015, arXiv:1502.05477; equation numbers are theirs, or GAE's (arXiv:1506.02438).

    for each iteration:
        run the policy for num_steps in each of num_envs environments
        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                 (GAE, eq. 11)
        A_t = delta_t + gamma lambda A_{t+1}, and R_t = A_t + V(s_t)              (GAE, eq. 16)
        (no V(s_{t+1}) after a termination, no A_{t+1} after the end of an episode or rollout)
        g = gradient of L, where L = mean of A_t pi(a_t|s_t) / pi_old(a_t|s_t)    (eq. 14)
        solve (F + damping I) x = g; F v = gradient of v^T (gradient of mean KL)  (appendix C.1)
        beta = sqrt(2 max_kl / x^T (F + damping I) x); beta x has a KL of at most about max_kl
        shrink beta until L is better and the mean KL at most max_kl, or give up  (appendix C)
        --no-line-search: beta x, whatever its KL, or --npg-step times x          (Kakade 2001)
        gradient steps of the critic on the mean of (V(s_t) - R_t)^2 / 2, on random minibatches

    python trpo.py --env-id HalfCheetah-v5 --seed 1

Deviations from the paper:
- Advantages come from a critic (arXiv:1506.02438). Small ones of a critic that explains nothing of
  the returns are its errors: no step then. max_kl falls to 0. F is damped, and uses all samples.
- Where a time limit ends an episode, the return continues with V of its last observation
  (arXiv:1712.00378): the limit is not part of the task, so it must not change the values.
- Advantages and observations are normalised, rewards scaled (arXiv:2005.12729). The statistics of
  the observations change after the step, and with them the policy a little.
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
from collections.abc import Callable, Iterable, Iterator
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
    max_kl: float = 0.04
    """Largest mean KL divergence in nats of a new policy from the old one, at the start."""
    cg_steps: Count = 15
    """Largest number of conjugate gradient steps; each takes one product with the Fisher matrix."""
    cg_damping: float = 0.1
    """Added to the diagonal of the Fisher matrix, which is nearly singular."""
    line_search: bool = True
    """Shrink the step until the surrogate has improved and the KL is at most --max-kl."""
    backtrack_coef: float = 0.8
    """Factor by which the line search shrinks the step."""
    max_backtracks: Count = 10
    """How many steps the line search tries before it keeps the old policy."""
    npg_step: float | None = None
    """Step size along F^-1 g with --no-line-search, a constant; None: the largest for --max-kl."""
    gamma: float = 0.99
    """Discount factor per step; below 1 where time limits end episodes, or values may diverge."""
    gae_lambda: float = 0.95
    """Lambda of GAE. 0: V after one reward; 1: V only at the rollout's end; arXiv:1506.02438."""
    num_steps: Count = 64
    """Steps of each environment per iteration."""
    norm_adv: bool = True
    """Normalise advantages in each batch."""
    small_adv: float = 0.05
    """No step if the std of the advantages is below this, and explained_variance at most 0."""
    critic_learning_rate: float = 1e-3
    """Step size for the critic at the start."""
    anneal_lr: bool = True
    """Lower --max-kl and the critic's learning rate linearly over the run, to 0 at its end."""
    critic_steps: Count = 80
    """Gradient steps of the critic for each gradient step of the policy."""
    critic_batch_size: Count = 256
    """Samples in a gradient step of the critic."""
    log_std_init: float = -1.0
    """Initial log std of continuous actions, which are scaled to [-1, 1] (arXiv:2006.05990)."""

    # Environment
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment; "module:Name-v0" imports the module first."""
    num_envs: Count = 16
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
    """Compile the critic's step: needs a C++ compiler, starts seconds later, is often faster."""
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


# ---- Mathematics of TRPO (below train: log_prob, sample, compute_gae; they are as in a2c.py) -----

# What an actor returns: logits (..., num_actions), or mean (..., action_dim) and log_std.
Policy = Tensor | tuple[Tensor, Tensor]


def surrogate_objective(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Mean advantage of the old policy's actions, each weighted by its probability ratio.

    log_ratio is log pi(a|s) - log pi_old(a|s). Where it is 0, the gradient is the policy gradient.

    Shapes: log_ratio, advantages (...) -> (). Source: Schulman et al. 2015, eq. 14.
    """
    return (log_ratio.exp() * advantages).mean()


def kl_divergence(old: Policy, new: Policy) -> Tensor:
    """KL(old, new) in nats for each observation. Shapes: policies (..., dim) -> (...)."""
    if isinstance(old, tuple):
        (old_mean, old_log_std), (mean, log_std) = old, new
        squares = (2 * old_log_std).exp() + (mean - old_mean).square()
        return (log_std - old_log_std + 0.5 * squares * (-2 * log_std).exp() - 0.5).sum(-1)
    old_log_probs = old.log_softmax(-1)
    return (old_log_probs.exp() * (old_log_probs - new.log_softmax(-1))).sum(-1)


def fisher_vector_product(kl_gradient: Tensor, parameters: list[Tensor], vector: Tensor) -> Tensor:
    """F v: the gradient of v^T (gradient of the mean KL); kl_gradient needs its graph.

    Shapes: kl_gradient, vector (P,) -> (P,). Source: Schulman et al. 2015, appendix C.1.
    """
    return flatten(torch.autograd.grad(kl_gradient @ vector, parameters, retain_graph=True))


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Solve A x = b from products of A with vectors; the solution and |b - A x| / |b|.

    A is symmetric and positive definite. If rounding breaks this, or b is 0, x so far is returned.

    Shapes: b (P,) -> x (P,), residual (). Source: Hestenes and Stiefel 1952, section 3.
    """
    x = torch.zeros_like(b)
    residual, direction = b, b
    squared_norm = b @ b
    for _ in range(max_steps):
        product = matvec(direction)
        curvature = direction @ product
        if not curvature > 0:
            break
        step_size = squared_norm / curvature
        x = x + step_size * direction
        residual = residual - step_size * product
        last_squared_norm, squared_norm = squared_norm, residual @ residual
        direction = residual + squared_norm / last_squared_norm * direction
    return x, residual.norm() / b.norm()


def largest_step_size(curvature: Tensor, max_kl: float) -> Tensor:
    """beta for which beta^2 curvature / 2 is max_kl; 0 if the curvature is not positive.

    Shapes: curvature (), x^T (F + damping) x -> (). Source: Schulman et al. 2015, appendix C.
    """
    return torch.where(curvature > 0, (2 * max_kl / curvature).sqrt(), 0)


def line_search(
    try_step: Callable[[Tensor], tuple[Tensor, Tensor]], step_size: Tensor, max_kl: float,
    backtrack_coef: float, max_backtracks: int,
) -> tuple[Tensor, int]:
    """The first good one of step_size * backtrack_coef^k, k = 0, 1, ..., and the number of tries.

    try_step(step_size) returns the surrogate's improvement and the KL. A step size is good if the
    improvement is positive and the KL at most max_kl. If none is good, the result is 0.

    Shapes: step_size () -> (). Source: Schulman et al. 2015, appendix C.
    """
    for tried in range(1, max_backtracks + 1):
        improvement, kl = try_step(step_size)
        if improvement > 0 and kl <= max_kl:
            return step_size, tried
        step_size = step_size * backtrack_coef
    return torch.zeros_like(step_size), max_backtracks


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
    obs_dim, action_space = envs.single_observation_space.shape[0], envs.single_action_space
    if isinstance(action_space, gym.spaces.Discrete):
        to_env = ActionNumbers(action_space)
        actor = CategoricalActor(obs_dim, to_env.num_actions).to(device)
    else:
        to_env = ActionScaler(action_space)
        actor = GaussianActor(obs_dim, to_env.dim, args.log_std_init).to(device)
    critic = ValueCritic(obs_dim).to(device)
    parameters = list(actor.parameters())
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, fused=True)
    obs_normalizer = ObsNormalizer(obs_dim, args.obs_clip) if args.norm_obs else nn.Identity()
    obs_normalizer.to(device)
    reward_scaler = RewardScaler(args.num_envs, args.gamma).to(device)

    def to_network(obs: np.ndarray | Tensor) -> Tensor:
        """Observations as the networks take them. Shapes: (..., obs_dim)."""
        return obs_normalizer(torch.as_tensor(obs).float().to(device))

    @torch.no_grad()
    def deterministic_policy(obs: np.ndarray) -> np.ndarray:
        return to_env(mode(actor(to_network(obs[None]))))[0]

    def policy_step(obs, actions, advantages, max_kl):
        """One step of the actor, as in appendix C; returns its metrics."""
        policy = actor(obs)
        old_policy, old_parameters = frozen(policy), flatten(parameters).detach()
        old_log_probs = log_prob(old_policy, actions)
        assert old_log_probs.shape == advantages.shape
        surrogate = surrogate_objective(log_prob(policy, actions) - old_log_probs, advantages)
        gradient = flatten(torch.autograd.grad(surrogate, parameters, retain_graph=True))  # eq. 14
        kl = kl_divergence(old_policy, policy).mean()  # 0, as is its gradient; F: its Hessian
        kl_gradient = flatten(torch.autograd.grad(kl, parameters, create_graph=True))

        def fisher_product(vector):
            product = fisher_vector_product(kl_gradient, parameters, vector)  # appendix C.1
            return product + args.cg_damping * vector

        direction, residual = conjugate_gradient(fisher_product, gradient, args.cg_steps)
        curvature = direction @ fisher_product(direction)

        @torch.no_grad()
        def try_step(step_size):
            """Take the step; return the surrogate's improvement and the mean KL."""
            step = step_size * direction if step_size > 0 else 0
            set_parameters(parameters, old_parameters + step)
            policy = actor(obs)
            log_ratio = log_prob(policy, actions) - old_log_probs
            improvement = surrogate_objective(log_ratio, advantages) - surrogate
            return improvement, kl_divergence(old_policy, policy).mean()

        step_size, tried = args.npg_step or largest_step_size(curvature, max_kl), 1
        if args.line_search:
            limits = max_kl, args.backtrack_coef, args.max_backtracks
            step_size, tried = line_search(try_step, step_size, *limits)
        improvement, kl = try_step(step_size)  # moves back where no step was good
        return {
            "losses/policy_loss": -surrogate.detach(),
            "losses/surrogate_improvement": improvement,
            "losses/kl": kl,
            "losses/step_size": step_size,
            "losses/line_search_steps": tried,
            "losses/rejected_steps": step_size == 0,
            "losses/cg_residual": residual,
            "losses/grad_norm": gradient.norm(),
            "losses/entropy": entropy(old_policy).mean(),
        }

    def critic_step(obs, returns):
        """Compute the gradients for the next step of the critic's optimizer."""
        values = critic(obs)
        assert values.shape == returns.shape
        (0.5 * (values - returns).square().mean()).backward()

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward() in the same graph
        critic_step = torch.compile(critic_step, fullgraph=True)  # no second derivatives: not F v
    state = {"actor": actor, "critic": critic, "critic_optimizer": critic_optimizer, "rng": rng}
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
        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * remaining
        steps = []
        for _ in range(args.num_steps):
            # 1. Act
            with torch.no_grad():
                actions = sample(actor(to_network(obs)), rng)

            # 2. Step the environments
            last_obs = obs
            obs, rewards, terminations, truncations, infos = envs.step(to_env(actions))
            global_step += args.num_envs
            dones = terminations | truncations
            cut_values = torch.zeros(args.num_envs, device=device)  # V where a time limit has cut
            if dones.any():
                ended = infos["final_info"]
                run.episodes += zip(ended["return"][dones], ended["length"][dones], strict=True)
            if truncations.any():  # there, obs already begins a new episode
                final_obs = np.stack(infos["final_obs"][truncations])
                with torch.no_grad():
                    cut_values[truncations] = critic(to_network(final_obs))
            steps.append((last_obs, actions, rewards, terminations, dones, cut_values))

        # 3. Targets
        observed, actions, rewards, terminations, dones, cut_values = stack_steps(steps, device)
        normed_obs = to_network(observed)
        if args.norm_reward:
            reward_scaler.observe(rewards, dones)
            rewards = reward_scaler(rewards)
        with torch.no_grad():
            values, last_values = critic(normed_obs), critic(to_network(obs))
        next_values = torch.cat([values[1:], last_values[None]])  # V(s_{t+1})
        next_values = torch.where(dones > 0, cut_values, next_values)
        advantages = compute_gae(  # GAE, eq. 11, 16
            rewards, values, next_values, terminations, dones, args.gamma, args.gae_lambda
        )
        returns = advantages + values
        is_noise = (explained_variance(values, returns) <= 0) & (advantages.std() < args.small_adv)
        if args.norm_adv and advantages.numel() > 1:  # the std of one sample is not defined
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        # 4. Update
        metrics = policy_step(normed_obs, actions, advantages * ~is_noise, args.max_kl * remaining)
        inputs, targets = normed_obs.flatten(0, 1), returns.flatten()
        for _ in range(args.critic_steps):
            sampled = rng.integers(len(targets), size=args.critic_batch_size)
            critic_optimizer.zero_grad()
            critic_step(inputs[sampled], targets[sampled])
            critic_optimizer.step()
        if args.norm_obs:  # last, so that acting and learning use the same normalisation
            obs_normalizer.update(observed.flatten(0, 1).float())

        # 5. Log, checkpoint, evaluate
        metrics |= {
            "losses/value_loss": 0.5 * (values - returns).square().mean(),  # before its steps
            "losses/values": values.mean() * reward_scaler.scale,  # in units of the reward
            "losses/explained_variance": explained_variance(values, returns),
            "charts/learning_rate": critic_optimizer.param_groups[0]["lr"],  # the critic's
        }
        run.end_iteration(global_step, {name: float(x) for name, x in metrics.items()})
    run.finish()


def check_args(args: Args) -> None:
    """Raises: ValueError for values that make no sense."""
    check_run_args(args)
    require(args, "gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1")
    positive = "max_kl critic_learning_rate obs_clip"
    require(args, positive, lambda x: 0 < x < math.inf, "above 0")
    counts = "num_steps critic_steps critic_batch_size cg_steps max_backtracks"
    require(args, counts, lambda x: x >= 1, "at least 1")
    require(args, "cg_damping small_adv", lambda x: 0 <= x < math.inf, "0 or more")
    require(args, "backtrack_coef", lambda x: 0 < x < 1, "above 0 and below 1")
    require(args, "log_std_init", lambda x: -20 <= x <= 2, "between -20 and 2")
    require(args, "npg_step", lambda x: x is None or 0 < x < math.inf, "above 0")
    require(args, "npg_step", lambda x: x is None or not args.line_search, "for --no-line-search")


# ---- Policies, advantages, parameters ------------------------------------------------------------


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


def frozen(policy: Policy) -> Policy:
    """A copy that stays as it is while the actor changes. Shapes: the policy's."""
    if isinstance(policy, tuple):
        mean, log_std = policy
        return mean.detach().clone(), log_std.detach().clone()
    return policy.detach().clone()


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """All elements in one vector. Shapes: any -> (P,)."""
    return torch.cat([x.flatten() for x in tensors])


def set_parameters(parameters: list[nn.Parameter], vector: Tensor) -> None:
    """Copy a vector's elements into the parameters, in their order. Shapes: vector (P,)."""
    parts = vector.split([x.numel() for x in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


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
    vector_env = AsyncVectorEnv if apart else SyncVectorEnv
    envs = vector_env([env_fn] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    CLOSING.callback(close, envs)
    seeds = np.random.SeedSequence([args.seed, 0]).generate_state(args.num_envs)
    envs.reset(seed=[int(seed) for seed in seeds])
    return envs


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with Box or Discrete actions; observations are flattened."""
    with contextlib.suppress(Exception):  # not installed, or it finds no way to render
        __import__("mujoco").set_mju_user_warning(lambda message: None)  # no MUJOCO_LOG.TXT
    render = {"render_mode": render_mode} if render_mode else {}
    with making(args):
        env = gym.make(args.env_id, **(args.env_kwargs | render))
    space = env.action_space
    if not isinstance(space, gym.spaces.Box | gym.spaces.Discrete):
        close(env)
        stop(f"error: --env-id {args.env_id}: needs Box or Discrete actions, this one has {space}")
    return ReplayableEnv(flatten_observations(args, env))


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
