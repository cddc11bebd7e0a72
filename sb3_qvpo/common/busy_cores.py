"""
Several runs on one machine: OpenMP's threads wait for each other actively, so that two runs with two threads each on two cores
take several times as long as with one thread each.
"""

import os
import warnings

import torch as th

TOO_BUSY = 1.5
"""Programs that want to run, for each core. One run that uses all cores makes 1, two such runs 2."""

has_warned = False


def warn_of_busy_cores() -> None:
    """Say once in a process that it would be faster with one thread, where that is so; not where the system cannot tell."""
    global has_warned
    if has_warned or th.get_num_threads() == 1 or not hasattr(os, "getloadavg"):
        return
    load, n_cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > TOO_BUSY * n_cores:
        has_warned = True
        warnings.warn(
            f"{load:.1f} threads want to run on {n_cores} cores, {th.get_num_threads()} of them of this run: if several runs "
            "share the machine, each is faster with one thread, OMP_NUM_THREADS=1 or torch.set_num_threads(1)",
            stacklevel=2,
        )
