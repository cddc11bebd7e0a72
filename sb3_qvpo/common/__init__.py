"""
Building blocks that depend on no algorithm: schedules, the diffusion process, networks, candidates and policies.

Equation, table and section numbers in the docstrings are those of the QVPO paper, arXiv 2405.16173.
"""
