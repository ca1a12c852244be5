"""What a path names: a file of some format, something inside a file, a Zarr array, or a folder of shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from streamgmm.errors import DataError
from streamgmm.io.objects.cache import Cache
from streamgmm.io.objects.urls import scheme_of
from streamgmm.io.optional import require
from streamgmm.io.sources.base import Recipe, Source
from streamgmm.io.sources.concat import ConcatSource
from streamgmm.io.sources.fbin import DTYPES as FBIN_DTYPES
from streamgmm.io.sources.fbin import FbinSource
from streamgmm.io.sources.npy import NpySource
from streamgmm.io.sources.raw import unreadable
from streamgmm.io.sources.vecs import DTYPES as VECS_DTYPES
from streamgmm.io.sources.vecs import VecsSource

INSIDE = "::"
"""Between a file and what is meant inside it: ``file.h5::dataset``, ``file.parquet::column``."""

ZARR_METADATA = ("zarr.json", ".zarray", ".zgroup")

Opener: TypeAlias = Callable[[str, str | None], Source]


def open_path(path: str, cache: Cache | None = None) -> Source:
    """The rows that ``path`` names; of an object store, kept in ``cache`` as far as there is room.

    Raises
    ------
    DataError
        Nothing is there, it is damaged, or no format that is known.
    RequestError
        The library that its format needs is not installed.
    """
    if scheme_of(path):
        remote = _zarr_array(path, cache)
        remote.opened_by = Recipe(open_path, (path, cache))
        return remote
    source = _open(path)
    # From the root: another process may work in another folder.
    source.opened_by = Recipe(open_path, (str(Path(path).absolute()),))
    return source


def _open(path: str) -> Source:
    try:
        target, member = _divide(path)
        is_folder = Path(target).is_dir()
        is_zarr = is_folder and any(Path(target, name).exists() for name in ZARR_METADATA)
        if is_folder and not is_zarr:
            return _open_folder(target, member)
    # ValueError: a null byte in the path.
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise unreadable(path, error) from error
    if is_zarr:
        return _zarr_array(target if member is None else str(Path(target, member)))
    return _open_file(target, member)


def _zarr_array(path: str, cache: Cache | None = None) -> Source:
    from streamgmm.io.sources.zarr_array import ZarrSource  # which imports zarr, and that takes a while

    return ZarrSource(path, cache)


def _divide(path: str) -> tuple[str, str | None]:
    """``path`` as a file or folder that exists and what is meant inside it.

    Raises
    ------
    OSError
        Nothing of that name exists.
    """
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        target, mark, member = path.rpartition(INSIDE)
        if mark and Path(target).exists():
            return target, member
        for parent in Path(path).parents:
            if parent.suffix.lower() in HDF5_SUFFIXES and parent.is_file():
                return str(parent), str(Path(path).relative_to(parent))
        raise
    return path, None


def _open_file(path: str, member: str | None) -> Source:
    suffix = Path(path).suffix.lower()
    if suffix not in OPENERS:
        known = ", ".join(OPENERS)
        raise DataError(f"{path}: unknown suffix {suffix!r}; give {known}, or the folder of a Zarr array")
    if member is not None and suffix not in (*HDF5_SUFFIXES, *ARROW_SUFFIXES, *PARQUET_SUFFIXES):
        raise DataError(f"{path}{INSIDE}{member}: {suffix} files hold one array; give {path}")
    return OPENERS[suffix](path, member)


def _open_folder(path: str, member: str | None) -> Source:
    """The files of a folder, all of one format, in the order of their names; hidden ones (``.x``, ``_x``) left out."""
    names = sorted(entry.name for entry in Path(path).iterdir() if entry.name[0] not in "._")
    suffixes = sorted({Path(name).suffix.lower() for name in names})
    if not names or any(suffix not in OPENERS for suffix in suffixes):
        raise DataError(
            f"{path}: is a folder without {', '.join(ZARR_METADATA)}, and not of shards alone; give the folder of a "
            "Zarr array or list the files"
        )
    if len(suffixes) > 1:
        raise DataError(f"{path}: is a folder of mixed files ({', '.join(suffixes)}); list those that are meant")
    return ConcatSource([_open_file(str(Path(path, name)), member) for name in names])


def _hdf5(path: str, member: str | None) -> Source:
    require("h5py", "hdf5", path)
    from streamgmm.io.sources.hdf5 import Hdf5Source

    return Hdf5Source(path, member)


def _arrow(path: str, member: str | None) -> Source:
    require("pyarrow", "arrow", path)
    from streamgmm.io.sources.arrow import open_arrow

    return open_arrow(path, member)


def _parquet(path: str, member: str | None) -> Source:
    require("pyarrow", "arrow", path)
    from streamgmm.io.sources.tables import ParquetSource

    return ParquetSource(path, member)


HDF5_SUFFIXES = (".h5", ".hdf5")
ARROW_SUFFIXES = (".arrow", ".feather")
PARQUET_SUFFIXES = (".parquet",)
OPENERS: dict[str, Opener] = {
    ".npy": lambda path, _: NpySource(path),
    **dict.fromkeys(FBIN_DTYPES, lambda path, _: FbinSource(path)),
    **dict.fromkeys(VECS_DTYPES, lambda path, _: VecsSource(path)),
    **dict.fromkeys(HDF5_SUFFIXES, _hdf5),
    **dict.fromkeys(ARROW_SUFFIXES, _arrow),
    **dict.fromkeys(PARQUET_SUFFIXES, _parquet),
}
"""How a file is opened, by suffix."""
