"""Off-policy actor-critics: squashed Gaussians, temperature, noise, replay, whole runs."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import checkpoint, load, metrics, run, same, training
from torch.distributions import Normal, TanhTransform, TransformedDistribution

BOTH = ["ddpg", "sac"]
each = pytest.mark.parametrize("script", BOTH)
PROBE = """--gamma 0.9 --learning-starts 100 --total-timesteps 900 --learning-rate 0.003
--critic-learning-rate 0.003 --tau 0.05 --batch-size 32 --eval-episodes 1 --num-envs 2
--updates-per-step 1 --buffer-size 2000 --env-kwargs {}""".split()
# Without payment for entropy, values are those of the task alone.
OWN = {"ddpg": [], "sac": ["--no-autotune", "--alpha", 1e-4]}


@pytest.fixture
def sac():
    return load("sac")


@pytest.fixture
def ddpg():
    return load("ddpg")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- Mathematics ---------------------------------------------------------------------------------


def test_squashed_log_prob(sac):
    """Against torch's own distribution in float64, the tails included."""
    mean, log_std = rand(200, 3), rand(200, 3, seed=1)
    unsquashed = 3 * rand(200, 3, seed=2)
    reference = TransformedDistribution(
        Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)], validate_args=False
    )
    transform = reference.transforms[0]
    expected = reference.log_prob(transform(unsquashed)).sum(1)
    noise = (unsquashed - mean) / log_std.exp()
    torch.testing.assert_close(sac.squashed_log_prob(noise, log_std, unsquashed), expected)
    one = torch.ones(1, 1)
    for u in (-60.0, -20.0, 20.0, 60.0):  # tanh(u) is 1 in float32; its slope is 4 exp(-2 |u|)
        actual = sac.squashed_log_prob(0 * one, 0 * one, u * one).item()
        slope = math.log(4) - 2 * abs(u)
        assert actual == pytest.approx(-0.5 * math.log(2 * math.pi) - slope, rel=1e-6)


def test_the_density_integrates_to_one(sac):
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
    mean, log_std = torch.full_like(u, 0.3), torch.full_like(u, -0.2)
    density = sac.squashed_log_prob((u - mean) / log_std.exp(), log_std, u).exp()
    assert torch.trapezoid(density, u.tanh()[:, 0]).item() == pytest.approx(1, abs=1e-6)


def test_soft_value(sac):
    q_values = torch.tensor([[1.0, 5.0], [2.0, 3.0]])
    actual = sac.soft_value(q_values, torch.tensor([-1.0, 2.0]), torch.tensor(0.5))
    assert actual.tolist() == [1 + 0.5, 3 - 1]


@pytest.mark.parametrize("flags", [[], ["--value-network", "--no-autotune"]])
def test_soft_values_are_of_both_critics(sac, flags, tmp_path, monkeypatch):
    """In the targets and in the actor's loss: neither the first alone, nor their mean."""
    soft_value, seen = sac.soft_value, []

    def look(q_values, *rest):
        seen.append((q_values.shape, (q_values[0] != q_values[-1]).any().item()))
        return soft_value(q_values, *rest)

    monkeypatch.setattr(sac, "soft_value", look)
    run("sac", *flags, "--run-dir", tmp_path / "r", module=sac)
    assert len(seen) >= 200 and set(seen) == {((2, 16), True)}


def test_twin_critics_equal_two_separate_ones(sac):
    torch.manual_seed(0)
    twin, obs, actions = sac.TwinCritic(5, 2, False), torch.randn(7, 5), torch.randn(7, 2)
    actual = twin(obs, actions)
    assert actual.shape == (2, 7) and not torch.allclose(actual[0], actual[1])
    for k in range(2):
        x = torch.cat([obs, actions], 1)
        for layer in (twin.hidden[0], twin.hidden[2]):
            x = (x @ layer.weight[k] + layer.bias[k]).relu()
        expected = (x @ twin.last.weight[k] + twin.last.bias[k]).squeeze(1)
        torch.testing.assert_close(actual[k], expected)
    linear = torch.nn.Linear(300, 300)
    layer = sac.TwinLinear(300, 300)
    assert layer.weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)
    assert layer.weight.abs().max() <= 300**-0.5


