"""One factory a format: each writes given rows where it is told and opens them."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dask.array
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from streamgmm.io.bfloat16 import as_rows, as_tensor
from streamgmm.io.sources import Source, open_source

NUMPY_DTYPES = ("float64", "float32", "float16", "int8", "uint8")
ALL_DTYPES = ("bfloat16", *NUMPY_DTYPES)

VECS_DTYPES = {".fvecs": "<f4", ".bvecs": "u1"}
FBIN_DTYPES = {".fbin": "<f4", ".f16bin": "<f2", ".u8bin": "u1", ".i8bin": "i1"}

CHUNK_ROWS = 7
SHARD_ROWS = 21


@dataclass(frozen=True)
class Factory:
    """How to make a source of some rows; ``read_path`` is what it must say of itself."""

    name: str
    make: Callable[[Path, np.ndarray], object]
    read_path: str
    dtypes: tuple[str, ...] = ALL_DTYPES

    def __call__(self, folder: Path, rows: np.ndarray) -> Source:
        folder.mkdir(parents=True, exist_ok=True)
        return open_source(self.make(folder, rows))


def make_rows(dtype: str, n: int = 50, d: int = 5, seed: int = 0) -> np.ndarray:
    """Random rows of ``dtype``, shape (n, d): integers over their whole range; the third chunk is all zeros."""
    rng = np.random.default_rng(seed)
    if dtype == "bfloat16":
        return as_rows(torch.from_numpy(make_rows("float32", n, d, seed)).bfloat16())
    if np.dtype(dtype).kind in "iu":
        bounds = np.iinfo(dtype)
        rows = rng.integers(bounds.min, bounds.max + 1, (n, d)).astype(dtype)
    else:
        rows = rng.normal(size=(n, d)).astype(dtype)
    rows[2 * CHUNK_ROWS : 3 * CHUNK_ROWS] = 0
    return rows


def write_fbin(path: Path, rows: np.ndarray) -> Path:
    path.write_bytes(struct.pack("<II", *rows.shape) + rows.astype(FBIN_DTYPES[path.suffix]).tobytes())
    return path


def write_vecs(path: Path, rows: np.ndarray) -> Path:
    record = [("count", "<i4"), ("values", VECS_DTYPES[path.suffix], (rows.shape[1],))]
    records = np.zeros(len(rows), dtype=record)
    records["count"], records["values"] = rows.shape[1], rows
    path.write_bytes(records.tobytes())
    return path


def write_hdf5(path: Path, rows: np.ndarray, name: str = "vectors", **options: object) -> Path:
    with h5py.File(path, "a", **({"userblock_size": 512} if options.pop("userblock", False) else {})) as file:
        file.create_dataset(name, data=rows, **options)
    return path


def vectors(rows: np.ndarray, kind: str = "fixed") -> pa.Array:
    """``rows`` as an Arrow column: lists of fixed size, or of variable length that happen to agree."""
    flat = pa.array(rows.reshape(-1))
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    return pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1], flat)


def table(rows: np.ndarray, kind: str = "fixed") -> pa.Table:
    """Vectors beside a column of another kind, or one column a feature (``kind`` columns)."""
    if kind == "columns":
        return pa.table({f"x{i}": rows[:, i] for i in range(rows.shape[1])})
    return pa.table({"id": [f"row {i}" for i in range(len(rows))], "vector": vectors(rows, kind)})


def write_arrow(path: Path, rows: np.ndarray, kind: str = "fixed", compression: str | None = None) -> Path:
    data, options = table(rows, kind), pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, data.schema, options=options) as writer:
        writer.write_table(data, max_chunksize=CHUNK_ROWS)
    return path


def write_parquet(path: Path, rows: np.ndarray, kind: str = "fixed", **options: object) -> Path:
    pa.parquet.write_table(table(rows, kind), path, row_group_size=CHUNK_ROWS, **options)
    return path


def write_npy(path: Path, rows: np.ndarray) -> Path:
    np.save(path, rows)
    return path


def write_zarr(path: Path | str, rows: np.ndarray, **options: object) -> Path | str:
    """An array whose last chunk and shard are padded, with every chunk present."""
    settings: dict[str, object] = {"chunks": (CHUNK_ROWS, rows.shape[1]), "config": {"write_empty_chunks": True}}
    array = zarr.create_array(path, shape=rows.shape, dtype=rows.dtype, **{**settings, **options})
    array[:] = rows
    return path


def _fbin(suffix: str) -> Factory:
    dtype = np.dtype(FBIN_DTYPES[suffix]).name
    return Factory(suffix[1:], lambda f, x: write_fbin(f / f"x{suffix}", x), "extents", (dtype,))


def _vecs(suffix: str) -> Factory:
    dtype = np.dtype(VECS_DTYPES[suffix]).name
    return Factory(suffix[1:], lambda f, x: write_vecs(f / f"x{suffix}", x), "extents", (dtype,))


def _zarr(name: str, read_path: str = "decode", **options: object) -> Factory:
    # zarr-python warns that version 3 does not specify the bytes that bfloat16 would be.
    dtypes = ALL_DTYPES if options.get("zarr_format") == 2 else NUMPY_DTYPES
    return Factory(name, lambda f, x: write_zarr(f / "x.zarr", x, **options), read_path, dtypes)


def _hdf5(name: str, read_path: str, **options: object) -> Factory:
    return Factory(name, lambda f, x: write_hdf5(f / "x.h5", x, **options), read_path, NUMPY_DTYPES)


def _folder(folder: Path, rows: np.ndarray) -> Path:
    (folder / "shards").mkdir()
    for index, start in enumerate(range(0, len(rows), 20)):
        write_npy(folder / "shards" / f"{index}.npy", rows[start : start + 20])
    (folder / "shards" / "_SUCCESS").touch()
    return folder / "shards"


def shard_codec(rows: np.ndarray, *, checked: bool, **options: object) -> dict[str, object]:
    """Options of an uncompressed sharded array, its inner chunks with or without a CRC-32C."""
    inner = [BytesCodec(), *([Crc32cCodec()] if checked else [])]
    codec = ShardingCodec(chunk_shape=(CHUNK_ROWS, rows.shape[1]), codecs=inner, **options)
    return {"chunks": (SHARD_ROWS, rows.shape[1]), "serializer": codec, "compressors": None, "filters": None}


def _zarr_index_first(folder: Path, rows: np.ndarray) -> Path:
    return write_zarr(folder / "x.zarr", rows, **shard_codec(rows, checked=True, index_location="start"))


def _strided(folder: Path, rows: np.ndarray) -> np.ndarray:
    wide = np.zeros((2 * len(rows), 2 * rows.shape[1]), dtype=rows.dtype)
    wide[::-2, ::2] = rows
    return wide[::-2, ::2]


def _memory_store(folder: Path, rows: np.ndarray) -> object:
    config = {"write_empty_chunks": True}
    return zarr.create_array(zarr.storage.MemoryStore(), name="v", data=rows, chunks=(CHUNK_ROWS, 5), config=config)


def _in_a_store(folder: Path, rows: np.ndarray) -> str:
    """Checksummed shards at an address, in fsspec's memory."""
    url = f"memory://{folder}/x.zarr"
    with warnings.catch_warnings(action="ignore"):  # zarr would have liked an asynchronous file system
        write_zarr(url, rows, shards=(SHARD_ROWS, rows.shape[1]), compressors=[Crc32cCodec()])
    return url


