"""Zarr arrays in a real S3 server: every row right, or an error that names the object; never zeros."""

from __future__ import annotations

import json
import threading

import numpy as np
import obstore
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from streamgmm import GaussianMixture, open_source
from streamgmm.cli import main
from streamgmm.errors import DataError, RequestError
from streamgmm.io.objects import urls
from streamgmm.io.sources import Cache
from tests.io.objects.conftest import CHUNK, SHARD, N, bucket_of, put
from tests.io.sources.conftest import write_zarr

URL = "s3://vectors/x.zarr"


def error(environ, start):
    start("500 Internal Server Error", [("Content-Length", "0")])
    return [b""]


def cut_short(environ, start):
    """Promises a hundred bytes and closes after ten."""
    start("206 Partial Content", [("Content-Length", "100"), ("Content-Range", "bytes 0-99/100")])
    return [b"0123456789"]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "objects"),
        ({"compressors": None}, "objects"),
        ({"shards": None, "compressors": None}, "objects"),
        ({"compressors": "auto"}, "decode"),
        ({"shards": None, "compressors": "auto"}, "decode"),
    ],
)
def test_every_row_of_every_layout(s3, rows, options, path):
    source = open_source(put(URL, rows, **options))
    assert (source.shape, source.dtype, source.read_path) == (rows.shape, rows.dtype, path)
    for start, stop in [(0, N), (0, 1), (CHUNK - 1, CHUNK + 1), (SHARD - 1, SHARD + 1), (N - 1, N), (7, 7)]:
        assert source.read(start, stop).tobytes() == rows[start:stop].tobytes()
        out = np.empty((stop - start, 4), np.float32)
        assert source.read_uncached(start, stop, out) is None
        assert out.tobytes() == rows[start:stop].tobytes()
    assert source.stored_bytes == 0  # none of them in files here
    source.close()


def test_neighbouring_chunks_are_one_request(s3, rows):
    source = open_source(put(URL, rows))
    source.read(0, 1)
    before = s3.reads("x.zarr/c/0/0")
    source.read(0, SHARD)
    assert s3.reads("x.zarr/c/0/0") == before + 1


def test_errors_that_pass_are_waited_for(s3, rows, waits):
    put(URL, rows)
    s3.inject("x.zarr/c/1/0", 3, error)
    s3.inject("x.zarr/zarr.json", 1, error)
    assert open_source(URL).read(0, N).tobytes() == rows.tobytes()
    assert sorted(waits) == [0.25, 0.25, 0.5, 1.0]


def test_errors_that_stay_are_told(s3, rows, waits):
    put(URL, rows)
    source = open_source(URL)
    s3.inject("x.zarr/c/1/0", 100, error)
    with pytest.raises(DataError, match=r"rows 250 to 299 cannot be read: s3://vectors/x\.zarr/c/1/0: failed 4 times"):
        source.read(0, N)


def test_an_answer_that_ends_early_is_asked_for_again(s3, rows, waits):
    put(URL, rows)
    source = open_source(URL)
    s3.inject("x.zarr/c/2/0", 2, cut_short)
    assert source.read(0, N).tobytes() == rows.tobytes()
    assert waits == [0.25, 0.5]


def test_an_answer_that_does_not_come(s3, rows, waits, monkeypatch):
    put(URL, rows)
    monkeypatch.setattr(urls, "REQUEST_SECONDS", "300ms")
    over = threading.Event()

    def silent(environ, start):
        over.wait(60)
        return error(environ, start)

    source = open_source(URL)
    s3.inject("x.zarr/c/0/0", 1, silent)
    try:
        assert source.read(0, N).tobytes() == rows.tobytes()
    finally:
        over.set()
    assert waits[0] == 0.25


