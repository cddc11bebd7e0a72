"""Diffusion policies for Stable-Baselines3, trained by QVPO and SDAC."""

from sb3_qvpo import presets
from sb3_qvpo.common.figures import CandidateFigureCallback
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.common.runs.callbacks import ResumableCheckpointCallback
from sb3_qvpo.qvpo import QVPO
from sb3_qvpo.sdac import SDAC

__version__ = "0.1.0"

__all__ = [
    "QVPO",
    "SDAC",
    "CandidateFigureCallback",
    "DiffusionPolicy",
    "ResumableCheckpointCallback",
    "__version__",
    "presets",
]
