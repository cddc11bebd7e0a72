"""Policies of DTQL: a one-step policy that acts, a diffusion model that judges it, and critics with a value function."""

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.arguments import check_choice, check_class
from sb3_qvpo.common.diffusion import DiffusionProcess
from sb3_qvpo.common.softmax_policies import SoftmaxPolicy
from sb3_qvpo.dtql.networks import ONE_STEP_POLICIES, ClonedActor, ImplicitCritic, OneStepActor

OF_CHAINS = ("noise_schedule", "n_sampling_steps", "sampling_eta", "sampler", "prediction", "critic_type", "n_diffusion_steps")
"""Arguments of :class:`~sb3_qvpo.DiffusionPolicy` that mean nothing here."""


class MlpPolicy(SoftmaxPolicy):
    """
    ``predict(deterministic=False)`` draws ``n_behavior_candidates`` actions in one pass and chooses one by a softmax of the
    target critics' values. ``predict(deterministic=True)`` takes the best of ``n_eval_candidates``, of which the first is the
    policy's centre: with one candidate it is tanh of the mean, and no critic is asked.

    :param observation_space: Observation space.
    :param action_space: Action space, a finite ``Box``.
    :param lr_schedule: Learning rate schedule.
    :param one_step_policy: ``"gaussian"``, with a density, or ``"implicit"``, of any shape.
    :param policy_activation_fn: Activation function of the one-step policy.
    :param sigma_min: Lowest noise level of the diffusion model, above 0.
    :param sigma_max: Its highest noise level.
    :param sigma_data: The deviation that the data's actions are taken to have.
    :param kwargs: Further arguments of :class:`~sb3_qvpo.common.softmax_policies.SoftmaxPolicy`, but for those of chains. By
        default three layers of 256, a time network 16, 32, 16 wide and torch's initial weights.
    :raises ValueError: If an argument is out of its range, or one of chains is given.
    """

    actor_class: ClassVar[type[DiffusionActor]] = OneStepActor
    critic_class: ClassVar[type[CandidateCritic]] = ImplicitCritic

    cloned: ClonedActor
    """The diffusion model of the data's actions, mu_phi."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        one_step_policy: str = "gaussian",
        policy_activation_fn: type[nn.Module] = nn.ReLU,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        **kwargs: Any,
    ):
        for name in OF_CHAINS:
            if name in kwargs:
                raise ValueError(f"{name} must be left out, got {kwargs[name]!r}: DTQL's policy has no chain")
        if kwargs.get("share_features_extractor"):
            raise ValueError(
                "share_features_extractor must be False, got True: while DTQL pre-trains, the actor, whose loss would train a "
                "shared extractor, waits"
            )
        check_choice("one_step_policy", one_step_policy, ONE_STEP_POLICIES)
        check_class("policy_activation_fn", policy_activation_fn, nn.Module)
        self._levels = dict(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data)
        self._one_step = dict(one_step_policy=one_step_policy, policy_activation_fn=policy_activation_fn)
        defaults: dict[str, Any] = dict(
            net_arch=[256, 256, 256], time_embedding_dim=16, time_hidden_dim=32, initialization="torch"
        )
        super().__init__(observation_space, action_space, lr_schedule, n_diffusion_steps=1, **{**defaults, **kwargs})

    def _build(self, lr_schedule: Schedule) -> None:
        of_chains = {*OF_CHAINS} - {"n_diffusion_steps", "critic_type"}
        shared = {name: value for name, value in self.actor_kwargs.items() if name not in of_chains}
        own = dict(one_step_policy=self._one_step["one_step_policy"], activation_fn=self._one_step["policy_activation_fn"])
        self.actor_kwargs = {**shared, **own}
        super()._build(lr_schedule)
        # Nothing takes a moving average of the policy. Past torch's list of modules, as where there are no targets at all
        del self.actor_target
        vars(self)["actor_target"] = self.actor
        self.cloned_kwargs = {**shared, **self._levels}
        self.cloned = ClonedActor(**self._update_features_extractor(self.cloned_kwargs)).to(self.device)
        self.cloned.optimizer = self._make_optimizer(list(self.cloned.parameters()), lr_schedule(1))

    @property
    def acts_alone(self) -> bool:
        """Whether deterministic predictions ask no critic. Then an exported file holds the one-step policy alone."""
        return bool(self.n_eval_candidates == 1)

    @property
    def trained_process(self) -> DiffusionProcess:
        """The diffusion process of the cloned model."""
        return self.cloned.diffusion

    def noise_bank(self, n_candidates: int) -> th.Tensor:
        """
        The noise of deterministic predictions. That of the first candidate is 0: it is the policy's centre.

        :param n_candidates: Number of candidates K.
        :return: Noise of shape (1, 1, K, A), on the policy's device.
        """
        bank = super().noise_bank(n_candidates)
        return th.cat([th.zeros_like(bank[:, :, :1]), bank[:, :, 1:]], dim=2)

    def set_training_mode(self, mode: bool) -> None:
        """
        Switch actor, diffusion model and critics between training and evaluation mode.

        :param mode: True for training mode.
        """
        super().set_training_mode(mode)
        self.cloned.set_training_mode(mode)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        kept = {name: value for name, value in parameters.items() if name not in OF_CHAINS}
        return {**kept, **self._levels, **self._one_step}


class CnnPolicy(MlpPolicy):
    """
    The same for images.

    :param args: Positional arguments of :class:`MlpPolicy`.
    :param kwargs: Its keyword arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"features_extractor_class": NatureCNN, **kwargs})


class MultiInputPolicy(MlpPolicy):
    """
    The same for dictionaries of vectors and images.

    :param args: Positional arguments of :class:`MlpPolicy`.
    :param kwargs: Its keyword arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"features_extractor_class": CombinedExtractor, **kwargs})
