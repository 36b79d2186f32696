"""Tiny environments whose optimal values are known, and some that misbehave; "probes:Name-v0"."""

import multiprocessing
import os
import pathlib
import random
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple


class Probe(gym.Env):
    """Base: one-dimensional observation 0, one action in [-1, 1], one step, reward 1."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)
    length, truncates = 1, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is outside {self.action_space}"
        reward = self.reward(action)
        self.steps += 1
        over = self.steps >= self.length
        return self.observe(), reward, over and not self.truncates, over and self.truncates, {}

    def observe(self):
        return np.zeros(1, np.float32)

    def reward(self, action):
        return 1.0


class ObservedValue(Probe):
    """The reward is the observation, -1 or 1."""

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.value = float(self.np_random.choice([-1, 1]))
        return super().reset(options=options)

    def observe(self):
        return np.full(1, self.value, np.float32)

    def reward(self, action):
        return self.value


class Delayed(Probe):
    """Two steps, observation 0 then 1, and reward 1 at the end: V = gamma, then 1."""

    length = 2

    def observe(self):
        return np.full(1, min(self.steps, 1), np.float32)

    def reward(self, action):
        return float(self.steps == 1)


class Forever(Probe):
    """Reward 1 for ever, cut every 5 steps by a time limit: V = 1 / (1 - gamma)."""

    length, truncates = 5, True


class Always(Forever):
    """The same, cut after every step: no return differs from another."""

    length = 1


class Ending(Forever):
    """Its twin, which ends for good after the same 5 steps: V at most 1 + gamma + ... + gamma^4."""

    truncates = False


class Both(Ending):
    """The same, with a time limit at the very step that ends the task."""

    def step(self, action):
        obs, reward, termination, _, info = super().step(action)
        return obs, reward, termination, termination, info


class Swap(Probe):
    """One step from s to 1 - s with reward s, then a time limit: V(s) = s + gamma V(1 - s).

    A new episode starts anywhere, so that a bootstrap from its first observation shows.
    """

    truncates = True

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.start = int(self.np_random.integers(2))
        return super().reset(options=options)

    def observe(self):
        return np.full(1, self.start if self.steps == 0 else 1 - self.start, np.float32)

    def reward(self, action):
        return float(self.start)


class Target(Probe):
    """The best action is 4 in a lopsided box [3, 5] x [-8, 0]; second dimension: -7."""

    action_space = Box(np.array([3, -8], np.float32), np.array([5, 0], np.float32))

    def reward(self, action):
        return -float((action[0] - 4.5) ** 2 + ((action[1] + 7) / 4) ** 2)


class Offset(Probe):
    """Reward 100, less at most 2.25: the best action is 0.5."""

    def reward(self, action):
        return 100 - float((action[0] - 0.5) ** 2)


class ObservedTarget(ObservedValue):
    """The best action is half the observation, in an unbounded action space."""

    action_space = Box(-np.inf, np.inf, (1,), np.float32)

    def reward(self, action):
        return -float((action[0] - 0.5 * self.value) ** 2)


class Pointing(ObservedTarget):
    """The same in a bounded one."""

    action_space = Probe.action_space


class Counting(Probe):
    """Episodes of differing lengths whose observation counts the steps and reward is 1."""

    observation_space = Box(0, np.inf, (2,), np.float64)

    def __init__(self):
        self.buffer = np.zeros(2)  # written into again and again, as some environments do

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.length = int(self.np_random.integers(1, 9))
        self.truncates = bool(self.np_random.integers(2))
        return super().reset(options=options)

    def observe(self):
        self.buffer[:] = self.steps, self.length
        return self.buffer


class Nested(Probe):
    """Dict observations and a two-dimensional action box."""

    observation_space = Dict(position=Box(-1, 1, (2, 2)), speed=Box(-1, 1, (3,), np.float64))
    action_space = Box(-1, 1, (2, 3), np.float32)
    length = 7

    def observe(self):
        return {"position": np.ones((2, 2), np.float32), "speed": np.zeros(3)}


class Whole(Probe):
    """A box of whole numbers; the best action is 60 of [-100, 100]."""

    action_space = Box(-100, 100, (1,), np.int8)

    def reward(self, action):
        return -(((float(action[0]) - 60) / 100) ** 2)


class Meddling(Counting):
    """Writes into the action that it is given; the reward depends on it."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        reward = float(action[0])
        action *= 0.5
        return obs, reward, *rest


