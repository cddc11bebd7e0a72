"""Writing files so that a full disk or a kill in the middle leaves the previous file as it was."""

import errno
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _output_path(path: str | Path, suffix: str = "") -> Path:
    """
    Where SB3 would write: with a suffix if there is none, in folders that are created, beside a folder of that name.

    :param path: The path that the user gave.
    :param suffix: Suffix without the dot, added if the path has none.
    :return: The path of the file.
    :raises ValueError: If the path has no name.
    """
    path = Path(path)
    if not path.name:
        raise ValueError(f"path must name a file, got {str(path)!r}")
    if path.suffix == "" and suffix:
        path = path.with_name(f"{path.name}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=4)
        path = path.with_name(f"{path.name}_2")
    # A link stays a link
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_file(path: str | Path, suffix: str = "") -> Iterator[io.BufferedIOBase]:
    """
    Open a file for writing that takes its place only when it is complete.

    It is written beside the old one, under the same name and ``.tmp``, and needs room for both.

    :param path: Path of the file, the suffix is added if it has none.
    :param suffix: Suffix without the dot, added if the path has none.
    :raises OSError: If writing fails. The previous file is intact then, and nothing is left of the new one.
    """
    # A pipe or a device cannot be replaced
    target = written = Path(path)
    special = False
    try:
        special = target.exists() and not (target.is_file() or target.is_dir())
        if not special:
            target = _output_path(path, suffix)
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            written = target.with_name(f"{target.name}.tmp")
        with written.open("wb") as file:
            yield file
            file.flush()
            if not special:
                os.fsync(file.fileno())
        if not special:
            if target.exists():
                shutil.copymode(target, written)
            written.replace(target)
    except BaseException as error:
        if written != target:
            with suppress(OSError):
                written.unlink()
        if not isinstance(error, OSError):
            raise
        raise OSError(
            error.errno,
            f"could not save ({error.strerror or error}); what was saved there before is intact, and so is the model in "
            "memory: make room or choose another place, and save again",
            str(target),
        ) from error


def check_writable(path: str | Path, suffix: str = "") -> None:
    """
    Find out at once whether :func:`atomic_file` could write here.

    :param path: Path of the file.
    :param suffix: Suffix without the dot, added if the path has none.
    :raises OSError: If not.
    """
    probe = _output_path(path, suffix)
    with atomic_file(probe.with_name(f"{probe.name}.probe")):
        pass
    probe.with_name(f"{probe.name}.probe").unlink()
