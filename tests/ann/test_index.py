from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgmm.ann.assignment import assign
from streamgmm.ann.coding import Coding
from streamgmm.ann.faiss_files import read_index, write_index
from streamgmm.ann.faiss_index import build_index, centroids_of
from streamgmm.ann.policies import POLICIES, Policy
from streamgmm.ann.probing import Probing
from streamgmm.ann.quantizer import Quantizer, quantizer_of
from streamgmm.ann.search import Searcher, without_duplicates
from streamgmm.errors import DamagedFileError, DataError, RequestError
from streamgmm.inference import InferenceSettings
from tests.ann.cases import brute_search, overlapping, rows_near

faiss = pytest.importorskip("faiss")

K, D, N = 11, 8, 2000


@pytest.fixture
def model() -> Quantizer:
    return quantizer_of(overlapping(k=K, d=D))


@pytest.fixture
def x(model: Quantizer) -> np.ndarray:
    return rows_near(model.mixture, N)


@pytest.fixture
def queries(model: Quantizer) -> np.ndarray:
    return rows_near(model.mixture, 40, seed=9)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("probes", [1, 3, K])
def test_search_is_that_of_the_lists(
    tmp_path: Path,
    settings: InferenceSettings,
    model: Quantizer,
    x: np.ndarray,
    queries: np.ndarray,
    name: str,
    probes: int,
) -> None:
    """Each vector once, the true k of what the lists hold, ids beyond 32 bits: as brute force over the same lists."""
    ids = np.random.default_rng(3).permutation(N) + (1 << 40)
    postings = assign(x, model, tmp_path / "lists", name, settings=settings)
    searcher = Searcher(*build_index(x, model, name, ids=ids, settings=settings))
    assert searcher.index.ntotal == len(postings.ids)
    for k in range(K):
        size = searcher.index.invlists.list_size(k)
        held = faiss.rev_swig_ptr(searcher.index.invlists.get_ids(k), size) if size else []
        np.testing.assert_array_equal(held, ids[postings.list_ids(k)])
    distances, found = searcher.search(queries, 10, probes)
    lists = [np.array(postings.list_ids(k)) for k in range(K)]
    assert found.tolist() == brute_search(x, ids, lists, queries, model.centroids, probes, 10)
    assert (np.diff(distances) >= 0).all()


def test_written_and_read_it_is_the_same(
    tmp_path: Path, settings: InferenceSettings, model: Quantizer, x: np.ndarray, queries: np.ndarray
) -> None:
    expected = Searcher(*build_index(x, model, settings=settings)).search(queries, 10, 4)
    write_index(tmp_path / "memory.faiss", x, model, settings=settings)
    write_index(tmp_path / "disk.faiss", x, model, settings=settings, on_disk=True, shard_bytes=20_000)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in tmp_path.glob("disk.faiss*"):
        path.rename(moved / path.name)
    for path in (tmp_path / "memory.faiss", moved / "disk.faiss"):
        distances, ids = Searcher.open(path).search(queries, 10, 4)
        np.testing.assert_array_equal(ids, expected[1])
        np.testing.assert_array_equal(distances, expected[0])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "coding", [Coding("flat"), Coding("pq", 4, 4), Coding("pq", None, 4), Coding("sq"), Coding("sq", bits=16)]
)
def test_codings_on_disk_and_in_memory(
    tmp_path: Path, settings: InferenceSettings, model: Quantizer, x: np.ndarray, queries: np.ndarray, coding: Coding
) -> None:
    expected = Searcher(*build_index(x, model, coding=coding, settings=settings)).search(queries, 10, 5)
    path = tmp_path / "i.faiss"
    write_index(path, x, model, coding=coding, settings=settings, on_disk=True, shard_bytes=30_000)
    index, facts = read_index(path)
    assert facts.kind == coding.kind
    np.testing.assert_array_equal(Searcher(index, facts).search(queries, 10, 5)[1], expected[1])
    exact = Searcher(*build_index(x, model, settings=settings)).search(queries, 10, 5)[1]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), expected[1].tolist(), strict=True)])
    assert shared >= (0.99 if coding.kind == "flat" else 0.3)