@pytest.mark.parametrize("kind", ["gaussian", "ou"])
def test_noise(ddpg, kind):
    """Its std is the one asked for, and lag k correlates with (1 - theta)^k."""
    theta = 1.0 if kind == "gaussian" else 0.15
    noise, rng = ddpg.ActionNoise(theta, 0.3, 50, 2), ddpg.Rng(np.random.PCG64(0))
    values = np.array([noise.sample(rng).copy() for _ in range(4000)])[100:]
    assert values.std() == pytest.approx(0.3, rel=0.03)
    assert abs(values.mean()) < 0.01
    for lag in (1, 5):
        correlation = (values[lag:] * values[:-lag]).mean() / values.var()
        assert correlation == pytest.approx((1 - theta) ** lag, abs=0.03)
    across = (values[:, 0, 0] * values[:, 1, 1]).mean() / values.var()
    assert abs(across) < 0.15  # drawn for each environment and dimension


def test_noise_restarts_where_an_episode_ended_and_is_saved(ddpg):
    noise, rng = ddpg.ActionNoise(0.15, 0.3, 3, 2), ddpg.Rng(np.random.PCG64(0))
    for _ in range(5):
        before = noise.sample(rng)
    other = ddpg.ActionNoise(0.15, 0.3, 3, 2)
    other.load_state_dict(noise.state_dict())
    assert np.array_equal(other.values, before)
    noise.reset(np.array([False, True, False]))
    assert (noise.values[1] == 0).all() and np.array_equal(noise.values[[0, 2]], before[[0, 2]])


def test_the_noise_of_an_episode_ends_with_it(ddpg, tmp_path, monkeypatch):
    """Episodes of 50 steps: the first noise of each is drawn as if from 0."""
    starts, sample = [], ddpg.ActionNoise.sample

    def look(noise, rng):
        starts.append((noise.values == 0).all(1).tolist())
        return sample(noise, rng)

    monkeypatch.setattr(ddpg.ActionNoise, "sample", look)
    run("ddpg", "--env-id", "probes:Fifty-v0", "--run-dir", tmp_path / "r", "--noise", "ou",
        "--learning-starts", 0, "--total-timesteps", 384, "--env-kwargs", "{}")  # fmt: skip
    assert starts == [[step % 50 == 0] * 2 for step in range(192)]


@pytest.mark.parametrize(
    "script, flags",
    [("ddpg", ["--noise", "ou"]), ("sac", ["--value-network"]), ("sac", ["--no-autotune"])],
)
def test_a_resumed_run_ends_in_the_same_weights(script, flags, tmp_path):
    """The general tests see to the defaults; these have a state of their own."""
    run(script, "--run-dir", tmp_path / "whole", *flags)
    run(script, "--run-dir", tmp_path / "cut", *flags, "--total-timesteps", 256)
    run(script, "--resume", tmp_path / "cut", "--total-timesteps", 512, quick=False)
    assert same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut"))


# ---- Replay --------------------------------------------------------------------------------------


def test_replay_keeps_the_newest_transitions_whole(ddpg):
    """Every field of transition i encodes i; nine are added two at a time to five rows."""
    buffer, rng = ddpg.TransitionBuffer(5, 3, 2), ddpg.Rng(np.random.PCG64(0))
    for first in range(0, 10, 2):
        i = np.arange(first, first + 2, dtype=np.float64)
        columns = np.repeat(i[:, None], 3, 1)
        buffer.add(columns, columns[:, :2] + 100, i + 200, columns + 300, i % 2 == 1)
        assert len(buffer) == min(first + 2, 5)
        batch = buffer.sample(500, rng, torch.device("cpu"))
        ids = batch.obs[:, 0]
        newest = set(range(max(0, first - 3), first + 2))
        assert set(ids.tolist()) == newest
        counts = torch.bincount(ids.long())[min(newest) :]
        assert (counts / 500 - 1 / len(newest)).abs().max() < 0.1
        assert batch.rewards.shape == batch.terminations.shape == (500,)
        for part, offset in ((batch.obs, 0), (batch.actions, 100), (batch.next_obs, 300)):
            assert (part == ids[:, None] + offset).all()
        assert (batch.rewards == ids + 200).all() and (batch.terminations == ids % 2).all()


