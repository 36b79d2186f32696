"""Trust regions: products with the Fisher matrix, conjugate gradients, line search, whole runs."""

import pytest
import torch
from conftest import checkpoint, load, run, training
from torch import nn

KINDS = ["gaussian", "categorical"]


@pytest.fixture
def trpo():
    return load("trpo")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_actor(trpo, kind):
    """A policy of float64 far from its start: no mean is 0 and no two spreads are equal."""
    torch.manual_seed(0)
    if kind == "gaussian":
        actor = trpo.GaussianActor(3, 2, -0.5).double()
    else:
        actor = trpo.CategoricalActor(3, 4).double()
    for number, parameter in enumerate(actor.parameters()):
        parameter.data += 0.3 * rand(*parameter.shape, seed=number)
    return actor


def fisher_product(trpo, actor, obs, old_policy=None):
    """F v as train computes it, without damping."""
    policy, parameters = actor(obs), list(actor.parameters())
    kl = trpo.kl_divergence(old_policy or trpo.frozen(policy), policy).mean()
    gradient = trpo.flatten(torch.autograd.grad(kl, parameters, create_graph=True))
    return lambda vector: trpo.fisher_vector_product(gradient, parameters, vector)


def matrix(product, size):
    return torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)])


def mean_kl_of(trpo, actor, obs):
    """The mean KL from today's policy as a function of all parameters in one vector."""
    old_policy, names = trpo.frozen(actor(obs)), [name for name, _ in actor.named_parameters()]
    shapes = [x.shape for x in actor.parameters()]

    def mean_kl(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        named = {n: x.view(s) for n, s, x in zip(names, shapes, parts, strict=True)}
        return trpo.kl_divergence(
            old_policy, torch.func.functional_call(actor, named, (obs,))
        ).mean()

    return mean_kl


# ---- Mathematics ---------------------------------------------------------------------------------


def test_kl_divergence(trpo):
    old, new = rand(5, 4), rand(5, 4, seed=1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=old), torch.distributions.Categorical(logits=new)
    )
    torch.testing.assert_close(trpo.kl_divergence(old, new), expected)
    old_std, new_std = rand(4, seed=2), rand(4, seed=3)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(old, old_std.exp()),
        torch.distributions.Normal(new, new_std.exp()),
    )
    actual = trpo.kl_divergence((old, old_std), (new, new_std))
    torch.testing.assert_close(actual, expected.sum(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_the_fisher_matrix_equal_the_hessian_of_the_kl(trpo, kind, monkeypatch):
    monkeypatch.setattr(trpo, "tanh_mlp", small_mlp)
    actor, obs = make_actor(trpo, kind), rand(6, 3, seed=9)
    start = trpo.flatten(actor.parameters()).detach()
    hessian = torch.autograd.functional.hessian(mean_kl_of(trpo, actor, obs), start)
    actual = matrix(fisher_product(trpo, actor, obs), len(start))
    torch.testing.assert_close(actual, hessian)
    assert torch.linalg.matrix_norm(hessian) > 0.1


def small_mlp(in_dim, out_dim, out_gain):
    return nn.Sequential(nn.Linear(in_dim, 5), nn.Tanh(), nn.Linear(5, out_dim))


def test_products_with_the_fisher_matrix_equal_the_mean_of_squared_scores(trpo, monkeypatch):
    """Categorical: the sum over all actions of probability times score times its transpose."""
    monkeypatch.setattr(trpo, "tanh_mlp", small_mlp)
    actor, obs = make_actor(trpo, "categorical"), rand(6, 3, seed=9)
    expected = 0
    for row in obs:
        log_probs = actor(row).log_softmax(-1)
        for log_prob in log_probs:
            grads = torch.autograd.grad(log_prob, list(actor.parameters()), retain_graph=True)
            score = trpo.flatten(grads)
            expected = expected + log_prob.exp().detach() * torch.outer(score, score) / len(obs)
    torch.testing.assert_close(matrix(fisher_product(trpo, actor, obs), len(expected)), expected)


def test_the_same_for_gaussians_from_samples(trpo, monkeypatch):
    """Scores of 40,000 sampled actions in one observation, within five standard errors."""
    monkeypatch.setattr(trpo, "tanh_mlp", lambda *dims, **_: nn.Linear(*dims[:2]))
    actor, obs = make_actor(trpo, "gaussian"), rand(1, 3, seed=9)
    mean, log_std = (x.detach() for x in actor(obs))
    actions = mean + log_std.exp() * rand(40_000, 2, seed=5)
    names = dict(actor.named_parameters())

    def log_prob(parameters, action):
        policy = torch.func.functional_call(actor, parameters, (obs,))
        return trpo.log_prob(policy, action[None]).sum()

    per_sample = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, 0))
    scores = torch.cat([x.flatten(1) for x in per_sample(names, actions).values()], 1).detach()
    squares = scores[:, :, None] * scores[:, None, :]
    errors = squares.std(0) / len(actions) ** 0.5
    actual = matrix(fisher_product(trpo, actor, obs), scores.shape[1])
    assert ((actual - squares.mean(0)).abs() <= 5 * errors + 1e-12).all()


