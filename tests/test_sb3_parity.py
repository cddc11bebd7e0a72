"""What SB3 users rely on with SAC and TD3, here with QVPO: training, callbacks, logs."""

import time
import warnings

import numpy as np
import pytest
import torch as th
from helpers import CountdownEnv, same_weights, tiny_qvpo, weights_of
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, EveryNTimesteps, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import HParam, KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def changed_names(before, after):
    return {name for name in before if not th.equal(before[name], after[name])}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_identity_is_learnt(seed):
    """An action within 0.2 of the observation earns 1; a constant action earns about 20 of 100, a random one less."""
    env = make_vec_env(IdentityEnvBox, env_kwargs=dict(eps=0.2), seed=seed)
    model = tiny_qvpo(
        env,
        seed=seed,
        learning_rate=3e-3,
        gamma=0.5,
        batch_size=64,
        buffer_size=1000,
        learning_starts=100,
        n_behavior_candidates=1,
        n_train_candidates=8,
        n_eval_candidates=16,
        policy_kwargs=dict(net_arch=[32, 32], time_embedding_dim=4),
    )
    assert evaluate_policy(model, env, n_eval_episodes=2)[0] < 50
    model.learn(600)
    assert evaluate_policy(model, env, n_eval_episodes=3)[0] >= 90
    model.n_eval_candidates = 1  # not by the critics' choice alone: the actor has learnt it too
    assert evaluate_policy(model, env, n_eval_episodes=3)[0] >= 80


def test_a_noisy_run_and_the_actions_after_it_repeat():
    """Action noise and stochastic predictions draw from the seeded generators only."""

    def run(seed):
        noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
        model = tiny_qvpo(seed=seed, action_noise=noise, train_freq=4).learn(40)
        env, returned = model.get_env(), []
        obs = env.reset()
        for _ in range(30):
            action, _ = model.predict(obs)
            obs, reward, _, _ = env.step(action)
            returned.append((action.item(), reward.item()))
        return returned

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_one_critic_is_enough():
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[8], n_critics=1)).learn(6)
    assert len(model.critic.q_networks) == 1
    before = weights_of(model)
    model.train(1, batch_size=8)
    assert {name for name in before if name.startswith("critic.")} <= changed_names(before, weights_of(model))


