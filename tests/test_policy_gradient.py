"""REINFORCE and A2C: the estimator against exact gradients, returns against their definitions."""

import numpy as np
import pytest
import torch
from conftest import checkpoint, load, metrics, run, training
from torch import nn
from torch.distributions import Categorical

BASELINES = ["none", "constant", "optimal", "time", "value"]


@pytest.fixture(scope="module")
def reinforce():
    return load("reinforce")


@pytest.fixture(scope="module")
def a2c():
    return load("a2c")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- Returns -------------------------------------------------------------------------------------


def ends(T, N):
    """Random terminations and truncations, several in every column."""
    terminations = (rand(T, N, seed=3) > 1.2).double()
    truncations = (rand(T, N, seed=4) > 1.2).double() * (1 - terminations)
    assert terminations.sum() > 3 and truncations.sum() > 3
    return terminations, truncations


def test_rewards_to_go_equal_their_definition(reinforce):
    """sum_k gamma^k r_t+k up to the episode's end, then V of the last observation if it was cut."""
    T, N, gamma = 40, 3, 0.9
    rewards, last_values = rand(T, N), rand(T, N, seed=1)
    terminations, truncations = ends(T, N)
    dones = terminations + truncations
    expected = torch.zeros(T, N, dtype=torch.float64)
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                expected[t, n] += gamma ** (k - t) * rewards[k, n]
                if dones[k, n]:
                    expected[t, n] += gamma ** (k + 1 - t) * last_values[k, n] * truncations[k, n]
                    break
    actual = reinforce.discounted_returns(rewards, last_values * truncations, dones, gamma)
    torch.testing.assert_close(actual, expected)


def n_step_return(rewards, values, next_values, terminations, dones, gamma, t, n):
    """r_t + gamma r_t+1 + ... up to the end of the rollout or of the episode, then V, in O(T)."""
    total, discount = 0.0, 1.0
    for k in range(t, len(rewards)):
        total += discount * rewards[k, n]
        discount *= gamma
        if terminations[k, n]:
            return total
        if dones[k, n]:
            break
    return total + discount * next_values[k, n]


def test_lambda_1_gives_n_step_returns_and_0_the_td_error(a2c):
    T, N, gamma = 30, 4, 0.95
    rewards, values, next_values = rand(T, N), rand(T, N, seed=1), rand(T, N, seed=2)
    terminations, truncations = ends(T, N)
    given = rewards, values, next_values, terminations, terminations + truncations
    # The recursion telescopes only if the next value is the next step's value where nothing ended.
    next_values[:-1] = torch.where(given[4][:-1] > 0, next_values[:-1], values[1:])
    expected = [[n_step_return(*given, gamma, t, n) for n in range(N)] for t in range(T)]
    torch.testing.assert_close(a2c.compute_gae(*given, gamma, 1.0) + values, torch.tensor(expected))
    td_errors = rewards + gamma * next_values * (1 - terminations) - values
    torch.testing.assert_close(a2c.compute_gae(*given, gamma, 0.0), td_errors)


# ---- The estimator of the policy gradient --------------------------------------------------------

REWARDS = torch.tensor([[2.0, 4.0], [9.0, 7.0]], dtype=torch.float64)  # of (state, action)
HORIZON = 3


