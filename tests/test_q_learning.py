"""dqn.py and double_dqn_per.py: replay memories, priorities, targets, clocks, known values."""

import json
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import assert_same_end, checkpoint, load, metrics, observe, run, same, training

Q_SCRIPTS = ["dqn", "double_dqn_per"]


@pytest.fixture(params=Q_SCRIPTS)
def q_script(request):
    return request.param


def make_memory(script, size, num_envs, obs_shape, stacked):
    module = load(script)
    if script == "dqn":
        return module.ReplayBuffer(size, num_envs, obs_shape, stacked)
    return module.PrioritizedReplayBuffer(size, num_envs, obs_shape, stacked, alpha=0.6)


def test_pictures_that_are_not_stacked(q_script):
    """--env-kwargs '{"stack_num": 1}': a game's picture has a first axis of 1."""
    memory = make_memory(q_script, 16, 2, (1, 3, 3), True)
    for step in range(3):
        obs = np.full((2, 1, 3, 3), step, np.uint8) + np.array([0, 10])[:, None, None, None]
        ended = np.zeros(2, bool)
        memory.add(obs.astype(np.uint8), np.zeros(2), np.zeros(2), obs + 1, ended, ended)
    assert memory.frames[:6, 0, 0].tolist() == [0, 10, 1, 11, 2, 12]


def valid(memory):
    """Indices of what can be sampled."""
    marks = memory.valid if hasattr(memory, "valid") else memory.priorities
    return np.flatnonzero(marks[: memory.size])


