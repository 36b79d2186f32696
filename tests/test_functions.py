"""Every pure function against an independent reference: hand-worked numbers, definitions."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gae_equals_its_definition(ppo):
    """A_t = sum_k (gamma lambda)^k delta_{t+k} up to the end of the episode, in O(T^2)."""
    T, N, gamma, lam = 40, 3, 0.97, 0.9
    rewards, values, next_values = rand(T, N), rand(T, N, seed=1), rand(T, N, seed=2)
    terminations = (rand(T, N, seed=3) > 1.2).double()
    truncations = (rand(T, N, seed=4) > 1.2).double()
    dones = torch.maximum(terminations, truncations)
    assert terminations.sum() > 3 and (truncations * (1 - terminations)).sum() > 3
    expected = torch.zeros(T, N, dtype=torch.float64)
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                bootstrap = 0 if terminations[k, n] else gamma * next_values[k, n]
                delta = rewards[k, n] + bootstrap - values[k, n]
                expected[t, n] += (gamma * lam) ** (k - t) * delta
                if dones[k, n]:
                    break
    actual = ppo.compute_gae(rewards, values, next_values, terminations, dones, gamma, lam)
    torch.testing.assert_close(actual, expected)


def test_gae_by_hand(ppo):
    """Three steps; the second is cut by a time limit, the third ends for good."""
    column = [torch.tensor(x)[:, None] for x in ([1.0, 1.0, 1.0], [2.0, 3.0, 4.0], [3.0, 5.0, 7.0])]
    terminations, dones = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0], [1.0]])
    # deltas: 1 + 0.5 * 3 - 2 = 0.5; 1 + 0.5 * 5 - 3 = 0.5; 1 + 0 - 4 = -3
    actual = ppo.compute_gae(*column, terminations, dones, 0.5, 0.5)
    assert actual.flatten().tolist() == [0.5 + 0.25 * 0.5, 0.5, -3.0]
    column[2][2] = torch.nan  # the value after a termination does not count
    assert torch.equal(ppo.compute_gae(*column, terminations, dones, 0.5, 0.5), actual)


def test_gaussian_log_prob_and_entropy(ppo):
    mean, log_std, actions = rand(5, 7, 3), rand(3, seed=1), rand(5, 7, 3, seed=2)
    reference = Independent(Normal(mean, log_std.exp()), 1)
    actual = ppo.gaussian_log_prob(mean, log_std, actions)
    torch.testing.assert_close(actual, reference.log_prob(actions))
    torch.testing.assert_close(ppo.gaussian_entropy(log_std), reference.entropy()[0, 0])


def test_clipped_objective_by_hand(ppo):
    """Four corners of min(r A, clip(r) A), eps = 0.2: a gain is capped, a loss is not."""
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = ppo.ppo_policy_loss(log_ratio, advantages, 0.2, None)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)


def test_clipping_removes_the_gradient_only_where_it_should(ppo):
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    ppo.ppo_policy_loss(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, None).backward()
    # d(-r A / 4) / d log r = -r A / 4 where the minimum takes the unclipped branch
    expected = torch.tensor([0.0, 1.5 / 4, -0.5 / 4, 0.0])
    torch.testing.assert_close(log_ratio.grad, expected)


def test_penalised_objective(ppo):
    """Without clipping: -mean(r A) + beta KL; both together: the sum."""
    log_ratio, advantages = rand(64) * 0.5, rand(64, seed=1)
    ratio = log_ratio.exp()
    kl = (ratio - 1 - log_ratio).mean()
    unclipped = ppo.ppo_policy_loss(log_ratio, advantages, math.inf, 0.7)
    torch.testing.assert_close(unclipped, -(ratio * advantages).mean() + 0.7 * kl)
    clipped = ppo.ppo_policy_loss(log_ratio, advantages, 0.2, None)
    both = ppo.ppo_policy_loss(log_ratio, advantages, 0.2, 0.7)
    torch.testing.assert_close(both, clipped + 0.7 * kl)


def test_kl_estimate_and_its_gradient_are_unbiased(ppo):
    """Against the closed form between two Gaussians, on a large sample of the old one."""
    old = Normal(torch.zeros(2, dtype=torch.float64), 0.8)
    mean = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([-0.1, -0.4], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    actions = old.sample((400_000,))
    log_ratio = ppo.gaussian_log_prob(mean, log_std, actions) - old.log_prob(actions).sum(-1)
    estimate = ppo.approximate_kl(log_ratio)
    exact = kl_divergence(old, Normal(mean, log_std.exp())).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=0.01)
    for ours, theirs in zip(
        torch.autograd.grad(estimate, (mean, log_std)),
        torch.autograd.grad(exact, (mean, log_std)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.005)


def test_adapting_the_kl_coefficient(ppo):
    assert ppo.adapt_kl_coef(1.0, 0.0151, 0.01) == 2.0
    assert ppo.adapt_kl_coef(1.0, 0.0149, 0.01) == 1.0
    assert ppo.adapt_kl_coef(1.0, 0.0067, 0.01) == 1.0
    assert ppo.adapt_kl_coef(1.0, 0.0066, 0.01) == 0.5
    coef = 1.0
    for _ in range(2000):  # within a float32's range, and back within twenty iterations
        coef = ppo.adapt_kl_coef(coef, 0.0, 0.01)
    assert coef == 1e-6
    for _ in range(2000):
        coef = ppo.adapt_kl_coef(coef, 1.0, 0.01)
    assert coef == 1e6


def test_value_loss(ppo):
    values, old, returns = (
        torch.tensor([2.0, 2.0]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([3.0, 0.0]),
    )
    plain = ppo.value_loss(values, old, returns, math.inf)
    assert plain.item() == pytest.approx(0.5 * (1 + 4) / 2)
    # clipped values are 1.5: errors 2.25 and 2.25; the worse of each pair is 2.25 and 4
    assert ppo.value_loss(values, old, returns, 0.5).item() == pytest.approx(0.5 * (2.25 + 4) / 2)


def test_explained_variance(ppo):
    returns = rand(100)
    assert ppo.explained_variance(returns, returns).item() == 1
    assert ppo.explained_variance(torch.zeros(100), returns).item() == pytest.approx(0)


@pytest.mark.parametrize(
    "action, low, high, expected",
    [
        ([-1.0, 0.0, 1.0], [3.0] * 3, [5.0] * 3, [3, 4, 5]),
        ([-2.0, 0.5, 9.0], [-8.0] * 3, [0.0] * 3, [-8, -2, 0]),
        ([-7.0, 0.5, 7.0], [-np.inf] * 3, [np.inf] * 3, [-7, 0.5, 7]),
        ([-7.0, 0.5, 7.0], [0.0, 0.0, -np.inf], [np.inf, np.inf, 2.0], [0, 0.5, 2]),
    ],
)
def test_actions_reach_every_kind_of_box(ppo, action, low, high, expected):
    box = gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
    scaler = ppo.ActionScaler(box)
    np.testing.assert_array_equal(scaler(torch.tensor(action)), expected)
    assert scaler.dim == 3 and scaler(torch.zeros(5, 2, 3)).shape == (5, 2, 3)


def test_actions_of_whole_numbers(ppo):
    box = gym.spaces.Box(-100, 100, (2, 2), np.int8)  # 200 wide: more than int8 holds
    actions = ppo.ActionScaler(box)(torch.tensor([-1.0, -0.004, 0.306, 2.0]))
    assert actions.dtype == np.int8 and actions.tolist() == [[-100, 0], [31, 100]]


@pytest.mark.parametrize(("low", "high"), [(-np.inf, np.inf), (0, np.inf), (-np.inf, 7)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])
def test_actions_without_bounds_are_not_scaled(ppo, low, high, dtype):
    """Gymnasium writes an integer's largest value where there is no bound."""
    box = gym.spaces.Box(low, high, (3,), dtype)
    actions = ppo.ActionScaler(box)(torch.tensor([1.0, 2.0, 5.0]))
    assert actions.tolist() == [1, 2, 5] and actions in box


