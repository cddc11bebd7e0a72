"""
What an algorithm is made of, and no algorithm itself. Read from top to bottom:

``arguments``, ``noise_schedules``, ``diffusion``, ``networks``, ``candidates``, ``actor_critic``, ``policies``,
``off_policy_algorithm``, ``export``. The folder ``runs/`` lets a run stop and go on. The folder ``speed/`` makes a run fast,
and defines no mathematics.

Equation, table and section numbers in the docstrings are those of the QVPO paper, arXiv 2405.16173.
"""
