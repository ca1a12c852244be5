"""Dask arrays that are passed over many times: each partition computed once, and kept until the source is closed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import dask
from dask.delayed import delayed

from streamgmm.cluster.connecting import connected
from streamgmm.errors import DataError, StreamGMMError
from streamgmm.io.sources.base import Recipe
from streamgmm.io.sources.concat import ConcatSource
from streamgmm.io.sources.dask_array import DaskSource
from streamgmm.io.sources.npy import NpySource
from streamgmm.prepare.inputs import of_array, save_part, staged_path
from streamgmm.units import format_bytes


class SpilledRows(ConcatSource):
    """The rows of a Dask array, from the files that its partitions were written to; as the array says who it is.

    Parameters
    ----------
    paths : sequence of path
        One a partition, all with rows, in order.
    name : str
    identity : JSON values
        Of the array: a run may be resumed with the files of another call.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], name: str, identity: object) -> None:
        super().__init__([NpySource(path) for path in paths])
        self.name, self._identity = name, identity
        self.opened_by = Recipe(SpilledRows, ([os.fspath(path) for path in paths], name, identity))

    def files(self) -> list[tuple[str, int, int]]:
        return [(self.name, 0, self.shape[0])]

    def identity(self) -> object:
        return self._identity


class SpilledSource(SpilledRows):
    """The rows of a Dask array, from files that whatever computes its partitions has written.

    That is Dask's default, threads, or the workers of a `distributed.Client` where there is one; rows then never pass
    through this process, and its workers must see the folder. The files take as many bytes as the rows.

    Parameters
    ----------
    array : dask.array.Array
        (N, D).
    folder : path, optional
        Where the files lie; default: where ``TMPDIR`` says.
    client : distributed.Client or address of a scheduler, optional
        Whose workers compute; default: whatever Dask's default is.

    Raises
    ------
    DataError
        As `DaskSource`; or there is no room, a partition cannot be computed, or its file cannot be seen from here.
    """

    def __init__(self, array: Any, folder: str | os.PathLike[str] | None = None, client: Any = None) -> None:
        unspilled = DaskSource(array)
        parts = of_array(array)
        where = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        needed = unspilled.shape[0] * unspilled.shape[1] * unspilled.dtype.itemsize
        free = shutil.disk_usage(where).free
        if needed > free:
            raise DataError(
                f"{where}: the Dask array's rows take {format_bytes(needed)} and {format_bytes(free)} are free; make "
                "room, or name another folder in TMPDIR"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="streamgmm-dask-", dir=where)
        try:
            self._spill(parts.parts, unspilled, client)
        except BaseException:
            self._folder.cleanup()
            raise

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    def _spill(self, parts: Any, unspilled: DaskSource, client: Any) -> None:
        save = delayed(save_part, pure=False)
        try:
            saved = [save(part, None, self._folder.name, index) for index, part in enumerate(parts)]
            with nullcontext() if client is None else connected(client) as scheduler:
                noted = dask.compute(*saved, scheduler=scheduler)
        except (MemoryError, OSError, StreamGMMError):
            raise
        # The graph runs whatever its author put in it.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(f"{unspilled.name}: a partition cannot be computed ({reason}); check its inputs") from error
        paths = [staged_path(self._folder.name, index) for index, facts in enumerate(noted) if facts["rows"]]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise DataError(
                f"{missing[0]}: was written by a Dask worker and cannot be seen here; name a folder that all share "
                "in TMPDIR"
            )
        super().__init__(paths, unspilled.name, unspilled.identity())
        if self.shape != unspilled.shape:
            raise DataError(
                f"{unspilled.name}: its partitions were computed with shape {self.shape}, not {unspilled.shape}; call "
                "compute_chunk_sizes() on it, or rebuild it with true chunks"
            )
