"""Tiny environments with known values: each catches one family of bugs (see probes.py)."""

import gymnasium as gym
import pytest
import torch
from conftest import ON_POLICY, checkpoint, load, metrics, run, same, training

PROBE = """--no-anneal-lr --gamma 0.9 --total-timesteps 12800 --eval-episodes 1 --no-norm-obs
--env-kwargs {}""".split()
OWN = {
    "ppo_continuous": "--num-envs 4 --num-steps 64 --num-minibatches 4 --learning-rate 0.003 "
    "--no-norm-reward",
    "a2c": "--num-envs 16 --num-steps 4 --learning-rate 0.001 --critic-learning-rate 0.003 "
    "--optimizer adam --no-norm-reward --log-std-init -1.5",
    "trpo": "--num-envs 16 --num-steps 8 --critic-learning-rate 0.003 --no-norm-reward "
    "--log-std-init -1.5 --max-kl 0.03",
    "reinforce": "--num-envs 64 --learning-rate 0.01 --critic-learning-rate 0.01 "
    "--critic-steps 10 --critic-batch-size 64 --no-norm-returns --log-std-init -1",
}
SCALED = {script: "--norm-reward" for script in ON_POLICY} | {"reinforce": "--norm-returns"}
each = pytest.mark.parametrize("script", ON_POLICY)


def learn(folder, probe, *extra, script="ppo_continuous"):
    words = [*PROBE, *OWN[script].split(), *extra]
    run(script, "--env-id", f"probes:{probe}-v0", "--run-dir", folder, *words)
    return training(folder)[-1]["losses/values"]


def networks(folder, script="ppo_continuous"):
    module, saved = load(script), checkpoint(folder)
    if "agent" in saved:
        parts = [(name.split(".", 1), x) for name, x in saved["agent"].items()]
        saved = {part: {n: x for (p, n), x in parts if p == part} for part in ("actor", "critic")}
    actor = module.GaussianActor(1, len(saved["actor"]["log_std"]), 0)
    critic = module.ValueCritic(1)
    actor.load_state_dict(saved["actor"])
    critic.load_state_dict(saved["critic"])
    return actor, critic


def values(folder, *observations, script="ppo_continuous"):
    with torch.no_grad():
        return networks(folder, script)[1](torch.tensor(observations)[:, None]).tolist()


@each
def test_constant_value(script, tmp_path):
    assert learn(tmp_path, "Probe", script=script) == pytest.approx(1, abs=0.05)


@each
@pytest.mark.parametrize("probe, value", [("Probe", 1), ("Always", 10)])
def test_returns_that_do_not_vary_can_be_normalised(script, probe, value, tmp_path):
    """Their std is 0. Reward 1 in one step, which ends the task; or which a time limit cuts."""
    assert learn(tmp_path, probe, SCALED[script], script=script) == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "trpo"])  # what clips
def test_returns_that_hardly_vary_can_be_normalised(script, tmp_path):
    """What differs between rewards is a fiftieth of them or less, and must not be clipped away."""
    small = ["--small-adv", "0"] if script == "trpo" else []
    learn(tmp_path, "Offset", SCALED[script], *small, script=script)
    assert metrics(tmp_path)[-1]["eval/episodic_return"] > 99.95


@each
def test_value_loss_is_half_the_squared_error(script, tmp_path):
    """Before the only step of the critic: every return is 1, and every observation the same."""
    own = {
        "ppo_continuous": ["--num-minibatches", 1, "--update-epochs", 1],
        "a2c": ["--log-frequency", 1, "--critic-steps", 1],
        "reinforce": ["--critic-steps", 1],
    }
    learn(tmp_path, "Probe", "--total-timesteps", "1", *own.get(script, []), script=script)
    (line,) = training(tmp_path)
    expected = 0.5 * (1 - line["losses/values"]) ** 2
    assert line["losses/value_loss"] == pytest.approx(expected, rel=1e-4) and expected > 0.1


@each
def test_value_of_an_observation(script, tmp_path):
    learn(tmp_path, "ObservedValue", script=script)
    assert values(tmp_path, -1.0, 1.0, script=script) == pytest.approx([-1, 1], abs=0.1)


@each
def test_discounting(script, tmp_path):
    learn(tmp_path, "Delayed", script=script)
    assert values(tmp_path, 0.0, 1.0, script=script) == pytest.approx([0.9, 1], abs=0.05)


@pytest.mark.parametrize("script", ["a2c", "reinforce", "trpo"])
def test_a_time_limit_bootstraps_in_the_others_too(script, tmp_path):
    """Reward 1 for ever, cut every 5 steps: V = 1 / (1 - 0.9) = 10, normalised or not."""
    assert learn(tmp_path / "a", "Forever", script=script) == pytest.approx(10, abs=0.7)
    value = learn(tmp_path / "b", "Forever", SCALED[script], "--norm-obs", script=script)
    assert value == pytest.approx(10, abs=1)