def test_actions_never_leave_the_box_by_rounding(ppo):
    rng = np.random.default_rng(0)
    low = rng.normal(size=1000).astype(np.float32)
    high = (low + rng.uniform(0.1, 9, 1000)).astype(np.float32)
    scaler = ppo.ActionScaler(gym.spaces.Box(low, high))
    for action in (-1, 1, 0.999, 3):
        inside = scaler(torch.full((1000,), float(action)))
        assert (inside >= low).all() and (inside <= high).all()


def test_running_moments_equal_numpys(ppo):
    moments = ppo.RunningMoments(3)
    data = (rand(1000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 20.0, -3.0])).float()
    for batch in data.split([1, 9, 90, 900]):
        moments.update(batch)
    torch.testing.assert_close(moments.mean, data.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.var, data.var(0, correction=0), rtol=1e-3, atol=1e-4)
    assert ppo.ObsNormalizer(3, 20.0)(torch.full((2, 3), 1e9)).max() == 20


def test_reward_scale_does_not_leak_across_episodes(ppo):
    """Discounted returns restart after every end, across calls too."""
    scaler, gamma = ppo.RewardScaler(2, 0.9), 0.9
    rewards, dones = rand(12, 2).float(), (rand(12, 2, seed=1) > 0.5).float()
    returns, running = [], np.zeros(2)
    for t in range(12):
        running = running * gamma + rewards[t].numpy()
        returns.append(running.copy())
        running = running * (1 - dones[t].numpy())
    scaler.observe(rewards[:5], dones[:5])
    scaler.observe(rewards[5:], dones[5:])
    assert scaler.scale.item() == pytest.approx(np.std(returns), rel=1e-3)
