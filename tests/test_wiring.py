"""What reaches what in a run: does each network, loss and optimizer get what the algorithm means?

Each test looks at the calls of a short run, and fails on a bug that learning would perhaps survive.
"""

import ast
import re
import subprocess
from dataclasses import fields

import numpy as np
import probes
import pytest
import torch
from conftest import ON_POLICY, ONE, ROOT, checkpoint, load, metrics, run, training
from test_ppo_atari import ProbeGame, learn

# ---- Policy gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ON_POLICY)
def test_networks_see_normalised_observations_alone(script, tmp_path, monkeypatch):
    """Numbers near 1000, of which no more than --obs-clip is left: to act, learn, evaluate, and
    where a time limit cuts. REINFORCE: the wait after an episode is not in the statistics."""
    module, seen, ended = load(script), [], []
    finish, observe = module.Run.finish, probes.Counting.observe
    monkeypatch.setattr(probes.Counting, "observe", lambda x: observe(x) + 1000)
    for network in (module.GaussianActor, module.ValueCritic):

        def look(self, obs, forward=network.forward):
            seen.append(obs.detach().abs().max().item())
            return forward(self, obs)

        monkeypatch.setattr(network, "forward", look)
    if script == "reinforce":  # only for the log, and per episode
        monkeypatch.setattr(module, "episode_gradients", lambda *given: torch.ones(2, 1))
    monkeypatch.setattr(module.Run, "finish", lambda x: (ended.append(x), finish(x)))
    run(script, "--env-id", "probes:Counting-v0", "--env-kwargs", "{}", "--run-dir", tmp_path / "r")
    assert max(seen) <= 50 and len(seen) > 100
    normalizer = ended[0].state["obs_normalizer"]
    assert normalizer.count.item() == pytest.approx(ended[0].global_step, abs=0.01)


@pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "trpo"])
def test_values_and_factors_that_advantages_are_made_of(script, tmp_path, monkeypatch):
    """V of what follows is V of the next step, also at a rollout's end; the critic stands still."""
    module, given = load(script), []
    compute_gae = module.compute_gae

    def look(rewards, values, next_values, terminations, dones, *factors):
        assert factors == (0.9, 0.8)
        given.append((values.clone(), next_values.clone(), dones.clone()))
        return compute_gae(rewards, values, next_values, terminations, dones, *factors)

    monkeypatch.setattr(module, "compute_gae", look)
    rate = "--learning-rate" if script == "ppo_continuous" else "--critic-learning-rate"
    words = ["--env-id", "probes:Counting-v0", "--env-kwargs", "{}", "--no-norm-obs", rate, 1e-12]
    words += ["--no-recompute-advantages"] if script == "ppo_continuous" else []
    run(script, *words, "--gamma", 0.9, "--gae-lambda", 0.8, "--run-dir", tmp_path / "r")
    values, next_values, dones = (torch.cat(parts) for parts in zip(*given, strict=True))
    goes_on = dones[:-1] == 0
    torch.testing.assert_close(next_values[:-1][goes_on], values[1:][goes_on])
    assert (values[1:] - values[:-1])[goes_on].abs().min() > 1e-3