def test_given_lists_are_used_as_they_are(
    tmp_path: Path, settings: InferenceSettings, model: Quantizer, x: np.ndarray, queries: np.ndarray
) -> None:
    postings = assign(x, model, tmp_path / "lists", "resp", settings=settings)
    ours = Searcher(*build_index(x, postings, settings=settings)).search(queries, 10, 3)
    same = Searcher(*build_index(x, model, "resp", settings=settings)).search(queries, 10, 3)
    np.testing.assert_array_equal(ours[1], same[1])
    with pytest.raises(RequestError, match="lists are given"):
        build_index(x, postings, "air", settings=settings)
    with pytest.raises(RequestError, match="2000 rows and array has 10"):
        build_index(x[:10], postings, settings=settings)
    for wrong in (N, -1, int(postings.ids[0])):
        ids = np.array(postings.ids)
        ids[: postings.max_copies + 1] = wrong
        with pytest.raises(DamagedFileError, match="list 0 holds rows that are not there, or too often"):
            build_index(x, replace(postings, ids=ids), settings=settings)
    named = assign(x, model, tmp_path / "named", ids=np.arange(N) * 2, settings=settings)
    with pytest.raises(RequestError, match="ids of their own"):
        build_index(x, named, settings=settings)


def test_chunks_change_nothing(settings: InferenceSettings, model: Quantizer) -> None:
    x = rows_near(model.mixture, 30_000)
    one, two = (build_index(x, model, settings=replace(settings, chunk_rows=rows))[0] for rows in (1024, 32_768))
    assert faiss.serialize_index(one).tobytes() == faiss.serialize_index(two).tobytes()


def test_k_results_where_k_exist(settings: InferenceSettings, model: Quantizer, queries: np.ndarray) -> None:
    x = rows_near(model.mixture, 25)
    searcher = Searcher(*build_index(x, model, "soar", settings=settings))
    assert searcher.search(queries[:0], 3)[1].shape == (0, 3)
    for k in (1, 24, 25, 40):
        distances, ids = searcher.search(queries, k, np.int64(1))
        assert ids.shape == distances.shape == (len(queries), k)
        for row in ids.tolist():
            found = [i for i in row if i >= 0]
            assert len(found) == len(set(found)) == min(k, 25)
        assert np.isinf(distances[:, 25:]).all()


def test_ids_that_are_negative_or_huge(settings: InferenceSettings, model: Quantizer, queries: np.ndarray) -> None:
    x = rows_near(model.mixture, 300)
    ids = np.arange(300) * 7777 - (1 << 20)
    ids[:5] = [-(1 << 63), (1 << 63) - 1, -2, (1 << 53) + 1, 1 << 53]
    searcher = Searcher(*build_index(x, model, "top2", ids=ids, settings=settings))
    _, found = searcher.search(queries, 300, K)
    assert all(sorted(row) == sorted(ids.tolist()) for row in found.tolist())
    nearest = ((queries[:, None].astype(np.float64) - x) ** 2).sum(2).argmin(1)
    np.testing.assert_array_equal(found[:, 0], ids[nearest])


