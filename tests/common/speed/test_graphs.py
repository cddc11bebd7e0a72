"""What is captured on the side stream, and how a replaced tensor is noticed. ``test_gpu.py`` has real graphs."""

import warnings
from contextlib import nullcontext

import pytest
import torch as th

from sb3_qvpo.common.speed import graphs


class Stream:
    def wait_stream(self, stream):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_on_the_side_stream_warns_of_nothing_and_puts_the_mode_back(fails, monkeypatch):
    """torch warns that its mode, in which waiting is an error, is a prototype; also where warnings are errors."""
    modes = [0]

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)

    def function():
        assert modes[-1] == "error"
        if fails:
            raise RuntimeError("waits")
        return {"x": th.ones(1)}

    monkeypatch.setattr(th.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(th.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(th.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(th.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(graphs, "side_stream", lambda device: Stream())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if fails:
            with pytest.raises(RuntimeError, match="waits"):
                graphs.on_side_stream(function, th.device("cuda"))
        else:
            assert graphs.on_side_stream(function, th.device("cuda"))["x"] == 1
    assert modes == [0, "error", 0]
