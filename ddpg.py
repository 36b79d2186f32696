"""Deep deterministic policy gradient (DDPG), complete in this one file.

Q-learning takes the action with the largest Q, which cannot be searched for among infinitely many
actions. DDPG learns a second network that outputs this action: the actor mu, whose parameters
are moved along the gradient of Q(s, mu(s)). Both learn from a replay memory of past transitions,
with target networks that follow them slowly. As mu is deterministic, exploration is noise that is
added to its actions. Lillicrap et al. 2016, arXiv:1509.02971; equation numbers are theirs.

    for each environment step:
        act with a = mu(s) + noise, in [-1, 1], at first at random              (eq. 7)
        store (s, a, r, s', whether the task ended)
        after learning_starts steps, for each of updates_per_step random minibatches:
            y = r + gamma Q'(s', mu'(s')), or r where the task ended            (Algorithm 1)
            one Adam step of Q on the mean of (Q(s, a) - y)^2                   (eq. 4)
            one Adam step of mu on the mean of -Q(s, mu(s))                     (eq. 6)
            move the targets Q' and mu' towards Q and mu by the share tau       (Algorithm 1)

    python ddpg.py --env-id HalfCheetah-v5 --seed 1

Deviations from the paper:
- The end of the task stops the bootstrap, a time limit does not (arXiv:1712.00378).
- Two hidden layers of 256 units and minibatches of 256, as in SAC (arXiv:1812.05905); PyTorch's
  initialisation; the action enters in the first layer, no batch normalisation or weight decay,
  faster learning of actor and targets: the tuned DDPG of arXiv:1802.09477, which does better.
- The noise is Gaussian; --noise ou --noise-std 0.38 is the paper's Ornstein-Uhlenbeck process
  (theta 0.15, sigma 0.2), in steps of 1. Noise that changes slowly gains nothing on MuJoCo tasks
  (arXiv:1802.09477). The sum of action and noise is clipped.
- The first actions are uniformly random, without updates: an untrained policy would see too little.
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
    learning_rate: float = 1e-3
    """Step size of Adam for the actor at the start."""
    critic_learning_rate: float = 1e-3
    """Step size for the critic at the start."""
    anneal_lr: bool = False
    """Lower the learning rates linearly over the run, to 0 at its end."""
    precision: Literal["highest", "medium", "bfloat16"] = "highest"
    """Matrix products: highest (float32), medium (faster, less exact), bfloat16 (hidden layers)."""
    gamma: float = 0.99
    """Discount factor per step; below 1 where time limits end episodes, or values may diverge."""
    buffer_size: Count = 1_000_000
    """Transitions in the replay memory."""
    learning_starts: Count = 10_000
    """Environment steps with random actions before the first gradient step."""
    updates_per_step: float = 1.0
    """Gradient steps per environment step, however many environments there are."""
    batch_size: Count = 256
    """Transitions per gradient step."""
    tau: float = 0.005
    """Share of the way that a target network moves to the trained one each time; 1: a copy."""
    noise: Literal["gaussian", "ou"] = "gaussian"
    """New noise for every action, or noise that changes slowly (Ornstein-Uhlenbeck)."""
    noise_std: float = 0.1
    """Std of the noise (of ou: over a long time), for actions whose bounds are [-1, 1]."""
    log_frequency: Count = 1000
    """Environment steps per iteration; each iteration ends with a line of metrics."""

    # Environment
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment; "module:Name-v0" imports the module first."""
    num_envs: Count = 1
    """Environments stepped together."""
    env_kwargs: Json = field(default_factory=dict)
    """Arguments for gymnasium.make, such as '{"healthy_reward": 2}'."""
    async_envs: bool = False
    """One process per environment: faster if a step takes milliseconds, otherwise slower."""

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


