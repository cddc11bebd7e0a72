"""Diffusion policies for Stable-Baselines3, trained by QVPO, SDAC, Diffusion-QL and DTQL."""

from sb3_qvpo import presets
from sb3_qvpo.common.figures import CandidateFigureCallback
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.common.runs.callbacks import ResumableCheckpointCallback
from sb3_qvpo.diffusion_ql import DiffusionQL
from sb3_qvpo.dtql import DTQL
from sb3_qvpo.qvpo import QVPO
from sb3_qvpo.sdac import SDAC

__version__ = "0.1.0"

__all__ = [
    "DTQL",
    "QVPO",
    "SDAC",
    "CandidateFigureCallback",
    "DiffusionPolicy",
    "DiffusionQL",
    "ResumableCheckpointCallback",
    "__version__",
    "presets",
]
