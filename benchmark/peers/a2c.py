"""A peer's A2C on the work that benchmark/speed.py names; prints steps per second.

python benchmark/peers/a2c.py stable_baselines3 ENV_ID TOTAL WARM_UP
"""

import importlib
import sys
import time

import mujoco
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


class Clock(BaseCallback):
    """Notes the time at the end of every rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        self.marks = []

    def _on_rollout_start(self) -> None:
        self.marks.append((time.perf_counter(), self.num_timesteps))


def main(library: str, env_id: str, total_timesteps: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    A2C = importlib.import_module(library).A2C
    mujoco.set_mju_user_warning(lambda message: None)  # it would write MUJOCO_LOG.TXT
    if env_id == "CartPole-v1":
        envs = make_vec_env(env_id, n_envs=8, seed=1)
    else:
        envs = VecNormalize(make_vec_env(env_id, n_envs=16, seed=1))
    model = A2C("MlpPolicy", envs, n_steps=5, seed=1, device="cpu")
    clock = Clock()
    model.learn(total_timesteps, callback=clock)
    end = (time.perf_counter(), model.num_timesteps)
    start = next(mark for mark in clock.marks if mark[1] >= warm_up)
    print((end[1] - start[1]) / (end[0] - start[0]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
