from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgmm.ann import assignment, spill
from streamgmm.ann.assignment import assign
from streamgmm.ann.policies import POLICIES, Policy
from streamgmm.ann.postings import PostingLists, imbalance
from streamgmm.ann.quantizer import Quantizer, quantizer_of
from streamgmm.errors import DamagedFileError, DataError, RequestError, RunError
from streamgmm.inference import InferenceSettings
from streamgmm.mixture import COVARIANCE_TYPES
from tests.ann.cases import brute_lists, overlapping, rows_near


def as_table(postings: PostingLists, n: int) -> list[list[int]]:
    """The lists of each row, ascending."""
    lists: list[list[int]] = [[] for _ in range(n)]
    for k in range(postings.n_lists):
        for row in postings.list_ids(k):
            lists[row].append(k)
    return lists


def whole(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".npy"}


@pytest.mark.parametrize("name", POLICIES)
def test_lists_are_those_of_the_definition(tmp_path: Path, settings: InferenceSettings, name: str) -> None:
    mixture = overlapping(k=11)
    x = rows_near(mixture, 997)
    postings = assign(x, mixture, tmp_path / "out", name, settings=settings)
    expected = [sorted(row) for row in brute_lists(x, mixture, Policy(name))]
    assert as_table(postings, len(x)) == expected
    assert all((np.diff(postings.list_ids(k)) > 0).all() for k in range(postings.n_lists))
    assert postings.facts["n_samples"] == len(x)
    assert postings.offsets.dtype == postings.ids.dtype == np.int64
    np.testing.assert_array_equal(postings.centroids, mixture.means.astype(np.float32))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_responsibilities_are_kept(tmp_path: Path, settings: InferenceSettings, covariance_type: str) -> None:
    mixture = overlapping(covariance_type)
    x = rows_near(mixture, 200)
    policy = Policy("resp", max_copies=4, threshold=0.05)
    postings = assign(x, mixture, tmp_path / "out", policy, keep_resp=True, settings=settings)
    assert as_table(postings, len(x)) == [sorted(row) for row in brute_lists(x, mixture, policy)]
    assert postings.resp is not None
    assert postings.resp.max() <= 1
    totals = np.bincount(postings.ids, weights=postings.resp, minlength=len(x))
    assert totals.max() <= 1 + 1e-5
    assert (totals > 0.3).all()


@pytest.mark.parametrize("name", ["air", "resp"])
def test_chunks_and_memory_change_no_bit(
    tmp_path: Path, settings: InferenceSettings, name: str, monkeypatch: Any
) -> None:
    mixture = overlapping(k=13)
    x = rows_near(mixture, 70_001)
    policy = Policy(name)
    keep = name == "resp"
    assign(x, mixture, tmp_path / "a", policy, keep_resp=keep, settings=settings)
    monkeypatch.setattr(assignment, "_SORT_BYTES", 1 << 16)
    assign(x, mixture, tmp_path / "b", policy, keep_resp=keep, settings=replace(settings, chunk_rows=1024, threads=1))
    assert whole(tmp_path / "a") == whole(tmp_path / "b")


