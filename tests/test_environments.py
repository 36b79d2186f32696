"""Environment plumbing: true final observations, autoreset, seeds, and exact replay."""

import numpy as np
import pytest
import torch
from conftest import observe, run, training

REPLAYED = ["HalfCheetah-v5", "Hopper-v5", "Ant-v5", "probes:Counting-v0", "probes:Meddling-v0"]


def counting_envs(ppo, num_envs=3, seed=0):
    return ppo.make_envs(ppo.Args(env_id="probes:Counting-v0", num_envs=num_envs, seed=seed))


def test_final_observations_and_episodes_are_complete(ppo):
    """At every end: the last observation of the old episode, the first of the new, the sums."""
    envs, finished = counting_envs(ppo), 0
    obs = observe(envs)
    for _ in range(200):
        before = obs
        obs, rewards, terminations, truncations, infos = envs.step(np.zeros((3, 1), np.float32))
        dones = terminations | truncations
        assert (rewards == 1).all()
        for i in range(3):
            if dones[i]:
                final = infos["final_obs"][i]
                assert final.tolist() == [before[i, 0] + 1, before[i, 1]] and final[0] == final[1]
                ended = infos["final_info"]
                assert ended["return"][i] == ended["length"][i] == final[1]
                assert obs[i, 0] == 0
                finished += 1
            else:
                assert obs[i].tolist() == [before[i, 0] + 1, before[i, 1]]
    assert finished > 50


def test_environments_differ_and_seeds_repeat(ppo):
    def lengths(seed):
        envs, seen = counting_envs(ppo, seed=seed), []
        for _ in range(40):
            obs = envs.step(np.zeros((3, 1), np.float32))[0]
            seen.append(obs[:, 1])
        return np.stack(seen)

    first = lengths(1)
    assert (first == lengths(1)).all() and not (first == lengths(2)).all()
    assert not (first[:, 0] == first[:, 1]).all()


@pytest.mark.parametrize("env_id", REPLAYED)
def test_replay_is_exact(ppo, env_id):
    """Saved in mid-episode and restored into used environments: every later number is the same."""
    args = ppo.Args(env_id=env_id, num_envs=2)
    envs, other = ppo.make_envs(args), ppo.make_envs(args)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (400, 2, *envs.single_action_space.shape)).astype(np.float32)
    begun = 173
    for action in actions[:begun]:
        envs.step(action.copy())
        other.step(-action)
    while min(envs.get_attr("length")) < 2:  # there has to be something to repeat
        envs.step(actions[begun].copy())
        begun += 1
    other.set_attr("snapshot", envs.get_attr("snapshot"))
    np.testing.assert_array_equal(observe(envs), observe(other))
    assert not any(other.get_attr("lost_episode"))
    for action in actions[begun:]:
        ours, theirs = envs.step(action.copy()), other.step(action.copy())
        for left, right in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(left, right)
        if "final_info" in ours[4]:
            done = ours[2] | ours[3]
            left, right = ours[4]["final_info"]["return"], theirs[4]["final_info"]["return"]
            np.testing.assert_array_equal(left[done], right[done])


@pytest.mark.parametrize("env_id", ["probes:Unseeded-v0", "probes:Breaking-v0"])
def test_what_cannot_be_replayed_says_so(ppo, capsys, env_id):
    envs = ppo.make_envs(ppo.Args(env_id=env_id, num_envs=2))
    envs.step(np.zeros((2, 1), np.float32))
    envs.set_attr("snapshot", envs.get_attr("snapshot"))
    assert capsys.readouterr().err.count("not restored") == 1  # said once
    assert envs.get_attr("lost_episode") == (True, True)
    assert [env.length for env in envs.envs] == [0, 0]


def test_an_episode_too_long_to_replay_restarts(ppo, capsys, monkeypatch):
    monkeypatch.setattr(ppo, "LONGEST_EPISODE", 3)
    envs = ppo.make_envs(ppo.Args(env_id="HalfCheetah-v5", num_envs=1))
    for _ in range(5):
        envs.step(np.ones((1, 6), np.float32))
    (snapshot,) = envs.get_attr("snapshot")
    assert len(snapshot["actions"]) == 3
    envs.set_attr("snapshot", [snapshot])
    assert "not restored" in capsys.readouterr().err


def test_dict_observations_are_flattened(ppo):
    envs = ppo.make_envs(ppo.Args(env_id="probes:Nested-v0", num_envs=2))
    assert observe(envs).shape == (2, 7)


def test_buffer_fields_stay_together(ppo):
    """Each field of the flattened, shuffled buffer still encodes its transition's id."""
    buffer = ppo.RolloutBuffer(5, 3, obs_dim=2, action_dim=1, device=torch.device("cpu"))
    for t in range(5):
        ids = torch.arange(3.0) + 3 * t
        buffer.obs[t], buffer.next_obs[t] = ids[:, None], ids[:, None] + 0.5
        buffer.actions[t], buffer.log_probs[t], buffer.rewards[t] = ids[:, None], -ids, 2 * ids
        buffer.terminations[t], buffer.dones[t] = ids % 2, ids % 3
    order = torch.randperm(15)
    fields = {name: field.flatten(0, 1)[order] for name, field in vars(buffer).items()}
    ids = fields["obs"][:, 0]
    assert sorted(ids.tolist()) == list(range(15))
    assert (fields["next_obs"] == ids[:, None] + 0.5).all() and (fields["log_probs"] == -ids).all()
    assert (fields["actions"][:, 0] == ids).all() and (fields["rewards"] == 2 * ids).all()
    assert (fields["terminations"] == ids % 2).all() and (fields["dones"] == ids % 3).all()


@pytest.mark.parametrize("script", ["dqn", "a2c", "reinforce", "trpo"])
def test_an_environment_that_shares_its_name_with_a_game(script, tmp_path):
    """Blackjack-v1 is no old name of ALE/Blackjack-v5."""
    words = ["--env-id", "Blackjack-v1", "--env-kwargs", "{}", "--total-timesteps", 256]
    run(script, *words, "--run-dir", tmp_path / "r")
    assert training(tmp_path / "r")[-1]["charts/episodes"] > 1
