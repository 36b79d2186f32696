"""A peer's SAC or DDPG on the work that benchmark/speed.py names; prints steps per second.

python benchmark/peers/actor_critic.py {SAC,DDPG} {stable_baselines3,sbx} ENV_ID TOTAL WARM_UP
"""

import importlib
import os
import sys
import time

import mujoco
import torch
from clock import StepClock
from stable_baselines3.common.env_util import make_vec_env


def main(algorithm: str, library: str, env_id: str, total_timesteps: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    if library == "sbx":  # JAX makes a thread for each core that it may use
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    mujoco.set_mju_user_warning(lambda message: None)  # it would write MUJOCO_LOG.TXT
    model = getattr(importlib.import_module(library), algorithm)(
        "MlpPolicy", make_vec_env(env_id, seed=1), buffer_size=100_000, learning_starts=1000,
        batch_size=256, train_freq=1, gradient_steps=1, seed=1, device="cpu",
        policy_kwargs={"net_arch": [256, 256]},
    )  # fmt: skip
    clock = StepClock(warm_up)
    model.learn(total_timesteps, callback=clock)
    print((total_timesteps - warm_up) / (time.perf_counter() - clock.start))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