class Story:
    """Random episodes of several environments, whose observations are kept whole, naively."""

    def __init__(self, num_envs, stack, seed):
        self.rng, self.stack, self.num_envs = np.random.default_rng(seed), stack, num_envs
        self.frames = 0
        self.obs = np.stack([self.start() for _ in range(num_envs)])
        self.known = {}  # action, which is the transition's number -> the transition

    def frame(self):
        """Two bytes that no other frame has."""
        self.frames += 1
        return np.array(divmod(self.frames, 256), np.uint8)

    def start(self):
        if self.stack == 1:
            return self.frame()
        return np.concatenate([np.zeros((self.stack - 1, 2), np.uint8), self.frame()[None]])

    def follow(self, obs):
        return self.frame() if self.stack == 1 else np.concatenate([obs[1:], self.frame()[None]])

    def step(self, memory):
        """One step of all into the memory. A lost life terminates, but the episode goes on."""
        next_obs = np.stack([self.follow(obs) for obs in self.obs])
        fate = self.rng.choice(4, self.num_envs, p=[0.7, 0.1, 0.1, 0.1])  # on, life, over, cut
        terminations, dones = (fate == 1) | (fate == 2), fate >= 2
        numbers = len(self.known) + np.arange(self.num_envs)
        rewards = self.rng.normal(size=self.num_envs).astype(np.float32)
        for n, number in enumerate(numbers):
            parts = self.obs[n], rewards[n], next_obs[n], terminations[n]
            self.known[int(number)] = parts
        memory.add(self.obs, numbers, rewards, next_obs, terminations, dones)
        self.obs = np.stack([self.start() if dones[n] else next_obs[n] for n in range(len(dones))])


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("stack", [1, 4])
def test_every_valid_transition_is_what_happened(q_script, num_envs, stack):
    """Stacks and next observations against naive ones, while the memory fills and wraps around."""
    shape = (stack, 2) if stack > 1 else (2,)
    memory = make_memory(q_script, 60, num_envs, shape, stack > 1)
    story = Story(num_envs, stack, seed=stack)
    for step in range(200):
        story.step(memory)
        indices = valid(memory)
        batch = memory.read(indices)
        for i, number in enumerate(batch.actions.tolist()):
            obs, reward, next_obs, termination = story.known[number]
            assert (batch.obs[i].numpy() == obs).all(), (step, number)
            assert batch.rewards[i] == reward and batch.terminations[i] == termination
            if not termination:
                assert (batch.next_obs[i].numpy() == next_obs).all(), (step, number)
        # all but each environment's newest (its next frame is to come), the rows of cut episodes,
        # and of a full memory those whose stacks were overwritten
        assert len(set(batch.actions.tolist())) == len(indices)
        rows = min(step + 1, 60 // num_envs)
        assert len(indices) >= 0.75 * num_envs * (rows - 1 - 4), step
        newest = len(story.known) - 2 * num_envs  # the newest whose next frame can be there
        if step:
            assert set(range(newest, newest + num_envs)) <= set(batch.actions.tolist())


def test_uniform_samples_are_uniform_over_what_is_valid():
    memory = make_memory("dqn", 60, 3, (4, 2), True)
    story = Story(3, 4, seed=0)
    for _ in range(90):
        story.step(memory)
    rng = np.random.default_rng(0)
    actions = memory.sample(60_000, rng).actions.numpy()  # the numbers of the transitions
    indices = valid(memory)
    row_of = {number: row for row, number in zip(indices, memory.actions[indices], strict=True)}
    counts = np.bincount([row_of[number] for number in actions], minlength=memory.size)
    expected = 60_000 / len(indices)
    chi2 = ((counts[indices] - expected) ** 2 / expected).sum()
    assert chi2 < len(indices) + 4 * np.sqrt(2 * len(indices))


def test_memory_is_restored_exactly(q_script):
    memory = make_memory(q_script, 300, 3, (4, 2), True)  # more than one node of the tree
    story = Story(3, 4, seed=0)
    for step in range(130):
        story.step(memory)
        if step in (5, 129):  # before and after it is full
            other = make_memory(q_script, 300, 3, (4, 2), True)
            if q_script == "double_dqn_per":
                memory.set_priorities(valid(memory)[:7], np.arange(7.0))
            other.load_state_dict(memory.state_dict())
            left, right = other.state_dict(), memory.state_dict()
            assert left.keys() == right.keys()
            first, second = (x.sample(30, np.random.default_rng(1)) for x in (memory, other))
            for ours, theirs in zip(second, first, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            np.testing.assert_array_equal(valid(memory), valid(other))
            if q_script == "double_dqn_per":
                for ours, theirs in zip(memory.tree.levels, other.tree.levels, strict=True):
                    np.testing.assert_array_equal(ours, theirs)


def test_sum_tree_equals_plain_sums():
    module, rng = load("double_dqn_per"), np.random.default_rng(0)
    for size in (5, 128, 129, 20_000):
        tree, plain = module.SumTree(size), np.zeros(size)
        for _ in range(20):
            indices = rng.integers(size, size=50)
            priorities = rng.choice([0.0, 1e-9, 1.0, 1e6], size)[indices]  # duplicates agree
            tree.update(indices, priorities)
            plain[indices] = priorities
        for level in range(len(tree.levels) - 1):
            lower = tree.levels[level + 1].sum(1)
            np.testing.assert_allclose(tree.levels[level].reshape(-1)[: len(lower)], lower)
        total = tree.levels[0].sum()
        assert total == pytest.approx(plain.sum())
        sums = rng.uniform(0, total, 5000)
        sums[:3] = 0, np.nextafter(total, 0), total
        found = tree.find(sums)
        assert (plain[found] > 0).all()
        edges = plain.cumsum()
        exact = np.minimum(np.searchsorted(edges, sums, side="right"), size - 1)
        differ = (found != exact) & (np.abs(edges[found] - sums) > 1e-6 * total)
        assert not differ[3:].any()


def prioritised(priorities, alpha=0.6):
    module = load("double_dqn_per")
    memory = module.PrioritizedReplayBuffer(len(priorities) + 1, 1, (1,), False, alpha)
    zero = np.zeros((1, 1), np.float32)
    for _ in range(len(priorities) + 1):  # the last one cannot be drawn yet
        memory.add(zero, np.zeros(1, int), np.zeros(1), zero, *np.zeros((2, 1), bool))
    memory.set_priorities(np.arange(len(priorities)), np.array(priorities))
    return memory


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_frequencies_follow_the_priorities(alpha):
    """P(i) = p_i^alpha / sum, from many batches of 32 stratified draws (chi-squared)."""
    rng = np.random.default_rng(0)
    priorities = rng.exponential(size=200) + 0.01
    memory = prioritised(priorities, alpha)
    drawn = np.concatenate([memory.sample(32, rng)[0] for _ in range(4000)])
    probabilities = (priorities + 1e-6) ** alpha / ((priorities + 1e-6) ** alpha).sum()
    expected = len(drawn) * probabilities
    counts = np.bincount(drawn, minlength=201)
    assert counts[200] == 0
    chi2 = ((counts[:200] - expected) ** 2 / expected).sum()
    assert chi2 < 200 + 4 * np.sqrt(400)
    indices, reported = memory.sample(32, rng)[:2]
    np.testing.assert_allclose(reported, probabilities[indices], rtol=1e-12)


def test_draws_are_stratified():
    """Equal priorities of 64 transitions, 32 draws: one from each pair, every time."""
    memory = prioritised(np.ones(64))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert (memory.sample(32, rng)[0] // 2).tolist() == list(range(32))


def test_new_transitions_get_the_largest_priority_so_far():
    memory = prioritised([0.5, 3.0, 0.1])
    zero = np.zeros((1, 1), np.float32)
    memory.set_priorities(np.array([1]), np.array([0.2]))  # the largest was, and stays, 3
    memory.add(zero, np.zeros(1, int), np.zeros(1), zero, *np.zeros((2, 1), bool))
    expected = (np.array([3.0, 0.2, 0.1]) + 1e-6) ** 0.6  # index 0 was overwritten just now
    assert memory.priorities[3] == pytest.approx(expected[0])
    assert memory.priorities[[0, 1, 2]] == pytest.approx([0, *expected[1:]])


def test_importance_weights_in_float64():
    module, rng = load("double_dqn_per"), np.random.default_rng(0)
    probabilities, size = rng.dirichlet(np.ones(50)), 1000
    for beta in (0.0, 0.4, 1.0):
        weights = module.importance_weights(torch.from_numpy(probabilities), beta)
        exact = (size * probabilities) ** -beta
        assert weights.dtype == torch.float64
        np.testing.assert_allclose(weights, exact / exact.max(), rtol=1e-12)


def test_targets_by_hand():
    module = load("double_dqn_per")
    rewards, terminations = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 1.0])
    online = torch.tensor([[1.0, 2.0], [5.0, 4.0], [0.0, 9.0]])
    target = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    double = module.double_q_target(rewards, terminations, online, target, 0.5)
    assert double.tolist() == [1 + 10, 2 + 15, 3]
    plain = module.double_q_target(rewards, terminations, target, target, 0.5)
    assert plain.tolist() == [1 + 10, 2 + 20, 3]
    next_values = torch.tensor([20.0, 40.0, 60.0])
    assert load("dqn").td_target(rewards, terminations, next_values, 0.5).tolist() == [11, 22, 3]
    next_values[2] = torch.nan  # of a termination, it does not count
    for name in Q_SCRIPTS:
        targets = load(name).td_target(rewards, terminations, next_values, 0.5)
        assert targets.tolist() == [11, 22, 3]


def test_schedule(q_script):
    module = load(q_script)
    values = [module.linear_schedule(step, 100, 1.0, 0.1) for step in (0, 50, 100, 1000)]
    assert values == pytest.approx([1, 0.55, 0.1, 0.1])


def test_polyak_update_copies_buffers(q_script):
    """Batch statistics, say, which are no parameters."""
    online, target = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    online(torch.randn(50, 3) + 5)
    load(q_script).polyak_update(target, online, 0.1)
    assert torch.equal(target.running_mean, online.running_mean)
    assert target.num_batches_tracked == 1


def test_polyak_update(q_script):
    module = load(q_script)
    target, source = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    old, new = target.weight.clone(), source.weight.clone()
    module.polyak_update(target, source, 0.25)
    torch.testing.assert_close(target.weight, 0.75 * old + 0.25 * new)
    module.polyak_update(target, source, 1.0)
    assert torch.equal(target.weight, source.weight) and torch.equal(source.weight, new)


# ---- Whole runs ----------------------------------------------------------------------------------

PROBE = """--learning-rate 0.003 --gamma 0.9 --total-timesteps 4000 --log-frequency 500 --num-envs 4
--learning-starts 200 --batch-size 64 --train-frequency 4 --target-frequency 100 --tau 1
--exploration-steps 2000 --eval-episodes 2""".split()


def learn(script, folder, probe, *extra):
    run(script, "--env-id", f"probes:{probe}-v0", "--run-dir", folder, *PROBE, *extra, quick=False)
    return training(folder)[-1]["losses/q_values"]


def q_values(script, folder, *observations):
    network = load(script).vector_q_network((1,), 2)
    network.load_state_dict(checkpoint(folder)["q_network"])
    with torch.no_grad():
        return network(torch.tensor(observations)[:, None]).amax(1).tolist()


def test_constant_value(q_script, tmp_path):
    assert learn(q_script, tmp_path, "DiscreteProbe") == pytest.approx(1, abs=0.05)


def test_value_of_an_observation(q_script, tmp_path):
    learn(q_script, tmp_path, "DiscreteObservedValue")
    assert q_values(q_script, tmp_path, -1.0, 1.0) == pytest.approx([-1, 1], abs=0.1)


def test_discounting(q_script, tmp_path):
    learn(q_script, tmp_path, "DiscreteDelayed")
    assert q_values(q_script, tmp_path, 0.0, 1.0) == pytest.approx([0.9, 1], abs=0.05)


@pytest.mark.parametrize("extra", [(), ("--tau", "0.3", "--target-frequency", "25")])
def test_a_time_limit_bootstraps(q_script, tmp_path, extra):
    """Reward 1 for ever, cut every 5 steps: Q = 1 / (1 - 0.9) = 10."""
    assert learn(q_script, tmp_path, "DiscreteForever", *extra) == pytest.approx(10, abs=0.7)


def test_the_bootstrap_is_the_final_observation_and_not_the_next_episodes_first(q_script, tmp_path):
    """V(s) = s + 0.9 V(1 - s): 4.74 and 5.26. From the wrong observation they differ by 1."""
    learn(q_script, tmp_path, "DiscreteSwap")
    low, high = q_values(q_script, tmp_path, 0.0, 1.0)
    assert (low + high) / 2 == pytest.approx(5, abs=0.4)
    assert high - low == pytest.approx(0.526, abs=0.2)


def test_its_terminating_twin_does_not(q_script, tmp_path):
    """The same, but one in 5 steps ends: the mean solves Q = 1 + 0.9 * 0.8 Q, which is 3.6.

    With the squared loss: observations do not tell the steps apart, and huber's minimum is no mean.
    """
    value = learn(q_script, tmp_path, "DiscreteEnding", "--loss", "squared")
    assert value == pytest.approx(3.57, abs=0.5)


@pytest.mark.parametrize(
    "script, extra",
    [("dqn", []), ("double_dqn_per", ["--no-double"]), ("double_dqn_per", [])],
)
def test_the_target_network_evaluates(script, extra, tmp_path):
    """Never updated, it leaves Q at 1 + 0.9 of its own first values: the larger, but if double.

    The trained network sees no difference between the actions, so that its choice is the smaller
    one every now and then.
    """
    never = ["--target-frequency", "1000000"]
    value = learn(script, tmp_path, "DiscreteForever", *never, *extra)
    network = load(script).vector_q_network((1,), 2)
    network.load_state_dict(checkpoint(tmp_path)["target_network"])
    low, high = sorted(network(torch.zeros(1, 1))[0].tolist())
    assert high - low > 0.05
    if script == "dqn" or extra:
        assert value == pytest.approx(1 + 0.9 * high, abs=0.005)
    else:
        assert 1 + 0.9 * low - 0.005 < value < 1 + 0.9 * high - 0.01


@pytest.mark.parametrize("extra", [(), ("--loss", "squared", "--optimizer", "rmsprop")])
def test_best_action_depends_on_the_observation(q_script, tmp_path, extra):
    """Actions -1, 0 and 1, of which the one that equals the observation is best."""
    learn(q_script, tmp_path, "Choice", *extra)
    assert metrics(tmp_path)[-1]["eval/episodic_return"] == 0


def test_actions_have_the_dtype_of_their_space(q_script, tmp_path):
    """In processes of their own and in an evaluation, too; the environment refuses larger ones."""
    learn(q_script, tmp_path, "Small", "--async-envs", "--total-timesteps", 128)
    assert metrics(tmp_path)[-1]["eval/episodes"] == 2


@pytest.mark.parametrize("extra", [["--no-double"], ["--no-prioritized"]])
def test_ablations_learn(tmp_path, extra):
    assert learn("double_dqn_per", tmp_path, "DiscreteForever", *extra) == pytest.approx(10, abs=1)
    if extra == ["--no-prioritized"]:
        priorities = checkpoint(tmp_path)["buffer"]["priorities"]
        assert set(priorities.tolist()) == {0.0, 1.0}


def test_what_was_drawn_gets_new_priorities_and_weights(tmp_path):
    """Reward 100, Q about 0. Gradient steps at 50 and 100: p^alpha is 1, then mostly 100^0.2."""
    learn("double_dqn_per", tmp_path, "DiscreteHundred", "--total-timesteps", 100, "--num-envs", 1,
          "--log-frequency", 50, "--learning-starts", 50, "--train-frequency", 50,
          "--batch-size", 16, "--learning-rate", 1e-9, "--priority-alpha", 0.2,
          "--target-frequency", 1_000_000, "--loss", "huber")  # fmt: skip
    priorities = checkpoint(tmp_path)["buffer"]["priorities"]
    drawn = (priorities > 0) & (priorities != 1)
    assert 16 <= drawn[:50].sum() <= 32
    network = load("double_dqn_per").vector_q_network((1,), 2)
    network.load_state_dict(checkpoint(tmp_path)["target_network"])
    td_errors = 100 - network(torch.zeros(1, 1))[0].detach().double()
    expected = (td_errors.abs() + 1e-6) ** 0.2
    assert all((x - expected).abs().min() < 1e-5 for x in priorities[drawn])
    first, second = (line["losses/td_loss"] for line in training(tmp_path))
    assert first == pytest.approx(99.5, abs=0.5)  # all drawn with the same probability
    assert 0.3 * first < second < 0.7 * first  # 1 for the rare, 100^-0.2 for the others


def test_loss_is_huber_or_squared(q_script, tmp_path):
    """Reward 100, Q close to 0: the loss of the first update is about 100 or 10,000."""
    short = ["--total-timesteps", "100", "--log-frequency", "100", "--learning-starts", "100"]
    for loss, low, high in (("huber", 90, 101), ("squared", 9000, 11_000)):
        learn(q_script, tmp_path / loss, "DiscreteHundred", *short, "--loss", loss)
        assert low < training(tmp_path / loss)[-1]["losses/td_loss"] < high


def gradient_steps(folder):
    """What the optimizer counted."""
    return int(checkpoint(folder)["optimizer"]["state"][0]["step"])


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_epsilon_is_the_share_of_random_actions(q_script, tmp_path, epsilon):
    """A network that does not learn always prefers the same of two actions."""
    steps = ["--total-timesteps", 2000, "--learning-starts", 1500]
    share = ["--epsilon-start", epsilon, "--epsilon-end", epsilon]
    learn(q_script, tmp_path, "DiscreteForever", *steps, *share)
    actions = checkpoint(tmp_path)["buffer"]["actions"][:1500]
    counts = torch.bincount(actions[actions >= 0], minlength=2)
    assert counts.max() / counts.sum() == pytest.approx(1 - epsilon / 2, abs=0.04)
    # each environment explores on its own: all four are greedy as often as that makes it
    together = (actions[actions >= 0].view(-1, 4) == counts.argmax()).all(1).float().mean()
    assert together == pytest.approx((1 - epsilon / 2) ** 4, abs=0.08)


@pytest.mark.parametrize("num_envs", [1, 4, 8])
def test_clocks_count_environment_steps(q_script, tmp_path, num_envs):
    """Whatever the number of environments: gradient steps, epsilon, target, all by steps."""
    learn(q_script, tmp_path, "DiscreteForever", "--num-envs", num_envs, "--total-timesteps", 800,
          "--log-frequency", 200, "--train-frequency", 8, "--target-frequency", 10_000,
          "--learning-starts", 400, "--exploration-steps", 1000, "--epsilon-end", 0.5)  # fmt: skip
    steps = [line["global_step"] for line in training(tmp_path)]
    assert steps == [200, 400, 600, 800]
    assert gradient_steps(tmp_path) == (800 - 400) // 8 + 1  # at 400, 408, ..., 800
    for line in training(tmp_path):  # that of the last step taken
        taken = line["global_step"] - num_envs
        assert line["charts/epsilon"] == pytest.approx(1 - 0.5 * taken / 1000)
        assert ("losses/td_loss" in line) == (line["global_step"] >= 400)
    saved = checkpoint(tmp_path)
    assert not torch.equal(saved["q_network"]["4.bias"], saved["target_network"]["4.bias"])


@pytest.mark.parametrize("num_envs", [1, 4])
def test_learning_rate_falls_to_zero(q_script, tmp_path, num_envs):
    """A function of the step at each gradient step, however often there is a line of metrics."""
    short = ["--total-timesteps", 800, "--learning-rate", 0.01, "--num-envs", num_envs]
    learn(q_script, tmp_path / "a", "DiscreteForever", *short, "--log-frequency", 200)
    rates = [line["charts/learning_rate"] for line in training(tmp_path / "a")]
    assert rates == pytest.approx([0.0075, 0.005, 0.0025, 0])
    assert checkpoint(tmp_path / "a")["optimizer"]["param_groups"][0]["lr"] == rates[-1]
    learn(q_script, tmp_path / "b", "DiscreteForever", *short, "--log-frequency", 800)
    assert same(*(checkpoint(tmp_path / name)["q_network"] for name in "ab"))


def test_learning_rate_can_stay(q_script, tmp_path):
    learn(q_script, tmp_path, "DiscreteForever", "--total-timesteps", 800, "--no-anneal-lr")
    assert [line["charts/learning_rate"] for line in training(tmp_path)] == [0.003] * 2


def test_target_has_its_own_clock(q_script, tmp_path):
    """It ticks where no gradient step is due, and then equals the network."""
    short = ["--num-envs", 1, "--total-timesteps", 300, "--log-frequency", 300]
    clocks = ["--train-frequency", 7, "--target-frequency", 300]
    learn(q_script, tmp_path, "DiscreteForever", *short, *clocks)
    saved = checkpoint(tmp_path)
    assert gradient_steps(tmp_path) == 300 // 7 - 199 // 7
    for name, part in saved["q_network"].items():
        assert torch.equal(part, saved["target_network"][name])


def test_precision(q_script):
    """medium may round inputs of products; bfloat16 is left to hidden layers, and Q is float32."""
    module, obs = load(q_script), torch.randint(256, (4, 4, 84, 84)).float()
    values, seen = {}, []
    for precision in ("highest", "medium", "bfloat16"):
        args = module.Args(env_id="ALE/Pong-v5", precision=precision)
        torch.manual_seed(0)
        network = module.make_q_network(args, (4, 84, 84), 6)
        network.hidden.register_forward_hook(lambda *parts: seen.append(parts[-1].dtype))
        values[precision] = network(obs)
        rounds = torch.get_float32_matmul_precision() == "medium"
        assert rounds == (precision == "medium")  # the last layer's products, too
    torch.set_float32_matmul_precision("highest")
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert all(x.dtype == torch.float32 for x in values.values())
    torch.testing.assert_close(values["medium"], values["highest"], rtol=0, atol=0.01)
    off = (values["bfloat16"] - values["highest"]).abs().max()
    assert 1e-5 < off < 0.01


# ---- Atari ---------------------------------------------------------------------------------------

ATARI = """--total-timesteps 600 --log-frequency 100 --learning-starts 300 --buffer-size 400
--eval-episodes 1 --checkpoint-frequency 100""".split()


def play(module, game, steps, **args):
    """Random play of one game; yields what a training loop sees."""
    envs = module.make_envs(module.Args(env_id=f"ALE/{game}-v5", **args))
    rng = np.random.default_rng(0)
    obs = observe(envs)
    for _ in range(steps):
        before, actions = obs, rng.integers(envs.single_action_space.n, size=envs.num_envs)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        yield before, actions, rewards, obs, terminations, truncations, infos


def test_stacks_of_a_real_game(q_script):
    """Breakout, two environments, until the memory has wrapped around: byte for byte."""
    pytest.importorskip("ale_py")
    module = load(q_script)
    memory = make_memory(q_script, 300, 2, (4, 84, 84), True)
    known, ends = {}, 0
    for number, step in enumerate(play(module, "Breakout", 400, num_envs=2)):
        before, _, rewards, obs, terminations, truncations, infos = step
        dones = terminations | truncations
        next_obs = obs.copy()
        if dones.any():
            next_obs[dones] = np.stack(infos["final_obs"][dones])
        ends += dones.sum()
        numbers = np.array([2 * number, 2 * number + 1])
        for n in range(2):
            known[2 * number + n] = before[n], next_obs[n], bool(terminations[n])
        memory.add(before, numbers, rewards, next_obs, terminations, dones)
    batch = memory.read(valid(memory))
    assert ends >= 2 and len(batch.actions) > 280
    for i, number in enumerate(batch.actions.tolist()):
        obs, next_obs, termination = known[number]
        assert (batch.obs[i].numpy() == obs).all()
        assert termination or (batch.next_obs[i].numpy() == next_obs).all()


def test_an_atari_run(q_script, tmp_path):
    """The paper's defaults, said in the first line; clipped rewards and lives only to learn."""
    pytest.importorskip("ale_py")
    arguments = ["--env-id", "ALE/MsPacman-v5", *ATARI, "--total-timesteps", 1500]
    arguments += ["--buffer-size", 2000, "--learning-starts", 1400]
    done = run(q_script, *arguments, "--run-dir", tmp_path / "r", quick=False)
    first = done.stdout.splitlines()[0]
    assert "ALE/MsPacman-v5" in first and "published" in first and "2,000 transitions" in first
    args = json.loads((tmp_path / "r" / "args.json").read_text())["args"]
    assert args["optimizer"] == "rmsprop" and args["batch_size"] == 32
    assert args["learning_starts"] == 1400 and args["exploration_steps"] == 1_000_000
    saved = checkpoint(tmp_path / "r")["buffer"]
    assert saved["frames"].dtype == torch.uint8 and saved["frames"].shape[1:] == (84, 84)
    assert saved["rewards"].max() == 1 and saved["rewards"].sum() > 10
    lines = training(tmp_path / "r")
    episodes = sum(line.get("charts/episodes", 0) for line in lines)
    returns = [x["charts/episodic_return"] for x in lines if "charts/episodes" in x]
    assert episodes >= 1 and all(x >= 60 for x in returns)  # ten points a pellet, not one
    assert saved["terminations"].sum() > episodes  # three lives each


def test_an_atari_run_resumes_bit_for_bit(q_script, tmp_path, monkeypatch):
    """Crashed after 500 steps; the last checkpoint is of 400, in mid-game."""
    pytest.importorskip("ale_py")
    module = load(q_script)
    monkeypatch.setattr(module, "LONGEST_EPISODE", 300)  # of the evaluation, too
    arguments = ["--env-id", "ALE/Breakout-v5", "--sticky-actions", 0.25, *ATARI, "--num-envs", 2]
    run(q_script, *arguments, "--run-dir", tmp_path / "a", quick=False)
    write_metrics = module.Run.write_metrics

    def crash(self, line):
        if self.global_step == 500:
            raise RuntimeError("crashed")
        write_metrics(self, line)

    monkeypatch.setattr(module.Run, "write_metrics", crash)
    run(q_script, *arguments, "--run-dir", tmp_path / "b", quick=False, code=1)
    assert checkpoint(tmp_path / "b")["global_step"] == 400
    monkeypatch.setattr(module.Run, "write_metrics", write_metrics)
    done = run(q_script, "--resume", tmp_path / "b", quick=False)
    assert "not restored" not in done.stderr
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_games_that_step_together_step_as_in_turn(q_script):
    pytest.importorskip("ale_py")
    module, seen = load(q_script), []
    for step in (module.ParallelGames.step, module.SyncVectorEnv.step):
        envs = module.make_envs(module.Args(env_id="ALE/Breakout-v5", num_envs=3))
        rng = np.random.default_rng(0)
        seen.append([step(envs, rng.integers(4, size=3))[:3] for _ in range(200)])
    for together, in_turn in zip(*seen, strict=True):
        for left, right in zip(together, in_turn, strict=True):
            np.testing.assert_array_equal(left, right)
    assert any(terminations.any() for _, _, terminations in seen[0])


def test_every_game_has_its_action_before_one_is_waited_for(q_script, monkeypatch):
    pytest.importorskip("ale_py")
    module, calls = load(q_script), []
    for name in ("send", "step"):
        method = getattr(module.AtariGame, name)

        def look(game, action, name=name, method=method):
            calls.append(name)
            return method(game, action)

        monkeypatch.setattr(module.AtariGame, name, look)
    envs = module.make_envs(module.Args(env_id="ALE/Breakout-v5", num_envs=3))
    envs.step(np.zeros(3, int))
    assert calls[:3] == ["send"] * 3 and calls.count("step") == 3


def test_sticky_actions_reach_the_game(q_script):
    pytest.importorskip("ale_py")
    module = load(q_script)
    plain, again, sticky = (
        np.stack([step[3][0, -1] for step in play(module, "Pong", 150, sticky_actions=share)])
        for share in (0.0, 0.0, 0.5)
    )
    assert (plain == again).all() and not (plain == sticky).all()


def test_games_and_environments_start_differently(q_script):
    """The no-ops and the sticky actions of each environment and each seed are their own."""
    pytest.importorskip("ale_py")
    module = load(q_script)

    def frames(seed):
        steps = list(play(module, "Pong", 60, seed=seed, num_envs=2, sticky_actions=0.5))
        return np.stack([step[3][:, -1] for step in steps])

    first, second = frames(1), frames(2)
    assert not (first == second).all() and not (first[:, 0] == first[:, 1]).all()


def test_memory_that_does_not_fit_is_refused(q_script, tmp_path):
    for env_id in ("ALE/Pong-v5", "CartPole-v1"):
        arguments = ["--env-id", env_id, "--buffer-size", "1e13", "--run-dir", tmp_path / "r"]
        done = run(q_script, *arguments, quick=False, code=2)
        assert "error: --buffer-size" in done.stderr and "GB" in done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


BAD_ARGUMENTS = [
    ("--env-id Pendulum-v1", ["error: --env-id Pendulum-v1", "Discrete"]),
    ("--env-id ALE/Nothing-v5", ["error: --env-id ALE/Nothing-v5"]),
    ("--env-id PongNoFrameskip-v4", ["error: --env-id PongNoFrameskip-v4", "ALE/Pong-v5"]),
    ('--env-id ALE/Pong-v5 --env-kwargs {"speed":2}', ["error: --env-id ALE/Pong-v5", "speed"]),
    ("--buffer-size 7", ["--buffer-size", "at least 8"]),
    ("--tau 0", ["--tau"]),
    ("--epsilon-end 1.5", ["--epsilon-end"]),
    ("--train-frequency 0", ["--train-frequency"]),
    ("--optimizer sgd", ["--optimizer"]),
]


def test_bad_arguments_of_q_learning(q_script, tmp_path):
    for arguments, says in BAD_ARGUMENTS:
        words = [*arguments.split(), "--run-dir", tmp_path / "r"]
        done = run(q_script, *words, quick=False, code=2)
        assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
        for text in says:
            assert text in done.stderr, done.stderr


def test_defaults_depend_on_the_environment(q_script):
    """Also for who makes Args in Python; a value that is given always wins."""
    module = load(q_script)
    vectors, atari = module.Args(), module.Args(env_id="ALE/Pong-v5")
    assert (vectors.loss, atari.loss) == ("squared", "huber")
    assert (vectors.total_timesteps, atari.total_timesteps) == (500_000, 10_000_000)
    assert module.Args(env_id="ALE/Pong-v5", loss="squared").loss == "squared"
    for words, anneal, starts in (
        ([], True, 1000),
        (["--env-id", "ALE/Pong-v5"], False, 50_000),
        (["--anneal-lr", "--env-id", "ALE/Pong-v5", "--learning-starts", "1e3"], True, 1000),
        (["--no-anneal-lr"], False, 1000),
    ):
        with mock.patch.object(sys, "argv", [q_script, *words]):
            args = module.parse_args(module.Args)
        assert (args.anneal_lr, args.learning_starts) == (anneal, starts)