def buffer_of(script, folder):
    rows = checkpoint(folder)["buffer"]["rows"]
    widths = {"obs": 1, "actions": rows.shape[1] - 4, "rewards": 1, "next_obs": 1, "ended": 1}
    return dict(zip(widths, rows.split(list(widths.values()), 1), strict=True))


@each
@pytest.mark.parametrize("name, share", [("Forever", 0), ("Ending", 1 / 5), ("Both", 1 / 5)])
def test_terminations_are_stored_and_time_limits_are_not(script, name, share, tmp_path):
    run(script, "--run-dir", tmp_path / "r", "--env-id", f"probes:{name}-v0", "--num-envs", 1,
        "--total-timesteps", 200, "--log-frequency", 200, "--env-kwargs", "{}")  # fmt: skip
    assert buffer_of(script, tmp_path / "r")["ended"].mean().item() == pytest.approx(share)


@each
def test_the_next_observation_is_the_episodes_own(script, tmp_path):
    """From s to 1 - s, then a time limit, always."""
    run(script, "--run-dir", tmp_path / "r", "--env-id", "probes:Swap-v0", "--env-kwargs", "{}")
    stored = buffer_of(script, tmp_path / "r")
    assert torch.equal(stored["next_obs"], 1 - stored["obs"])
    assert torch.equal(stored["rewards"], stored["obs"])


# ---- Learning ------------------------------------------------------------------------------------


def learn(script, folder, name, *extra):
    words = [*PROBE, *OWN[script], *extra]
    run(script, "--env-id", f"probes:{name}-v0", "--run-dir", folder, *words)
    return training(folder)[-1]["losses/q_values"]


def q_values(script, folder, *observations):
    """Q of the policy's actions. Shapes: one-dimensional observations -> the same."""
    module, saved = load(script), checkpoint(folder)
    obs = torch.tensor(observations)[:, None]
    with torch.no_grad():
        if script == "ddpg":
            actor, critic = module.DeterministicActor(1, 1, False), module.QCritic(1, 1, False)
        else:
            actor, critic = (
                module.SquashedGaussianActor(1, 1, False),
                module.TwinCritic(1, 1, False),
            )
        actor.load_state_dict(saved["actor"])
        critic.load_state_dict(saved["critic"])
        actions = actor(obs) if script == "ddpg" else actor(obs)[0].tanh()
        values = critic(obs, actions)
    return (values if script == "ddpg" else values.mean(0)).tolist()


@each
def test_constant_value(script, tmp_path):
    assert learn(script, tmp_path, "Probe") == pytest.approx(1, abs=0.05)


@each
def test_value_of_an_observation(script, tmp_path):
    learn(script, tmp_path, "ObservedValue")
    assert q_values(script, tmp_path, -1.0, 1.0) == pytest.approx([-1, 1], abs=0.1)


@each
def test_discounting(script, tmp_path):
    learn(script, tmp_path, "Delayed")
    assert q_values(script, tmp_path, 0.0, 1.0) == pytest.approx([0.9, 1], abs=0.05)


@each
def test_a_time_limit_bootstraps(script, tmp_path):
    """Reward 1 for ever, cut every 5 steps: Q = 1 / (1 - 0.9) = 10, from below; else below 5."""
    assert 7 < learn(script, tmp_path, "Forever") < 10.5


def test_the_value_network_bootstraps_too(tmp_path):
    q_forever = learn("sac", tmp_path / "a", "Forever", "--value-network")
    q_ending = learn("sac", tmp_path / "b", "Ending", "--value-network")
    assert q_forever > 6 and 2 < q_ending < 4.3
    v_forever, v_ending = (training(tmp_path / x)[-1]["losses/values"] for x in "ab")
    assert v_forever == pytest.approx(q_forever, rel=0.2) and 2 < v_ending < 4.3
    assert "last.weight" in checkpoint(tmp_path / "a")["target_network"]


@each
@pytest.mark.parametrize("name", ["Ending", "Both"])
def test_its_terminating_twin_does_not(script, name, tmp_path):
    assert 2 < learn(script, tmp_path, name) < 4.3


@each
def test_best_action_in_a_lopsided_box(script, tmp_path):
    """The best action is (4.5, -7) in [3, 5] x [-8, 0]."""
    learn(script, tmp_path, "Target")
    assert metrics(tmp_path)[-1]["eval/episodic_return"] > -0.05


