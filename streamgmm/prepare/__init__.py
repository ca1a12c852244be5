"""Vectors as they come to shards as the loader wants them: steps, a shuffle, a split; on Dask, resumable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamgmm.prepare.preparation import run_preparation
from streamgmm.prepare.request import PrepareRequest, parse_columns, parse_steps
from streamgmm.prepare.result import Prepared, PrepareProgress
from streamgmm.prepare.steps import L2, Drop, Impute, Pca, Project, Standardise, Step, Whiten
from streamgmm.units import parse_bytes

__all__ = [
    "L2",
    "Drop",
    "Impute",
    "Pca",
    "PrepareProgress",
    "Prepared",
    "Project",
    "Standardise",
    "Step",
    "Whiten",
    "prepare",
]


def prepare(
    source: Any,
    destination: str | os.PathLike[str],
    steps: str | Sequence[str | Step] = (),
    *,
    columns: str | Sequence[str | int | slice] = (),
    dtype: str | None = None,
    shuffle: bool = False,
    holdout: float = 0.0,
    ids: bool = False,
    id_column: str | None = None,
    seed: int = 0,
    shard_size: str | int = "64MiB",
    memory: str | int = "1GiB",
    workers: int | None = None,
    scheduler: Any = "threads",
    fresh: bool = False,
    progress: PrepareProgress | None = None,
) -> Prepared:
    """Write the rows of ``source`` to a sharded Zarr v3 array that is read straight into place, after ``steps``.

    Called again with the same arguments it goes on where an earlier call was killed, to the same bytes.

    Parameters
    ----------
    source : path, list of paths, array, Source, Dask array or Dask dataframe
        CSV and Parquet files are read by `dask.dataframe`, everything else as `open_source` does. The partitions of a
        Dask collection are computed once each and kept beside the destination until all is done.
    destination : path
        Ends in ``.zarr``.
    steps : str or sequence of str or Step
        Taken in order: ``drop``, ``impute=mean``, ``impute=0``, ``l2``, ``standardise``, ``pca=32``, ``whiten=32``,
        ``project=32``. What they learn, they learn from the rows that are not held out.
    columns : str or sequence
        Names (of a table) or numbers and slices: ``"0:64,70"``.
    dtype : {'float64', 'float32', 'float16', 'int8'}, optional
        int8 keeps what one unit stands for in the transformation. Default: as in the source where no step computes,
        else float32.
    shuffle : bool
        Write the rows in a random order, the same for the same ``seed``.
    holdout : float
        Share of the rows that go to ``NAME.held-out.zarr``, chosen by a hash of the row's number and ``seed``, as
        ``fit --holdout`` chooses them.
    ids : bool
        Write the number of each row in the source to ``NAME.ids.zarr``, int64.
    id_column : str, optional
        Write what this column of a table (CSV, Parquet, Dask dataframe; integers) says instead; it is no feature then.
    shard_size, memory : str or int
        Bytes. ``memory`` bounds the growth of this process; it never changes the result.
    workers : int, optional
        Tasks at once; default: the cores there are, or fewer where ``memory`` says so.
    scheduler : 'threads', 'processes', address or `distributed.Client`
        Where tasks run; other processes must see the paths under the same names.
    fresh : bool
        Discard what was begun, and move what was finished aside.

    Raises
    ------
    RequestError, DataError, RunError
        What is asked for cannot be done with this data; one line that names it and the remedy.
    """
    request = PrepareRequest(
        steps=parse_steps(steps),
        columns=parse_columns(columns),
        dtype=dtype,
        shuffle=shuffle,
        holdout=holdout,
        ids=ids or id_column is not None,
        id_column=id_column,
        seed=seed,
        shard_bytes=parse_bytes(shard_size, "shard_size"),
        memory=parse_bytes(memory),
        workers=workers,
        scheduler=scheduler,
    )
    return run_preparation(source, Path(destination), request, progress, fresh=fresh)