def test_conjugate_gradients_solve_what_a_dense_solver_solves(trpo):
    factor, b = rand(12, 12), rand(12, seed=1)
    A = factor @ factor.T + 0.5 * torch.eye(12, dtype=torch.float64)
    x, residual = trpo.conjugate_gradient(lambda v: A @ v, b, 12)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-4, atol=1e-5)
    assert residual < 1e-6
    x, residual = trpo.conjugate_gradient(lambda v: A @ v, b, 3)  # not solved yet
    torch.testing.assert_close(residual, (b - A @ x).norm() / b.norm())
    assert 1e-3 < residual < 1
    x, _ = trpo.conjugate_gradient(lambda v: A @ v, b, 1000)  # nothing left to solve
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan")])
def test_no_nan_without_curvature(trpo, scale):
    b = rand(5)
    x, residual = trpo.conjugate_gradient(lambda v: scale * v, b, 10)
    assert torch.equal(x, torch.zeros(5, dtype=torch.float64)) and residual == 1
    assert trpo.largest_step_size(torch.tensor(scale), 0.01) == 0
    A = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    x, _ = trpo.conjugate_gradient(lambda v: A @ v, b, 10)  # found on the way
    assert x.isfinite().all()
    zero, _ = trpo.conjugate_gradient(lambda v: v, torch.zeros(5), 10)
    assert torch.equal(zero, torch.zeros(5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_step_has_the_kl_that_the_quadratic_form_predicts(trpo, kind):
    actor, obs = make_actor(trpo, kind), rand(50, 3, seed=9)
    start = trpo.flatten(actor.parameters()).detach()
    mean_kl, product = mean_kl_of(trpo, actor, obs), fisher_product(trpo, actor, obs)
    direction = rand(len(start), seed=7)
    for max_kl in (1e-6, 1e-8):
        beta = trpo.largest_step_size(direction @ product(direction), max_kl)
        assert mean_kl(start + beta * direction).item() == pytest.approx(max_kl, rel=0.02)


def test_the_surrogate_has_the_policy_gradient(trpo):
    actor, obs, actions, advantages = make_actor(trpo, "gaussian"), rand(8, 3), rand(8, 2), rand(8)
    log_probs = trpo.log_prob(actor(obs), actions)
    loss = trpo.surrogate_objective(log_probs - log_probs.detach(), advantages)
    actual = torch.autograd.grad(loss, list(actor.parameters()), retain_graph=True)
    expected = torch.autograd.grad((log_probs * advantages).mean(), list(actor.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    ratio = torch.tensor([0.5, 2.0])
    weighted = trpo.surrogate_objective(ratio.log(), torch.tensor([4.0, -1.0]))
    assert weighted.item() == pytest.approx((0.5 * 4 - 2 * 1) / 2)


# ---- Line search ---------------------------------------------------------------------------------


def search(trpo, outcomes, max_backtracks=5):
    """Step size 8, halved each time; outcomes are (improvement, KL) of each try."""
    steps, results = [], iter(outcomes)

    def try_step(step_size):
        steps.append(step_size.item())
        return tuple(torch.tensor(x) for x in next(results))

    found, tried = trpo.line_search(try_step, torch.tensor(8.0), 0.01, 0.5, max_backtracks)
    assert tried == len(steps)
    return found.item(), steps


def test_line_search(trpo):
    assert search(trpo, [(0.1, 0.01)]) == (8, [8])
    too_far, worse, good = (0.5, 0.011), (-0.1, 0.001), (0.1, 0.009)
    assert search(trpo, [too_far, good]) == (4, [8, 4])
    assert search(trpo, [worse, too_far, good]) == (2, [8, 4, 2])
    assert search(trpo, [too_far, worse, too_far], 3) == (0, [8, 4, 2])
    assert search(trpo, [(0.0, 0.0)], 1) == (0, [8])  # no improvement
    nan = float("nan")
    assert search(trpo, [(nan, 0.0), (0.1, nan)], 2) == (0, [8, 4])


def test_frozen_policies_stay(trpo):
    """The log std that an actor returns is its parameter, which the next step changes."""
    actor, obs = make_actor(trpo, "gaussian"), rand(4, 3)
    before = trpo.frozen(actor(obs))
    copies = [x.clone() for x in before]
    with torch.no_grad():
        parameters = list(actor.parameters())
        trpo.set_parameters(parameters, trpo.flatten(parameters) + 1)
    assert all(torch.equal(one, copy) for one, copy in zip(before, copies, strict=True))
    assert not torch.equal(actor(obs)[1], copies[1])


def test_set_parameters_undoes_flatten(trpo):
    actor = make_actor(trpo, "gaussian")
    parameters = list(actor.parameters())
    before = [x.clone() for x in parameters]
    vector = trpo.flatten(parameters).detach()
    assert len(vector) == sum(x.numel() for x in parameters)
    with torch.no_grad():
        trpo.set_parameters(parameters, 0 * vector)
        assert all((x == 0).all() for x in parameters)
        trpo.set_parameters(parameters, vector)
    assert all(torch.equal(x, y) for x, y in zip(before, parameters, strict=True))


# ---- Whole runs ----------------------------------------------------------------------------------


def test_every_step_is_in_the_trust_region_and_improves(tmp_path):
    run("trpo", "--run-dir", tmp_path / "r", "--total-timesteps", 2560)
    for line in training(tmp_path / "r"):
        rejected = line["losses/rejected_steps"]
        assert rejected == (line["losses/step_size"] == 0)
        radius = 0.04 * (1 - (line["global_step"] - 128) / 2560)  # of 128 steps an iteration
        assert rejected or 0 < line["losses/kl"] <= radius
        assert rejected or line["losses/surrogate_improvement"] > 0
        assert 1 <= line["losses/line_search_steps"] <= 10
        assert 0 < line["losses/cg_residual"] < 1
        assert line["losses/explained_variance"] <= 1


def test_the_step_is_a_multiple_of_the_natural_gradient(trpo, tmp_path, monkeypatch):
    """beta x with (F + damping) x = g, checked with an explicit matrix at the old policy."""
    monkeypatch.setattr(trpo, "tanh_mlp", small_mlp)
    seen, conjugate_gradient = [], trpo.conjugate_gradient

    def look(matvec, b, steps):
        rows = torch.stack([matvec(row) for row in torch.eye(len(b))])
        x, residual = conjugate_gradient(matvec, b, 100)
        seen.append((rows, b, x))
        return x, residual

    monkeypatch.setattr(trpo, "conjugate_gradient", look)
    run("trpo", "--run-dir", tmp_path / "r", "--total-timesteps", 256, "--num-steps", 64)
    for (rows, gradient, direction), line in zip(seen, training(tmp_path / "r"), strict=True):
        torch.testing.assert_close(rows, rows.T, rtol=1e-3, atol=1e-4)
        assert torch.linalg.eigvalsh(rows).min() > 0.09  # the damping
        solved = torch.linalg.solve(rows, gradient)
        torch.testing.assert_close(direction, solved, rtol=0.01, atol=0.01)
        radius = 0.04 * (1 - (line["global_step"] - 128) / 256)  # it shrinks
        largest = (2 * radius / (direction @ rows @ direction)).sqrt()
        shrunk = largest * 0.8 ** (line["losses/line_search_steps"] - 1)
        if not line["losses/rejected_steps"]:
            assert line["losses/step_size"] == pytest.approx(shrunk.item(), rel=1e-3)


def test_a_rejected_step_leaves_the_policy_and_the_critic_learns_all_the_same(
    trpo, tmp_path, monkeypatch
):
    """This also shows that fitting the critic leaves the actor untouched."""
    run("trpo", "--run-dir", tmp_path / "a", "--total-timesteps", 128)
    monkeypatch.setattr(trpo, "line_search", lambda try_step, step, *_: (0 * step, 10))
    start, actors = {}, []
    actor_init = trpo.GaussianActor.__init__

    def init(actor, *given):
        actor_init(actor, *given)
        actors.append({name: x.clone() for name, x in actor.state_dict().items()})

    monkeypatch.setattr(trpo.GaussianActor, "__init__", init)
    run("trpo", "--run-dir", tmp_path / "b", "--total-timesteps", 128)
    start, moved, kept = actors[0], checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert all(torch.equal(start[name], x) for name, x in kept["actor"].items())
    assert any(not torch.equal(start[name], x) for name, x in moved["actor"].items())
    for name, x in kept["critic"].items():
        torch.testing.assert_close(x, moved["critic"][name])
    assert training(tmp_path / "b")[0]["losses/rejected_steps"] == 1


def test_the_trust_region_shrinks_only_with_anneal_lr(tmp_path):
    words = ["--max-kl", 0.5, "--no-line-search", "--total-timesteps", 2560]
    steps = {}
    for flag in ("--anneal-lr", "--no-anneal-lr"):
        run("trpo", "--run-dir", tmp_path / flag, *words, flag)
        steps[flag] = [line["losses/step_size"] for line in training(tmp_path / flag)]
    first, constant = steps["--anneal-lr"], steps["--no-anneal-lr"]
    assert first[0] == constant[0] and first[-1] < 0.5 * constant[-1]  # the root of 1 / 20


@pytest.mark.parametrize("extra", [[], ["--no-line-search", "--npg-step", 0.05]])
def test_errors_of_the_critic_move_nothing(tmp_path, extra):
    """Where it explains nothing, and advantages are small; what is small is a flag."""
    words = ["--num-steps", 16, "--critic-steps", 1, "--total-timesteps", 1280, *extra]
    for small in (0, 1e9):
        run("trpo", "--run-dir", tmp_path / str(small), *words, "--small-adv", small)
        lines = training(tmp_path / str(small))
        nothing = [line["losses/explained_variance"] <= 0 for line in lines]
        assert 5 < sum(nothing) < len(lines) - 5
        still = [abs(line["losses/kl"]) < 1e-6 for line in lines]
        assert still == (nothing if small else [False] * len(lines))


def test_a_direction_that_is_not_finite_leaves_the_policy(trpo, tmp_path, monkeypatch):
    """0 times infinity would be NaN."""
    monkeypatch.setattr(trpo, "conjugate_gradient", lambda _, b, __: (b / 0, b.norm()))
    run("trpo", "--run-dir", tmp_path / "r", "--total-timesteps", 256)
    assert all(line["losses/rejected_steps"] == 1 for line in training(tmp_path / "r"))
    assert all(x.isfinite().all() for x in checkpoint(tmp_path / "r")["actor"].values())


def test_natural_policy_gradient(tmp_path):
    """Without the line search the first step is taken; --npg-step fixes its size."""
    wide = ["--max-kl", 0.5, "--log-std-init", -0.5]
    run("trpo", "--run-dir", tmp_path / "a", "--no-line-search", *wide)
    run("trpo", "--run-dir", tmp_path / "b", "--no-line-search", "--npg-step", 0.05)
    free, fixed = training(tmp_path / "a"), training(tmp_path / "b")
    assert {line["losses/line_search_steps"] for line in free + fixed} == {1}
    assert any(line["losses/kl"] > 0.5 for line in free)  # the quadratic form is only local
    assert {line["losses/step_size"] for line in fixed} == {0.05}


def test_a_fixed_step_needs_the_natural_gradient(tmp_path):
    done = run("trpo", "--run-dir", tmp_path / "r", "--npg-step", 0.1, code=2)
    assert "--npg-step" in done.stderr and "--no-line-search" in done.stderr
    assert not (tmp_path / "r").exists()
