"""The same rows in every format that can be read here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from tests.oracles import clustered

ROWS = clustered(20_000, 3, 4, spread=2.0).astype(np.float32)


def _zarr(path: Path, **options: object) -> None:
    array = zarr.create_array(path, shape=ROWS.shape, dtype=ROWS.dtype, **{"chunks": (2048, 4), **options})
    array[:] = ROWS


def _fbin(path: Path) -> None:
    path.write_bytes(np.array(ROWS.shape, np.uint32).tobytes() + ROWS.tobytes())


def _fvecs(path: Path) -> None:
    rows = np.empty((len(ROWS), 5), np.float32)
    rows[:, 0] = np.array([4], np.int32).view(np.float32)
    rows[:, 1:] = ROWS
    path.write_bytes(rows.tobytes())


def _hdf5(path: Path, **options: object) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=ROWS, **options)


def _parquet(path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    column = arrow.FixedSizeListArray.from_arrays(arrow.array(ROWS.ravel()), 4)
    parquet.write_table(arrow.table({"x": column}), path, row_group_size=4096)


def _arrow(path: Path) -> None:
    import pyarrow as arrow

    column = arrow.FixedSizeListArray.from_arrays(arrow.array(ROWS.ravel()), 4)
    table = arrow.table({"x": column})
    with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4096)


FORMATS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "npy": ("x.npy", lambda path: np.save(path, ROWS)),
    "npy fortran": ("x.npy", lambda path: np.save(path, np.asfortranarray(ROWS))),
    "npy big endian": ("x.npy", lambda path: np.save(path, ROWS.astype(">f4"))),
    "fbin": ("x.fbin", _fbin),
    "fvecs": ("x.fvecs", _fvecs),
    "zarr plain": ("x.zarr", lambda path: _zarr(path, compressors=None)),
    "zarr compressed": ("x.zarr", _zarr),
    "zarr sharded": ("x.zarr", lambda path: _zarr(path, compressors=None, shards=(8192, 4))),
    "zarr crc32c": (
        "x.zarr",
        lambda path: _zarr(path, compressors=[zarr.codecs.Crc32cCodec()], shards=(8192, 4)),
    ),
    "zarr sharded and compressed": ("x.zarr", lambda path: _zarr(path, shards=(8192, 4))),
    "zarr v2": ("x.zarr", lambda path: _zarr(path, zarr_format=2)),
    "hdf5": ("x.h5", _hdf5),
    "hdf5 chunked": ("x.h5", lambda path: _hdf5(path, chunks=(2048, 4), compression="gzip")),
    "parquet": ("x.parquet", _parquet),
    "arrow": ("x.arrow", _arrow),
}


def write(kind: str, folder: Path) -> Path:
    """The rows as ``kind`` in ``folder``."""
    name, writer = FORMATS[kind]
    writer(folder / name)
    return folder / name
