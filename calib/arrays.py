"""``.npy`` and ``.npz`` files as columns: headers are checked before any data is read, and data is streamed or mapped.

Nothing is unpickled, and what a file claims is compared with what it holds before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from calib.errors import DataError
from calib.inputs import Array, Column, MemoryColumn

# One sample larger than this is no sample; a compressed file that unpacks to more than the other bound is a bomb.
# Data that large is stored uncompressed, where its size on disk is the bound.
MAX_SAMPLE_BYTES = 1 << 31
MAX_UNPACKED_BYTES = 1 << 36
_DAMAGED = (EOFError, OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)

# numpy reads the header as Python's literals, and mends those of Python 2 with Python's tokenizer first.
_NO_HEADER = (ValueError, SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError)


@contextlib.contextmanager
def open_npy(path: Path) -> Iterator[Column]:
    """Map a ``.npy`` file.

    Raises:
        DataError: it is not a ``.npy`` file, is cut short, or holds Python objects or records.
    """
    try:
        with path.open("rb") as stream:
            shape, fortran, dtype = _header(stream, str(path))
            offset, size = stream.tell(), path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    needed = offset + math.prod(shape) * dtype.itemsize
    if size < needed:
        raise DataError(f"{path} is cut short: it has {size} bytes, {needed} are needed", hint="copy or make it again")
    if not math.prod(shape):
        yield MemoryColumn(np.empty(shape, dtype))
        return
    array = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    yield MemoryColumn(array.view(np.ndarray))


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[dict[str, Column]]:
    """Open a ``.npz`` file as columns that read one sample at a time.

    Raises:
        DataError: it is no ``.npz`` file, is damaged, unpacks to absurd sizes, or holds Python objects or records.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise DataError(f"{path} is not a .npz file, or is cut short: {error}", hint="copy or make it again") from error
    with archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        unpacked = sum(info.file_size for info in members if info.compress_type != zipfile.ZIP_STORED)
        if unpacked > MAX_UNPACKED_BYTES:
            raise DataError(
                f"{path} claims to unpack to {unpacked >> 30} GiB; the limit is {MAX_UNPACKED_BYTES >> 30}",
                hint="store it uncompressed (np.savez), or as several files in a folder",
            )
        if not members:
            raise DataError(f"{path} is empty: it holds no array")
        yield {info.filename[: -len(".npy")]: _ZipColumn(archive, info, path) for info in members}


class _ZipColumn:
    """One array of a ``.npz`` file, unpacked as it is read."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
        self._archive, self._info, self._origin = archive, info, f"{path}, array {info.filename[:-4]!r}"
        with self._open() as stream:
            self.shape, self._fortran, self.dtype = _header(stream, self._origin)
            needed = stream.tell() + math.prod(self.shape) * self.dtype.itemsize
        if info.file_size < needed:
            raise DataError(f"{self._origin} is cut short: it has {info.file_size} bytes, {needed} are needed")

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """Open the member; damage met while it is read becomes a DataError."""
        try:
            with self._archive.open(self._info) as stream:
                yield stream
        except _DAMAGED as error:
            raise DataError(f"{self._origin} is damaged: {error}", hint="copy or make it again") from error

    def rows(self) -> Iterator[Array]:
        """Yield ``array[i : i + 1]`` in order."""
        if self._fortran and len(self.shape) > 1:
            whole = self.read()
            yield from (whole[i : i + 1] for i in range(len(whole)))
            return
        row = (1, *self.shape[1:])
        with self._open() as stream:
            _header(stream, self._origin)
            for _ in range(self.shape[0]):
                yield self._take(stream, row)

    def read(self) -> Array:
        """Return the whole array."""
        with self._open() as stream:
            _header(stream, self._origin)
            if not self._fortran:
                return self._take(stream, self.shape)
            turned: Array = self._take(stream, self.shape[::-1]).transpose()
            return turned

    def _take(self, stream: IO[bytes], shape: tuple[int, ...]) -> Array:
        """Read the next array of this shape."""
        size = math.prod(shape) * self.dtype.itemsize
        if size > MAX_SAMPLE_BYTES:
            raise DataError(
                f"{self._origin} needs {size >> 20} MiB at once; the limit is {MAX_SAMPLE_BYTES >> 20}",
                hint="store it in C order (np.ascontiguousarray), samples on axis 0",
            )
        data = stream.read(size)
        if len(data) < size:
            raise EOFError("it ends too early")
        return np.frombuffer(data, self.dtype).reshape(shape)


def _header(stream: IO[bytes], origin: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, order and dtype, and refuse what cannot be numbers. The stream is then at the data."""
    try:
        version = np.lib.format.read_magic(stream)
        # Version 3.0 exists for records with names beyond latin1; read as 2.0 it gives a dtype that is refused below.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except _NO_HEADER as error:
        raise DataError(f"{origin} is not a readable .npy array: {error}", hint="write it with np.save") from error
    if dtype.hasobject:
        raise DataError(
            f"{origin} holds Python objects, which are never loaded: they could run code",
            hint="save an array of numbers; arrays of different shapes go into one file each",
        )
    if dtype.kind not in "fiubc":
        raise DataError(f"{origin} holds {dtype}, not numbers")
    if any(not 0 <= extent < 1 << 48 for extent in shape) or len(shape) > 64:  # numpy has no more axes
        raise DataError(f"{origin} is damaged: its shape is {shape}")
    return shape, fortran, dtype