def _concat(folder: Path, rows: np.ndarray) -> object:
    third = len(rows) // 3
    return [
        write_npy(folder / "a.npy", rows[:third]),
        write_fbin(folder / "b.fbin", rows[third : third + 1]),
        np.asfortranarray(rows[third + 1 : 2 * third]),
        write_zarr(folder / "d.zarr", rows[2 * third :]),
    ]


FACTORIES = (
    Factory("npy", lambda f, x: write_npy(f / "x.npy", x), "extents"),
    Factory("npy_fortran", lambda f, x: write_npy(f / "x.npy", np.asfortranarray(x)), "decode"),
    Factory(
        "npy_big_endian",
        lambda f, x: write_npy(f / "x.npy", x.astype(x.dtype.newbyteorder(">"))),
        "decode",
        ("float64", "float32", "float16"),
    ),
    *(_fbin(suffix) for suffix in FBIN_DTYPES),
    *(_vecs(suffix) for suffix in VECS_DTYPES),
    _hdf5("hdf5", "extents"),
    _hdf5("hdf5_userblock", "extents", userblock=True),
    _hdf5("hdf5_chunked", "decode", chunks=(CHUNK_ROWS, 3)),
    _hdf5("hdf5_gzip", "decode", chunks=(CHUNK_ROWS, 5), compression="gzip"),
    Factory(
        "hdf5_big_endian",
        lambda f, x: write_hdf5(f / "x.h5", x.astype(x.dtype.newbyteorder(">"))),
        "decode",
        ("float64", "float32", "float16"),
    ),
    Factory("arrow", lambda f, x: write_arrow(f / "x.arrow", x), "extents", NUMPY_DTYPES),
    Factory("arrow_lz4", lambda f, x: write_arrow(f / "x.feather", x, compression="lz4"), "decode", NUMPY_DTYPES),
    Factory("arrow_lists", lambda f, x: write_arrow(f / "x.arrow", x, "lists"), "decode", NUMPY_DTYPES),
    Factory("arrow_columns", lambda f, x: write_arrow(f / "x.arrow", x, "columns"), "decode", NUMPY_DTYPES),
    Factory("parquet", lambda f, x: write_parquet(f / "x.parquet", x), "decode", NUMPY_DTYPES),
    Factory("parquet_lists", lambda f, x: write_parquet(f / "x.parquet", x, "lists"), "decode", NUMPY_DTYPES),
    Factory("parquet_columns", lambda f, x: write_parquet(f / "x.parquet", x, "columns"), "decode", NUMPY_DTYPES),
    Factory("folder", _folder, "extents"),
    _zarr("zarr_sharded", shards=(SHARD_ROWS, 5), compressors=[ZstdCodec(checksum=True)]),
    _zarr("zarr_sharded_blosc_columns", shards=(SHARD_ROWS, 6), chunks=(CHUNK_ROWS, 3), compressors=[BloscCodec()]),
    _zarr("zarr_sharded_raw", "extents", shards=(SHARD_ROWS, 5), compressors=None),
    _zarr("zarr_sharded_crc", "extents", shards=(SHARD_ROWS, 5), compressors=[Crc32cCodec()]),
    Factory("zarr_index_first", _zarr_index_first, "extents", NUMPY_DTYPES),
    _zarr("zarr_sharded_padded_columns", shards=(SHARD_ROWS, 6), chunks=(CHUNK_ROWS, 6), compressors=None),
    _zarr("zarr_plain"),
    _zarr("zarr_plain_raw", "extents", compressors=None),
    _zarr("zarr_plain_crc", "extents", compressors=[Crc32cCodec()]),
    Factory(
        "zarr_big_endian",
        lambda f, x: write_zarr(f / "x.zarr", x, compressors=None, serializer=BytesCodec(endian="big")),
        "decode",
        ("float64", "float32", "float16"),
    ),
    _zarr("zarr_plain_columns", chunks=(CHUNK_ROWS, 2), compressors=None),
    _zarr("zarr_v2", zarr_format=2),
    _zarr("zarr_v2_raw", "extents", zarr_format=2, compressors=None),
    _zarr("zarr_v2_fortran", zarr_format=2, compressors=None, order="F"),
    Factory(
        "zarr_array",
        lambda f, x: zarr.open_array(write_zarr(f / "x.zarr", x, shards=(SHARD_ROWS, 5))),
        "decode",
        NUMPY_DTYPES,
    ),
    Factory("zarr_memory", _memory_store, "decode", NUMPY_DTYPES),
    Factory("zarr_objects", _in_a_store, "objects", NUMPY_DTYPES),
    Factory("ndarray", lambda f, x: x.copy(), "memory"),
    Factory("ndarray_strided", _strided, "memory"),
    Factory("memmap", lambda f, x: np.load(write_npy(f / "x.npy", x), mmap_mode="r"), "memory"),
    Factory("torch", lambda f, x: as_tensor(x.copy()), "memory"),
    Factory("dask", lambda f, x: dask.array.from_array(x.copy(), chunks=(11, 2)), "decode"),
    Factory("concat", _concat, "decode", ("float32",)),
    Factory(
        "concat_npy",
        lambda f, x: [write_npy(f / "a.npy", x[:20]), write_npy(f / "b.npy", x[20:21]), write_npy(f / "c.npy", x[21:])],
        "extents",
    ),
)

CASES = [(factory, dtype) for factory in FACTORIES for dtype in factory.dtypes]
CASE_IDS = [f"{factory.name}-{dtype}" for factory, dtype in CASES]
