"""DTQL: a one-step policy, kept near the data by a diffusion model that is never sampled."""

from sb3_qvpo.dtql.dtql import DTQL
from sb3_qvpo.dtql.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["DTQL", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
