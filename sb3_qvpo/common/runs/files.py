"""Writing files so that a full disk or a kill in the middle leaves the previous file as it was."""

import errno
import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _output_path(path: str | Path, suffix: str = "") -> Path:
    """
    Where SB3 would write. A missing suffix is added, given without its dot. Folders are created. If the path is a folder, the
    file comes beside it.

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


CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EPERM)
"""What renaming over a file fails with where the file is a mount of its own, or where the file system knows no renaming."""

CANNOT_WRITE_BESIDE = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What a new file in a folder fails with where only the files that are there may be written."""

DATA_MAY_BE_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What a failure to synchronise means, instead of that the file system cannot."""


class _KeptBesideError(OSError):
    """The previous file may be damaged. The new one is complete, under another name."""


def _beside(target: Path, suffix: str) -> Path:
    """A file in the same folder, whose name is not too long."""
    name = f"{target.name}{suffix}"
    if len(os.fsencode(name)) > 255:
        name = f"{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}{suffix}"
    return target.with_name(name)


def _synchronize(file: io.BufferedWriter) -> None:
    """Write through to the disk, where the file system offers it."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno in DATA_MAY_BE_LOST:
            raise


def _put_in_place(written: Path, target: Path) -> None:
    """Let a complete file take the place of another, by renaming if that is possible."""
    if target.exists():
        with suppress(OSError):  # a mode is no reason to lose a file
            shutil.copymode(target, written)
    try:
        written.replace(target)
    except OSError as error:
        if error.errno not in CANNOT_RENAME:
            raise
        _warn_of_writing_in_place(target)
        try:
            shutil.copyfile(written, target)
        except OSError as failure:
            raise _KeptBesideError(failure.errno, f"{failure.strerror}; all that was to be saved is in {written}") from failure
        written.unlink()


def _warn_of_writing_in_place(target: Path) -> None:
    warnings.warn(
        f"{target} cannot be replaced by renaming, and is written in place: a kill in the middle would damage it", stacklevel=6
    )


@contextmanager
def atomic_file(path: str | Path, suffix: str = "") -> Iterator[io.BufferedIOBase]:
    """
    Open a file for writing that takes its place only when it is complete. A missing suffix is added, given without its dot.

    The new file is written beside the old one, under the same name and ``.tmp``. So there must be room for both. Where the
    folder or the file system does not allow that, the file is written in place, with a warning.

    :raises OSError: If writing fails. The previous file is intact then, and nothing is left of the new one.
    """
    target = written = Path(path)
    # A pipe or a device cannot be replaced
    in_place = is_special = False
    try:
        in_place = is_special = target.exists() and not (target.is_file() or target.is_dir())
        if not is_special:
            target = _output_path(path, suffix)
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            written = _beside(target, ".tmp")
        try:
            file = written.open("wb")
        except OSError as error:
            if is_special or error.errno not in CANNOT_WRITE_BESIDE or not target.exists():
                raise
            _warn_of_writing_in_place(target)
            written, in_place = target, True
            file = written.open("wb")
        with file:
            yield file
            file.flush()
            if not is_special:
                _synchronize(file)
        if not in_place:
            _put_in_place(written, target)
    except BaseException as error:
        is_kept = isinstance(error, _KeptBesideError)
        if written != target and not is_kept:
            with suppress(OSError):
                written.unlink()
        if not isinstance(error, OSError):
            raise
        intact = "what was saved there before is intact, and so is the model in memory"
        if is_kept or (in_place and not is_special):
            intact = "the model in memory is intact"
        raise OSError(
            error.errno,
            f"could not save ({error.strerror or error}); {intact}: make room or choose another place, and save again",
            str(target),
        ) from error


def check_writable(path: str | Path, suffix: str = "") -> None:
    """
    Find out at once whether :func:`atomic_file` could write here, a first time and over the first file.

    :raises OSError: If not.
    """
    target = _output_path(path, suffix)
    probe = _beside(target, ".probe")
    try:
        for _ in range(2):
            with atomic_file(probe):
                pass
    except OSError:
        # A folder may only admit the files that are there
        if not (target.exists() and os.access(target, os.W_OK)):
            raise
    with suppress(OSError):
        probe.unlink()