class Table(nn.Module):
    """A policy whose logits are a table; observations are the two states, one-hot."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[0.3, -0.2], [-0.5, 0.4]], dtype=torch.float64))

    def forward(self, obs):
        return obs @ self.logits


def returns_of(reinforce, states, actions, playing):
    rewards = REWARDS[states, actions] * playing
    dones = playing * torch.cat([1 - playing[1:], torch.ones_like(playing[:1])])
    return reinforce.discounted_returns(rewards, torch.zeros_like(rewards), dones, 1.0)


def episodes(reinforce, number, seed=0):
    """Start in either state; the action is the next state; state 1 ends with action 1 or after
    three steps. Shapes: (HORIZON, number)."""
    rng, probs = np.random.default_rng(seed), Table().logits.softmax(1).detach().numpy()
    state, playing = rng.integers(2, size=number), np.ones(number)
    steps = []
    for _ in range(HORIZON):
        action = (rng.random(number) > probs[state, 0]).astype(int)
        steps.append((state, action, playing))
        playing = playing * (1 - state * action)
        state = action
    return [torch.from_numpy(np.stack(part)) for part in zip(*steps, strict=True)]


def exact_gradient_and_values():
    """Over all trajectories: the gradient of the expected return, and V of (step, state)."""
    table = Table()
    values = [torch.zeros(2, dtype=torch.float64)]
    for _ in range(HORIZON):
        goes_on = torch.tensor([[1, 1], [1, 0]], dtype=torch.float64)
        following = values[0][None] * goes_on  # the action is the next state
        values.insert(0, (table.logits.softmax(1) * (REWARDS + following)).sum(1))
    values[0].mean().backward()
    return table.logits.grad.flatten(), torch.stack(values[:HORIZON]).detach()


def batch_gradients(reinforce, kind, reward_to_go=True, size=6, batches=400):
    """One estimate of the gradient for each batch of episodes. Shapes: (batches, parameters)."""
    states, actions, playing = episodes(reinforce, size * batches)
    returns = returns_of(reinforce, states, actions, playing)
    weights = returns if reward_to_go else returns[:1].expand_as(returns)
    _, values = exact_gradient_and_values()
    table, estimates = Table(), []
    for i in range(batches):
        part = slice(i * size, (i + 1) * size)
        s, a, w, p = (x[:, part] for x in (states, actions, weights, playing))
        obs = nn.functional.one_hot(s, 2).double()
        if kind == "none":
            baseline = 0
        elif kind == "constant":
            baseline = reinforce.constant_baseline(w, p)
        elif kind == "optimal":
            scores = reinforce.episode_gradients(table, obs, a, p)
            baseline = reinforce.optimal_baseline(
                scores, reinforce.episode_gradients(table, obs, a, w * p)
            )
        elif kind == "time":
            baseline = reinforce.time_baseline(w, p)
        else:
            baseline = torch.gather(values, 1, s)
        table.zero_grad()
        log_probs = reinforce.log_prob(table(obs), a)
        reinforce.policy_gradient_loss(log_probs, (w - baseline) * p).backward()
        estimates.append(-table.logits.grad.flatten())
    return torch.stack(estimates)


def test_the_estimator_is_unbiased_and_each_idea_lowers_its_variance(reinforce):
    exact, _ = exact_gradient_and_values()
    variance = {}
    for kind in BASELINES:
        for to_go in (True, False) if kind == "none" else (True,):
            estimates = batch_gradients(reinforce, kind, to_go)
            error = estimates.std(0) / len(estimates) ** 0.5
            assert ((estimates.mean(0) - exact).abs() < 4 * error).all(), kind
            assert (error < 0.5).all()
            variance[kind if to_go else "whole return"] = estimates.var(0).sum().item()
    assert variance["whole return"] > 1.5 * variance["none"] > 1.5 * variance["constant"]
    assert variance["none"] > 2 * variance["optimal"]
    assert variance["constant"] > 1.2 * variance["time"] > 1.2 * variance["value"]


def test_the_optimal_baseline_is_the_best_constant(reinforce):
    """Against brute force: no constant on a grid gives the episodes' gradients less variance."""
    states, actions, playing = episodes(reinforce, 400)
    returns, table = returns_of(reinforce, states, actions, playing), Table()
    obs = nn.functional.one_hot(states, 2).double()
    scores = reinforce.episode_gradients(table, obs, actions, playing)
    gradients = reinforce.episode_gradients(table, obs, actions, returns * playing)
    baseline = reinforce.optimal_baseline(scores, gradients)
    grid = torch.arange(0, 20, 0.05, dtype=torch.float64)
    # The mean of the score is 0 in expectation, so that E|g - b s|^2 and the variance agree.
    squares = torch.stack([(gradients - b * scores).square().sum(1).mean() for b in grid])
    assert baseline.mean().item() == pytest.approx(grid[squares.argmin()].item(), abs=0.1)
    assert baseline.std() < 0.1
    one_return = reinforce.episode_gradients(table, obs, actions, returns[:1] * playing)
    weighted = (returns[0] * scores.square().sum(1)).sum() / scores.square().sum()
    actual = reinforce.optimal_baseline(scores, one_return).mean()
    assert actual.item() == pytest.approx(weighted.item(), rel=0.01)


