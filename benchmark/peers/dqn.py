"""A peer's DQN on the work that benchmark/speed.py names; prints steps per second.

python benchmark/peers/dqn.py {stable_baselines3,sbx} ENV_ID TOTAL WARM_UP
"""

import importlib
import os
import sys
import time

import ale_py  # noqa: F401  registers the games
import torch
from clock import StepClock
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack


def main(library: str, env_id: str, total_timesteps: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    if library == "sbx":  # JAX makes a thread for each core that it may use
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    DQN = importlib.import_module(library).DQN
    if env_id.startswith("ALE/"):
        # frame skip, picture, clipped rewards and lives by its wrappers; no sticky actions
        raw = {"frameskip": 1, "repeat_action_probability": 0.0}
        envs = VecFrameStack(make_atari_env(env_id, seed=1, env_kwargs=raw), n_stack=4)
        model = DQN(
            "CnnPolicy", envs, learning_rate=1e-4, buffer_size=10_000, learning_starts=1000,
            batch_size=32, train_freq=4, target_update_interval=1000, seed=1, device="cpu",
            exploration_initial_eps=0.1, exploration_final_eps=0.1,
        )  # fmt: skip
    else:
        model = DQN(
            "MlpPolicy", make_vec_env(env_id, seed=1), learning_rate=2.5e-4, buffer_size=10_000,
            learning_starts=10_000, batch_size=128, train_freq=10, target_update_interval=500,
            exploration_fraction=0.5, exploration_final_eps=0.05, seed=1, device="cpu",
            policy_kwargs={"net_arch": [120, 84]},
        )  # fmt: skip
    clock = StepClock(warm_up)
    model.learn(total_timesteps, callback=clock)
    print((total_timesteps - warm_up) / (time.perf_counter() - clock.start))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
