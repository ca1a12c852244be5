"""Data sets whose metadata point out of their folder are refused, and nothing out there is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamgmm.errors import DataError
from streamgmm.io.sources import open_source

ROWS = np.arange(64, dtype=np.float32).reshape(16, 4)
SECRET = np.full((16, 4), 42.0, np.float32)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """What must stay unread: the bytes of a whole chunk, so that nothing but its place is wrong with it."""
    path = tmp_path / "etc" / "passwd"
    path.parent.mkdir()
    path.write_bytes(SECRET.tobytes())
    return path


def write(path: Path, **options: object) -> None:
    array = zarr.create_array(path, shape=ROWS.shape, dtype=ROWS.dtype, chunks=(16, 4), compressors=None, **options)
    array[:] = ROWS


def assert_refused(path: Path) -> None:
    try:
        source = open_source(path)
        rows = source.read(0, 16)
    except DataError as error:
        text = str(error)
    else:
        assert not (rows == 42).any()
        raise AssertionError("it was opened and read")
    assert "\n" not in text
    assert path.name in text


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("link", ["chunk", "folder"])
def test_links_out_of_a_zarr_array(tmp_path, secret, version, link):
    path = tmp_path / "data" / "x.zarr"
    write(path, zarr_format=version)
    chunk = path / "c" / "0" / "0" if version == 3 else path / "0.0"
    if link == "chunk":
        chunk.unlink()
        chunk.symlink_to("../" * len(chunk.relative_to(tmp_path).parts[1:]) + "etc/passwd")
    else:
        if version == 2:
            pytest.skip("its chunks lie in no folder")
        chunk.unlink()
        chunk.parent.rmdir()
        (secret.parent / "0").write_bytes(SECRET.tobytes())
        chunk.parent.symlink_to(secret.parent)
    assert_refused(path)


@pytest.mark.parametrize("separator", ["/../../etc/passwd/", "../", "/", "", "\0", "x" * 10_000])
def test_key_encodings_that_climb(tmp_path, secret, separator):
    path = tmp_path / "x.zarr"
    write(path)
    facts = json.loads((path / "zarr.json").read_text())
    facts["chunk_key_encoding"] = {"name": "default", "configuration": {"separator": separator}}
    (path / "zarr.json").write_text(json.dumps(facts))
    if separator == "/":
        np.testing.assert_array_equal(open_source(path).read(0, 16), ROWS)
    else:
        assert_refused(path)


def test_a_v2_separator_that_climbs(tmp_path, secret):
    path = tmp_path / "x.zarr"
    write(path, zarr_format=2)
    facts = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps({**facts, "dimension_separator": "/../../etc/passwd"}))
    assert_refused(path)


def test_hdf5_that_points_elsewhere(tmp_path, secret):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_dataset("x", data=SECRET)
    path = tmp_path / "linked.h5"
    with h5py.File(path, "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/x")
    assert_refused(path)
    path = tmp_path / "external.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", shape=(16, 4), dtype="f4", external=[(str(secret), 0, SECRET.nbytes)])
    assert_refused(path)
    path = tmp_path / "virtual.h5"
    layout = h5py.VirtualLayout(shape=(16, 4), dtype="f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", shape=(16, 4))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)
    assert_refused(path)