def ppo_parts(monkeypatch, ppo):
    """What each gradient step gets: advantages, clip_coef, kl_coef, returns, ...; and its norm."""
    policy_loss, value_loss, step = ppo.ppo_policy_loss, ppo.value_loss, torch.optim.Adam.step
    policy, critic, norms = [], [], []
    monkeypatch.setattr(
        ppo, "ppo_policy_loss", lambda *x: (policy.append(x[1:]), policy_loss(*x))[1]
    )
    monkeypatch.setattr(ppo, "value_loss", lambda *x: (critic.append(x[1:]), value_loss(*x))[1])

    def look(optimizer, *given):
        gradients = [x.grad for x in optimizer.param_groups[0]["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    return policy, critic, norms


def test_minibatches_and_gradients(ppo, tmp_path, monkeypatch):
    """Two epochs of four minibatches: every transition once in each, in another order."""
    policy, critic, norms = ppo_parts(monkeypatch, ppo)
    words = ["--total-timesteps", 128, "--max-grad-norm", 1e-3, "--no-recompute-advantages"]
    run(ONE, "--run-dir", tmp_path / "r", *words)
    assert len(policy) == len(norms) == 8 and np.allclose(norms, 1e-3, rtol=0.01)
    for advantages, clip_coef, kl_coef in policy:
        assert advantages.mean().abs() < 1e-5 and advantages.std() == pytest.approx(1, abs=1e-3)
        assert clip_coef == 0.2 and kl_coef is None
    first, second = (torch.cat([x[1] for x in critic[i : i + 4]]) for i in (0, 4))  # returns
    assert len(first.unique()) == 128 and torch.equal(first.sort()[0], second.sort()[0])
    assert not torch.equal(first, second) and first[:64].mean() != first.mean()


def test_flags_of_ppo_reach_the_losses(ppo, tmp_path, monkeypatch):
    policy, critic, _ = ppo_parts(monkeypatch, ppo)
    words = ["--total-timesteps", 128, "--clip-vloss", "--no-norm-adv", "--kl-coef", 0.7]
    run(ONE, "--run-dir", tmp_path / "r", *words, "--policy-objective", "kl-penalty")
    assert all(clip == np.inf and kl.item() == pytest.approx(0.7) for _, clip, kl in policy)
    assert all(clip == 0.2 for *_, clip in critic)
    old, returns = (torch.cat([x[i] for x in critic[:4]]) for i in (0, 1))
    advantages = torch.cat([x for x, *_ in policy[:4]])
    torch.testing.assert_close(old + advantages, returns)  # not normalised
    newer, again = (torch.cat([x[i] for x in critic[4:]]) for i in (0, 1))
    assert torch.equal(old.sort()[0], newer.sort()[0])  # V of before the first epoch
    assert not torch.equal(returns.sort()[0], again.sort()[0])  # computed with the newest V


def test_with_a_penalty_no_epoch_is_left_out(ppo, tmp_path, monkeypatch):
    policy, *_ = ppo_parts(monkeypatch, ppo)
    words = ["--total-timesteps", 128, "--policy-objective", "kl-penalty", "--target-kl", 1e-9]
    run(ONE, "--run-dir", tmp_path / "r", *words)
    assert len(policy) == 8


@pytest.mark.parametrize("script", ["ppo_continuous", "a2c"])
def test_without_a_weight_the_value_loss_moves_nothing(script, tmp_path, monkeypatch):
    module, starts = load(script), []
    init = module.ValueCritic.__init__

    def look(critic, *given):
        init(critic, *given)
        starts.append(critic.value[0].weight.clone())

    monkeypatch.setattr(module.ValueCritic, "__init__", look)
    run(script, "--vf-coef", 0, "--run-dir", tmp_path / "r")
    saved = checkpoint(tmp_path / "r")
    ends = saved["critic"] if "critic" in saved else saved["agent"]
    end = next(x for name, x in ends.items() if name.endswith("value.0.weight"))
    assert torch.equal(end, starts[0])


@pytest.mark.parametrize("script", ["ppo_continuous", "sac"])
def test_every_environment_explores_on_its_own(script, tmp_path, monkeypatch):
    """Nothing to observe, one policy: only the noise makes actions differ."""
    module, seen = load(script), []
    scale = module.ActionScaler.__call__
    monkeypatch.setattr(
        module.ActionScaler, "__call__", lambda x, y: (seen.append(y.clone()), scale(x, y))[1]
    )
    words = ["--learning-starts", 1] if script == "sac" else []
    run(script, "--env-id", "probes:Probe-v0", "--env-kwargs", "{}", *words,
        "--total-timesteps", 256, "--run-dir", tmp_path / "r")  # fmt: skip
    actions = [x.flatten() for x in seen if len(x) == 2 and x.dim() == 2]
    assert len(actions) > 100 and all(x[0] != x[1] for x in actions)


# ---- A2C and REINFORCE ---------------------------------------------------------------------------


def test_the_critics_own_steps_are_like_the_first(a2c, tmp_path, monkeypatch):
    step, norms = a2c.RMSpropTF.step, []

    def look(optimizer):
        gradients = [x.grad for x in optimizer.param_groups[1]["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        step(optimizer)

    monkeypatch.setattr(a2c.RMSpropTF, "step", look)
    run("a2c", "--max-grad-norm", 1e-3, "--critic-steps", 3, "--run-dir", tmp_path / "r")
    assert len(norms) == 48 and np.allclose(norms, 1e-3, rtol=0.01)


@pytest.fixture
def a2c():
    return load("a2c")


@pytest.mark.parametrize("script", ["reinforce", "trpo"])
def test_the_critic_learns_from_all_transitions(script, tmp_path, monkeypatch):
    module, seen = load(script), []
    forward = module.ValueCritic.forward

    def look(critic, obs):
        if torch.is_grad_enabled() and obs.dim() == 2:
            seen.append(obs[:, 0].detach().clone())
        return forward(critic, obs)

    monkeypatch.setattr(module.ValueCritic, "forward", look)
    words = ["--critic-steps", 40, "--critic-batch-size", 32, "--total-timesteps", 128]
    run(script, *words, "--run-dir", tmp_path / "r")
    assert len(seen) == 40 and not torch.equal(seen[0], seen[1])
    assert len(torch.cat(seen).unique()) > 120  # of 128 transitions


@pytest.mark.parametrize(
    "baseline, name", [("constant", "Ending"), ("time", "Ending"), ("value", "Counting")]
)
def test_baselines_of_the_whole_return(baseline, name, tmp_path, weights):
    """Without reward to go, all of an episode's actions have the same weight and baseline."""
    words = ["--env-id", f"probes:{name}-v0", "--env-kwargs", "{}", "--num-envs", 5, "--gamma", 1]
    words += ["--no-reward-to-go", "--no-norm-adv", "--total-timesteps", 60]
    run("reinforce", *words, "--baseline", baseline, "--run-dir", tmp_path / "r")
    for episode in [episode for x in weights for episode in x.T]:
        of_steps = episode[episode != 0]
        assert len(of_steps) == 0 if name == "Ending" else of_steps.std(correction=0) < 1e-5


@pytest.mark.parametrize("anneals", ["--anneal-lr", "--no-anneal-lr"])
def test_the_critic_of_reinforce_has_its_learning_rate(anneals, tmp_path):
    words = ["--learning-rate", 1e-3, "--critic-learning-rate", 2e-3, anneals]
    run("reinforce", *words, "--run-dir", tmp_path / "r")
    saved = checkpoint(tmp_path / "r")
    actor, critic = (saved[x]["param_groups"][0]["lr"] for x in ("optimizer", "critic_optimizer"))
    assert critic == pytest.approx(2 * actor) and (actor < 1e-3) == (anneals == "--anneal-lr")


def test_the_variance_of_the_gradient(tmp_path, monkeypatch):
    """Of the mean over two episodes, whose gradients are 1 and 3: 2 / 2."""
    module = load("reinforce")
    monkeypatch.setattr(module, "episode_gradients", lambda *given: torch.tensor([[1.0], [3.0]]))
    run("reinforce", "--run-dir", tmp_path / "r", "--total-timesteps", 128)
    (line,) = training(tmp_path / "r")
    assert line["losses/gradient_variance"] == 1 and line["losses/grad_norm"] == 2


# ---- TRPO ----------------------------------------------------------------------------------------


@pytest.fixture
def trpo():
    return load("trpo")


@pytest.mark.parametrize("normalises", [True, False])
def test_advantages_and_improvement(trpo, normalises, tmp_path, monkeypatch):
    """Mean 0 and std 1, or as they are; no step improves nothing, whatever their mean."""
    surrogate, seen, improved = trpo.surrogate_objective, [], []

    def look(log_ratio, advantages):
        seen.append(advantages)
        return surrogate(log_ratio, advantages)

    def search(try_step, step_size, *_):
        improved.append(try_step(0 * step_size)[0].item())
        return step_size, 1

    monkeypatch.setattr(trpo, "surrogate_objective", look)
    monkeypatch.setattr(trpo, "line_search", search)
    words = ["--norm-adv" if normalises else "--no-norm-adv", "--small-adv", 0]
    run("trpo", *words, "--total-timesteps", 128, "--run-dir", tmp_path / "r")
    normal = abs(seen[0].mean()) < 1e-5 and abs(seen[0].std() - 1) < 1e-3
    assert normal == normalises and improved == [pytest.approx(0, abs=1e-5)]
    assert normalises or abs(seen[0].mean()) > 1e-3


def test_the_line_search_measures_the_kl_from_the_old_policy(trpo, tmp_path, monkeypatch):
    kl_divergence, seen = trpo.kl_divergence, []
    monkeypatch.setattr(
        trpo, "kl_divergence", lambda *x: (seen.append(x[0][0].clone()), kl_divergence(*x))[1]
    )
    run("trpo", "--total-timesteps", 128, "--run-dir", tmp_path / "r")
    assert len(seen) > 2 and all(torch.equal(x, seen[0]) for x in seen)


# ---- DDPG and SAC --------------------------------------------------------------------------------

each = pytest.mark.parametrize("script", ["ddpg", "sac"])


@pytest.fixture
def sac():
    return load("sac")


@each
@pytest.mark.parametrize("anneals", ["--anneal-lr", "--no-anneal-lr"])
def test_each_optimizer_has_its_learning_rate(script, anneals, tmp_path, monkeypatch):
    step, rates = torch.optim.Adam.step, []

    def look(optimizer, *given):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    words = ["--learning-rate", 1e-3, "--critic-learning-rate", 2e-3, anneals]
    run(script, *words, "--run-dir", tmp_path / "r")
    assert rates[::2] == pytest.approx([2 * x for x in rates[1::2]])  # critic, actor, critic, ...
    assert (min(rates) == 1e-3) == (anneals == "--no-anneal-lr")


@each
def test_which_network_sees_what(script, tmp_path, monkeypatch):
    """The actor learns from obs and the trained critic; targets come from next_obs."""
    module, calls, batches, sources = load(script), [], [], {}
    actor_class = module.DeterministicActor if script == "ddpg" else module.SquashedGaussianActor
    critic_class = module.QCritic if script == "ddpg" else module.TwinCritic
    for kind, name in ((actor_class, "actor"), (critic_class, "critic")):

        def look(network, obs, *rest, name=name, forward=kind.forward):
            if len(obs) == 16:
                calls.append((name, id(network), obs.clone()))
            return forward(network, obs, *rest)

        monkeypatch.setattr(kind, "forward", look)
    sample, polyak = module.TransitionBuffer.sample, module.polyak_update

    def look_at_batch(*given):
        batches.append(sample(*given))
        return batches[-1]

    def look_at_polyak(target, source, tau):
        sources[id(target)] = id(source)
        polyak(target, source, tau)

    monkeypatch.setattr(module.TransitionBuffer, "sample", look_at_batch)
    monkeypatch.setattr(module, "polyak_update", look_at_polyak)
    run(script, "--run-dir", tmp_path / "r", "--total-timesteps", 256)
    assert len(calls) == 5 * len(batches) > 100
    for batch, *of_update in zip(batches, *(calls[i::5] for i in range(5)), strict=True):
        names, networks, seen = zip(*of_update, strict=True)
        assert names == ("actor", "critic", "critic", "actor", "critic")
        wanted = [batch.next_obs] * 2 + [batch.obs] * 3
        assert all(torch.equal(x, y) for x, y in zip(seen, wanted, strict=True))
        trained = [network not in sources for network in networks]
        assert trained == [script == "sac", False, True, True, True]


def test_which_network_sees_what_with_a_value_network(sac, tmp_path, monkeypatch):
    """V learns of obs from actions in obs; the target of Q is the target network's V(next_obs)."""
    calls, batches = [], []
    for name in ("SquashedGaussianActor", "TwinCritic", "ValueNetwork"):
        forward = getattr(sac, name).forward

        def look(network, obs, *rest, name=name, forward=forward):
            if len(obs) == 16:
                calls.append((name, obs.clone()))
            return forward(network, obs, *rest)

        monkeypatch.setattr(getattr(sac, name), "forward", look)
    sample = sac.TransitionBuffer.sample
    monkeypatch.setattr(
        sac.TransitionBuffer, "sample", lambda *x: (batches.append(sample(*x)), batches[-1])[1]
    )
    run("sac", "--value-network", "--run-dir", tmp_path / "r", "--total-timesteps", 256)
    assert len(calls) == 7 * len(batches) > 100
    wanted = ["obs", "obs", "next_obs", "obs", "obs", "obs", "obs"]  # pi, Q, V'; Q, V; pi, Q
    for i, (name, obs) in enumerate(calls):
        assert torch.equal(obs, getattr(batches[i // 7], wanted[i % 7]))
        assert (name == "ValueNetwork") == (i % 7 in (2, 4))


def test_targets_pay_for_entropy(sac, tmp_path, monkeypatch):
    soft_value, alphas = sac.soft_value, []
    monkeypatch.setattr(
        sac, "soft_value", lambda *x: (alphas.append(x[2].item()), soft_value(*x))[1]
    )
    run("sac", "--no-autotune", "--alpha", 0.3, "--run-dir", tmp_path / "r")
    assert alphas == pytest.approx([0.3] * len(alphas)) and len(alphas) > 100


def test_the_target_entropy_is_minus_1_a_dimension(sac, tmp_path, monkeypatch):
    """Two dimensions. The gradient by log alpha is alpha times (entropy - target)."""
    made, seen = [], []
    init, step = sac.Temperature.__init__, torch.optim.Adam.step
    monkeypatch.setattr(sac.Temperature, "__init__", lambda x, y: (init(x, y), made.append(x))[0])

    def look(optimizer, *given):
        if any(x is made[-1].log_alpha for x in optimizer.param_groups[0]["params"]):
            seen.append(made[-1].log_alpha.grad.item() / made[-1]().item())
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    words = ["--env-id", "probes:Target-v0", "--env-kwargs", "{}", "--total-timesteps", 128]
    run("sac", *words, "--log-frequency", 4, "--run-dir", tmp_path / "r")
    entropies = [x["losses/entropy"] for x in training(tmp_path / "r") if "losses/entropy" in x]
    assert seen == pytest.approx([x + 2 for x in entropies], rel=1e-4) and len(seen) > 10


def test_log_stds_are_bounded(sac):
    actor = sac.SquashedGaussianActor(3, 1, False)
    for bias, expected in ((100.0, 2), (-100.0, -20), (1.0, pytest.approx(1, abs=0.1))):
        actor.last.weight.data.zero_()
        actor.last.bias.data = torch.tensor([0.0, bias])
        assert actor(torch.zeros(1, 3))[1].item() == expected


@pytest.mark.parametrize("kind, kept", [("gaussian", 0), ("ou", 0.85)])
def test_the_kind_of_noise_is_a_flag(kind, kept, tmp_path, monkeypatch):
    ddpg, made = load("ddpg"), []
    init = ddpg.ActionNoise.__init__
    monkeypatch.setattr(ddpg.ActionNoise, "__init__", lambda *x: (init(*x), made.append(x[0]))[0])
    run("ddpg", "--noise", kind, "--total-timesteps", 2, "--run-dir", tmp_path / "r")
    assert [x.kept for x in made] == [kept]


@each
def test_nothing_is_learned_before_learning_starts(script, tmp_path):
    run(script, "--learning-starts", 256, "--run-dir", tmp_path / "r")
    rates = [line["charts/updates_per_step"] for line in training(tmp_path / "r")]
    assert rates[0] == 0 and rates[1] < 0.01 and rates[2:] == [0.25, 0.25]


# ---- Q-learning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["dqn", "double_dqn_per", "ddpg"])
def test_the_trained_network_acts(script, tmp_path, monkeypatch):
    """And not the target network: each action in turn becomes the best by its last bias."""
    module, ended = load(script), []
    finish = module.Run.finish
    monkeypatch.setattr(module.Run, "finish", lambda x: (ended.append(x), finish(x)))
    run(script, "--run-dir", tmp_path / "r", "--total-timesteps", 128)
    (end,) = ended
    network = end.state["actor" if script == "ddpg" else "q_network"]
    obs = end.envs.get_attr("obs")[0]
    for bias, expected in (([1e3, 0], 0), ([0, 1e3], 1)):
        if script == "ddpg":
            bias, expected = [bias[0] - bias[1]], 2 - 4 * expected  # Pendulum's torques
        list(network.parameters())[-1].data = torch.tensor(bias)
        assert end.policy(obs) == expected


def test_beta_rises_on_a_line(tmp_path, monkeypatch):
    module, betas = load("double_dqn_per"), []
    weights = module.importance_weights
    monkeypatch.setattr(
        module, "importance_weights", lambda p, beta: (betas.append(beta), weights(p, beta))[1]
    )
    words = ["--learning-starts", 128, "--train-frequency", 128]
    run("double_dqn_per", *words, "--priority-beta", 0.2, "--run-dir", tmp_path / "r")
    assert betas == pytest.approx([0.4, 0.6, 0.8, 1])


# ---- PPO on Atari --------------------------------------------------------------------------------


def test_every_transition_is_in_one_minibatch_of_an_epoch(tmp_path, monkeypatch):
    module, returns = load("ppo_atari"), []
    value_loss = module.value_loss
    monkeypatch.setattr(module, "value_loss", lambda *x: (returns.append(x[1:]), value_loss(*x))[1])
    words = ["--total-timesteps", 64, "--update-epochs", 2, "--clip-vloss", "--eval-episodes", 1]
    learn(tmp_path, monkeypatch, *words, length=50)
    first, second = (torch.cat([x[1] for x in returns[i : i + 2]]) for i in (0, 2))
    assert torch.equal(first.sort()[0], second.sort()[0]) and not torch.equal(first, second)
    assert len(first.unique()) > 8 and {x[2] for x in returns} == {0.1}


def test_values_and_factors_on_atari(tmp_path, monkeypatch):
    """Four rollouts of two steps."""
    module, given = load("ppo_atari"), []
    compute_gae = module.compute_gae

    def look(rewards, values, next_values, terminations, dones, *factors):
        assert factors == (0.5, 0.8)
        given.append((values.clone(), next_values.clone()))
        return compute_gae(rewards, values, next_values, terminations, dones, *factors)

    monkeypatch.setattr(module, "compute_gae", look)
    words = ["--total-timesteps", 64, "--num-steps", 2, "--num-minibatches", 1, "--gae-lambda", 0.8]
    words += ["--learning-rate", 1e-12, "--eval-episodes", 1]
    learn(tmp_path, monkeypatch, *words, length=50)
    values, next_values = (torch.cat(parts) for parts in zip(*given, strict=True))
    torch.testing.assert_close(next_values[:-1], values[1:], rtol=1e-3, atol=1e-3)
    assert (values[2::2] - values[1:-1:2]).abs().max() > 0.05  # where a rollout ends


def test_ratios_are_to_the_policy_that_acted(tmp_path, monkeypatch):
    """1 in the first minibatch, and not in the next ones. Each game draws for itself."""
    module, ratios, actions = load("ppo_atari"), [], []
    policy_loss, send = module.ppo_policy_loss, ProbeGame.send
    monkeypatch.setattr(
        module, "ppo_policy_loss", lambda *x: (ratios.append(x[0].detach()), policy_loss(*x))[1]
    )
    monkeypatch.setattr(ProbeGame, "send", lambda *x: (actions.append(int(x[1])), send(*x)))
    reward = lambda self, action: float(action)  # noqa: E731
    learn(tmp_path, monkeypatch, "--total-timesteps", 64, reward=reward)
    assert ratios[0].abs().max() < 1e-4 and all(x.abs().max() > 1e-4 for x in ratios[1:])
    assert len({tuple(actions[i:64:8]) for i in range(8)}) > 4  # by game


# ---- Limits --------------------------------------------------------------------------------------


def test_clipping_of_what_is_normalised(ppo):
    """The scale is 1 before anything is observed."""
    large = torch.tensor([[1e9, -1e9, 3.0]])
    scaled, normed = ppo.RewardScaler(3, 0.9)(large), ppo.ObsNormalizer(3, 20.0)(large)
    torch.testing.assert_close(scaled, torch.tensor([[10.0, -10.0, 3.0]]))
    torch.testing.assert_close(normed, torch.tensor([[20.0, -20.0, 3.0]]))


# ---- Seeds, evaluation, resume -------------------------------------------------------------------


def test_no_two_episodes_have_the_same_seed(tmp_path, monkeypatch):
    """Neither in training nor in an evaluation; and the evaluation's returns have a std."""
    reset, seeds = probes.Counting.reset, []

    def look(env, *, seed=None, options=None):
        seeds.append(seed)
        return reset(env, seed=seed, options=options)

    monkeypatch.setattr(probes.Counting, "reset", look)
    words = ["--env-id", "probes:Counting-v0", "--eval-episodes", 10, "--total-timesteps", 128]
    run(ONE, *words, "--run-dir", tmp_path / "r")
    assert len(set(seeds)) == len(seeds) > 30
    assert metrics(tmp_path / "r")[-1]["eval/episodic_return_std"] > 0


def test_the_seed_decides_on_weights_and_random_numbers(script, tmp_path, monkeypatch):
    module, starts = load(script), []

    def look(self):
        network = next(self.state[x] for x in ("agent", "actor", "q_network") if x in self.state)
        weights = torch.cat([x.flatten() for x in network.parameters() if x.dim() > 1])
        starts.append((weights.tolist(), self.state["rng"].random()))
        raise RuntimeError

    monkeypatch.setattr(module.Run, "begin", look)
    for number, seed in enumerate((1, 2)):
        run(script, "--seed", seed, "--run-dir", tmp_path / str(number), code=1)
    one, two = starts
    assert one[0] != two[0] and one[1] != two[1]


def test_torchs_generator_goes_on_where_it_was(tmp_path, monkeypatch):
    """For copies of a script whose networks have dropout. An evaluation leaves it alone."""
    run(ONE, "--run-dir", tmp_path / "r")
    saved = checkpoint(tmp_path / "r")
    saved["torch_rng"] = torch.Generator().manual_seed(77).get_state()
    torch.save(saved, tmp_path / "r" / "checkpoint.pt")
    module, seen = load(ONE), []
    begin, step = module.Run.begin, module.ReplayableEnv.step

    def look(self):
        seen.append(torch.get_rng_state())
        draws = lambda *x: (torch.rand(1), step(*x))[1]  # noqa: E731
        monkeypatch.setattr(module.ReplayableEnv, "step", draws)
        begin(self)

    monkeypatch.setattr(module.Run, "begin", look)
    run(ONE, "--resume", tmp_path / "r", "--eval-episodes", 1, quick=False)
    assert torch.equal(seen[0], saved["torch_rng"])
    assert torch.equal(torch.get_rng_state(), saved["torch_rng"])  # after the evaluation


@pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "trpo"])
def test_the_scale_of_rewards_is_of_discounted_returns(script, tmp_path):
    """Rewards of 1 for 50 steps: the scale is the std of (1 - gamma^t) / (1 - gamma)."""
    words = ["--env-id", "probes:Fifty-v0", "--gamma", 0.9, "--total-timesteps", 1280]
    run(script, *words, "--env-kwargs", "{}", "--run-dir", tmp_path / "r")
    returns = (1 - 0.9 ** (np.arange(640) % 50 + 1)) / (1 - 0.9)
    var = checkpoint(tmp_path / "r")["reward_scaler"]["var"].item()
    assert var == pytest.approx(returns.var(), rel=0.01)


def test_checkpoints_and_evaluations_between_iterations(tmp_path):
    """Iterations of 128 steps: where a multiple of the frequency was passed."""
    words = ["--eval-frequency", 200, "--eval-episodes", 1]
    run(ONE, "--run-dir", tmp_path / "r", *words)
    lines = [x["global_step"] for x in metrics(tmp_path / "r") if "eval/episodes" in x]
    assert lines == [256, 512]


# ---- Flags ---------------------------------------------------------------------------------------


def test_every_flag_is_read(script):
    """Also by what does not check the arguments."""
    found = set()
    for top in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if getattr(top, "name", "") not in ("check_args", "check_run_args"):
            found |= set(re.findall(r"\bargs\.(\w+)|\bself\.(env_id)", ast.unparse(top)))
    names = {name for pair in found for name in pair}
    assert not {field.name for field in fields(load(script).Args)} - names


# ---- The rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["dqn", "double_dqn_per"])
def test_rmsprop_is_that_of_the_paper(script):
    """Gradients divided by their std over the last 20 steps or so; Mnih et al.: 0.01 in its root
    for sums over 32 transitions, here 0.01 / 32^2 for means."""
    weight = torch.nn.Linear(1, 1, bias=False)
    module = load(script)
    args = module.Args(env_id="ALE/Pong-v5", learning_rate=0.1)
    optimizer = module.make_optimizer(args, weight)
    expected, square, mean = weight.weight.item(), 0.0, 0.0
    for gradient in (1.0, -2.0, 0.5):
        weight.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        square, mean = 0.95 * square + 0.05 * gradient**2, 0.95 * mean + 0.05 * gradient
        expected -= 0.1 * gradient / (square - mean**2 + 0.01 / 32**2) ** 0.5
        assert weight.weight.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("script", ["dqn", "double_dqn_per"])
def test_rmsprop_of_gradients_that_hardly_vary(script):
    """The variance is the small difference of two large numbers, which rounding can turn around."""
    weight = torch.nn.Linear(1, 1, bias=False)
    module = load(script)
    optimizer = module.make_optimizer(module.Args(env_id="ALE/Pong-v5", learning_rate=1.0), weight)
    rng, square, mean = np.random.default_rng(0), 0.0, 0.0
    for step in range(1000):
        gradient = np.float32(1e3 * (1 + 1e-5 * rng.standard_normal()))
        before, weight.weight.grad = weight.weight.item(), torch.full((1, 1), float(gradient))
        optimizer.step()
        square = 0.95 * square + 0.05 * float(gradient) ** 2
        mean = 0.95 * mean + 0.05 * float(gradient)
        expected = 1e3 / (square - mean**2 + 0.01 / 32**2) ** 0.5
        if step > 500:  # the first ones, from a mean of 0, vary much
            assert before - weight.weight.item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("script", [*ON_POLICY, "ppo_atari"])
def test_policies_are_nearly_uniform_at_the_start(script):
    """Means close to 0, logits close to each other."""
    module = load(script)
    if script == "ppo_atari":
        logits, _ = module.AtariActorCritic(4, 6, False)(torch.full((1, 4, 84, 84), 255.0))
        assert 0 < logits.abs().max() < 0.1
        return
    mean, log_std = module.GaussianActor(5, 3, -0.7)(torch.ones(5))
    assert 0 < mean.abs().max() < 0.03 and log_std.tolist() == pytest.approx([-0.7] * 3)
    if hasattr(module, "CategoricalActor"):
        assert 0 < module.CategoricalActor(5, 3)(torch.ones(5)).abs().max() < 0.03


def test_the_std_of_an_evaluation(tmp_path, monkeypatch):
    """Of four episodes with the returns 1, 2, 3, 4."""
    lengths, step = [], probes.Counting.step

    def look(env, action):
        if env.steps == 0:
            env.length = len(lengths) % 4 + 1
            lengths.append(env.length)
        return step(env, action)

    run(ONE, "--env-id", "probes:Counting-v0", "--run-dir", tmp_path / "r")
    monkeypatch.setattr(probes.Counting, "step", look)
    done = run(ONE, "--evaluate", tmp_path / "r", "--eval-episodes", 4, quick=False)
    assert "mean_return=2.5000 std=1.1180 " in done.stdout


def test_the_commit_is_in_the_folder():
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git repository")
    assert load(ONE).describe(torch.device("cpu"))["git"] == done.stdout.strip()


def test_a_game_with_fewer_lives_than_the_last_one_has_lost_none(tmp_path, monkeypatch):
    """Cut by a time limit with lives that were won; the next game begins with fewer."""

    def reset(game, **options):
        game.lives = getattr(game, "lives", 1000) - 1
        return ProbeGame.reset(game, **options)

    module, seen = load("ppo_atari"), []
    compute_gae = module.compute_gae
    monkeypatch.setattr(
        module,
        "compute_gae",
        lambda *x: (seen.append((x[3].sum(), x[4].sum())), compute_gae(*x))[1],
    )
    words = ["--total-timesteps", 64, "--update-epochs", 1]
    learn(tmp_path, monkeypatch, *words, reset=reset, lives=1000, length=2, truncates=True)
    assert seen == [(0, 32)]  # terminations, ends
