"""ppo_atari: what it learns, from games with known values, and several processes as one run."""

import os
import re
import shutil
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TESTS,
    assert_same_end,
    checkpoint,
    command,
    environ,
    load,
    metrics,
    run,
    same,
    training,
)
from test_faults import alive, children
from test_resume import wait_for_step

pytest.importorskip("ale_py")
LEARN = """--num-envs 8 --num-steps 8 --num-minibatches 2 --total-timesteps 1024 --no-anneal-lr
--learning-rate 1e-3 --gamma 0.5 --eval-episodes 4 --ent-coef 0""".split()


class ProbeGame(gym.Env):
    """Stands in for a game: all pixels are black or all are white, as the seed wants it."""

    length, truncates, lives = 1, False, 0
    metadata = {"render_modes": [], "render_fps": 15}  # noqa: RUF012

    def __init__(self, args, render_mode):
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.action_space = gym.spaces.Discrete(2)

    def reward(self, action):
        return 1.0

    def observe(self):
        self.white = bool(self.np_random.integers(2))
        return np.full((4, 84, 84), 255 * self.white, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def send(self, action):
        self.sent = action

    def step(self, action):
        assert action in (0, 1)
        reward, self.t = self.reward(action), self.t + 1
        end = self.t == self.length
        return self.observe(), reward, end and not self.truncates, end and self.truncates, {}


def learn(folder, monkeypatch, *arguments, code=0, **attributes):
    """Play a game with these attributes. Returns the mean V at the end, V of black and of white."""
    module = load("ppo_atari")
    monkeypatch.setattr(module, "AtariGame", type("Game", (ProbeGame,), attributes))
    words = ["--run-dir", folder, "--device", "cpu"]
    done = run("ppo_atari", *LEARN, *arguments, *words, quick=False, code=code)
    if code:
        return done
    agent = module.AtariActorCritic(4, 2, False)
    agent.load_state_dict(checkpoint(folder)["agent"])
    pictures = torch.stack([torch.zeros(4, 84, 84), torch.full((4, 84, 84), 255.0)])
    with torch.no_grad():
        values = agent(pictures)[1].tolist()
    # Five iterations: one alone lies up to 0.25 beside it, and where, depends on the processor.
    return np.mean([line["losses/values"] for line in training(folder)[-5:]]), values


def test_value_of_an_observation(tmp_path, monkeypatch):
    _, values = learn(tmp_path, monkeypatch, reward=lambda self, action: float(self.white))
    assert values == pytest.approx([0, 1], abs=0.15)


@pytest.mark.parametrize("script", ["ppo_atari", "a2c"])
def test_precision(script):
    """bfloat16 is left to the hidden layers; logits and values are computed in float32."""
    module, obs, outputs = load(script), torch.randint(256, (8, 4, 84, 84)).float(), []
    for bfloat16 in (False, True):
        torch.manual_seed(0)
        network = module.AtariActorCritic(4, 6, bfloat16)
        types = []
        network.hidden.register_forward_hook(lambda *parts, to=types: to.append(parts[-1].dtype))
        result = network(obs)
        logits, values = result[0], result[-1]
        assert types == [torch.bfloat16 if bfloat16 else torch.float32]
        outputs.append(torch.cat([logits.flatten(), values.flatten()]))
        assert outputs[-1].dtype == torch.float32
        rounded = outputs[-1].bfloat16().float() == outputs[-1]  # as if it came from bfloat16
        assert rounded.float().mean() < 0.2
    assert 1e-5 < (outputs[0] - outputs[1]).abs().max() < 0.05


@pytest.mark.parametrize("more", ["--no-norm-adv", "--precision bfloat16"])
def test_an_action_that_depends_on_the_observation(more, tmp_path, monkeypatch):
    def reward(self, action):
        return float(action == self.white)

    learn(tmp_path, monkeypatch, *more.split(), reward=reward)
    assert metrics(tmp_path)[-1]["eval/episodic_return"] == 1


@pytest.mark.parametrize("truncates, value", [(True, 2), (False, 1)])
def test_a_time_limit_goes_on_and_a_termination_does_not(truncates, value, tmp_path, monkeypatch):
    """Episodes of one step, discount 1/2: 1 + 1/2 + 1/4 + ... = 2."""
    mean, _ = learn(tmp_path, monkeypatch, truncates=truncates)
    assert mean == pytest.approx(value, abs=0.2)


@pytest.mark.parametrize("ends, value", [(True, 1), (False, 2)])
def test_a_lost_life(ends, value, tmp_path, monkeypatch):
    """It ends the episode of the targets, and not of the log."""

    class Lives:
        def __get__(self, game, owner=None):
            return 1000 - game.t

    words = [] if ends else ["--no-episodic-life"]
    mean, _ = learn(tmp_path, monkeypatch, *words, lives=Lives(), length=1000)
    assert mean == pytest.approx(value, abs=0.2)
    assert not any("charts/episodes" in line for line in training(tmp_path))


def test_clipped_rewards(tmp_path, monkeypatch):
    """Learned from; what is logged and evaluated is the game's own return."""
    mean, _ = learn(tmp_path, monkeypatch, reward=lambda self, action: 3.0)
    assert mean == pytest.approx(1, abs=0.2)
    assert all(line["charts/episodic_return"] == 3 for line in training(tmp_path))
    assert metrics(tmp_path)[-1]["eval/episodic_return"] == 3


def test_every_episode_that_ended_is_in_a_line(tmp_path, monkeypatch):
    learn(tmp_path, monkeypatch, "--total-timesteps", 1024, length=50)
    lines = training(tmp_path)
    assert sum(line.get("charts/episodes", 0) for line in lines) == 8 * (1024 // 8 // 50)
    assert all(line.get("charts/episodic_return", 50) == 50 for line in lines)
    assert all(line.get("charts/episodic_length", 50) == 50 for line in lines)


def test_a_nan_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    def reward(self, action):
        return float("nan") if self.t > 40 else 1.0

    done = learn(
        tmp_path, monkeypatch, "--checkpoint-frequency", 128, reward=reward, length=1000, code=3
    )
    assert "not finite at step" in done.stderr and "Traceback" not in done.stderr
    assert all(x.isfinite().all() for x in checkpoint(tmp_path)["agent"].values())


def test_the_learning_rate_falls_to_0(tmp_path, monkeypatch):
    step, used = torch.optim.Adam.step, []

    def look(optimizer, *arguments, **options):
        used.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    learn(tmp_path, monkeypatch, "--anneal-lr", "--total-timesteps", 256)
    rates = [line["charts/learning_rate"] for line in training(tmp_path)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert used == pytest.approx(np.repeat(rates, 8))  # 4 epochs of 2 minibatches


def test_it_logs_its_health(tmp_path, monkeypatch):
    names = "policy_loss value_loss entropy approx_kl clipfrac explained_variance values grad_norm"
    reward = lambda self, action: float(self.white)  # noqa: E731  returns that differ
    learn(tmp_path, monkeypatch, "--total-timesteps", 256, reward=reward)
    for line in training(tmp_path):
        assert {f"losses/{name}" for name in names.split()} <= line.keys()
        assert line["losses/grad_norm"] > 0 and line["losses/approx_kl"] > 0


def test_minibatches_and_gradients(tmp_path, monkeypatch):
    """Four epochs of two; advantages have mean 0 and std 1 in each; gradients are clipped."""
    module, seen, norms = load("ppo_atari"), [], []
    policy_loss, step = module.ppo_policy_loss, torch.optim.Adam.step

    def look(log_ratio, advantages, clip_coef, kl_coef):
        seen.append(advantages.clone())
        assert clip_coef == 0.1 and kl_coef is None
        return policy_loss(log_ratio, advantages, clip_coef, kl_coef)

    def stepping(optimizer, *arguments, **options):
        squares = [x.grad.square().sum() for x in optimizer.param_groups[0]["params"]]
        norms.append(sum(squares).sqrt().item())
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(module, "ppo_policy_loss", look)
    monkeypatch.setattr(torch.optim.Adam, "step", stepping)
    learn(tmp_path, monkeypatch, "--total-timesteps", 64, "--max-grad-norm", 1e-3)
    assert [len(x) for x in seen] == [32] * 8 and np.allclose(norms, 1e-3, rtol=0.01)
    for x in seen:
        assert x.mean().abs() < 1e-5 and x.std(correction=0) == pytest.approx(1, abs=1e-3)


def test_minibatches_of_one_sample(tmp_path, monkeypatch):
    """Their advantage is not normalised, which would leave nothing of it."""
    words = "--num-envs 1 --num-steps 4 --num-minibatches 4 --total-timesteps 4 --ent-coef 0"
    learn(tmp_path, monkeypatch, *words.split(), "--vf-coef", 0)
    (line,) = training(tmp_path)
    assert abs(line["losses/policy_loss"]) > 1e-3 and line["losses/grad_norm"] > 0


def test_log_probabilities_and_entropy():
    module, logits = load("ppo_atari"), torch.randn(50, 6, dtype=torch.float64)
    reference = torch.distributions.Categorical(logits=logits)
    actions = reference.sample()
    actual = module.categorical_log_prob(logits, actions)
    torch.testing.assert_close(actual, reference.log_prob(actions))
    torch.testing.assert_close(module.categorical_entropy(logits), reference.entropy())


def test_the_entropy_bonus_keeps_the_policy_wide(tmp_path, monkeypatch):
    """One action is better by 1, which a large bonus outweighs."""
    learn(tmp_path, monkeypatch, "--ent-coef", 10, reward=lambda self, action: float(action))
    assert training(tmp_path)[-1]["losses/entropy"] > 0.6  # of at most log 2 = 0.69


def test_actions_are_sampled_from_the_policy(tmp_path, monkeypatch):
    """The shares of the actions of an untrained policy that prefers one of them."""
    module, actions = load("ppo_atari"), []
    send = ProbeGame.send
    init = module.AtariActorCritic.__init__

    def prefer(self, *arguments):
        init(self, *arguments)
        torch.nn.init.zeros_(self.logits.weight)
        self.logits.bias.data = torch.tensor([0.0, 1.0])

    monkeypatch.setattr(module.AtariActorCritic, "__init__", prefer)
    monkeypatch.setattr(ProbeGame, "send", lambda *x: (actions.append(int(x[1])), send(*x)))
    words = "--total-timesteps 1024 --num-steps 128 --update-epochs 1".split()
    learn(tmp_path, monkeypatch, *words)
    expected = 1 / (1 + np.exp(-1))
    assert np.mean(actions) == pytest.approx(expected, abs=0.05)


FIRE = {"use_fire_reset": True}


@pytest.mark.parametrize(
    "fire, kwargs, expected", [(True, {}, True), (False, {}, False), (False, FIRE, True)]
)
def test_fire_at_the_start_of_a_game(fire, kwargs, expected, monkeypatch):
    module, made = load("ppo_atari"), []
    monkeypatch.setattr(module, "AtariGame", lambda args, mode: made.append(args))
    monkeypatch.setattr(module, "ReplayableEnv", lambda env: env)
    module.make_env(module.Args(env_id="ALE/Breakout-v5", fire_reset=fire, env_kwargs=kwargs))
    assert made[0].env_kwargs["use_fire_reset"] is expected


@pytest.mark.parametrize("fire", [True, False])
@pytest.mark.parametrize("name", ["ppo_atari", "a2c", "dqn", "double_dqn_per"])
def test_fire_after_a_lost_life(name, fire):
    """Who never presses it loses all lives of Breakout with it, and one without it."""
    module, kwargs = load(name), {"use_fire_reset": fire}
    env = module.make_env(module.Args(env_id="ALE/Breakout-v5", env_kwargs=kwargs), None)
    env.reset(seed=1)
    assert env.unwrapped.lives == 5
    if not fire:
        env.step(np.array(1))
    ended = any(env.step(np.array(0))[2] for _ in range(400))
    assert ended == fire and (fire or env.unwrapped.lives == 4)
    env.close()


@pytest.mark.parametrize("name", ["ppo_atari", "a2c", "dqn", "double_dqn_per"])
def test_fire_takes_the_place_of_one_action(name, monkeypatch):
    """By hand: the second step loses a life, so the third is FIRE. A step stays a frame."""
    module = load(name)
    env = module.make_env(module.Args(env_id="ALE/Breakout-v5"), None)
    env.reset(seed=1)
    sent, lives = [], iter([5, 4, 4, 4])

    def recv():
        info, none = {"lives": np.array([next(lives)])}, np.zeros(1, bool)
        return np.zeros((1, 4, 84, 84), np.uint8), np.zeros(1), none, none, info

    monkeypatch.setattr(env.unwrapped.game, "send", sent.append)
    monkeypatch.setattr(env.unwrapped.game, "recv", recv)
    for _ in range(4):
        env.step(np.array(2))
    assert np.concatenate(sent).tolist() == [2, 2, 1, 2]
    env.close()


def test_freeway_has_no_fire():
    module = load("ppo_atari")
    env = module.make_env(module.Args(env_id="ALE/Freeway-v5"), None)  # which has no such action
    env.reset(seed=1)
    assert env.unwrapped.fire is None and env.step(np.array(1))[2] is False
    env.close()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--env-id CartPole-v1", "error: --env-id CartPole-v1"),
        ("--env-id ALE/Pongg-v5", "Did you mean: `Pong`"),
        ("--env-id PongNoFrameskip-v4", "ALE/Pong-v5"),
        ("--env-id BreakoutDeterministic-v4", "ALE/Breakout-v5"),
        ("--env-id Breakout-v5", "ALE/Breakout-v5"),
        ("--num-minibatches 7", "a divisor of num_steps = 64"),
        ("--sticky-actions 2", "--sticky-actions"),
        ("--clip-coef 0", "--clip-coef"),
    ],
)
def test_bad_arguments_of_ppo_atari(arguments, says, tmp_path):
    words = [*arguments.split(), "--run-dir", tmp_path / "r"]
    done = run("ppo_atari", *words, code=2)
    text = re.sub(r"[ │\n]+", " ", done.stderr)
    assert says in text and "Traceback" not in text and not (tmp_path / "r").exists()


# ---- Several processes ---------------------------------------------------------------------------

SMALL = """--env-id ALE/Breakout-v5 --num-envs 4 --num-steps 16 --num-minibatches 2 --device cpu
--update-epochs 2 --eval-episodes 1 --env-kwargs {"max_num_frames_per_episode":160}""".split()


def start(processes, *arguments, script=ROOT / "ppo_atari.py", **extra):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.Popen(
        [*launcher, str(processes), str(script), *map(str, arguments)],
        env=environ(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, and its folder."""
    folder = tmp_path_factory.mktemp("alone") / "r"
    run("ppo_atari", *SMALL, "--total-timesteps", 512, "--run-dir", folder, quick=False)
    return folder


def assert_close_end(folder, other):
    """The same games, and the same weights up to rounding."""
    ours, theirs = checkpoint(folder), checkpoint(other)
    assert same(ours["envs"], theirs["envs"]) and len(ours["envs"]) == 4
    assert ours["rng"] == theirs["rng"]
    for weight, expected in zip(ours["agent"].values(), theirs["agent"].values(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)
    for line, expected in zip(training(folder), training(other), strict=True):
        for name in ("charts/episodes", "charts/episodic_return", "charts/learning_rate"):
            assert line.get(name) == expected.get(name)
        assert line["losses/policy_loss"] == pytest.approx(expected["losses/policy_loss"], abs=1e-4)


def test_two_processes_are_the_run_of_one(alone, tmp_path):
    """Each plays half of the games; both end with the same weights, which are that run's."""
    words = [*SMALL, "--total-timesteps", 512, "--run-dir", tmp_path / "r"]
    process = start(2, *words, script=TESTS / "two_processes.py", WEIGHTS=str(tmp_path))
    out, _ = finish(process)
    assert out.count("eval mean_return") == 1
    assert_close_end(tmp_path / "r", alone)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["games"] == second["games"] == 2
    assert same(first["agent"], second["agent"])
    assert same(first["agent"], checkpoint(tmp_path / "r")["agent"])
    # A thread of the group that is left at the end of Python may abort the process.
    assert not [name for name in first["threads"] + second["threads"] if "gloo" in name]


def test_a_stopped_run_goes_on_with_any_number_of_processes(tmp_path):
    """SIGTERM to the launcher; resumed by two processes bit for bit, by one up to rounding."""
    words = [*SMALL, "--total-timesteps", 1024, "--eval-frequency", 256, "--update-epochs", 1]
    words += ["--checkpoint-frequency", 0]
    calm, stopped, alone = (tmp_path / name for name in ("calm", "stopped", "alone"))
    finish(start(2, *words, "--run-dir", calm))
    process = start(2, *words, "--run-dir", stopped)
    wait_for_step(process, stopped, 320)  # beyond an evaluation
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err.count("go on: torchrun --nproc-per-node 2 ") == 1 and f"--resume {stopped}" in err
    step = checkpoint(stopped)["global_step"]
    assert step == metrics(stopped)[-1]["global_step"] < 1024
    shutil.copytree(stopped, alone)
    finish(start(2, "--resume", stopped))
    assert_same_end(stopped, calm)
    run("ppo_atari", "--resume", alone, quick=False)
    assert_close_end(alone, calm)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(killed, tmp_path):
    """Nothing hangs, and what was saved is whole."""
    words = [*SMALL, "--total-timesteps", 10**6, "--checkpoint-frequency", 64]
    process = start(2, *words, "--run-dir", tmp_path / "r")
    wait_for_step(process, tmp_path / "r", 192)
    processes = children(process.pid)
    assert len(processes) == 2
    os.kill(processes[killed], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not out and not any(map(alive, processes))
    if killed:
        # Or torchrun's SIGTERM came first, between two exchanges.
        said = ("error: the processes cannot exchange data", "stopped; go on: torchrun")
        assert any(text in err for text in said), err
    assert checkpoint(tmp_path / "r")["global_step"] >= 64
    last = checkpoint(tmp_path / "r")["global_step"]
    words = ["--resume", tmp_path / "r", "--total-timesteps", 10**6]
    process = subprocess.Popen(command("ppo_atari", *words, quick=False), env=environ())
    wait_for_step(process, tmp_path / "r", last + 256)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_mistakes_and_evaluations_of_several_processes(alone, tmp_path):
    _, err = finish(start(2, *SMALL, "--num-envs", 3, "--run-dir", tmp_path / "r"), code=1)
    assert err.count("error: --num-envs 3: must be a multiple of 2 processes") == 1
    out, _ = finish(start(2, "--evaluate", alone))
    again = run("ppo_atari", "--evaluate", alone, quick=False)
    assert out == again.stdout


def test_several_processes_are_refused_on_a_mac(monkeypatch, capsys):
    """Its GPU cannot exchange tensors with gloo."""
    module = load("ppo_atari")
    monkeypatch.setattr(module.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        module.join_processes(module.Args(device="auto"))
    assert ended.value.code == 2 and "--device cpu" in capsys.readouterr().err


def test_averages_over_processes_keep_any_memory_layout(monkeypatch):
    """Convolutions have gradients with the channels last."""
    module = load("ppo_atari")
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(module.dist, "all_reduce", lambda x: x.mul_(4))
    tensors = [torch.randn(3, 2, 5, 5).to(memory_format=torch.channels_last), torch.randn(())]
    expected = [2 * x for x in tensors]
    module.average_over_processes(tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))
