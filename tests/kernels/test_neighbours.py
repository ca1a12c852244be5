"""The nearest centroids in Triton, against brute force in fp64."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from streamgmm.ann.listing import choice_of
from streamgmm.ann.nearest import Centroids, nearest
from streamgmm.ann.policies import Candidates, Policy, lists_of, second_lists
from streamgmm.kernels.fused.configs import Tile, architecture_of
from streamgmm.kernels.neighbours import search as search_module
from streamgmm.kernels.neighbours.grouping import Grouping
from streamgmm.kernels.neighbours.search import Neighbours, Search

pytestmark = [
    # The interpreter computes with NumPy: it warns of what a GPU does silently, and of range() over an argument.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

SMALL = Tile(32, 64, 4, 2)


def draw(n: int, k: int, d: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows about centroids of which some resemble each other."""
    generator = torch.Generator(device).manual_seed(seed)
    centroids = torch.randn((k, d), generator=generator, device=device) * 3
    chosen = torch.randint(k, (n,), generator=generator, device=device)
    return centroids[chosen] + torch.randn((n, d), generator=generator, device=device) * 2, centroids


def search_of(centroids: Tensor, tile: Tile | None = SMALL) -> Search:
    own = Centroids.of(centroids.cpu().numpy(), centroids.device)
    return Search.of(own.points, own.shift, architecture_of(centroids.device), tile)


def exact(rows: Tensor, centroids: Tensor) -> Tensor:
    return torch.stack([(row - centroids.double()).square().sum(1) for row in rows.double()])


def check(found: Neighbours, rows: Tensor, centroids: Tensor, m: int, *, lost: float = 0.0) -> None:
    """Lists in order, nearest up to fp16's rounding, and distances of their own in fp32.

    ``lost`` is the share of rows whose candidates after the second may lack one.
    """
    distances = exact(rows, centroids)
    own = distances.gather(1, found.lists)
    size = float(rows.double().sub(centroids.double().mean(0)).square().sum(1).max())
    torch.testing.assert_close(found.distances.double(), own, rtol=1e-5, atol=1e-6 * size)
    assert (found.distances.diff(dim=1) >= 0).all()
    best = distances.sort(dim=1).values[:, :m]
    beyond = own > best + 2e-3 * size / rows.shape[1] ** 0.5 + 1e-6
    assert not beyond[:, :2].any()
    assert beyond.any(1).double().mean() <= lost
    assert all(len(set(row)) == m for row in found.lists.tolist())
    residuals = rows.double()[:, None] - centroids.double()[found.lists]
    inner = (residuals * residuals[:, :1]).sum(2)
    torch.testing.assert_close(found.inner.double(), inner, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize(
    ("n", "k", "d", "m"),
    [
        (5, 1, 1, 1),
        (13, 3, 3, 3),
        (21, 63, 64, 2),
        (7, 256, 100, 16),
        (7, 1000, 128, 1),
        (7, 1000, 17, 2),
        (5, 300, 300, 5),
        (3, 130, 768, 16),
        (3, 20_000, 2, 2),
    ],
)
def test_against_fp64(n: int, k: int, d: int, m: int, device: torch.device) -> None:
    rows, centroids = draw(n, k, d, device)
    # Many centroids want larger tiles, or the interpreter takes seconds.
    check(search_of(centroids, SMALL if k < 2000 else Tile(32, 4096, 4, 2))(rows, m), rows, centroids, m)


def test_of_16_nearest_few_rows_lack_one(device: torch.device) -> None:
    rows, centroids = draw(31, 1500, 12, device)
    check(search_of(centroids, Tile(64, 512, 4, 2))(rows, 16), rows, centroids, 16, lost=0.12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16, torch.bfloat16])
def test_rows_of_every_type(dtype: torch.dtype, device: torch.device) -> None:
    rows, centroids = draw(9, 40, 9, device)
    rows = (rows * 8).abs().clamp(max=120).to(dtype)
    check(search_of(centroids.abs() * 8)(rows, 3), rows, centroids.abs() * 8, 3)


@pytest.mark.parametrize(("offset", "scale"), [(1e4, 1.0), (0.0, 1e-6), (0.0, 1e6), (-300.0, 1e-2)])
def test_offset_and_scale(offset: float, scale: float, device: torch.device) -> None:
    rows, centroids = (part * scale + offset for part in draw(13, 100, 24, device))
    check(search_of(centroids)(rows, 4), rows, centroids, 4)


def test_far_rows_change_no_other(device: torch.device) -> None:
    rows, centroids = draw(20, 100, 8, device)
    search = search_of(centroids)
    plain = search(rows, 2)
    far = rows.clone()
    far[17] *= 1e6
    moved = search(far, 2)
    others = torch.arange(20, device=device) != 17
    assert all(torch.equal(a[others], b[others]) for a, b in zip(plain, moved, strict=True))
    check(Neighbours(*(part[17:18] for part in moved)), far[17:18], centroids, 2)


def test_groups_are_taken_block_by_block(device: torch.device) -> None:
    rows, centroids = draw(3, 1000, 10, device)
    centroids[500:520] = centroids[:20]
    search = search_of(centroids, Tile(32, 256, 4, 2))
    whole = search(rows, 16)
    with patch.object(search_module, "_GROUPS_AT_ONCE", 64):
        parts = search(rows, 16)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_cuts_change_no_bit(device: torch.device) -> None:
    rows, centroids = draw(13, 500, 20, device)
    search = search_of(centroids, Tile(32, 256, 4, 2))
    whole = search(rows, 5)
    parts = [search(part, 5) for part in rows.split([1, 4, 8])]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))