def hidden_layers(in_dim: int) -> nn.Sequential:
    """Two layers of 256 rectified linear units. Shapes: (B, in_dim) -> (B, 256)."""
    return nn.Sequential(nn.Linear(in_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())


def mixed_precision(network: nn.Module, inputs: Tensor, bfloat16: bool) -> Tensor:
    """The network's output in float32; its layers compute in bfloat16 where asked."""
    bfloat16 = bfloat16 and inputs.shape[-2] > 16  # else converting weights costs more
    with torch.autocast(inputs.device.type, torch.bfloat16, bfloat16):
        outputs = network(inputs)
    return outputs.float()


class DeterministicActor(nn.Module):
    """Policy mu(s). Shapes: obs (B, obs_dim) -> actions in [-1, 1] (B, action_dim)."""

    def __init__(self, obs_dim: int, action_dim: int, bfloat16: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16  # in the hidden layers; the last one needs float32
        self.hidden, self.last = hidden_layers(obs_dim), nn.Linear(256, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        return self.last(mixed_precision(self.hidden, obs, self.bfloat16)).tanh()


class QCritic(nn.Module):
    """Action value Q(s, a). Shapes: obs (B, obs_dim), actions (B, action_dim) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int, bfloat16: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16
        self.hidden, self.last = hidden_layers(obs_dim + action_dim), nn.Linear(256, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        hidden = mixed_precision(self.hidden, torch.cat([obs, actions], 1), self.bfloat16)
        return (hidden * self.last.weight).sum(1) + self.last.bias  # faster than self.last(hidden)


# ---- Mathematics of DDPG -------------------------------------------------------------------------


def td_target(rewards: Tensor, terminations: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """Reward plus the discounted value of the next observation, which is 0 after a termination.

    Shapes: all (B,) -> (B,). Source: Mnih et al. 2015, Algorithm 1.
    """
    return rewards + gamma * next_values.masked_fill(terminations > 0, 0)


class ActionNoise:
    """Noise for the actions of each environment, with mean 0 and, after some steps, the given std.

    Each value is the last one times 1 - theta, plus Gaussian noise (an Ornstein-Uhlenbeck process
    in steps of 1). theta = 1 makes all values independent. Shapes: values (num_envs, action_dim).
    """

    def __init__(self, theta: float, std: float, num_envs: int, action_dim: int) -> None:
        self.kept = 1 - theta
        self.new_std = std * math.sqrt(1 - self.kept**2)  # so that the sum has the std asked for
        self.values = np.zeros((num_envs, action_dim))

    def sample(self, rng: Rng) -> np.ndarray:
        new = rng.standard_normal(self.values.shape)
        self.values = self.kept * self.values + self.new_std * new
        return self.values

    def reset(self, dones: np.ndarray) -> None:
        """Begin at 0 again in the environments whose episode has ended. Shapes: (num_envs,)."""
        self.values[dones] = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": torch.from_numpy(self.values)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.values = state["values"].numpy().copy()


# ---- Buffer and training -------------------------------------------------------------------------


Batch = namedtuple("Batch", "obs actions rewards next_obs terminations")  # tensors (B, ...)


class TransitionBuffer:
    """The newest transitions: actions[i], taken in obs[i], led to rewards[i] and next_obs[i].

    Everything that belongs to a transition stands side by side in one row, so that a minibatch is
    gathered at once. next_obs is the true next observation, also where an episode ended.

    Shapes: rows (size, 2 * obs_dim + action_dim + 2).
    """

    def __init__(self, size: int, obs_dim: int, action_dim: int) -> None:
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = np.zeros((size, sum(self.widths)), np.float32)  # takes memory when written to
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, obs, actions, rewards, next_obs, terminations) -> None:
        """Add one step of all environments, over the oldest rows. Shapes: (num_envs, ...)."""
        parts = obs, actions, rewards[:, None], next_obs, terminations[:, None]
        new = (self.added + np.arange(len(obs))) % len(self.rows)
        self.rows[new] = np.concatenate(parts, axis=1)
        self.added += len(obs)

    def sample(self, batch_size: int, rng: Rng, device: torch.device) -> Batch:
        """Transitions, uniformly sampled with replacement. Shapes: (batch_size, ...)."""
        rows = torch.from_numpy(self.rows[rng.integers(len(self), size=batch_size)]).to(device)
        obs, actions, rewards, next_obs, terminations = rows.split(self.widths, dim=1)
        return Batch(obs, actions, rewards.squeeze(1), next_obs, terminations.squeeze(1))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": torch.from_numpy(self.rows[: len(self)]), "added": self.added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.added = state["added"]
        self.rows[: len(self)] = state["rows"].numpy()


def train(args: Args) -> None:
    # Setup
    device, rng = setup(args)
    envs = make_envs(args)
    torch.manual_seed(args.seed)  # for the initial weights; everything else draws from rng
    to_env = ActionScaler(envs.single_action_space)
    obs_dim, action_dim = envs.single_observation_space.shape[0], to_env.dim

    actor, critic = make_networks(args, obs_dim, action_dim, device)
    target_actor, target_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    actor_parameters = list(actor.parameters())
    actor_optimizer = torch.optim.Adam(actor_parameters, args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, fused=True)
    buffer = make_buffer(args, obs_dim, action_dim)
    theta = 0.15 if args.noise == "ou" else 1.0
    noise = ActionNoise(theta, args.noise_std, args.num_envs, action_dim)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        """mu(s). Shapes: obs (B, obs_dim) -> (B, action_dim)."""
        return actor(torch.from_numpy(obs).float().to(device)).cpu().numpy()

    def deterministic_policy(obs: np.ndarray) -> np.ndarray:
        return to_env(torch.from_numpy(act(obs[None])))[0]

    @torch.no_grad()
    def compute_targets(rewards, next_obs, terminations):
        """What Q of the transitions should be."""
        next_values = target_critic(next_obs, target_actor(next_obs))
        return td_target(rewards, terminations, next_values, args.gamma)  # Algorithm 1

    def critic_step(obs, actions, targets):
        """Compute the gradients for the next step of the critic's optimizer."""
        q_values = critic(obs, actions)
        assert q_values.shape == targets.shape
        loss = (q_values - targets).square().mean()  # eq. 4
        loss.backward()
        return {"losses/critic_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}

    def actor_step(obs):
        """The same for the actor; the critic stays as it is."""
        loss = -critic(obs, actor(obs)).mean()  # eq. 6
        loss.backward(inputs=actor_parameters)
        return {"losses/actor_loss": loss.detach()}

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward() in the same graph
        compute_targets = torch.compile(compute_targets, fullgraph=True)
        critic_step = torch.compile(critic_step, fullgraph=True)
        actor_step = torch.compile(actor_step, fullgraph=True)
    state = {"actor": actor, "critic": critic, "target_actor": target_actor}
    state |= {"target_critic": target_critic, "actor_optimizer": actor_optimizer}
    state |= {"critic_optimizer": critic_optimizer, "buffer": buffer, "noise": noise, "rng": rng}
    run = Run(args, device, envs, state, deterministic_policy)
    global_step = run.restore() if args.resume or args.evaluate else 0
    if args.evaluate:
        run.finish()
        return
    noise.reset(np.array(envs.get_attr("lost_episode")))
    run.begin()
    obs, update_metrics = np.stack(envs.get_attr("obs")), []
    iteration_steps = math.ceil(args.log_frequency / args.num_envs) * args.num_envs
    last_step = math.ceil(args.total_timesteps / iteration_steps) * iteration_steps

    while global_step < last_step:
        # 1. Act
        if global_step < args.learning_starts:
            actions = rng.uniform(-1, 1, (args.num_envs, action_dim))
        else:
            actions = np.clip(act(obs) + noise.sample(rng), -1, 1)  # eq. 7

        # 2. Step the environments
        last_obs, scaled = obs, to_env(torch.from_numpy(actions))
        obs, rewards, terminations, truncations, infos = envs.step(scaled)
        global_step += args.num_envs
        dones = terminations | truncations
        next_obs = obs.copy()  # where an episode ended, obs already begins a new one
        if dones.any():
            next_obs[dones] = np.stack(infos["final_obs"][dones])
            ended = infos["final_info"]
            run.episodes += zip(ended["return"][dones], ended["length"][dones], strict=True)
            noise.reset(dones)
        buffer.add(last_obs, actions, rewards, next_obs, terminations)

        for _ in range(updates_due(args, global_step)):
            # 3. Targets
            batch = buffer.sample(args.batch_size, rng, device)
            targets = compute_targets(batch.rewards, batch.next_obs, batch.terminations)

            # 4. Update
            if args.anneal_lr:
                remaining = max(0, 1 - global_step / args.total_timesteps)
                actor_optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
                critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * remaining
            critic_optimizer.zero_grad()
            metrics = critic_step(batch.obs, batch.actions, targets)
            critic_optimizer.step()
            actor_optimizer.zero_grad()
            metrics |= actor_step(batch.obs)
            actor_optimizer.step()
            polyak_update(target_critic, critic, args.tau)
            polyak_update(target_actor, actor, args.tau)
            update_metrics.append(metrics)

        # 5. Log, checkpoint, evaluate
        finite = not update_metrics or update_metrics[-1]["losses/critic_loss"].isfinite()
        if due(global_step, iteration_steps) or not finite:  # if it is not, the run ends
            metrics = {"charts/learning_rate": actor_optimizer.param_groups[0]["lr"]}
            metrics["charts/updates_per_step"] = len(update_metrics) / iteration_steps
            for name in update_metrics[0] if update_metrics else ():
                metrics[name] = torch.stack([x[name] for x in update_metrics]).mean().item()
            update_metrics = []
            run.end_iteration(global_step, metrics)
    run.finish()


def check_args(args: Args) -> None:
    """Raises: ValueError for values that make no sense."""
    check_run_args(args)
    require(args, "buffer_size batch_size log_frequency", lambda x: x >= 1, "at least 1")
    require(args, "learning_starts", lambda x: x >= 0, "0 or more")
    require(args, "gamma", lambda x: 0 <= x <= 1, "between 0 and 1")
    require(args, "tau", lambda x: 0 < x <= 1, "above 0 and at most 1")
    positive = "learning_rate critic_learning_rate updates_per_step"
    require(args, positive, lambda x: 0 < x < math.inf, "above 0")
    require(args, "noise_std", lambda x: 0 <= x < math.inf, "0 or more")


# ---- Schedules, networks, replay memory ----------------------------------------------------------


def updates_due(args: Args, global_step: int) -> int:
    """How many gradient steps follow the newest step of all environments."""
    if global_step < args.learning_starts:
        return 0
    before = math.floor((global_step - args.num_envs) * args.updates_per_step)
    return math.floor(global_step * args.updates_per_step) - before


def due(step: int, frequency: int) -> bool:
    """Whether something that happens every `frequency` steps happens at this step."""
    return step % frequency == 0


def make_networks(
    args: Args, obs_dim: int, action_dim: int, device: torch.device
) -> list[nn.Module]:
    """Actor and critic, in the chosen precision."""
    torch.set_float32_matmul_precision("medium" if args.precision == "medium" else "highest")
    dims = obs_dim, action_dim, args.precision == "bfloat16"
    networks = DeterministicActor(*dims), QCritic(*dims)
    return [network.to(device) for network in networks]


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move the target's parameters towards the source's by the share tau; copy the buffers."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.lerp_(new, tau)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):
        old.copy_(new)


def make_buffer(args: Args, obs_dim: int, action_dim: int) -> TransitionBuffer:
    """The replay memory. One that will not fit is refused now, not hours later when it fills."""
    row, free = TransitionBuffer(1, obs_dim, action_dim).rows, math.inf
    gigabytes = args.buffer_size * row.nbytes / 1e9
    with contextlib.suppress(OSError, IndexError):  # only on Linux
        kilobytes = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        free = int(kilobytes) * 1024 / 1e9
    if args.learning_starts > args.total_timesteps and not args.evaluate:
        warn(f"--learning-starts {args.learning_starts} is after the end: it may learn nothing")
    if gigabytes > free and not args.evaluate:
        memory = f"{args.buffer_size:,} transitions in {gigabytes:.1f} GB"
        stop(f"error: --buffer-size: {memory}, but only {free:.1f} GB of memory are free")
    return TransitionBuffer(args.buffer_size, obs_dim, action_dim)


# ---- Environments, actions -----------------------------------------------------------------------


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
    """One environment with bounded Box actions; observations are flattened, pictures refused."""
    with contextlib.suppress(Exception):  # not installed, or it finds no way to render
        __import__("mujoco").set_mju_user_warning(lambda message: None)  # no MUJOCO_LOG.TXT
    render = {"render_mode": render_mode} if render_mode else {}
    with making(args):
        env = gym.make(args.env_id, **(args.env_kwargs | render))
    space = env.action_space
    if not (isinstance(space, gym.spaces.Box) and space.is_bounded()):
        close(env)
        stop(f"error: --env-id {args.env_id}: needs Box actions with bounds, this one has {space}")
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
