"""Short real learning, with a margin that a broken algorithm does not pass; fixed seeds."""

import pytest
from conftest import metrics, run


def evaluation(folder):
    return metrics(folder)[-1]["eval/episodic_return"]


def test_ppo_balances_the_pendulum(tmp_path):
    """InvertedPendulum-v5: 1000 is perfect, a random policy gets about 6."""
    arguments = "--env-id InvertedPendulum-v5 --total-timesteps 40000 --num-envs 8 --num-steps 64"
    run("ppo_continuous", *arguments.split(), "--num-minibatches", 8, "--update-epochs", 10,
        "--run-dir", tmp_path / "r", "--eval-episodes", 5, quick=False)  # fmt: skip
    assert evaluation(tmp_path / "r") > 900


@pytest.mark.parametrize("script", ["dqn", "double_dqn_per"])
def test_q_learning_balances_the_pole(script, tmp_path):
    """CartPole-v1: random actions get 22, an untrained network 9; 150 to 300 after 25,000 steps."""
    arguments = "--env-id CartPole-v1 --total-timesteps 25000 --eval-episodes 20 --tau 1 "
    arguments += "--target-frequency 500 --learning-rate 5e-4 --exploration-steps 20000 "
    arguments += "--train-frequency 4"
    run(script, *arguments.split(), "--run-dir", tmp_path / "r", quick=False)
    assert evaluation(tmp_path / "r") > 110


@pytest.mark.parametrize(
    "script, steps", [("reinforce", 24_000), ("a2c", 100_000), ("trpo", 24_000)]
)
def test_policy_gradients_balance_the_pole(script, steps, tmp_path):
    """CartPole-v1: 500 is perfect; what does not learn, or learns the wrong way, stays below 50."""
    words = ["--env-id", "CartPole-v1", "--total-timesteps", steps, "--eval-episodes", 10]
    run(script, *words, "--run-dir", tmp_path / "r", quick=False)
    assert evaluation(tmp_path / "r") > 200
