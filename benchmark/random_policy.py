"""Returns of uniformly random actions: the 0 of normalised scores (the best published result is 1).

python -m benchmark.random_policy HalfCheetah-v5 ...     prints rows for reference_results.csv
"""

import sys

import gymnasium as gym
import numpy as np

EPISODES = 100


def play(env_id: str) -> np.ndarray:
    """Returns of whole episodes. Shapes: (EPISODES,)."""
    env, returns = gym.make(env_id), np.zeros(EPISODES)
    env.action_space.seed(0)
    for episode in range(EPISODES):
        env.reset(seed=episode)
        over = False
        while not over:
            _, reward, termination, truncation, _ = env.step(env.action_space.sample())
            returns[episode] += float(reward)
            over = termination or truncation
    env.close()
    return returns


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    for name in sys.argv[1:]:
        x = play(name)
        source = "measured: python -m benchmark.random_policy"
        what = f"mean of {EPISODES} episodes of uniform actions"
        print(f"any,{name},random,0,{what},{x.mean():.4f},{x.std():.4f},1,{name},{source}")