@pytest.mark.parametrize("compressors", [None, "auto"])
def test_a_truncated_object_is_named(s3, rows, compressors):
    put(URL, rows, compressors=compressors)
    bucket = bucket_of(URL)
    whole = bytes(obstore.get(bucket, "c/1/0").bytes())
    source = open_source(URL)
    source.read(0, N)
    obstore.put(bucket, "c/1/0", whole[: len(whole) // 2])
    for opened in (source, open_source(URL)):
        with pytest.raises(DataError, match=r"c/1/0"):
            opened.read(0, N)


def test_a_flipped_bit_is_named(s3, rows):
    put(URL, rows)
    bucket = bucket_of(URL)
    damaged = bytearray(obstore.get(bucket, "c/1/0").bytes())
    damaged[100] ^= 1
    obstore.put(bucket, "c/1/0", bytes(damaged))
    with pytest.raises(DataError, match=r"s3://vectors/x\.zarr/c/1/0: bytes 0 to 799 fail their checksum"):
        open_source(URL).read(0, N)


def test_a_missing_shard_is_named_before_anything_is_read(s3, rows):
    put(URL, rows)
    obstore.delete(bucket_of(URL), "c/2/0")
    with pytest.raises(DataError, match=r"s3://vectors/x\.zarr: c/2/0, which holds rows from 500 on, is missing"):
        open_source(URL)


def test_what_is_not_there(s3, rows, monkeypatch):
    with pytest.raises(DataError, match=r"s3://vectors/none\.zarr: holds no zarr.json"):
        open_source("s3://vectors/none.zarr")
    with pytest.raises(DataError, match="ftp:// is no store that is known; give s3://"):
        open_source("ftp://host/x.zarr")
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(RequestError, match=r"needs obstore; pip install 'streamgmm\[s3\]'"):
        open_source(URL)


def test_the_fingerprint_is_of_the_objects_versions(s3, rows):
    put(URL, rows)
    before = open_source(URL).fingerprint
    assert open_source(URL).fingerprint == before
    changed = rows.copy()
    changed[300, 2] += 1  # no row of those that a fingerprint looks at
    put(URL, changed, overwrite=True)
    assert open_source(URL).fingerprint != before


@pytest.mark.filterwarnings("ignore:Best performing")
def test_a_fit_and_the_cache(s3, rows, tmp_path):
    put(URL, rows)
    size = 2 * (SHARD * 16 + 5 * 4 + 5 * 16 + 4) + 100  # two shards of four
    cache = Cache(tmp_path / "cache", size)
    settings = {"max_iter": 4, "tol": 0.0, "random_state": 0, "covariance_type": "diag"}
    expected = GaussianMixture(3, **settings).fit(rows)
    source = open_source(URL, cache)
    found = GaussianMixture(3, **settings).fit(source)
    assert np.array_equal(found.means_, expected.means_)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(kept) == 2
    assert sum(path.stat().st_size for path in kept) <= size
    asked = len(s3.asked)
    source.read(0, 2 * SHARD)
    assert len(s3.asked) == asked  # the first shards stay, however often all are read
    source.read(2 * SHARD, N)
    assert len(s3.asked) > asked
    source.close()


def test_a_prepared_array_brings_its_transformation(s3, tmp_path, monkeypatch):
    from streamgmm.prepare import prepare

    raw = np.random.default_rng(1).normal(size=(500, 4)).astype(np.float32)
    made = prepare(raw, tmp_path / "y.zarr", "standardise,pca=2")
    for path in (tmp_path / "y.zarr").rglob("*"):
        if path.is_file():
            obstore.put(bucket_of("s3://vectors/y.zarr"), str(path.relative_to(tmp_path / "y.zarr")), path.read_bytes())
    source = open_source("s3://vectors/y.zarr")
    assert source.read(0, 500).tobytes() == open_source(tmp_path / "y.zarr").read(0, 500).tobytes()
    assert source.transformation.digest == made.transformation.digest


def test_memory(rows):
    zarr.save_array("memory://kept.zarr", rows)
    source = open_source("memory://kept.zarr")
    assert source.read(3, 900).tobytes() == rows[3:900].tobytes()


def test_the_web(server, waits, rows, tmp_path, monkeypatch):
    address, faults = server
    monkeypatch.setattr(faults, "folder", tmp_path)
    write_zarr(tmp_path / "x.zarr", rows, chunks=(CHUNK, 4), shards=(SHARD, 4), compressors=[Crc32cCodec()])
    source = open_source(f"{address}/web/x.zarr")
    assert source.read_path == "objects"
    assert source.read(0, N).tobytes() == rows.tobytes()
    assert source.identity() is None  # nobody lists what a web server has
    (tmp_path / "x.zarr/c/3/0").unlink()
    with pytest.raises(DataError, match=r"rows 750 to 799 cannot be read: c/3/0 is missing"):
        open_source(f"{address}/web/x.zarr").read(0, N)


def told(capsys, *arguments):
    """The JSON that a command prints last."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    return json.loads(out.out.splitlines()[-1])


@pytest.mark.filterwarnings("ignore")
def test_from_the_command_line(s3, rows, tmp_path, capsys):
    put(URL, rows)
    info = told(capsys, "info", URL)
    assert (info["read_path"], info["read_cost"]) == ("objects", "15.6 KiB a pass, in ranges of objects")
    asked = ["-k", 3, "--max-iter", 2, "--device", "cpu"]
    found = told(capsys, "fit", URL, *asked, "--cache", tmp_path / "cache", "--cache-size", "1MiB")
    assert found["digest"] == told(capsys, "fit", write_zarr(tmp_path / "x.zarr", rows), *asked)["digest"]
    assert (
        len([path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"]) == N // SHARD
    )
    told(capsys, "prepare", URL, tmp_path / "y.zarr", "--steps", "l2")
    assert open_source(tmp_path / "y.zarr").shape == rows.shape