def test_equal_centroids_go_to_the_lower_index(device: torch.device) -> None:
    rows, centroids = draw(9, 10, 6, device)
    many = centroids.repeat(40, 1)
    found = search_of(many, Tile(32, 128, 4, 2))(rows, 4)
    nearest_one = exact(rows, centroids).argmin(1)
    expected = nearest_one[:, None] + 10 * torch.arange(4, device=device)
    torch.testing.assert_close(found.lists[:, :1], expected[:, :1])
    # All forty are as near, and of each group two are kept.
    assert ((found.lists % 10) == nearest_one[:, None]).all()
    same = search_of(torch.zeros((300, 3), device=device), Tile(32, 128, 4, 2))(rows[:, :3], 1)
    assert (same.lists == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_seen_and_harms_no_other_row(value: float, device: torch.device) -> None:
    rows, centroids = draw(19, 30, 7, device)
    search = search_of(centroids)
    plain = search(rows, 3)
    rows[5, 2] = value
    found = search(rows, 3)
    others = torch.arange(19, device=device) != 5
    assert all(torch.equal(a[others], b[others]) for a, b in zip(plain, found, strict=True))
    assert not torch.isfinite(found.distances[5]).any()
    assert ((found.lists >= 0) & (found.lists < 30)).all()


def check_lists(rows: Tensor, search: Search, m: int, policy: Policy) -> None:
    """Lists and gains are those that the plain way makes of the same candidates."""
    candidates = Candidates(*search(rows, m))
    expected = lists_of(candidates, policy)
    lists, gains = search.lists(rows, m, choice_of(policy, m))
    assert lists.dtype == torch.int32
    if expected.shape[1] == 1:
        assert torch.equal(lists, expected)
        assert (gains == 0).all()
        return
    own = second_lists(candidates, policy)[1]
    torch.testing.assert_close(gains, own, rtol=1e-5, atol=1e-5)
    clear = (own - policy.gate).abs() > 1e-4
    assert torch.equal(lists[clear], expected[clear])
    assert clear.double().mean() > 0.8


@pytest.mark.parametrize(
    ("policy", "m"),
    [
        (Policy("top1"), 1),
        (Policy("top2"), 2),
        (Policy("soar"), 16),
        (Policy("air"), 7),
        (Policy("air", strength=2.0, threshold=0.4), 16),
        (Policy("soar", threshold=-0.9), 2),
        (Policy("air"), 1),
    ],
)
def test_lists_are_those_of_the_candidates(policy: Policy, m: int, device: torch.device) -> None:
    rows, centroids = draw(7, 90, 20, device)
    rows[3] = centroids[5]
    check_lists(rows, search_of(centroids), m, policy)


def test_lists_where_centroids_are_few_or_equal(device: torch.device) -> None:
    rows, centroids = draw(9, 3, 5, device)
    check_lists(rows, search_of(centroids), 3, Policy("air"))
    rows, centroids = draw(9, 10, 6, device)
    search = search_of(centroids.repeat(3, 1))
    found, _ = search.lists(rows, 4, choice_of(Policy("top2"), 4))
    assert torch.equal(found, search(rows, 4).lists[:, :2].int())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("policy", [Policy("top1"), Policy("soar")])
def test_gains_show_what_is_no_number(value: float, policy: Policy, device: torch.device) -> None:
    rows, centroids = draw(11, 30, 7, device)
    rows[5, 2] = value
    lists, gains = search_of(centroids).lists(rows, 3, choice_of(policy, min(3, policy.width + 1)))
    assert torch.isnan(gains).nonzero().ravel().tolist() == [5]
    assert ((lists >= 0) & (lists < 30)).all()


@pytest.mark.parametrize("k", [1, 3, 64, 255, 256, 257, 1000, 3000, 4096, 5000])
@pytest.mark.parametrize("columns", [64, 128, 256])
def test_every_centroid_has_a_column(k: int, columns: int) -> None:
    grouping = Grouping.of(k, columns)
    own = grouping.centroids()
    assert torch.equal(own.sort().values, torch.arange(grouping.groups * grouping.members))
    assert len(own) % (columns * grouping.run) == 0
    assert len(own) >= k


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k", "d", "m"),
    [
        (99_991, 4096, 128, 16),
        (99_991, 1000, 96, 2),
        (20_011, 70_001, 33, 1),
        (10_007, 512, 768, 16),
        (8191, 3, 2000, 2),
    ],
)
def test_against_the_plain_way(n: int, k: int, d: int, m: int, device: torch.device) -> None:
    rows, centroids = draw(n, k, d, device)
    own = Centroids.of(centroids.cpu().numpy(), device)
    found = search_of(centroids, None)(rows, m)
    plain = [nearest(part, own, m) for part in rows.split(16_384)]
    distances = torch.cat([part.distances for part in plain])
    differs = (found.distances / distances.clamp(min=1e-6) - 1).abs() > 1e-3
    assert not differs[:, :2].any()
    assert differs.any(1).double().mean() < 0.08
    first = torch.cat([part.lists[:, 0] for part in plain])
    assert (found.lists[:, 0] != first).double().mean() < 1e-3
