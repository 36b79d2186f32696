"""Pendulum-v1 whose steps take 5 ms, as a simulator's may: "benchmark.slow:SlowPendulum-v0"."""

import time

import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv


class SlowPendulum(PendulumEnv):
    def step(self, action):
        time.sleep(0.005)
        return super().step(action)


gym.register("SlowPendulum-v0", SlowPendulum, max_episode_steps=200)