@pytest.mark.parametrize("extra", [(), ("--no-recompute-advantages",), ("--gae-lambda", "0.5")])
def test_a_time_limit_bootstraps(tmp_path, extra):
    """Reward 1 for ever, cut every 5 steps: V = 1 / (1 - 0.9) = 10."""
    assert learn(tmp_path, "Forever", *extra) == pytest.approx(10, abs=0.7)


def test_a_time_limit_bootstraps_under_normalisation(tmp_path):
    """The same with scaled rewards: losses/values is in the environment's own units."""
    normalised = ["--norm-reward", "--norm-obs"]
    assert learn(tmp_path, "Forever", *normalised) == pytest.approx(10, abs=1)


@pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "trpo"])
def test_values_are_logged_in_units_of_the_reward(script, tmp_path):
    """Episodes of 50 steps with reward 1: V is 8 or so; what the critic learns is half of it."""
    assert 6 < learn(tmp_path, "Fifty", "--norm-reward", script=script) < 11


@each
def test_the_bootstrap_is_the_final_observation_and_not_the_next_episodes_first(script, tmp_path):
    """V(s) = s + 0.9 V(1 - s): 4.74 and 5.26. From the wrong observation they differ by 1."""
    learn(tmp_path, "Swap", script=script)
    low, high = values(tmp_path, 0.0, 1.0, script=script)
    assert (low + high) / 2 == pytest.approx(5, abs=0.4)
    assert high - low == pytest.approx(0.526, abs=0.2)


@each
@pytest.mark.parametrize("probe", ["Ending", "Both"])
def test_its_terminating_twin_does_not(script, probe, tmp_path):
    """The same, but ending after 5 steps: V of the first step is 4.1, and a mean near 2.7."""
    assert 2 < learn(tmp_path, probe, script=script) < 4.1


@each
def test_best_action_in_a_lopsided_box(script, tmp_path):
    """The best action is (4.5, -7) in [3, 5] x [-8, 0]."""
    learn(tmp_path, "Target", script=script)
    box = gym.make("probes:Target-v0").action_space
    mean, _ = networks(tmp_path, script)[0](torch.zeros(1))
    action = load("ppo_continuous").ActionScaler(box)(mean.detach())
    assert action.tolist() == pytest.approx([4.5, -7], abs=0.3)
    assert metrics(tmp_path)[-1]["eval/episodic_return"] > -0.05


def test_best_action_in_a_box_of_whole_numbers(tmp_path):
    learn(tmp_path, "Whole")
    assert metrics(tmp_path)[-1]["eval/episodic_return"] > -0.01


@each
def test_best_action_depends_on_the_observation(script, tmp_path):
    learn(tmp_path, "ObservedTarget", script=script)
    actor, _ = networks(tmp_path, script)
    means = actor(torch.tensor([[-1.0], [1.0]]))[0].flatten().tolist()
    assert means == pytest.approx([-0.5, 0.5], abs=0.15)


@pytest.mark.parametrize("objective", ["kl-penalty", "clip+kl-penalty"])
def test_every_objective_learns_and_adapts(tmp_path, objective):
    learn(tmp_path, "Target", "--policy-objective", objective, "--target-kl", "0.01")
    lines = training(tmp_path)
    assert metrics(tmp_path)[-1]["eval/episodic_return"] > -0.1
    assert len({line["charts/kl_coef"] for line in lines}) > 1
    assert checkpoint(tmp_path)["loop"]["kl_coef"] == lines[-1]["charts/kl_coef"]


