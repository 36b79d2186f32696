"""Short real learning, with a margin that a broken algorithm does not pass; fixed seeds."""

from conftest import metrics, run


def evaluation(folder):
    return metrics(folder)[-1]["eval/episodic_return"]


def test_ppo_balances_the_pendulum(tmp_path):
    """InvertedPendulum-v5: 1000 is perfect, a random policy gets about 6."""
    arguments = "--env-id InvertedPendulum-v5 --total-timesteps 100000 --num-envs 8 --num-steps 64"
    run("ppo_continuous", *arguments.split(), "--num-minibatches", 8, "--update-epochs", 10,
        "--run-dir", tmp_path / "r", "--eval-episodes", 5, quick=False)  # fmt: skip
    assert evaluation(tmp_path / "r") > 900