def test_best_action_depends_on_the_observation(tmp_path):
    """It is half of what is observed."""
    learn("ddpg", tmp_path / "a", "Pointing")
    learn("sac", tmp_path / "b", "Pointing")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert metrics(folder)[-1]["eval/episodic_return"] > -0.05


@each
def test_an_unbounded_box_is_refused(script, tmp_path):
    done = run(
        script, "--env-id", "probes:ObservedTarget-v0", "--run-dir", tmp_path / "r",
        "--env-kwargs", "{}", code=2,
    )  # fmt: skip
    assert "bounds" in done.stderr and not (tmp_path / "r").exists()


def test_alpha_steers_the_entropy_to_its_target(tmp_path):
    """A target that is hard to reach makes alpha grow, a low one lets it fall.

    Uniform actions in [-1, 1] have an entropy of log 2: alpha would grow for ever above it.
    """
    ends, words = [], ["--env-id", "probes:Pointing-v0", "--target-entropy", 0.7]
    done = run("sac", *words, "--run-dir", tmp_path / "none", code=2)
    assert "must be below 0.69" in done.stderr and not (tmp_path / "none").exists()
    for target in (-1.5, 0.65):
        words = ["--target-entropy", target, "--alpha", 0.2, "--learning-rate", 0.01]
        words += ["--env-id", "probes:Pointing-v0", "--log-frequency", 100]
        run("sac", *PROBE, *words, "--run-dir", tmp_path / str(target))
        lines = [x for x in training(tmp_path / str(target)) if "losses/alpha" in x]
        ends.append((lines[-1]["losses/entropy"], lines[-1]["losses/alpha"]))
    (low, small), (high, large) = ends
    assert low < high - 0.3 and small < 0.2 < large


def test_the_gradient_of_alpha(sac, tmp_path, monkeypatch):
    """Its loss is alpha (entropy - target): by log alpha, alpha times the difference."""
    made, seen = [], []
    init, step = sac.Temperature.__init__, torch.optim.Adam.step

    def remember(temperature, alpha):
        init(temperature, alpha)
        made.append(temperature)

    def look(optimizer, *given):
        parameters = optimizer.param_groups[0]["params"]
        if any(x is made[-1].log_alpha for x in parameters):
            gradient = made[-1].log_alpha.grad
            seen.append((made[-1]().item(), gradient if gradient is None else gradient.item()))
        return step(optimizer, *given)

    monkeypatch.setattr(sac.Temperature, "__init__", remember)
    monkeypatch.setattr(torch.optim.Adam, "step", look)
    run("sac", "--run-dir", tmp_path / "r", "--target-entropy", 0.25, "--log-frequency", 4)
    lines = [x for x in training(tmp_path / "r") if "losses/entropy" in x]
    assert len(lines) == len(seen) > 50  # an update in each
    for line, (alpha, gradient) in zip(lines, seen, strict=True):
        assert gradient == pytest.approx(alpha * (line["losses/entropy"] - 0.25), rel=1e-4)
    seen.clear()
    run("sac", "--run-dir", tmp_path / "s", "--no-autotune", "--alpha", 0.3)
    assert seen and all(gradient is None for _, gradient in seen)
    alphas = [x["losses/alpha"] for x in training(tmp_path / "s") if "losses/alpha" in x]
    assert alphas == pytest.approx([0.3] * len(alphas))


@each
@pytest.mark.parametrize("extra", [[], ["--value-network"]])
def test_targets_have_no_gradient_and_follow_by_tau(script, extra, tmp_path, monkeypatch):
    if script == "ddpg" and extra:
        pytest.skip("it has no value network")
    module, polyak = load(script), load(script).polyak_update
    calls = []

    def look(target, source, tau):
        before = [x.clone() for x in target.parameters()]
        polyak(target, source, tau)
        for old, new, goal in zip(before, target.parameters(), source.parameters(), strict=True):
            assert new.grad is None and goal.grad is not None
            torch.testing.assert_close(new, old + tau * (goal - old))
        calls.append(tau)

    monkeypatch.setattr(module, "polyak_update", look)
    run(script, "--run-dir", tmp_path / "r", "--tau", 0.1, *extra)
    assert set(calls) == {0.1}


