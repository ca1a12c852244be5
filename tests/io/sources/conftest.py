"""One factory a format: each writes given rows where it is told and opens them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dask.array
import numpy as np
import torch
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from streamgmm.io.bfloat16 import as_rows, as_tensor
from streamgmm.io.sources import Source, open_source

NUMPY_DTYPES = ("float64", "float32", "float16", "int8", "uint8")
ALL_DTYPES = ("bfloat16", *NUMPY_DTYPES)

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


def write_npy(path: Path, rows: np.ndarray) -> Path:
    np.save(path, rows)
    return path


def write_zarr(path: Path, rows: np.ndarray, **options: object) -> Path:
    """An array whose last chunk and shard are padded, with every chunk present."""
    settings: dict[str, object] = {"chunks": (CHUNK_ROWS, rows.shape[1]), "config": {"write_empty_chunks": True}}
    array = zarr.create_array(path, shape=rows.shape, dtype=rows.dtype, **{**settings, **options})
    array[:] = rows
    return path


def _fbin(suffix: str) -> Factory:
    dtype = np.dtype(FBIN_DTYPES[suffix]).name
    return Factory(suffix[1:], lambda f, x: write_fbin(f / f"x{suffix}", x), "extents", (dtype,))


def _zarr(name: str, **options: object) -> Factory:
    # zarr-python warns that version 3 does not specify the bytes that bfloat16 would be.
    dtypes = ALL_DTYPES if options.get("zarr_format") == 2 else NUMPY_DTYPES
    return Factory(name, lambda f, x: write_zarr(f / "x.zarr", x, **options), "decode", dtypes)


def _strided(folder: Path, rows: np.ndarray) -> np.ndarray:
    wide = np.zeros((2 * len(rows), 2 * rows.shape[1]), dtype=rows.dtype)
    wide[::-2, ::2] = rows
    return wide[::-2, ::2]


def _memory_store(folder: Path, rows: np.ndarray) -> object:
    config = {"write_empty_chunks": True}
    return zarr.create_array(zarr.storage.MemoryStore(), name="v", data=rows, chunks=(CHUNK_ROWS, 5), config=config)


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
    _zarr("zarr_sharded", shards=(SHARD_ROWS, 5), compressors=[ZstdCodec(checksum=True)]),
    _zarr("zarr_sharded_blosc_columns", shards=(SHARD_ROWS, 6), chunks=(CHUNK_ROWS, 3), compressors=[BloscCodec()]),
    _zarr("zarr_sharded_raw", shards=(SHARD_ROWS, 5), compressors=None),
    _zarr("zarr_plain"),
    _zarr("zarr_plain_columns", chunks=(CHUNK_ROWS, 2), compressors=None),
    _zarr("zarr_v2", zarr_format=2),
    Factory(
        "zarr_array",
        lambda f, x: zarr.open_array(write_zarr(f / "x.zarr", x, shards=(SHARD_ROWS, 5))),
        "decode",
        NUMPY_DTYPES,
    ),
    Factory("zarr_memory", _memory_store, "decode", NUMPY_DTYPES),
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