def test_baselines_leave_out_the_own_episode(reinforce):
    returns = torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 0.0], [5.0, 0.0, 0.0]])
    playing = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    constant = reinforce.constant_baseline(returns, playing)
    torch.testing.assert_close(constant, torch.tensor([12 / 3, 15 / 4, 15 / 5]))
    by_time = reinforce.time_baseline(returns, playing)
    expected = torch.tensor([[4.0, 3.5, 1.5], [4.0, 3.0, 3.5], [4.0, 5.0, 5.0]])
    torch.testing.assert_close(by_time, expected)
    scores = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    gradients = torch.tensor([[3.0, 1.0], [1.0, 5.0], [2.0, 2.0]])
    optimal = reinforce.optimal_baseline(scores, gradients)
    torch.testing.assert_close(optimal, torch.tensor([14 / 6, 7 / 3, 13 / 5]))


def test_the_optimal_baseline_is_finite_and_does_not_cancel(reinforce):
    """With a single action all scores are 0; a large score of its own must not drown the others."""
    zero = torch.zeros(3, 2)
    assert torch.equal(reinforce.optimal_baseline(zero, zero), torch.zeros(3))
    scores, gradients = torch.tensor([[1e4, 0], [1.0, 0]]), torch.tensor([[5e4, 0], [3.0, 0]])
    torch.testing.assert_close(
        reinforce.optimal_baseline(scores, gradients), torch.tensor([3.0, 5])
    )


def test_gradients_of_episodes_add_up_to_the_loss(reinforce):
    """For both kinds of actions; what comes after an episode's end does not count."""
    torch.manual_seed(0)
    obs = torch.randn(7, 3, 4)
    playing = (torch.arange(7)[:, None] < torch.tensor([7, 3, 5])).float()
    advantages = torch.randn(7, 3) * playing
    for actor, actions in (
        (reinforce.CategoricalActor(4, 3), torch.randint(3, (7, 3))),
        (reinforce.GaussianActor(4, 2, -0.5), torch.randn(7, 3, 2)),
    ):
        gradients = reinforce.episode_gradients(actor, obs, actions, advantages)
        log_probs = reinforce.log_prob(actor(obs), actions)
        reinforce.policy_gradient_loss(log_probs, advantages).backward()
        total = torch.cat([x.grad.flatten() for x in actor.parameters()])
        torch.testing.assert_close(gradients.mean(0), -total)
        obs = torch.where(playing[..., None] > 0, obs, 9.0)
        again = reinforce.episode_gradients(actor, obs, actions, advantages)
        torch.testing.assert_close(again, gradients)


# ---- Policies ------------------------------------------------------------------------------------


def test_discrete_actions(reinforce):
    logits, actions = rand(5, 7, 4) * 2, torch.randint(4, (5, 7))
    reference = Categorical(logits=logits)
    torch.testing.assert_close(reinforce.log_prob(logits, actions), reference.log_prob(actions))
    torch.testing.assert_close(reinforce.entropy(logits), reference.entropy())
    assert torch.equal(reinforce.mode(logits), logits.argmax(-1))
    rng, one = reinforce.Rng(np.random.PCG64(0)), torch.tensor([0.5, -1.0, 1.5])
    drawn = torch.bincount(reinforce.sample(one.expand(40_000, 3), rng), minlength=3) / 40_000
    torch.testing.assert_close(drawn, one.softmax(0), atol=0.01, rtol=0)


