"""A peer's PPO on the work that benchmark/speed.py names; prints steps per second.

python benchmark/peers/ppo.py {stable_baselines3,sbx} ENV_ID TOTAL WARM_UP
"""

import importlib
import os
import sys

import mujoco
import torch
from clock import steps_per_second
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


def main(library: str, env_id: str, total_timesteps: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    if library == "sbx":  # JAX makes a thread for each core that it may use
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    PPO = importlib.import_module(library).PPO
    mujoco.set_mju_user_warning(lambda message: None)  # it would write MUJOCO_LOG.TXT
    envs = VecNormalize(make_vec_env(env_id, n_envs=8, seed=1))
    network = {"net_arch": [64, 64]}
    if library == "stable_baselines3":
        network["activation_fn"] = torch.nn.Tanh  # the other's default
    model = PPO(
        "MlpPolicy", envs, n_steps=256, batch_size=64, n_epochs=10, learning_rate=3e-4, seed=1,
        device="cpu", policy_kwargs=network,
    )  # fmt: skip
    print(steps_per_second(model, total_timesteps, warm_up))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
