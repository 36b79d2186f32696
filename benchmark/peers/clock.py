"""What the peers' scripts share."""

import time

from stable_baselines3.common.callbacks import BaseCallback


class Clock(BaseCallback):
    """Notes the time at the beginning of every rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        self.marks = []

    def _on_rollout_start(self) -> None:
        self.marks.append((time.perf_counter(), self.num_timesteps))


def steps_per_second(model, total_timesteps: int, warm_up: int) -> float:
    """Train; the first warm_up steps do not count."""
    clock = Clock()
    model.learn(total_timesteps, callback=clock)
    end = (time.perf_counter(), model.num_timesteps)
    start = next(mark for mark in clock.marks if mark[1] >= warm_up)
    return (end[1] - start[1]) / (end[0] - start[0])


class StepClock(BaseCallback):
    """Notes the time at one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            self.start = time.perf_counter()
        return True
