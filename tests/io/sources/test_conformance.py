"""What every source must do, whatever it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgmm.io.sources import Source
from tests.io.sources.conftest import CASE_IDS, CASES, CHUNK_ROWS, FACTORIES, SHARD_ROWS, Factory, make_rows

RANGES = [
    (0, 1),
    (49, 50),
    (23, 24),
    (0, CHUNK_ROWS),
    (CHUNK_ROWS - 1, CHUNK_ROWS + 1),
    (CHUNK_ROWS, 2 * CHUNK_ROWS),
    (SHARD_ROWS - 1, SHARD_ROWS + 1),
    (3, 47),
    (SHARD_ROWS, 2 * SHARD_ROWS),
    (0, 50),
]


@pytest.fixture(params=CASES, ids=CASE_IDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Source, np.ndarray, Factory]]:
    factory, dtype = request.param
    rows = make_rows(dtype)
    source = factory(tmp_path, rows)
    yield source, rows, factory
    source.close()


def test_describes_itself(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, factory = case
    assert source.shape == rows.shape
    assert all(type(length) is int for length in source.shape)
    assert source.dtype == rows.dtype
    assert source.dtype.isnative
    assert source.read_path == factory.read_path
    assert isinstance(source.name, str)
    assert source.read_granule >= 1


def test_every_kind_of_range(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, _ = case
    for start, stop in RANGES:
        read = source.read(start, stop)
        assert read.dtype == rows.dtype
        assert read.shape == (stop - start, rows.shape[1])
        assert read.tobytes() == rows[start:stop].tobytes(), (start, stop)


def test_reads_past_the_page_cache_are_the_same(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, _ = case
    for start, stop in RANGES:
        guarded = np.frombuffer(bytearray(b"\x4d" * (stop - start + 4) * rows[0].nbytes), dtype=rows.dtype)
        guarded = guarded.reshape(-1, rows.shape[1])
        word = source.read_uncached(start, stop, guarded[2:-2])
        assert word is None or "O_DIRECT" in word
        assert guarded[2:-2].tobytes() == rows[start:stop].tobytes(), (start, stop)
        assert guarded[:2].tobytes() + guarded[-2:].tobytes() == b"\x4d" * 4 * rows[0].nbytes


def test_stored_bytes_are_those_of_the_files(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, factory = case
    whole = list(source.stored(0, len(rows)))
    assert sum(extent.length for extent in whole) == source.stored_bytes
    # What rows share belongs to one call alone, so the parts of a scan add up to the whole.
    parts = [extent for start in range(0, 50, 10) for extent in source.stored(start, start + 10)]
    assert sum(extent.length for extent in parts) == source.stored_bytes
    if factory.read_path in ("memory", "objects") or factory.name in ("dask", "zarr_memory"):
        assert source.stored_bytes == 0
    elif factory.read_path == "extents":
        assert source.stored_bytes in (rows.nbytes, rows.nbytes + 4 * len(rows))
        assert source.slow_because == ""
    else:
        assert source.slow_because
    for extent in whole:
        assert 0 <= extent.offset <= extent.offset + extent.length <= os.fstat(extent.descriptor).st_size


def test_read_into_writes_only_out(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, _ = case
    for start, stop in RANGES:
        guarded = np.frombuffer(bytearray(b"\x4d" * (stop - start + 4) * rows[0].nbytes), dtype=rows.dtype)
        guarded = guarded.reshape(-1, rows.shape[1])
        source.read_into(start, stop, guarded[2:-2])
        assert guarded[2:-2].tobytes() == rows[start:stop].tobytes()
        for guard in (guarded[:2], guarded[-2:]):
            assert guard.tobytes() == b"\x4d" * guard.nbytes


def test_reads_of_nothing(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, _ = case
    for row in (0, 10, 50):
        assert source.read(row, row).shape == (0, rows.shape[1])


@pytest.mark.parametrize("size", [1, 6, 13, 49, 50, 1000])
def test_chunks_are_everything_in_order(case: tuple[Source, np.ndarray, Factory], size: int) -> None:
    source, rows, _ = case
    pieces = list(source.chunks(size))
    assert all(len(piece) == size for piece in pieces[:-1])
    assert np.concatenate(pieces).tobytes() == rows.tobytes()


def test_gather(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, _ = case
    rng = np.random.default_rng(1)
    for count in (0, 1, 2, 9, 30, 50):
        indices = np.sort(rng.choice(50, count, replace=False)).astype(np.int64)
        gathered, rows_read = source.gather(indices)
        assert gathered.tobytes() == rows[indices].tobytes()
        assert rows_read >= count


@pytest.mark.parametrize("gap", [0, 20, 100, 10**6])
@pytest.mark.parametrize("most", [1, 60, 10**6])
def test_gathered_rows_do_not_depend_on_how_they_are_grouped(tmp_path: Path, gap: int, most: int) -> None:
    rows = make_rows("float32")
    source = next(factory for factory in FACTORIES if factory.name == "npy")(tmp_path, rows)
    rng = np.random.default_rng(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamgmm.io.sources.base.GATHER_GAP_BYTES", gap)
        patch.setattr("streamgmm.io.sources.base.GATHER_RUN_BYTES", most)
        for count in (1, 2, 9, 30, 50):
            indices = np.sort(rng.choice(50, count, replace=False)).astype(np.int64)
            gathered, rows_read = source.gather(indices)
            assert gathered.tobytes() == rows[indices].tobytes()
            assert count <= rows_read <= 50


def test_concurrent_reads(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, _ = case
    ranges = [(start, min(start + 9, 50)) for start in range(0, 50, 4)] * 2

    def agrees(span: tuple[int, int]) -> bool:
        return source.read(*span).tobytes() == rows[slice(*span)].tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agrees, ranges))


def test_locate_and_files(case: tuple[Source, np.ndarray, Factory]) -> None:
    source, rows, factory = case
    parts = source.files()
    assert [first for _, first, _ in parts] == [0, *np.cumsum([count for _, _, count in parts])[:-1]]
    assert sum(count for _, _, count in parts) == len(rows)
    assert source.locate(0) == f"row 0 of {parts[0][0]}"
    assert source.locate(49) == f"row {parts[-1][2] - 1} of {parts[-1][0]}"
    with pytest.raises(IndexError):
        source.locate(50)
    if factory.name == "concat_npy":
        assert source.locate(20).startswith("row 0 of ")
        assert source.locate(20).endswith("b.npy")


@pytest.mark.parametrize(("factory", "dtype"), CASES, ids=CASE_IDS)
def test_fingerprint(factory: Factory, dtype: str, tmp_path: Path) -> None:
    rows = make_rows(dtype)
    original, again = factory(tmp_path / "a", rows).fingerprint, factory(tmp_path / "b", rows).fingerprint
    assert original == again
    changed = rows.copy()
    changed.view(np.uint8)[-1, -1] ^= 1
    assert factory(tmp_path / "c", changed).fingerprint != original
    assert factory(tmp_path / "d", rows[:-1]).fingerprint != original


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.name)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(spans=st.lists(st.tuples(st.integers(0, 49), st.integers(1, 50)), min_size=1, max_size=8))
def test_any_ranges(factory: Factory, spans: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = make_rows(factory.dtypes[-1])
    source = factory(tmp_path_factory.mktemp("rows"), rows)
    for start, count in spans:
        stop = min(start + count, 50)
        assert source.read(start, stop).tobytes() == rows[start:stop].tobytes()
    source.close()


# The others' own parts need more rows, or chunks of five features.
ANY_SHAPE = [factory for factory in FACTORIES if not factory.name.startswith(("concat", "zarr_", "hdf5_"))]


@pytest.mark.parametrize("factory", ANY_SHAPE, ids=lambda factory: factory.name)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5), (53, 1)])
def test_awkward_shapes(factory: Factory, n: int, d: int, tmp_path: Path) -> None:
    rows = make_rows(factory.dtypes[0], n, d)
    source = factory(tmp_path, rows)
    assert source.shape == (n, d)
    assert source.read(0, n).tobytes() == rows.tobytes()
    source.close()
