"""A peer's PPO on the work that benchmark/speed.py names; prints steps per second.

python benchmark/peers/ppo.py {stable_baselines3,sbx} ENV_ID TOTAL WARM_UP
"""

import importlib
import os
import sys

import ale_py  # noqa: F401  registers the games
import mujoco
import torch
from clock import steps_per_second
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize


def main(library: str, env_id: str, total_timesteps: int, warm_up: int) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if library == "sbx":  # JAX makes a thread for each core that it may use
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    PPO = importlib.import_module(library).PPO
    mujoco.set_mju_user_warning(lambda message: None)  # it would write MUJOCO_LOG.TXT
    if env_id.startswith("ALE/"):
        # frame skip, picture, clipped rewards and lives by its wrappers; no sticky actions
        raw = {"frameskip": 1, "repeat_action_probability": 0.0}
        envs = make_atari_env(env_id, n_envs=8, seed=1, env_kwargs=raw)  # SubprocVecEnv: the same
        model = PPO(
            "CnnPolicy", VecFrameStack(envs, n_stack=4), n_steps=128, batch_size=256, n_epochs=4,
            learning_rate=2.5e-4, clip_range=0.1, vf_coef=0.5, ent_coef=0.01, seed=1, device="cpu",
        )  # fmt: skip
        print(steps_per_second(model, total_timesteps, warm_up))
        return
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