def test_continuous_actions(reinforce):
    mean, log_std = torch.tensor([[1.0, -2.0]]), torch.tensor([-0.5, 0.3])
    drawn = reinforce.sample((mean.expand(40_000, 2), log_std), reinforce.Rng(np.random.PCG64(0)))
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), log_std.exp(), atol=0.02, rtol=0)
    assert torch.equal(reinforce.mode((mean, log_std)), mean)
    entropy = reinforce.entropy((mean.expand(4, 2), log_std))
    torch.testing.assert_close(entropy, reinforce.gaussian_entropy(log_std).expand(4))


def test_rmsprop_is_tensorflows(a2c):
    """Three steps by the formula: the mean square starts at 1, epsilon stands under the root."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    idle = nn.Parameter(torch.tensor([3.0]))
    optimizer = a2c.RMSpropTF([{"params": [weight, idle], "lr": 0.1}], alpha=0.9, eps=1e-2)
    expected, square = weight.detach().clone(), torch.ones(2)
    for gradient in torch.tensor([[1.0, 0.1], [-2.0, 0.0], [0.5, 3.0]]):
        weight.grad = gradient.clone()
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        expected -= 0.1 * gradient / (square + 1e-2).sqrt()
        torch.testing.assert_close(weight.detach(), expected)
    assert idle.item() == 3 and idle not in optimizer.state


# ---- Whole runs ----------------------------------------------------------------------------------


def test_every_environment_plays_one_whole_episode(tmp_path):
    """Episodes of random length: an environment that is done waits, and its wait is not counted."""
    run("reinforce", "--env-id", "probes:Counting-v0", "--run-dir", tmp_path / "r",
        "--num-envs", 5, "--total-timesteps", 300, "--env-kwargs", "{}")  # fmt: skip
    before = 0
    for line in training(tmp_path / "r"):
        played = line["charts/episodes"] * line["charts/episodic_length"]
        assert line["charts/episodes"] == 5
        assert line["global_step"] - before == pytest.approx(played)
        before = line["global_step"]


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_learns(baseline, tmp_path):
    """A bandit with continuous actions: the best is 0.5 times what is seen."""
    run("reinforce", "--env-id", "probes:ObservedTarget-v0", "--run-dir", tmp_path / "r",
        "--baseline", baseline, "--num-envs", 32, "--total-timesteps", 5000, "--no-norm-obs",
        "--env-kwargs", "{}", "--eval-episodes", 10, "--log-std-init", -1.5)  # fmt: skip
    assert metrics(tmp_path / "r")[-1]["eval/episodic_return"] > -0.02
    assert all(line["losses/gradient_variance"] > 0 for line in training(tmp_path / "r"))
    assert ("losses/value_loss" in training(tmp_path / "r")[0]) == (baseline == "value")


def test_without_reward_to_go_an_action_is_weighted_by_the_whole_return(tmp_path, weights):
    words = ["--env-id", "probes:Ending-v0", "--baseline", "none", "--no-norm-adv", "--gamma", 1]
    words += ["--total-timesteps", 10, "--env-kwargs", "{}"]
    run("reinforce", *words, "--run-dir", tmp_path / "a")
    run("reinforce", *words, "--run-dir", tmp_path / "b", "--no-reward-to-go")
    assert weights[0][:, 0].tolist() == [5, 4, 3, 2, 1] and weights[1][:, 0].tolist() == [5] * 5


def test_advantages_keep_their_mean(tmp_path, weights):
    """Subtracting it would be a baseline; all rewards are 1 here, so that their scale is left."""
    run("reinforce", "--env-id", "probes:Ending-v0", "--baseline", "none", "--gamma", 1,
        "--total-timesteps", 10, "--env-kwargs", "{}", "--run-dir", tmp_path / "r")  # fmt: skip
    expected = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(weights[0][:, 0], expected / 11**0.5)  # the mean square is 11


def test_the_wait_after_an_episode_does_not_count_in_the_scale(tmp_path, weights):
    """Episodes of random length with positive returns: 0 is the wait, and the rest has scale 1."""
    run("reinforce", "--env-id", "probes:Counting-v0", "--baseline", "none", "--num-envs", 5,
        "--total-timesteps", 60, "--env-kwargs", "{}", "--run-dir", tmp_path / "r")  # fmt: skip
    assert any((x == 0).any() for x in weights)
    for advantages in weights:
        assert advantages[advantages > 0].square().mean().item() == pytest.approx(1, rel=1e-4)


def test_the_critic_can_take_more_steps_than_the_policy(tmp_path, monkeypatch):
    counts = {}
    for steps in (1, 3):
        module = load("a2c")
        step, calls = module.RMSpropTF.step, []

        def count(optimizer, step=step, calls=calls):
            calls.append([g["params"][0].grad is not None for g in optimizer.param_groups])
            step(optimizer)

        monkeypatch.setattr(module.RMSpropTF, "step", count)
        run("a2c", "--run-dir", tmp_path / str(steps), "--critic-steps", steps)
        counts[steps] = sum(actor for actor, _ in calls), sum(critic for _, critic in calls)
        monkeypatch.undo()
    assert counts == {1: (16, 16), 3: (16, 48)}


def test_a2c_divides_advantages_by_their_std_over_the_run(a2c, tmp_path, monkeypatch):
    """Not by a batch's: where all actions are as good, that would make much of mere noise."""
    given = [scale * (1 + rand(4, 2, seed=i).float()) for i, scale in enumerate((1, 100, 1e-3))]
    todo = iter(given)
    monkeypatch.setattr(a2c, "compute_gae", lambda *_: next(todo))
    log_prob = a2c.log_prob
    monkeypatch.setattr(a2c, "log_prob", lambda *x: log_prob(*x) * 0 - 1)  # the loss is their mean
    words = ["--num-envs", 2, "--num-steps", 4, "--log-frequency", 1, "--total-timesteps", 24]
    run("a2c", *words, "--env-kwargs", "{}", "--run-dir", tmp_path / "r")
    seen = [line["losses/policy_loss"] for line in training(tmp_path / "r")]
    stds = [torch.cat(given[: i + 1]).std(correction=0) for i in range(3)]
    expected = [(x.mean() / std).item() for x, std in zip(given, stds, strict=True)]
    assert seen == pytest.approx(expected, rel=1e-3)  # the std before all has a weight of 1e-4