def test_more_lists_than_rows(settings: InferenceSettings, queries: np.ndarray) -> None:
    mixture = overlapping(k=60, d=D)
    searcher = Searcher(*build_index(rows_near(mixture, 3), mixture, settings=settings))
    assert sorted(searcher.search(queries, 3, 1)[1][0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    "probing",
    [
        Probing(value=3),
        Probing(stop="margin", value=2.0),
        Probing(stop="mass", value=0.9),
        Probing("posterior", "count", 3),
    ],
)
def test_any_rule_of_probing(
    settings: InferenceSettings, model: Quantizer, x: np.ndarray, queries: np.ndarray, probing: Probing
) -> None:
    import torch

    from streamgmm.ann.probing import rank_lists

    searcher = Searcher(*build_index(x, model, settings=settings))
    _, ids = searcher.search(queries, 5, probing, model)
    ranked = rank_lists(torch.from_numpy(queries), model, probing)
    for query, row, lists, kept in zip(queries, ids, ranked.lists, ranked.kept(probing.value), strict=True):
        members = [
            faiss.rev_swig_ptr(searcher.index.invlists.get_ids(int(k)), searcher.index.invlists.list_size(int(k)))
            for k in lists[: int(kept)]
            if searcher.index.invlists.list_size(int(k))
        ]
        held = np.unique(np.concatenate(members))
        best = held[np.argsort(((x[held].astype(np.float64) - query) ** 2).sum(1), kind="stable")[:5]]
        np.testing.assert_array_equal(row, best)


def test_a_foreign_index(tmp_path: Path, model: Quantizer, x: np.ndarray, queries: np.ndarray) -> None:
    coarse = faiss.IndexFlatL2(D)
    index = faiss.IndexIVFFlat(coarse, D, K)
    index.train(x)
    index.add_with_ids(x, np.arange(N) % 700)
    faiss.write_index(index, str(tmp_path / "f.faiss"))
    searcher = Searcher.open(tmp_path / "f.faiss")
    assert searcher.facts.max_copies == 3
    assert searcher.facts.n_samples == 700
    ids = searcher.search(queries, 700, 1)[1]
    assert all(len(set(row)) == 700 for row in ids.tolist())
    np.testing.assert_array_equal(centroids_of(index).centroids, coarse.reconstruct_n(0, K))


def test_what_cannot_be_is_refused(
    tmp_path: Path, settings: InferenceSettings, model: Quantizer, x: np.ndarray, queries: np.ndarray
) -> None:
    searcher = Searcher(*build_index(x, model, settings=settings))
    with pytest.raises(RequestError, match=r"shape \(Q, 8\)"):
        searcher.search(queries[:, :3], 5)
    with pytest.raises(RequestError, match=r"shape \(Q, 8\)"):
        searcher.search(queries[0], 5)
    with pytest.raises(RequestError, match="k must"):
        searcher.search(queries, 0)
    with pytest.raises(RequestError, match="whole number"):
        searcher.search(queries, 2.5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="must be numbers; got str"):
        searcher.search("queries.npy", 5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="query 0 holds NaN or infinity"):
        searcher.search(queries.astype(np.float64) * 1e300, 5)
    with pytest.raises(RequestError, match="need the quantizer"):
        searcher.search(queries, 5, Probing(stop="mass", value=0.5))
    with pytest.raises(RequestError, match="query 2 holds NaN"):
        searcher.search(np.where(np.arange(40)[:, None] == 2, np.nan, queries), 5)
    with pytest.raises(RequestError, match="divide the 8 features"):
        build_index(x, model, coding=Coding("pq", 3), settings=settings)
    with pytest.raises(RequestError, match="256 codewords"):
        build_index(x[:100], model, coding=Coding("pq", 4), settings=settings)
    with pytest.raises(RequestError, match=r"\.faiss"):
        write_index(tmp_path / "i.bin", x, model, settings=settings)
    write_index(tmp_path / "i.faiss", x, model, settings=settings)
    with pytest.raises(RequestError, match="exists"):
        write_index(tmp_path / "i.faiss", x, model, settings=settings)
    with pytest.raises(DataError, match="no such file"):
        Searcher.open(tmp_path / "none.faiss")
    (tmp_path / "i.faiss").write_bytes(b"no index at all")
    with pytest.raises(DataError, match="cannot read it"):
        Searcher.open(tmp_path / "i.faiss")
    faiss.write_index(faiss.IndexFlatL2(4), str(tmp_path / "flat.faiss"))
    with pytest.raises(DataError, match="without lists"):
        Searcher.open(tmp_path / "flat.faiss")


@pytest.mark.parametrize(
    "settings_",
    [{"kind": "hnsw"}, {"kind": "sq", "subspaces": 2}, {"kind": "pq", "bits": 13}, {"kind": "sq", "bits": 5}],
)
def test_codings_that_do_not_exist(settings_: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Coding(**settings_)


def test_duplicates_keep_the_nearest() -> None:
    distances = np.array([[1, 2, 3, 4, np.inf]], np.float32)
    ids = np.array([[7, 7, 5, 7, -1]])
    kept = without_duplicates(distances, ids, 3)
    assert kept[1].tolist() == [[7, 5, -1]]
    assert kept[0].tolist() == [[1, 3, np.inf]]
    assert without_duplicates(distances, ids, 7)[1].tolist() == [[7, 5, -1, -1, -1, -1, -1]]


def test_policies_agree_with_assign(
    tmp_path: Path, settings: InferenceSettings, model: Quantizer, x: np.ndarray
) -> None:
    policy = Policy("air", strength=1.0)
    postings = assign(x, model, tmp_path / "a", policy, copies=1.3, settings=settings)
    index, _ = build_index(x, model, policy, copies=1.3, settings=settings)
    np.testing.assert_array_equal(postings.sizes, [index.invlists.list_size(k) for k in range(K)])