def test_no_hidden_layers():
    """``net_arch=[]``: a linear critic of state and action, and it trains."""
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[])).learn(6)
    layers = [layer for layer in model.critic.q_networks[0] if isinstance(layer, th.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(4, 1)]
    before = weights_of(model)
    model.train(1, batch_size=8)
    assert {"actor", "critic"} <= {name.split(".")[0] for name in changed_names(before, weights_of(model))}


@pytest.mark.parametrize("optimizer_kwargs", [None, dict(weight_decay=0.5)])
def test_optimizer_arguments(optimizer_kwargs):
    policy_kwargs = dict(net_arch=[8], optimizer_class=th.optim.AdamW, optimizer_kwargs=optimizer_kwargs)
    model = tiny_qvpo(policy_kwargs=policy_kwargs).learn(8)
    for network in (model.actor, model.critic):
        assert type(network.optimizer) is th.optim.AdamW
        assert network.optimizer.param_groups[0]["weight_decay"] == (0.5 if optimizer_kwargs else 0.01)


@pytest.mark.parametrize("train_freq", ["4", ("1", "episode"), "non_sense", (1, "close")])
def test_a_train_freq_that_means_nothing_is_refused(train_freq):
    with pytest.raises(ValueError, match=r"[Tt]rain_?\s?freq"):
        tiny_qvpo(CountdownEnv(), train_freq=train_freq).learn(12)


def test_the_logged_number_of_updates_counts_all_environments():
    """One rollout of 3 steps in 2 environments is 6 transitions, so 6 updates."""
    env = make_vec_env(CountdownEnv, n_envs=2)
    model = tiny_qvpo(env, train_freq=3, gradient_steps=-1, learning_starts=0).learn(3)
    assert model.logger.name_to_value["train/n_updates"] == 6
    assert model.num_timesteps == 6


def test_few_updates_for_many_environments_are_warned_of_once():
    def messages(n_envs, gradient_steps):
        model = tiny_qvpo(make_vec_env(CountdownEnv, n_envs=n_envs), gradient_steps=gradient_steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(8).learn(8)
        return [str(each.message) for each in caught if each.category is UserWarning]

    (message,) = messages(n_envs=2, gradient_steps=1)
    assert "gradient_steps=1 with 2 environments" in message
    assert messages(n_envs=2, gradient_steps=-1) == messages(n_envs=1, gradient_steps=1) == []


def test_arguments_of_gsde_without_gsde_change_nothing():
    kwargs = dict(use_sde=False, sde_sample_freq=4, use_sde_at_warmup=True)
    assert same_weights(weights_of(tiny_qvpo(**kwargs).learn(12)), weights_of(tiny_qvpo().learn(12)))


def test_time_limits_and_noise_of_several_environments():
    """Each environment ends by its own time limit and has noise of its own."""
    env = DummyVecEnv([lambda: CountdownEnv(3, truncate=True), lambda: CountdownEnv(5, truncate=True)])
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    model = tiny_qvpo(env, action_noise=noise, gradient_steps=-1, learning_starts=30).learn(60)
    rows = np.arange(1, 31)
    np.testing.assert_array_equal(model.replay_buffer.timeouts[:30, 0], rows % 3 == 0)
    np.testing.assert_array_equal(model.replay_buffer.timeouts[:30, 1], rows % 5 == 0)
    assert not model.replay_buffer._get_samples(np.arange(30)).dones.any()  # bootstrapped
    first, second = model.action_noise()
    assert first != second


def test_n_step_returns_of_two_environments_do_not_mix():
    """The observation tells the environment and the steps left in it: 4, or 5."""
    env = DummyVecEnv([lambda: CountdownEnv(4), lambda: CountdownEnv(5)])
    model = tiny_qvpo(env, n_steps=3, gamma=0.5, train_freq=4, gradient_steps=-1).learn(48)
    assert (type(model.replay_buffer), model.replay_buffer.n_steps) == (NStepReplayBuffer, 3)
    batch = model.replay_buffer._get_samples(np.repeat(np.arange(20), 10))
    observations = batch.observations[:, 0].numpy()
    of_four = np.isin(observations, np.float32([0.25, 0.5, 0.75]))
    left = np.where(of_four, 4 - 4 * observations, 5 - 5 * observations).round().astype(int)
    np.testing.assert_allclose(batch.rewards[:, 0], np.array([0, 1, 1.5, 1.75, 1.75, 1.75])[left])
    assert (of_four & (left == 1)).any() and (~of_four & (left == 1)).any()


def test_targets_start_as_copies():
    for share in (False, True):
        env = FakeImageEnv(screen_height=36, screen_width=36, discrete=False)
        policy_kwargs = dict(net_arch=[8], share_features_extractor=share)
        model = tiny_qvpo(env, policy="CnnPolicy", policy_kwargs=policy_kwargs, buffer_size=10)
        for online, target in ((model.actor, model.actor_target), (model.critic, model.critic_target)):
            assert same_weights(online.state_dict(), target.state_dict())
            assert not {id(parameter) for parameter in online.parameters()} & {id(each) for each in target.parameters()}
        assert (model.actor_target.features_extractor is model.critic_target.features_extractor) == share


def test_tau_zero_leaves_the_targets_alone():
    model = tiny_qvpo().learn(10)
    model.tau = 0.0
    before = weights_of(model)
    model.train(1, batch_size=8)
    changed = changed_names(before, weights_of(model))
    assert changed == {name for name, _ in model.policy.named_parameters() if name.startswith(("actor.", "critic."))}


@pytest.mark.parametrize("qf_learning_rate", [None, 1e-2])
def test_a_replaced_learning_rate_schedule_acts_on_actor_and_critic(qf_learning_rate):
    """Rate 0: only the targets still move, towards what is online; the critic moves on if it has a rate of its own."""
    model = tiny_qvpo(qf_learning_rate=qf_learning_rate).learn(10)
    model.lr_schedule = lambda _: 0.0
    before = weights_of(model)
    model.train(1, batch_size=8)
    changed = {name.split(".")[0] for name in changed_names(before, weights_of(model))}
    assert changed == {"actor_target", "critic_target"} | ({"critic"} if qf_learning_rate else set())
    rates = [each.optimizer.param_groups[0]["lr"] for each in (model.actor, model.critic)]
    assert rates == [0.0, qf_learning_rate or 0.0]


class NormedExtractor(BaseFeaturesExtractor):
    """Batch norm and dropout."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=6)
        self.layers = th.nn.Sequential(th.nn.Linear(3, 6), th.nn.BatchNorm1d(6, momentum=0.5), th.nn.Dropout(0.5))

    def forward(self, observation):
        return self.layers(observation)


def normed_qvpo(**kwargs):
    return tiny_qvpo(policy_kwargs=dict(net_arch=[8], features_extractor_class=NormedExtractor), **kwargs)


def test_batch_norm_learns_in_updates_only():
    """Updates move bias and running mean of all four networks; collecting alone moves nothing at all."""
    for gradient_steps in (0, 1):
        model = normed_qvpo(gradient_steps=gradient_steps)
        before = weights_of(model)
        changed = changed_names(before, weights_of(model.learn(20)))
        norm = "features_extractor.layers.1"
        expected = {
            f"{network}.{norm}.{name}"
            for network in ("actor", "critic", "actor_target", "critic_target")
            for name in ("bias", "running_mean")
        }
        assert expected <= changed if gradient_steps else not changed


def test_predictions_apply_no_dropout_and_move_no_statistics():
    model = normed_qvpo().learn(10)
    before = weights_of(model)
    assert model.policy.training  # after an update: predict() must switch it off
    obs = np.full((4, 3), 0.5, np.float32)
    actions = [model.predict(obs, deterministic=True)[0] for _ in range(6)]
    assert all(np.array_equal(actions[0], each) for each in actions)
    model.predict(obs)
    assert same_weights(before, weights_of(model))


# Callbacks and logs


@pytest.mark.parametrize("answer", [False, np.bool_(False), th.tensor(False)])
def test_a_callback_stops_training_at_once(answer):
    calls = []
    model = tiny_qvpo(learning_starts=1, buffer_size=1, batch_size=1)
    model.learn(10, callback=lambda *_: calls.append(1) or answer)
    assert (len(calls), model.num_timesteps, model._n_updates) == (1, 1, 0)


class Watch(BaseCallback):
    """Records its counters and the observation that it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        self.seen.append((self.n_calls, self.num_timesteps, self.model.num_timesteps, self.locals["new_obs"]))
        return True


def test_callbacks_in_a_list_see_the_same_step():
    first, second, every_four = Watch(), Watch(), Watch()
    callbacks = [first, second, EveryNTimesteps(n_steps=4, callback=every_four)]
    model = tiny_qvpo().learn(12, callback=callbacks, progress_bar=True)
    assert [seen[:3] for seen in first.seen] == [(i, i, i) for i in range(1, 13)]
    assert [seen[:3] for seen in every_four.seen] == [(i, 4 * i, 4 * i) for i in (1, 2, 3)]
    for mine, theirs in zip(first.seen, second.seen, strict=True):
        assert mine[3] is theirs[3]
        assert model.observation_space.contains(mine[3][0])
    assert all(event[3] is first.seen[4 * i + 3][3] for i, event in enumerate(every_four.seen))


@pytest.mark.parametrize(("threshold", "n_steps"), [(4.9, 10), (5.1, 30)])
def test_training_stops_at_a_reward_threshold(threshold, n_steps):
    """Every episode of this environment returns 5."""
    stop = StopTrainingOnRewardThreshold(reward_threshold=threshold)
    env = make_vec_env(lambda: CountdownEnv(length=5))
    evaluation = EvalCallback(env, callback_on_new_best=stop, eval_freq=10, n_eval_episodes=1, verbose=0)
    assert tiny_qvpo(CountdownEnv()).learn(30, callback=evaluation).num_timesteps == n_steps


class RecordHyperparameters(BaseCallback):
    """Hands SB3's logger a table of hyperparameters, as its documentation recommends."""

    def _on_training_start(self):
        values = {"gamma": self.model.gamma, "learning_rate": self.model.learning_rate}
        self.logger.record("hparams", HParam(values, {"train/critic_loss": 0.0}), exclude=("stdout", "log", "json", "csv"))

    def _on_step(self):
        return True


def test_tensorboard_folders_and_contents(tmp_path):
    """Training that continues writes on in the same folder; a new run, also under a name of its own, counts up."""
    model = tiny_qvpo(CountdownEnv(), tensorboard_log=str(tmp_path))
    model.learn(20, callback=RecordHyperparameters(), log_interval=1).learn(4, reset_num_timesteps=False)
    for _ in range(2):
        model.learn(4, tb_log_name="mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["QVPO_1", "mine_1", "mine_2"]
    events = EventAccumulator(str(tmp_path / "QVPO_1")).Reload()
    assert {"train/actor_loss", "train/critic_loss", "rollout/ep_rew_mean"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("rollout/ep_rew_mean")][:5] == [4.0] * 5
    assert "_hparams_/session_start_info" in events.summary_metadata


class Recorder(KVWriter):
    """Keeps what is logged."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


def recorded_qvpo(env, **kwargs):
    model, recorder = tiny_qvpo(env, **kwargs), Recorder()
    model.set_logger(Logger(folder=None, output_formats=[recorder]))
    return model, recorder


def test_steps_per_second_count_from_each_learn(monkeypatch):
    """The clock stands still, then 2 seconds have passed since the second ``learn()`` and its 10 steps: 5 a second."""
    model, recorder = recorded_qvpo(CountdownEnv())
    monkeypatch.setattr(time, "time_ns", lambda: 10**9)
    model.learn(20, log_interval=1)  # no division by zero
    model.learn(10, reset_num_timesteps=False)
    monkeypatch.setattr(time, "time_ns", lambda: 3 * 10**9)
    model.dump_logs()
    assert recorder.rows[-1]["time/fps"] == 5
    assert recorder.rows[-1]["time/total_timesteps"] == 30


class SometimesSuccessfulEnv(CountdownEnv):
    """The first two episodes fail, all others succeed."""

    episodes = 0

    def step(self, action):
        observation, reward, terminated, truncated, _ = super().step(action)
        self.episodes += terminated
        return observation, reward, terminated, truncated, {"is_success": self.episodes > 2}


@pytest.mark.parametrize(("stats_window_size", "rate"), [(1, 1.0), (4, 0.75), (42, 0.6)])
def test_the_success_rate_covers_the_last_episodes(stats_window_size, rate):
    model, recorder = recorded_qvpo(SometimesSuccessfulEnv(), stats_window_size=stats_window_size)
    model.learn(20)
    assert (model.ep_success_buffer.maxlen, model.ep_info_buffer.maxlen) == (stats_window_size, stats_window_size)
    model.dump_logs()
    assert recorder.rows[-1]["rollout/success_rate"] == rate
