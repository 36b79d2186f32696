"""A peer's TRPO on the work that benchmark/speed.py names; prints steps per second.

python benchmark/peers/trpo.py stable_baselines3 ENV_ID TOTAL WARM_UP
"""

import sys

import mujoco
import torch
from clock import steps_per_second
from sb3_contrib import TRPO  # Stable-Baselines3 keeps it in a package of its own
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


def main(env_id: str, total_timesteps: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    mujoco.set_mju_user_warning(lambda message: None)  # it would write MUJOCO_LOG.TXT
    envs = VecNormalize(make_vec_env(env_id, n_envs=16, seed=1))
    model = TRPO(
        "MlpPolicy", envs, n_steps=64, batch_size=16 * 64, n_critic_updates=20, cg_max_steps=15,
        seed=1, device="cpu",
    )  # fmt: skip
    print(steps_per_second(model, total_timesteps, warm_up))


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
