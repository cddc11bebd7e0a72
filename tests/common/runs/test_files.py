"""A full disk or a kill in the middle of writing leaves the previous file as it was."""

import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, CountdownEnv, same_weights, tiny_qvpo, weights_of
from resumable_run import train

from sb3_qvpo import QVPO, ResumableCheckpointCallback


def test_a_run_that_is_killed_loses_nothing_older_than_the_last_checkpoint(tmp_path):
    """Twelve times SIGKILL, every other time while a checkpoint is being written; in the end nothing is different."""
    path, temporary, n_steps, draws = tmp_path / "run.zip", tmp_path / "run.zip.tmp", 250, random.Random(0)
    while_writing = ["0", "100000", str(draws.randrange(200_000)), "sync", "replace", "replaced"]
    moments = [moment for inside in while_writing for moment in ("outside", inside)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", ROOT / "tests" / "resumable_run.py", path, str(n_steps)]
    promised = 0
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runs:
        for moment in moments:
            print(moment, file=runs.stdin, flush=True)
            output = [runs.stdout.readline(), runs.stdout.readline()]
            (process,) = [int(line.removeprefix("process ")) for line in output if line.startswith("process")]
            (start,) = [line for line in output if not line.startswith("process")]
            assert start == "started\n" or int(start.removeprefix("resumed at ")) >= promised
            if moment == "outside":
                # At any moment. The run waits after some steps, so it cannot be over
                time.sleep(draws.uniform(0, 0.4))
                os.kill(process, signal.SIGKILL)
            while not output[-1].startswith("ended by"):
                output.append(runs.stdout.readline())
                assert output[-1], "all processes must be alive"
            assert output[-1] == f"ended by {-signal.SIGKILL}\n"
            if moment != "outside":
                assert temporary.exists() == (moment != "replaced")
            promised = max([promised, *map(int, re.findall(r"checkpoint after (\d+) steps", "".join(output)))])
            if path.exists():
                resumed = QVPO.resume(path, CountdownEnv(length=4), device="cpu")
                assert resumed.num_timesteps >= promised
                assert resumed.replay_buffer.size() == resumed.num_timesteps
                promised = resumed.num_timesteps
        runs.stdin.close()
    assert promised > 0
    continued, uninterrupted = train(path, n_steps), train(tmp_path / "other.zip", n_steps)
    assert continued.num_timesteps == uninterrupted.num_timesteps == n_steps
    assert same_weights(weights_of(continued), weights_of(uninterrupted))


@pytest.fixture
def full_disk():
    """No file can grow beyond 50 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_full(full):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if full else limits[0], limits[1]))

    yield set_full
    set_full(False)


@pytest.mark.parametrize(
    ("method", "name"), [("save", "a.zip"), ("save_replay_buffer", "a.pkl"), ("save_checkpoint", "a.zip"), ("policy", "a.pt")]
)
def test_a_full_disk_leaves_the_previous_file(method, name, full_disk, tmp_path):
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[64, 64]), buffer_size=10_000).learn(20)
    save = model.policy.save if method == "policy" else getattr(model, method)
    save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert len(content) > 50_000
    model.learn(5)
    full_disk(True)
    with pytest.raises(OSError, match=r"could not save .*what was saved there before is intact.* and save again") as raised:
        save(tmp_path / name)
    assert raised.value.errno == errno.EFBIG
    full_disk(False)
    assert (tmp_path / name).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [name]
    save(tmp_path / name)
    assert (tmp_path / name).read_bytes() != content


def test_training_goes_on_after_a_full_disk(full_disk, tmp_path):
    model = tiny_qvpo(buffer_size=10_000)
    callback = ResumableCheckpointCallback(10, tmp_path / "run")
    full_disk(True)
    with pytest.raises(OSError, match="could not save"):
        model.learn(50, callback)
    full_disk(False)
    assert (model.num_timesteps, model.replay_buffer.size()) == (10, 10)
    model.learn(model.remaining_timesteps, callback, reset_num_timesteps=False)
    assert QVPO.resume(tmp_path / "run", model.get_env()).num_timesteps == 50


@pytest.mark.parametrize("path", ["file/model", "x" * 300])
def test_a_path_that_cannot_be_is_an_error_that_says_what_is_intact(path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not save .* so is the model in memory"):
        tiny_qvpo().save(tmp_path / path)
    with pytest.raises(ValueError, match=r"path must name a file, got '\.'"):
        tiny_qvpo().save("")


def test_where_files_go(tmp_path):
    """As in SB3: the suffix is added, folders are made, a folder of the name is left alone. A link stays a link."""
    model = tiny_qvpo()
    model.save(tmp_path / "deep" / "folder" / "model")
    assert (tmp_path / "deep" / "folder" / "model.zip").is_file()
    (tmp_path / "folder.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        model.save(tmp_path / "folder")
    assert (tmp_path / "folder.zip_2").is_file()
    os.chmod(tmp_path / "folder.zip_2", 0o640)
    (tmp_path / "folder.zip_2").rename(tmp_path / "mode.zip")
    model.save(tmp_path / "mode")
    assert (tmp_path / "mode.zip").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link.zip").symlink_to(tmp_path / "target.zip")
    model.save(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink()
    assert zipfile.is_zipfile(tmp_path / "target.zip")
    with pytest.raises(OSError, match="No space left on device"):
        model.save("/dev/full")
    assert Path("/dev/full").is_char_device()