@pytest.mark.parametrize("script", ["a2c", "reinforce", "trpo"])
@pytest.mark.parametrize("name", ["Choice", "Small"])
def test_discrete_actions_that_start_anywhere(script, name, tmp_path):
    """All these scripts take discrete actions, too, and in the dtype of their space."""
    words = "--num-envs 16 --total-timesteps 12800 --eval-episodes 5 --env-kwargs {}".split()
    run(script, "--env-id", f"probes:{name}-v0", "--run-dir", tmp_path / "r", *words)
    assert metrics(tmp_path / "r")[-1]["eval/episodic_return"] > -0.1


@pytest.mark.parametrize("script", ["a2c", "reinforce", "trpo"])
def test_the_policy_learns_from_what_it_saw_when_it_acted(script, tmp_path, monkeypatch):
    """Means of the actions in the gradient step are those of acting: the same normalisation."""
    module, acted, learned = load(script), [], []
    sample, log_prob = module.sample, module.log_prob

    def look_at_sample(policy, rng):
        acted.append(policy[0].clone())
        return sample(policy, rng)

    def look_at_log_prob(policy, actions):
        learned.append(policy[0].detach().flatten(0, -2))
        return log_prob(policy, actions)

    if script == "reinforce":  # only for the log
        monkeypatch.setattr(module, "episode_gradients", lambda *given: torch.ones(2, 1))
    monkeypatch.setattr(module, "sample", look_at_sample)
    monkeypatch.setattr(module, "log_prob", look_at_log_prob)
    if script == "trpo":  # a look at the old policy alone, not at each try of the line search
        monkeypatch.setattr(module, "log_prob", log_prob)
        frozen = module.frozen
        monkeypatch.setattr(
            module, "frozen", lambda x: (learned.append(x[0].detach().flatten(0, -2)), frozen(x))[1]
        )
    run(script, "--run-dir", tmp_path / "r")
    assert len(learned) > 2
    torch.testing.assert_close(torch.cat(learned), torch.cat(acted), rtol=1e-4, atol=1e-6)


