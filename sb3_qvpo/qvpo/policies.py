"""The policies that QVPO knows by name."""

from sb3_qvpo.common.policy_aliases import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
