"""SDAC: Soft Diffusion Actor-Critic."""

from sb3_qvpo.common.policy_aliases import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_qvpo.sdac.sdac import SDAC

__all__ = ["SDAC", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