def test_the_first_gradient_is_on_policy(tmp_path):
    """One epoch of one minibatch: the ratio is 1, so training sees what the policy saw."""
    once = ["--update-epochs", "1", "--num-minibatches", "1", "--total-timesteps", "2048"]
    learn(tmp_path, "ObservedTarget", *once, "--norm-obs")
    for line in training(tmp_path):
        assert line["losses/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert line["losses/clipfrac"] == 0


@each
def test_evaluation_is_deterministic_without_exploration(script, tmp_path):
    """The mean action of a policy that otherwise jumps all over the box: every episode the same."""
    wild = ["--log-std-init", "1.5", "--total-timesteps", "256", "--eval-episodes", "5"]
    learn(tmp_path, "Target", *wild, script=script)
    assert metrics(tmp_path)[-1]["eval/episodic_return_std"] == 0


@each
def test_the_learning_rate_falls_on_a_line(script, tmp_path):
    """From its start, at the first step of an iteration, to 0 at the end of the run."""
    rest = ["--log-frequency", 1, "--num-steps", 16] if script == "a2c" else []  # 256 steps each
    rest += ["--num-envs", 256] if script == "reinforce" else []
    rest += ["--num-steps", 16] if script == "trpo" else []
    learn(tmp_path, "Target", "--anneal-lr", "--total-timesteps", "1024", *rest, script=script)
    rates = [x["charts/learning_rate"] for x in training(tmp_path)]
    start = {"ppo_continuous": 0.003, "a2c": 0.001, "reinforce": 0.01, "trpo": 0.003}[script]
    assert rates == pytest.approx([start * x for x in (1, 0.75, 0.5, 0.25)])
    parts = checkpoint(tmp_path).items()
    groups = [x for name, part in parts if "optimizer" in name for x in part["param_groups"]]
    critic = 0.003 if script == "a2c" else start
    assert groups  # and not only the log
    for group in groups:
        assert group["lr"] in (pytest.approx(start / 4), pytest.approx(critic / 4))


@pytest.mark.parametrize("script", ["a2c", "ddpg", "sac", "dqn", "double_dqn_per"])
def test_how_often_a_run_logs_changes_no_weight(script, tmp_path):
    """Iterations of 96 steps end at 576, but the learning rate is 0 from step 512 on."""
    for steps in (128, 96):
        words = ["--anneal-lr", "--log-frequency", steps, "--num-envs", 1, "--seed", 3]
        run(script, *words, "--run-dir", tmp_path / str(steps))
    name = {"a2c": "agent", "ddpg": "actor", "sac": "actor"}.get(script, "q_network")
    assert same(*(checkpoint(tmp_path / folder)[name] for folder in ("128", "96")))


@pytest.mark.parametrize("script", ["ppo_continuous", "a2c"])
def test_the_entropy_bonus_widens_the_policy(script, tmp_path):
    """Where all actions are worth the same, it alone acts on the spread."""
    words = ["--ent-coef", 0.5, "--learning-rate", 0.01, "--total-timesteps", 2048]
    plain = ["--optimizer", "adam", "--no-norm-adv", "--no-norm-reward"]
    words += plain if script == "a2c" else []
    run(script, "--env-id", "probes:Probe-v0", "--run-dir", tmp_path / "r", *words)
    first, *_, last = (line["losses/entropy"] for line in training(tmp_path / "r"))
    assert last > first + 0.1


def test_target_kl_ends_the_epochs_early(tmp_path):
    learn(tmp_path / "free", "Target", "--total-timesteps", "1024", "--target-kl", "None")
    learn(tmp_path / "held", "Target", "--total-timesteps", "1024", "--target-kl", "1e-4")
    free, held = ([x["losses/approx_kl"] for x in training(tmp_path / n)] for n in ("free", "held"))
    assert max(held) < max(free) / 2


def test_minibatches_of_one_sample(tmp_path):
    """No NaN from a standard deviation over one element."""
    extra = ["--num-steps", "4", "--num-minibatches", "16", "--total-timesteps", "256"]
    learn(tmp_path, "Target", *extra)


@each
def test_odd_spaces_run(script, tmp_path):
    """Dict observations, a matrix of actions, float64 and 2-d parts, values in a nested Dict."""
    learn(tmp_path, "Nested", "--total-timesteps", "512", script=script)
    assert training(tmp_path)[-1]["charts/episodic_length"] == 7


@pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "trpo"])
@pytest.mark.parametrize("name, terminates", [("Forever", 0), ("Ending", 1)])
def test_every_end_cuts_the_recursion_and_only_a_termination_the_bootstrap(
    script, tmp_path, monkeypatch, name, terminates
):
    """Values alone do not show it: what leaks in from the next episode is 0 in the mean."""
    given, cuts, module = [], [], load(script)
    compute_gae, observe = module.compute_gae, module.RewardScaler.observe

    def look(rewards, values, next_values, terminations, dones, *rest):
        given.append((terminations.clone(), dones.clone()))
        return compute_gae(rewards, values, next_values, terminations, dones, *rest)

    def look_at_scaler(scaler, rewards, dones):
        cuts.append(dones.clone())
        observe(scaler, rewards, dones)

    monkeypatch.setattr(module, "compute_gae", look)
    monkeypatch.setattr(module.RewardScaler, "observe", look_at_scaler)
    words = ["--env-id", f"probes:{name}-v0", "--env-kwargs", "{}"]
    words += ["--no-recompute-advantages"] if script == "ppo_continuous" else []  # once a rollout
    run(script, *words, "--run-dir", tmp_path / "r")
    every_fifth = ((torch.arange(256) + 1) % 5 == 0).float()
    terminations, dones = (torch.cat(parts) for parts in zip(*given, strict=True))
    assert torch.equal(torch.cat(cuts), dones)  # the return that scales rewards is cut, too
    for column in range(2):
        assert dones[:, column].tolist() == every_fifth.tolist()
        assert terminations[:, column].tolist() == (terminates * every_fifth).tolist()