@pytest.mark.parametrize("copies", [1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("name", ["air", "soar", "top2", "resp"])
def test_target_number_of_copies(tmp_path: Path, settings: InferenceSettings, name: str, copies: float) -> None:
    mixture = overlapping(k=20)
    postings = assign(rows_near(mixture, 5000), mixture, tmp_path / "out", name, copies=copies, settings=settings)
    assert postings.facts["copies"] == pytest.approx(copies, abs=0.01)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["air", "resp"])
def test_killed_anywhere_it_goes_on_to_the_same_bits(
    tmp_path: Path, settings: InferenceSettings, name: str, monkeypatch: Any
) -> None:
    mixture = overlapping(k=5, d=3)
    x = rows_near(mixture, 200_000)
    small = replace(settings, chunk_rows=16_384)
    assign(x, mixture, tmp_path / "whole", name, settings=settings)
    monkeypatch.setattr(spill, "SYNC_SECONDS", 0.0)
    seen: list[int] = []

    def stop_after(rows: int) -> Any:
        def told(done: int) -> None:
            seen.append(done)
            if sum(seen) > rows:
                raise _Killed

        return told

    with pytest.raises(_Killed):
        assign(x, mixture, tmp_path / "out", name, settings=small, progress=stop_after(100_000))
    assert not (tmp_path / "out").exists()
    seen.clear()
    postings = assign(x, mixture, tmp_path / "out", name, settings=small, progress=seen.append)
    assert seen[0] == 65_536
    assert sum(seen) == len(x)
    assert postings.facts["resumed"]
    assert whole(tmp_path / "whole") == whole(tmp_path / "out")


def test_killed_while_sorting(
    tmp_path: Path, settings: InferenceSettings, quantizer: Quantizer, monkeypatch: Any
) -> None:
    x = rows_near(quantizer.mixture, 5000)
    publish = assignment._publish

    def killed(result: Path, output: Path) -> None:
        raise _Killed

    monkeypatch.setattr(assignment, "_publish", killed)
    with pytest.raises(_Killed):
        assign(x, quantizer, tmp_path / "out", settings=settings)
    monkeypatch.setattr(assignment, "_publish", publish)
    done: list[int] = []
    assign(x, quantizer, tmp_path / "out", settings=settings, progress=done.append)
    assert done == [5000]
    assign(x, quantizer, tmp_path / "again", settings=settings)
    assert whole(tmp_path / "out") == whole(tmp_path / "again")


def test_other_data_is_not_gone_on_with(tmp_path: Path, settings: InferenceSettings, quantizer: Quantizer) -> None:
    x, other = (rows_near(quantizer.mixture, 4000, seed) for seed in (1, 2))

    def killed(rows: int) -> None:
        if rows:
            raise _Killed

    with pytest.raises(_Killed):
        assign(x, quantizer, tmp_path / "out", settings=settings, progress=killed)
    postings = assign(other, quantizer, tmp_path / "out", settings=settings)
    expected = [sorted(row) for row in brute_lists(other, quantizer.mixture, Policy())]
    assert as_table(postings, 4000) == expected
    assert not postings.facts["resumed"]


def test_another_search_of_a_gpu_is_not_gone_on_with(
    tmp_path: Path, settings: InferenceSettings, quantizer: Quantizer, monkeypatch: Any
) -> None:
    x = rows_near(quantizer.mixture, 4000)
    monkeypatch.setattr(assignment, "fused", lambda dtype, device: True)
    with monkeypatch.context() as context:

        def killed(result: Path, output: Path) -> None:
            raise _Killed

        context.setattr(assignment, "_publish", killed)
        with pytest.raises(_Killed):
            assign(x, quantizer, tmp_path / "out", settings=settings)
    monkeypatch.setattr(assignment, "SEARCH_VERSION", assignment.SEARCH_VERSION + 1)
    done: list[int] = []
    assert not assign(x, quantizer, tmp_path / "out", settings=settings, progress=done.append).facts["resumed"]
    assert done[0] == 0


def test_asked_again(tmp_path: Path, settings: InferenceSettings, quantizer: Quantizer) -> None:
    x = rows_near(quantizer.mixture, 300)
    first = assign(x, quantizer, tmp_path / "out", settings=settings)
    assert not first.facts["resumed"]
    assert assign(x, quantizer, tmp_path / "out", settings=settings).facts["resumed"]
    with pytest.raises(RequestError, match="other data or settings"):
        assign(x, quantizer, tmp_path / "out", "top1", settings=settings)
    assert assign(x, quantizer, tmp_path / "out", "top1", settings=settings, overwrite=True).max_copies == 1
    assert not list(tmp_path.glob(".*"))


def test_ids_of_the_user(tmp_path: Path, settings: InferenceSettings, quantizer: Quantizer) -> None:
    x = rows_near(quantizer.mixture, 300)
    ids = np.random.default_rng(0).permutation(300) + (1 << 60)
    plain = assign(x, quantizer, tmp_path / "a", settings=settings)
    named = assign(x, quantizer, tmp_path / "b", ids=ids, settings=settings)
    np.testing.assert_array_equal(named.ids, ids[plain.ids])
    for wrong in (ids[:-1], ids.astype(np.int32), ids.tolist()):
        with pytest.raises(RequestError, match="300 int64 numbers"):
            assign(x, quantizer, tmp_path / "c", ids=wrong, settings=settings)
    # Asked for again with two ids exchanged, they are other lists.
    ids[[100, 200]] = ids[[200, 100]]
    with pytest.raises(RequestError, match="other data or settings"):
        assign(x, quantizer, tmp_path / "b", ids=ids, settings=settings)
    for first, message in ((ids[1], "differ, and"), (-1, "must not hold -1")):
        with pytest.raises(RequestError, match=message):
            assign(x, quantizer, tmp_path / "c", ids=np.array([first, *ids[1:]]), settings=settings)


def test_more_lists_than_rows(tmp_path: Path, settings: InferenceSettings) -> None:
    mixture = overlapping(k=50)
    postings = assign(rows_near(mixture, 3), mixture, tmp_path / "out", settings=settings)
    assert postings.n_lists == 50
    assert (postings.sizes == 0).sum() >= 44
    assert as_table(postings, 3) == [sorted(row) for row in brute_lists(rows_near(mixture, 3), mixture, Policy())]


def test_what_cannot_be_is_refused(tmp_path: Path, settings: InferenceSettings, quantizer: Quantizer) -> None:
    x = rows_near(quantizer.mixture, 30)
    out = tmp_path / "out"
    with pytest.raises(RequestError, match="4 features and the centroids 5"):
        assign(x[:, :4], quantizer, out, settings=settings)
    with pytest.raises(RequestError, match="needs a mixture"):
        assign(x, quantizer.centroids, out, "resp", settings=settings)
    with pytest.raises(RequestError, match="responsibilities are kept"):
        assign(x, quantizer, out, keep_resp=True, settings=settings)
    with pytest.raises(RequestError, match="copies"):
        assign(x, quantizer, out, copies=2.5, settings=settings)
    with pytest.raises(RequestError, match=r"copies is 1\.5"):
        assign(x, quantizer, out, "top1", copies=1.5, settings=settings)
    with pytest.raises(RequestError, match="its folder does not exist"):
        assign(x, quantizer, tmp_path / "a" / "b", settings=settings)
    with pytest.raises(RequestError, match=r"at least \d+ MiB"):
        assign(x, quantizer, out, settings=replace(settings, memory_limit=1 << 20))
    x[17, 2] = np.nan
    with pytest.raises(DataError, match="row 17"):
        assign(x, quantizer, out, settings=settings)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(RequestError, match="holds no posting lists"):
        assign(x, quantizer, out, settings=settings, overwrite=True)


def test_two_at_once(tmp_path: Path, settings: InferenceSettings, quantizer: Quantizer) -> None:
    x = rows_near(quantizer.mixture, 30)

    def again(rows: int) -> None:
        assign(x, quantizer, tmp_path / "out", settings=settings)

    with pytest.raises(RunError, match="another process"):
        assign(x, quantizer, tmp_path / "out", settings=settings, progress=again)


@pytest.mark.parametrize("name", ["centroids.npy", "offsets.npy", "ids.npy", "postings.json"])
def test_damage_is_found(tmp_path: Path, settings: InferenceSettings, quantizer: Quantizer, name: str) -> None:
    out = tmp_path / "out"
    assign(rows_near(quantizer.mixture, 300), quantizer, out, settings=settings)
    path = out / name
    payload = path.read_bytes()
    path.write_bytes(payload[: len(payload) // 2])
    with pytest.raises(DamagedFileError, match="--overwrite"):
        PostingLists.load(out)
    path.unlink()
    with pytest.raises(DataError, match=name):
        PostingLists.load(out)


def test_float64_rows_far_from_the_origin(tmp_path: Path, settings: InferenceSettings) -> None:
    mixture = overlapping(k=9)
    x = rows_near(mixture, 100).astype(np.float64)
    near = assign(x, quantizer_of(mixture), tmp_path / "a", "top1", settings=settings)
    moved = assign(x + 1024, mixture.means + 1024, tmp_path / "b", "top1", settings=settings)
    assert as_table(near, 100) == as_table(moved, 100)


def test_imbalance() -> None:
    assert imbalance(np.array([3, 3, 3])) == 1
    assert imbalance(np.array([6, 0, 0])) == 3
    assert imbalance(np.array([0, 0])) == 1
