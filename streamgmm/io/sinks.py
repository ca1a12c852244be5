"""Where streamed results go: a ``.npy`` file or a Zarr array that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Protocol

import numpy as np

from streamgmm.errors import RequestError
from streamgmm.io.sources.base import Rows
from streamgmm.storage import naming, sync_folder

_ZARR_CHUNK_BYTES = 4 << 20
_ZARR_SHARD_CHUNKS = 16


class Sink(Protocol):
    """Takes rows in order; entering opens it, leaving without an error publishes it under its name."""

    def write(self, rows: Rows) -> None:
        """Append ``rows``, (n,) or (n, M), of the sink's dtype."""
        ...

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_sink(path: str | Path, shape: tuple[int, ...], dtype: np.dtype[np.generic], *, overwrite: bool) -> Sink:
    """A sink for an array of ``shape`` at ``path``: ``.npy`` or ``.zarr``.

    Raises
    ------
    RequestError
        Another suffix, a folder that cannot be written, or something is there and ``overwrite`` is not given.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".zarr"):
        raise RequestError(f"{path}: results are written to .npy or .zarr; give the output one of these endings")
    try:
        exists = path.exists()
        # A nameless file: os.access grants root everything, on read-only and virtual file systems too.
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror}); name another output") from None
    if exists and not overwrite:
        raise RequestError(f"{path}: exists; remove it, name another output, or allow --overwrite")
    if exists and not (path.is_file() if path.suffix == ".npy" else (path / "zarr.json").is_file()):
        raise RequestError(f"{path}: is not such an array, so it is not replaced; remove it, or name another output")
    return _NpySink(path, shape, dtype) if path.suffix == ".npy" else _ZarrSink(path, shape, dtype)


class _NpySink:
    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        self._path, self._shape, self._dtype = path, shape, dtype
        self._temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> _NpySink:
        with naming(self._path):
            self._file = self._temporary.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self

    def write(self, rows: Rows) -> None:
        with naming(self._path):
            self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with naming(self._path):
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                self._file.close()
            if kind is None:
                self._temporary.replace(self._path)
                sync_folder(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


class _ZarrSink:
    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        self._path, self._shape, self._dtype = path, shape, dtype
        self._temporary = path.with_name(f".{path.name}.tmp")
        row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        chunk = max(1, min(shape[0], _ZARR_CHUNK_BYTES // row_bytes))
        self._shard_rows = chunk * min(_ZARR_SHARD_CHUNKS, -(-shape[0] // chunk))
        self._chunk_rows = chunk

    def __enter__(self) -> _ZarrSink:
        import zarr

        shutil.rmtree(self._temporary, ignore_errors=True)
        try:
            with naming(self._path):
                self._array = zarr.create_array(
                    self._temporary,
                    shape=self._shape,
                    dtype=self._dtype,
                    chunks=(self._chunk_rows, *self._shape[1:]),
                    shards=(self._shard_rows, *self._shape[1:]),
                    compressors=None,
                    config={"write_empty_chunks": True},
                )
        except BaseException:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        # Whole shards only: a shard written twice would be read, merged and rewritten.
        self._pending = np.empty((self._shard_rows, *self._shape[1:]), self._dtype)
        self._filled = self._written = 0
        return self

    def write(self, rows: Rows) -> None:
        while len(rows):
            count = min(len(rows), len(self._pending) - self._filled)
            self._pending[self._filled : self._filled + count] = rows[:count]
            self._filled += count
            rows = rows[count:]
            if self._filled == len(self._pending):
                self._write_pending()

    def _write_pending(self) -> None:
        with naming(self._path):
            self._array[self._written : self._written + self._filled] = self._pending[: self._filled]
        self._written += self._filled
        self._filled = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._filled:
                    self._write_pending()
                if self._path.is_dir():
                    shutil.rmtree(self._path)
                self._temporary.rename(self._path)
                sync_folder(self._path.parent)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


class Behind:
    """Writes with a thread of its own, one piece behind: the next one is computed meanwhile.

    Pieces are not to change after they were handed over. An error of a write is raised by the next, or on leaving.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._writing: Future[None] | None = None

    def __enter__(self) -> Behind:
        self._sink.__enter__()
        self._thread = ThreadPoolExecutor(1, "sink")
        return self

    def write(self, rows: Rows) -> None:
        self._written()
        self._writing = self._thread.submit(self._sink.write, rows)

    def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The last write ends before the file is published, or removed.
        self._thread.shutdown(wait=True)
        try:
            if kind is None:
                self._written()
        except BaseException as failure:
            self._sink.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._sink.__exit__(kind, error, trace)
