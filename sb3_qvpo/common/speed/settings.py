"""What a user may switch: ``from sb3_qvpo.common.speed.settings import settings``."""

from dataclasses import dataclass

import torch as th

CANDIDATE_DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class SpeedSettings:
    """
    How the fast paths work in this process. No saved file holds any of these settings.

    :param enabled: Whether fast paths are used at all.
    :param compile_actions: Whether long runs compile their actions, and whether a GPU captures decisions in graphs on its own.
        See :meth:`DiffusionPolicy.compile_actions`.
    :param candidate_dtype: Type in which candidates for training are drawn: ``"float32"``, ``"bfloat16"`` or ``"auto"``. The
        last is bfloat16 if the processor multiplies it in hardware. On a CPU it is also the type of values that only choose
        among the TD target's candidates, or weigh SDAC's draws.
    """

    enabled: bool = True
    compile_actions: bool = True
    candidate_dtype: str = "auto"


settings = SpeedSettings()


def has_bfloat16(device: th.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware: AVX-512 BF16, AMX, and NVIDIA GPUs from Ampere on."""
    if device.type == "cuda":
        return th.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if hasattr(th.cpu, "get_capabilities"):
        capabilities = th.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return bool(th.cpu._is_avx512_bf16_supported())  # torch 2.8


def candidate_dtype(device: th.device) -> th.dtype:
    """
    Type in which candidates for training are drawn on a device: ``torch.float32`` or ``torch.bfloat16``.

    :raises ValueError: If ``settings.candidate_dtype`` is unknown.
    """
    if settings.candidate_dtype not in CANDIDATE_DTYPES:
        known = ", ".join(map(repr, CANDIDATE_DTYPES))
        raise ValueError(f"settings.candidate_dtype must be one of {known}, got {settings.candidate_dtype!r}")
    reduced = settings.candidate_dtype == "bfloat16" or (settings.candidate_dtype == "auto" and has_bfloat16(device))
    return th.bfloat16 if reduced else th.float32
