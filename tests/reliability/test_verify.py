"""``verify`` reads everything, compares every checksum there is, and lists every bad chunk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamgmm.errors import DataError
from streamgmm.io.sources import open_source
from streamgmm.io.sources.array import ArraySource
from streamgmm.verification import Damage, verify
from tests.cli.conftest import call, refused  # noqa: F401 - fixtures
from tests.oracles import clustered

ROWS = clustered(150_000, 3, 4, spread=2.0).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked_zarr(path: Path) -> None:
    array = zarr.create_array(
        path,
        shape=ROWS.shape,
        dtype=ROWS.dtype,
        chunks=(4096, 4),
        shards=(65_536, 4),
        compressors=[zarr.codecs.Crc32cCodec()],
    )
    array[:] = ROWS


def flip(path: Path, *positions: int) -> None:
    payload = bytearray(path.read_bytes())
    for position in positions:
        payload[position] ^= 1
    path.write_bytes(payload)


def test_whole_data_is_whole(folder, call):  # noqa: F811
    np.save("x.npy", ROWS)
    checked_zarr(folder / "x.zarr")
    for path in ("x.npy", "x.zarr"):
        facts = call("verify", path, "--json")
        assert facts.status == 0
        assert facts.json["n_bad"] == 0
        assert facts.json["n_samples"] == len(ROWS)


def test_every_bad_chunk_is_listed(folder, refused):  # noqa: F811
    checked_zarr(folder / "x.zarr")
    stored = 4096 * 4 * 4 + 4
    flip(folder / "x.zarr" / "c" / "0" / "0", 10, 5 * stored + 7, 6 * stored + 7)
    flip(folder / "x.zarr" / "c" / "2" / "0", 10)
    outcome = refused("verify", "x.zarr", "--json", told=("x.zarr", "4 bad parts"))
    bad = json.loads(outcome.stdout.splitlines()[-1])["bad"]
    assert [(damage["first"], damage["last"]) for damage in bad] == [
        (0, 4095),
        (20_480, 24_575),
        (24_576, 28_671),
        (131_072, 135_167),
    ]


def test_every_missing_shard_is_named(folder, refused):  # noqa: F811
    checked_zarr(folder / "x.zarr")
    for shard in (0, 2):
        (folder / "x.zarr" / "c" / str(shard) / "0").unlink()
    refused("verify", "x.zarr", told=("c/0/0, which holds rows from 0 on, is missing, and 1 more (c/2/0)",))


def test_against_a_run_it_finds_what_the_format_cannot_tell(folder, call, refused):  # noqa: F811
    np.save("x.npy", ROWS)
    fit = call("fit", "x.npy", "-k", 3, "--max-iter", 1, "--output", "run", "--device", "cpu", "--json")
    assert fit.status == 0, fit
    assert call("verify", "x.npy", "--against", "run", "--json").json["segments_compared"] == 3
    flip(folder / "x.npy", 128 + 70_000 * 16)
    assert call("verify", "x.npy").status == 0
    outcome = refused("verify", "x.npy", "--against", "run", "--json", told=("changed between row 65536",))
    bad = json.loads(outcome.stdout.splitlines()[-1])["bad"]
    assert [(damage["first"], damage["last"]) for damage in bad] == [(65_536, 131_071)]


def test_a_file_that_is_missing_does_not_hide_the_others(folder, refused):  # noqa: F811
    np.save("x.npy", ROWS[:1000])
    checked_zarr(folder / "x.zarr")
    flip(folder / "x.zarr" / "c" / "0" / "0", 10)
    outcome = refused("verify", "x.npy", "absent.npy", "x.zarr", "--json", told=("2 bad parts",))
    reasons = [damage["reason"] for damage in json.loads(outcome.stdout.splitlines()[-1])["bad"]]
    assert "absent.npy" in reasons[0]
    assert "rows 0 to 4095" in reasons[1]


def test_other_data_and_other_folders_are_refused(folder, call, refused):  # noqa: F811
    np.save("x.npy", ROWS[:1000])
    np.save("y.npy", ROWS[:999])
    assert call("fit", "x.npy", "-k", 2, "--max-iter", 1, "--output", "run", "--device", "cpu").status == 0
    refused("verify", "y.npy", "--against", "run", told=("y.npy", "run was fitted on [1000, 4]"))
    refused("verify", "x.npy", "--against", ".", told=("holds no checkpoints",))


class Holey(ArraySource):
    """An array some of whose rows cannot be read."""

    def __init__(self, rows: np.ndarray, holes: list[range], granule: int) -> None:
        super().__init__(rows)
        self._holes, self.read_granule = holes, granule

    def read_into(self, start, stop, out):
        for hole in self._holes:
            if start < hole.stop and hole.start < stop:
                raise DataError(f"rows {hole} are gone")
        super().read_into(start, stop, out)

    def read_uncached(self, start, stop, out):
        self.read_into(start, stop, out)


@pytest.mark.parametrize("threads", [1, 3])
def test_bad_chunks_are_listed_one_by_one_and_bad_bytes_by_the_run(threads):
    rows = np.zeros((200_000, 64), np.float32)
    chunks = Holey(rows, [range(1000, 2000), range(2000, 3000), range(150_000, 151_000)], 1000)
    assert [(d.first, d.last) for d in verify(chunks, {}, threads)] == [(1000, 2000), (2000, 3000), (150_000, 151_000)]
    found = list(verify(Holey(rows, [range(70_000, 90_000)], 1), {}, threads))
    assert len(found) == 1
    assert 69_700 <= found[0].first <= 70_000
    assert 90_000 <= found[0].last <= 90_300


def test_a_segment_that_cannot_be_read_is_not_compared():
    rows = np.zeros((200_000, 64), np.float32)
    wrong = dict.fromkeys(range(64), 1)
    found = list(verify(Holey(rows, [range(1000)], 1000), wrong, 2))
    assert found[0] == Damage(0, 1000, "rows range(0, 1000) are gone")
    assert {damage.first for damage in found[1:]} == {65_536, 131_072, 196_608}


def test_the_source_is_left_open_for_the_caller(tmp_path):
    np.save(tmp_path / "x.npy", ROWS[:10])
    source = open_source(tmp_path / "x.npy")
    assert list(verify(source, {}, 1)) == []
    source.read(0, 1)