def test_each_network_has_its_learning_rate_and_its_own_clipping(a2c, tmp_path, monkeypatch):
    step, rates, norms = a2c.RMSpropTF.step, [], []

    def look(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        sizes = [
            [len(x) for x in group["params"] if x.dim() == 1] for group in optimizer.param_groups
        ]
        assert [1 in x for x in sizes] == [True, True] and sizes[1][-1] == 1
        gradients = [[x.grad for x in g["params"]] for g in optimizer.param_groups]
        norms.append([torch.nn.utils.get_total_norm(x).item() for x in gradients])
        step(optimizer)

    monkeypatch.setattr(a2c.RMSpropTF, "step", look)
    words = ["--learning-rate", 0.02, "--critic-learning-rate", 0.01, "--max-grad-norm", 0.001]
    run("a2c", *words, "--no-anneal-lr", "--critic-steps", 1, "--run-dir", tmp_path / "r")
    assert set(map(tuple, rates)) == {(0.02, 0.01)}
    assert np.allclose(norms, 0.001, rtol=0.01)


ATARI = "--num-envs 2 --log-frequency 20 --eval-episodes 1 --no-anneal-lr".split()


def test_a2c_on_atari(tmp_path, monkeypatch):
    """An update moves every layer, and a resumed run ends in the same weights."""
    pytest.importorskip("ale_py")
    monkeypatch.setattr(load("a2c"), "LONGEST_EPISODE", 200)  # an evaluation's
    words = ["--env-id", "ALE/Breakout-v5", *ATARI]
    run("a2c", *words, "--run-dir", tmp_path / "a", "--total-timesteps", 80, quick=False)
    run("a2c", *words, "--run-dir", tmp_path / "b", "--total-timesteps", 40, quick=False)
    first = checkpoint(tmp_path / "b")["agent"]
    run("a2c", "--resume", tmp_path / "b", "--total-timesteps", 80, quick=False)
    last = checkpoint(tmp_path / "b")["agent"]
    assert first.keys() == load("a2c").AtariActorCritic(4, 4, False).state_dict().keys()
    assert all(not torch.equal(first[name], last[name]) for name in first)
    whole = checkpoint(tmp_path / "a")["agent"]
    assert all(torch.equal(whole[name], last[name]) for name in whole)


@pytest.mark.parametrize("clips, ends", [(True, True), (False, False)])
def test_what_a2c_learns_from_on_atari(clips, ends, tmp_path, monkeypatch):
    """MsPacman: a pill is worth 10, and one of three lives is lost long before the game ends."""
    pytest.importorskip("ale_py")
    module, seen = load("a2c"), []
    compute_gae = module.compute_gae

    def look(rewards, values, next_values, terminations, dones, *rest):
        seen.append((rewards.clone(), terminations.clone(), dones.clone()))
        return compute_gae(rewards, values, next_values, terminations, dones, *rest)

    monkeypatch.setattr(module, "compute_gae", look)
    monkeypatch.setattr(module, "LONGEST_EPISODE", 200)
    words = ["--env-id", "ALE/MsPacman-v5", *ATARI, "--total-timesteps", 500]
    words += [] if clips else ["--no-clip-rewards"]
    words += [] if ends else ["--no-episodic-life"]
    run("a2c", *words, "--run-dir", tmp_path / "r", quick=False)
    rewards, terminations, dones = (torch.cat(part) for part in zip(*seen, strict=True))
    assert rewards.max() == 1 if clips else rewards.max() >= 10
    assert not any("charts/episodes" in line for line in training(tmp_path / "r"))
    assert (terminations.sum() > 0) == ends and torch.equal(terminations, dones)