@pytest.mark.parametrize(
    "script, names, flags",
    [
        ("ddpg", ["DeterministicActor", "QCritic"], []),
        ("sac", ["TwinCritic"], []),
        ("sac", ["ValueNetwork"], ["--value-network"]),
    ],
)
def test_targets_come_from_the_target_networks(script, names, flags, tmp_path, monkeypatch):
    """Whatever was called last before a target was computed is what follows slowly."""
    module, calls, before, targets = load(script), [], [], set()
    for name in names:
        forward = getattr(module, name).forward

        def look(network, *given, forward=forward):
            calls.append(id(network))
            return forward(network, *given)

        monkeypatch.setattr(getattr(module, name), "forward", look)
    td_target, polyak = module.td_target, module.polyak_update

    def look_at_target(*given):
        before.append(calls[-len(names) :])
        return td_target(*given)

    def look_at_polyak(target, source, tau):
        targets.add(id(target))
        polyak(target, source, tau)

    monkeypatch.setattr(module, "td_target", look_at_target)
    monkeypatch.setattr(module, "polyak_update", look_at_polyak)
    run(script, "--run-dir", tmp_path / "r", *flags)
    assert len(before) > 50 and len(targets) == len(names)
    assert all(set(ids) <= targets for ids in before)


@each
def test_the_actor_step_leaves_the_critics_gradients_alone(script, tmp_path, monkeypatch):
    """What the critic's optimizer saw is still there when the actor's steps."""
    step, seen = torch.optim.Adam.step, []

    def look(optimizer, *given):
        gradients = [x.grad.clone() for x in optimizer.param_groups[0]["params"]]
        if len(seen) % 2:
            critic, kept = seen[-1]
            assert all(
                torch.equal(x.grad, old)
                for x, old in zip(critic.param_groups[0]["params"], kept, strict=True)
            )
        seen.append((optimizer, gradients))
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    run(script, "--run-dir", tmp_path / "r")
    assert len(seen) > 20 and seen[0][0] is not seen[1][0]


@each
@pytest.mark.parametrize("num_envs, per_step", [(1, 0.5), (4, 0.5), (4, 0.1), (2, 3)])
def test_updates_per_step_hold_for_any_number_of_environments(script, num_envs, per_step, tmp_path):
    words = ["--num-envs", num_envs, "--updates-per-step", per_step, "--log-frequency", 80]
    run(script, "--run-dir", tmp_path / "r", "--total-timesteps", 400, *words)
    rates = [x["charts/updates_per_step"] for x in training(tmp_path / "r")]
    assert rates[1:] == pytest.approx([per_step] * 4)


@each
def test_each_update_draws_a_minibatch_of_its_own(script, tmp_path, monkeypatch):
    module, seen = load(script), []
    sample = module.TransitionBuffer.sample
    monkeypatch.setattr(
        module.TransitionBuffer, "sample", lambda *given: (seen.append(sample(*given)), seen[-1])[1]
    )
    run(script, "--run-dir", tmp_path / "r", "--updates-per-step", 2, "--total-timesteps", 256)
    assert len(seen) > 100
    assert not any(torch.equal(a.obs, b.obs) for a, b in itertools.pairwise(seen))


@each
def test_random_actions_first(script, tmp_path):
    """Uniform in the box before --learning-starts."""
    run(script, "--run-dir", tmp_path / "r", "--env-id", "probes:Probe-v0", "--learning-starts",
        2000, "--buffer-size", 4000, "--total-timesteps", 2000, "--log-frequency", 2000,
        "--env-kwargs", "{}")  # fmt: skip
    actions = buffer_of(script, tmp_path / "r")["actions"]
    assert actions.abs().max() <= 1 and actions.std().item() == pytest.approx(3**-0.5, rel=0.05)


def test_actions_stay_in_the_box_under_noise(tmp_path):
    learn("ddpg", tmp_path, "Target", "--noise-std", 2, "--total-timesteps", 400)
    actions = checkpoint(tmp_path)["buffer"]["rows"][:, 1:3]
    assert actions.abs().max() == 1 and (actions.abs() == 1).float().mean() > 0.2