class Unseeded(Probe):
    """Draws from the operating system, so that no replay can bring it back."""

    length = 1000

    def observe(self):
        return np.random.default_rng().uniform(-1, 1, 1).astype(np.float32)


class Breaking(Unseeded):
    """Ends at random, and cannot bear to be stepped after its end."""

    def reset(self, *, seed=None, options=None):
        self.length = np.random.default_rng().integers(1, 30)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        assert self.steps < self.length, "stepped after its end"
        return super().step(action)


class BadReward(Probe):
    """Its reward becomes NaN after 300 steps of one environment."""

    length, total = 50, 0

    def reward(self, action):
        self.total += 1
        return float("nan") if self.total > 300 else 1.0


class Crashing(Probe):
    """Raises an error of its own after 100 steps."""

    length, total = 50, 0

    def reward(self, action):
        self.total += 1
        if self.total > 100:
            raise OSError("the simulator fell over")
        return 1.0


class CrashingOnce(Crashing):
    """The same, but only while the file named by CRASH_MARKER is not there; it makes it."""

    def reward(self, action):
        marker = pathlib.Path(os.environ["CRASH_MARKER"])
        if self.total >= 100 and not marker.exists():
            marker.touch()
            raise OSError("the simulator fell over once")
        self.total += 1
        return 1.0


class Picture(Probe):
    observation_space = Box(0, 255, (64, 64, 3), np.uint8)

    def observe(self):
        return np.zeros((64, 64, 3), np.uint8)


class Drawn(Probe):
    """Can be rendered without a display."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    length = 20

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 64, 3), self.steps, np.uint8)


class Fifty(Probe):
    length = 50


class Hundred(Probe):
    """Reward 100."""

    def reward(self, action):
        return 100.0


class Choice(ObservedValue):
    """Actions -1, 0 and 1; the best is the one that equals the observation."""

    action_space = Discrete(3, start=-1)

    def reward(self, action):
        return -float(abs(action - self.value))


class Small(Choice):
    """Takes actions of one byte, and no larger ones."""

    action_space = Discrete(3, start=-1, dtype=np.int8)


class Reseeding(Fifty):
    """Seeds the global generators in every reset, as some simulators do."""

    def reset(self, *, seed=None, options=None):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return super().reset(seed=seed, options=options)


class Sharing(Fifty):
    """Seeds and uses the global generators, as older simulators do."""

    def reset(self, *, seed=None, options=None):
        np.random.seed(seed)
        random.seed(seed)
        return super().reset(seed=seed, options=options)

    def observe(self):
        return np.array([np.random.uniform(-1, 1) * random.random()], np.float32)


class Threaded(Fifty):
    """Has a thread that ends when it is closed, as clients of simulators have; fails at last."""

    total = 0

    def __init__(self):
        self.closed = threading.Event()
        threading.Thread(target=self.closed.wait).start()

    def reward(self, action):
        self.total += 1
        assert self.total < 200, "the simulator fell over"
        return 1.0

    def close(self):
        self.closed.set()
        print("closed")


class Chatty(Fifty):
    """Prints when it is closed."""

    def close(self):
        print("closed")


class BrokenReset(Unseeded):
    """Cannot be reset twice in a process with BROKEN."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        BrokenReset.resets += 1
        assert BrokenReset.resets < 2 or "BROKEN" not in os.environ, "the second reset failed"
        return super().reset(seed=seed, options=options)


class Wary(Fifty):
    """Takes seeds of 31 bits."""

    def reset(self, *, seed=None, options=None):
        assert 0 <= seed < 2**31, seed
        return super().reset(seed=seed, options=options)


class FallingApart(Fifty):
    """Terminates because its state is no longer finite, as Ant-v5 does."""

    def observe(self):
        return np.full(1, np.nan if self.steps >= self.length else 0.5, np.float32)


class Broken(Fifty):
    """Its observations are not finite from the tenth step of an episode on."""

    def observe(self):
        return np.full(1, np.inf if self.steps > 9 else 0.5, np.float32)


class Boxed(Fifty):
    """Returns its reward as an array of one element, as many home-made environments do."""

    def reward(self, action):
        return np.ones(1)


class Scalar(Probe):
    """An action box of shape ()."""

    action_space = Box(-2, 2, (), np.float32)


class Endless(Probe):
    """A return that is not finite."""

    def reward(self, action):
        return np.inf


class Unclosable(Fifty):
    """Its close() raises; CLOSE_MARKER names a file to which it adds a line first."""

    def close(self):
        if marker := os.environ.get("CLOSE_MARKER"):
            with open(marker, "a") as file:
                file.write("closed\n")
        raise OSError("the port is gone")


