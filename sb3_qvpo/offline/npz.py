"""Arrays of an ``.npz`` file in parts: NumPy itself reads each of them whole."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO
from zipfile import ZipFile, is_zipfile

import numpy as np
from numpy.lib import format as npy

PIECE = 4 << 20
"""Bytes that are read at a time, so that rows that nobody asked for are not kept."""


class Column:
    """
    An array that is read forward, as it is asked for. Rows before the last ones asked for are forgotten, and read again from
    the beginning if they are asked for after all.

    :param archive: The file.
    :param member: The array's name in it.
    """

    def __init__(self, archive: ZipFile, member: str):
        self._archive, self._member = archive, member
        self._open()

    def _open(self) -> None:
        self._file: IO[bytes] = self._archive.open(self._member)
        version = npy.read_magic(self._file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        self.shape, self._is_fortran, self.dtype = read_header(self._file)
        self._first, self._rows = 0, np.empty((0, *self.shape[1:]), self.dtype)

    def __len__(self) -> int:
        # Only here, because a file may hold other things that nobody reads
        if self.dtype.hasobject or not self.shape:
            raise ValueError(f"{self._member} must be numbers with a first dimension that counts rows, got {self.dtype}")
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        if start < self._first:
            self._file.close()
            self._open()
        if self._is_fortran:  # columns lie one after another: only the whole has rows
            if not len(self._rows):
                self._rows = np.frombuffer(self._file.read(), self.dtype).reshape(self.shape, order="F")
            return self._rows[start:stop]
        width = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        pieces, end = [self._rows[start - self._first :]], self._first + len(self._rows)
        while end < stop:
            n_rows = min(stop - end, max(1, PIECE // max(1, width)))
            read = np.frombuffer(self._read(n_rows * width), self.dtype).reshape(n_rows, *self.shape[1:])
            pieces.append(read[max(0, start - end) :])
            end += n_rows
        self._rows, self._first = np.concatenate(pieces) if len(pieces) > 1 else pieces[0], start
        return self._rows[: stop - start]

    def _read(self, n_bytes: int) -> bytes:
        data = self._file.read(n_bytes)
        if len(data) < n_bytes:
            raise ValueError(f"{self._member} must hold {len(self)} rows, but the file ends before")
        return data

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


@contextmanager
def columns(path: Path) -> Iterator[dict[str, Column]]:
    """
    :param path: Of an ``.npz`` file, compressed or not.
    :return: Its arrays by name, as long as the context lasts.
    :raises ValueError: If it is no such file.
    """
    if path.exists() and not is_zipfile(path):
        raise ValueError(f"dataset must be a file that numpy.savez() wrote, got {str(path)!r}")
    with ZipFile(path) as archive, ExitStack() as stack:
        arrays = {}
        for member in archive.namelist():
            column = arrays[member.removesuffix(".npy")] = Column(archive, member)
            stack.callback(column.close)
        yield arrays