@each
def test_the_pendulum_swings_up(script, tmp_path):
    """Pendulum-v1: -1400 at the start, -120 to -250 at the end, whatever the seed or processor."""
    words = "--env-id Pendulum-v1 --learning-starts 1000 --batch-size 64"
    rates = "--learning-rate 0.001 --critic-learning-rate 0.001 --eval-episodes 10"
    own = ["--total-timesteps", 8000]
    if script == "sac":
        own = ["--total-timesteps", 5000, "--alpha", 0.2]
    run(script, *words.split(), *rates.split(), *own, "--run-dir", tmp_path / "r", quick=False)
    assert metrics(tmp_path / "r")[-1]["eval/episodic_return"] > -500


@each
def test_precision(script):
    """bfloat16 in hidden layers alone; what comes out is float32. medium may round all products.

    To act on a few observations, converting the weights would take longer: float32.
    """
    module, values, seen = load(script), {}, []
    obs, actions = torch.randn(64, 5), torch.rand(64, 2)
    for precision in ("highest", "medium", "bfloat16"):
        torch.manual_seed(0)
        args = module.Args(precision=precision)
        actor, critic, *_ = module.make_networks(args, 5, 2, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == precision.replace("bfloat16", "highest")
        for network in (actor, critic):
            network.hidden.register_forward_hook(lambda *parts: seen.append(parts[-1].dtype))
        outputs = actor(obs) if script == "ddpg" else actor(obs)[0]
        values[precision] = torch.cat([outputs.flatten(), critic(obs, actions).flatten()])
    torch.set_float32_matmul_precision("highest")
    actor(obs[:16]), critic(obs[:16], actions[:16])
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(x.dtype == torch.float32 for x in values.values())
    torch.testing.assert_close(values["medium"], values["highest"], rtol=0, atol=0.01)
    assert 1e-5 < (values["bfloat16"] - values["highest"]).abs().max() < 0.01


def test_exploration_is_the_policy_itself(sac, tmp_path):
    """Its actions, unsquashed again, have the mean and the std that the actor says."""
    words = ["--env-id", "probes:Probe-v0", "--total-timesteps", 1000, "--buffer-size", 1000]
    words += ["--learning-rate", 1e-9, "--learning-starts", 1, "--updates-per-step", 0.01]
    run("sac", *words, "--env-kwargs", "{}", "--run-dir", tmp_path / "r")
    saved = checkpoint(tmp_path / "r")
    actor = sac.SquashedGaussianActor(1, 1, False)
    actor.load_state_dict(saved["actor"])
    mean, log_std = (x.item() for x in actor(torch.zeros(1, 1)))
    unsquashed = saved["buffer"]["rows"][10:, 1].atanh()
    assert unsquashed.mean().item() == pytest.approx(mean, abs=0.15)
    assert unsquashed.std().item() == pytest.approx(math.exp(log_std), rel=0.1)


def test_evaluation_plays_the_squashed_mean(tmp_path, monkeypatch):
    """Not the mean of the Gaussian, which clipping would hide: small ones differ by little."""
    module, seen = load("sac"), []
    evaluate = module.Run.evaluate

    def look(self):
        actor = self.state["actor"]
        with torch.no_grad():
            list(actor.parameters())[-1][0] += 0.5  # the bias of the mean
            obs = np.array([1.0, 0.0, 0.0], np.float32)
            mean, _ = actor(torch.from_numpy(obs)[None])
        seen.append((self.policy(obs), 2 * mean[0].tanh().numpy()))
        evaluate(self)

    monkeypatch.setattr(module.Run, "evaluate", look)
    run("sac", "--run-dir", tmp_path / "r")
    ((action, expected),) = seen
    assert action == pytest.approx(expected, rel=1e-4) and abs(expected) > 0.5


@each
def test_the_learning_rates_fall_on_a_line(script, tmp_path):
    """Of both optimizers, to 0 at the end of the run."""
    run(script, "--run-dir", tmp_path / "r", "--anneal-lr", "--learning-rate", 0.004)
    rates = [line["charts/learning_rate"] for line in training(tmp_path / "r")]
    assert rates == pytest.approx([0.003, 0.002, 0.001, 0])
    for name in ("actor_optimizer", "critic_optimizer"):
        groups = checkpoint(tmp_path / "r")[name]["param_groups"]
        assert [group["lr"] for group in groups] == [0]