class Tuned(Fifty):
    """Takes an argument, which is its reward."""

    def __init__(self, gain=1.0):
        if gain < 0:
            raise ValueError("gain must not be negative")
        self.gain = gain

    def reward(self, action):
        return self.gain


class Pictures(Probe):
    """A tuple of pictures."""

    observation_space = Tuple([Picture.observation_space] * 2)


class Mission(gym.Space):
    """A class of spaces of its own, as MiniGrid's for texts."""

    def __init__(self):
        super().__init__((), str)


class Told(Probe):
    observation_space = Dict(position=Box(-1, 1, (2,)), mission=Mission())


class Timeless(Drawn):
    """Has no frame rate."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": None}  # noqa: RUF012


class Flat(Drawn):
    """Its pictures have no colours."""

    def render(self):
        return np.zeros((64, 64), np.uint8)


class Blank(Drawn):
    """Its render() returns nothing."""

    def render(self):
        return None


class Stillborn(Fifty):
    """In processes of their own, all but the first fail to be made; BIRTH_MARKER names a file."""

    def __init__(self):
        if multiprocessing.parent_process():
            with open(os.environ["BIRTH_MARKER"], "x"):  # the others find the file
                pass


class Sketched(Sharing, Drawn):
    """Uses the global generators, and can be rendered."""


class Wandering(Fifty):
    """Goes to the folder of its files, as some simulators do."""

    def __init__(self, folder):
        os.chdir(folder)


class Quitting(Fifty):
    """Ends the process in one of its methods, as a game does whose window is closed."""

    def __init__(self, where, code):
        self.where, self.code, self.calls = where, code, 0
        self.perhaps_quit("make", 0)

    def perhaps_quit(self, here, calls):
        if here == self.where:
            self.calls += 1
            if self.calls > calls:
                sys.exit(self.code)

    def reset(self, *, seed=None, options=None):
        self.perhaps_quit("reset", 3)
        return super().reset(seed=seed, options=options)

    def reward(self, action):
        self.perhaps_quit("step", 100)
        return 1.0

    def close(self):
        self.perhaps_quit("close", 0)


class Foreign(Fifty):
    """Its numbers have the byte order of another machine, as if they came from a network."""

    def observe(self):
        return np.full(1, 0.5, ">f4")


class Gallery(Picture):
    """Adds a line to the file CLOSE_MARKER when it is closed."""

    def close(self):
        with open(os.environ["CLOSE_MARKER"], "a") as file:
            file.write("closed\n")


class Sleepy(Fifty):
    """Its first reset takes a minute; SLEEP_MARKER names a file that it makes before."""

    def reset(self, *, seed=None, options=None):
        pathlib.Path(os.environ["SLEEP_MARKER"]).touch()
        time.sleep(60)
        return super().reset(seed=seed, options=options)


def answer(pipe):
    while True:
        pipe.send(pipe.recv() + 1)


class Forking(Fifty):
    """Its simulator is a process of its own. If `tidy`, close() ends it; else Python does."""

    def __init__(self, tidy=True):
        context = multiprocessing.get_context("fork")
        self.tidy, (self.pipe, other) = tidy, context.Pipe()
        self.process = context.Process(target=answer, args=(other,), daemon=True)
        self.process.start()

    def reward(self, action):
        self.pipe.send(0)
        return float(self.pipe.recv())

    def close(self):
        if self.tidy:
            self.process.terminate()
            self.process.join()


class Slow(Fifty):
    """A step takes SLOW_SECONDS."""

    def reward(self, action):
        time.sleep(float(os.environ.get("SLOW_SECONDS", 0.005)))
        return 1.0


for probe in [
    Probe,
    *Probe.__subclasses__(),
    Always,
    Ending,
    Both,
    ObservedTarget,
    Pointing,
    Meddling,
    Breaking,
    BrokenReset,
    CrashingOnce,
    Choice,
    Small,
    Gallery,
    *Fifty.__subclasses__(),
    *Drawn.__subclasses__(),
]:
    gym.register(f"{probe.__name__}-v0", probe, disable_env_checker=True)
    discrete = type(f"Discrete{probe.__name__}", (probe,), {"action_space": Discrete(2)})
    gym.register(f"{discrete.__name__}-v0", discrete, disable_env_checker=True)

for name in ("here/Short-v0", "here-Short-v0"):  # of one folder's name, once cleaned
    gym.register(name, Probe, disable_env_checker=True)
