"""Diffusion policies for Stable-Baselines3, trained by QVPO."""

from sb3_qvpo import presets
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.common.runs.callbacks import ResumableCheckpointCallback
from sb3_qvpo.qvpo import QVPO

__version__ = "0.1.0"

__all__ = ["QVPO", "DiffusionPolicy", "ResumableCheckpointCallback", "__version__", "presets"]
