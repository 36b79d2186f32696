"""A peer's A2C on the work that benchmark/speed.py names; prints steps per second.

python benchmark/peers/a2c.py stable_baselines3 ENV_ID TOTAL WARM_UP
"""

import importlib
import sys

import mujoco
import torch
from clock import steps_per_second
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


def main(library: str, env_id: str, total_timesteps: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    A2C = importlib.import_module(library).A2C
    mujoco.set_mju_user_warning(lambda message: None)  # it would write MUJOCO_LOG.TXT
    if env_id == "CartPole-v1":
        envs = make_vec_env(env_id, n_envs=8, seed=1)
    else:
        envs = VecNormalize(make_vec_env(env_id, n_envs=16, seed=1))
    model = A2C("MlpPolicy", envs, n_steps=5, seed=1, device="cpu")
    print(steps_per_second(model, total_timesteps, warm_up))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
