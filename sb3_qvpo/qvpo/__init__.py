"""QVPO: Q-weighted Variational Policy Optimization."""

from sb3_qvpo.qvpo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_qvpo.qvpo.qvpo import QVPO

__all__ = ["QVPO", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
