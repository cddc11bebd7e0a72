"""Diffusion-QL: behaviour cloning by diffusion, guided by critics."""

from sb3_qvpo.diffusion_ql.diffusion_ql import DiffusionQL
from sb3_qvpo.diffusion_ql.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "DiffusionQL", "MlpPolicy", "MultiInputPolicy"]
