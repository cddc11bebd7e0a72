"""What the README shows runs, with fewer steps, and what it says of the arguments is true."""

import inspect
import re
from pathlib import Path

import pytest
import torch as th

from sb3_qvpo import QVPO

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_block(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = QVPO.learn

    def short_learn(self, total_timesteps, **kwargs):
        self.learning_starts = 2
        return learn(self, min(total_timesteps, 5), **kwargs)

    monkeypatch.setattr(QVPO, "learn", short_learn)
    th.set_num_threads(1)
    namespace = {}
    exec(code, namespace)
    assert isinstance(namespace["model"], QVPO)
    assert namespace["model"]._n_updates > 0 or ".learn(" not in code


def test_argument_table():
    parameters = inspect.signature(QVPO).parameters
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", README, flags=re.M))
    own = set(list(parameters)[list(parameters).index("ent_coef") : list(parameters).index("stats_window_size")])
    assert rows.keys() == own | {"policy_kwargs"}
    for name in own:
        default = parameters[name].default
        assert rows[name].strip().strip("`").strip('"') == str(default), name
