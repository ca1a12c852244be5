"""A state comes back with every bit, from the newest file that is whole."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from streamgmm import checkpoint
from streamgmm.checkpoint import GENERATIONS, Checkpoints, load_state, save_state
from streamgmm.consistency import check_fits
from streamgmm.errors import DamagedFileError, DataError
from streamgmm.frame import Frame
from streamgmm.passes import Course
from streamgmm.state import OpenSegment, SoFar, TrainingState
from streamgmm.statistics import Statistics, SummationTree
from streamgmm.steps.em import Candidate
from streamgmm.storage import load_tensors, save_tensors
from tests.oracles import COVARIANCE_TYPES, random_mixture

CPU = torch.device("cpu")
K, D = 3, 4
IDENTITY: dict[str, object] = {"fingerprint": "abc", "shape": [9, D], "tol": 1e-3}
HISTORY: tuple[dict[str, object], ...] = ({"iteration": 1, "lower_bound": -1.5, "change": None, "empty": [2]},)


def random_statistics(kind: str, seed: int) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    statistics = Statistics.zeros(kind, K, torch.zeros(D, dtype=torch.float64))
    for name in ("counts", "sums", "scatter", "log_likelihood", "n_rows"):
        getattr(statistics, name).copy_(torch.rand(getattr(statistics, name).shape, generator=generator) * 1e9 / 3)
    return statistics


def state_of(kind: str, seed: int = 0) -> TrainingState:
    """Two candidates, one of them converged, in the middle of a pass, with empty and filled tree nodes."""
    done = Candidate(random_mixture(kind, K, D, seed), "high", (-3.0, -2.5), True, (1,), (0, 2))
    active = Candidate(random_mixture(kind, K, D, seed + 1), "medium", (-3.0, -1 / 3))
    tree = SummationTree().place({2: random_statistics(kind, seed), 4: random_statistics(kind, seed + 1)})
    opened = OpenSegment(1, 131_072, (random_statistics(kind, seed + 2),), checksum=77, skipped=5)
    frame = Frame(np.random.default_rng(seed).normal(size=D), np.exp2(np.arange(D) - 2.0))
    return TrainingState((done, active), frame, (tree,), (opened,), rows_read=654_321)


def bits(state: TrainingState) -> dict[str, object]:
    """Everything in a state, with arrays as bytes and their shapes."""

    def of(statistics: Statistics | None) -> object:
        tensors = {} if statistics is None else statistics.tensors()
        return {name: (array.shape, array.numpy().tobytes()) for name, array in tensors.items()}

    return {
        "candidates": [
            (
                c.mixture.digest,
                c.mixture.covariance_type,
                c.precision,
                c.lower_bounds,
                c.converged,
                c.empty,
                c.degenerate,
            )
            for c in state.candidates
        ],
        "frame": (state.frame.shift.tobytes(), state.frame.scale.tobytes()),
        "trees": [[(n, of(s)) for n, s in tree.nodes] for tree in state.trees],
        "opened": [(o.segment, o.cursor, [of(s) for s in o.sums], o.checksum, o.skipped) for o in state.opened],
        "rows_read": state.rows_read,
        "course": (state.course, state.number, state.step, state.so_far, state.before and state.before.digest),
    }


def stepwise_state() -> TrainingState:
    """The middle of a step in the second of three stepwise passes."""
    whole = state_of("diag")
    return replace(
        whole,
        candidates=whole.candidates[1:],
        course=Course(3, 3, 32_768.0, 50, 1024, True, 7, "because"),
        number=1,
        step=49,
        before=random_mixture("diag", K, D, 9),
        so_far=SoFar(-1e9 / 3, 1e6 / 3, 12),
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    opened = Checkpoints(tmp_path / "checkpoints", IDENTITY)
    yield opened
    opened.close()


def write(checkpoints: Checkpoints, *seeds: int) -> None:
    for seed in seeds:
        checkpoints.save(state_of("diag", seed), HISTORY)
        checkpoints.flush()


def silent(text: str) -> None:
    raise AssertionError(f"an unexpected warning: {text}")


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_state_in_the_middle_of_a_pass_keeps_every_bit(tmp_path, kind):
    state = state_of(kind)
    save_state(tmp_path / "c", state, HISTORY, IDENTITY)
    loaded, history, identity = load_state(tmp_path / "c", CPU)
    assert bits(loaded) == bits(state)
    assert history == HISTORY
    assert identity == IDENTITY


def test_a_state_within_a_stepwise_pass_keeps_every_bit(tmp_path):
    save_state(tmp_path / "c", stepwise_state(), HISTORY, IDENTITY)
    assert bits(load_state(tmp_path / "c", CPU)[0]) == bits(stepwise_state())


def test_a_checkpoint_from_before_there_were_courses_is_one_of_full_batch_em(tmp_path):
    save_state(tmp_path / "c", state_of("diag"), HISTORY, IDENTITY)
    tensors, metadata = load_tensors(tmp_path / "c")
    older = {name: value for name, value in metadata.items() if name not in ("course", "number", "step", "so_far")}
    save_tensors(tmp_path / "c", tensors, older)
    assert bits(load_state(tmp_path / "c", CPU)[0]) == bits(state_of("diag"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("course", {"colour": 3}),
        ("course", {"stepwise_passes": 4, "planned_passes": 3, "region_rows": 1024}),
        ("course", {"stepwise_passes": 3, "planned_passes": 3, "region_rows": 100}),
        ("course", {"stepwise_passes": 3, "planned_passes": 3, "region_rows": 0}),
        ("course", {"stepwise_passes": 3, "planned_passes": 3, "region_rows": 1024, "steps": 0}),
        ("course", {"stepwise_passes": 3, "planned_passes": 3, "region_rows": 1024, "first_window": 0.0}),
        ("number", -1),
        ("step", 50),
        ("number", 3),
        ("so_far", {"n_rows": -1.0}),
        ("undoable", False),
    ],
)
def test_an_impossible_course_is_refused(tmp_path, name, value):
    save_state(tmp_path / "c", stepwise_state(), HISTORY, IDENTITY)
    tensors, metadata = load_tensors(tmp_path / "c")
    save_tensors(tmp_path / "c", tensors, {**metadata, name: value})
    with pytest.raises(DamagedFileError, match="c: not a usable checkpoint"):
        load_state(tmp_path / "c", CPU)


def test_a_course_must_be_one_over_the_rows_that_there_are():
    state = replace(stepwise_state(), opened=(), trees=())
    check_fits(state, 160_000)
    with pytest.raises(ValueError, match="course"):  # millions of regions
        check_fits(state, 10**10)
    with pytest.raises(ValueError, match="course"):  # one region, and the fiftieth step
        check_fits(replace(state, course=replace(state.course, region_rows=65_536)), 60_000)
    with pytest.raises(ValueError, match="segments under way"):  # of other rows
        check_fits(replace(state, opened=stepwise_state().opened), 160_000)


def test_a_state_between_passes_keeps_every_bit(tmp_path):
    state = TrainingState((Candidate(random_mixture("full", K, D), "medium"),), state_of("full").frame, rows_read=7)
    save_state(tmp_path / "c", state, (), IDENTITY)
    assert bits(load_state(tmp_path / "c", CPU)[0]) == bits(state)


def test_a_snapshot_is_not_changed_by_further_additions(checkpoints):
    state = state_of("diag")
    before = bits(state)
    checkpoints.save(state, HISTORY)
    state.opened[0].sums[0].sums.add_(1)
    checkpoints.flush()
    found = checkpoints.latest(CPU, silent)
    assert found is not None
    assert bits(found[0]) == before


def test_nothing_saved_is_nothing_found(checkpoints):
    assert checkpoints.latest(CPU, silent) is None


def test_two_generations_are_kept_and_the_newest_is_taken(checkpoints, tmp_path):
    write(checkpoints, 1, 2, 3, 4)
    assert [path.name for path in checkpoints.paths()] == ["00000004.safetensors", "00000003.safetensors"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == GENERATIONS == 2
    found = checkpoints.latest(CPU, silent)
    assert found is not None
    assert bits(found[0]) == bits(state_of("diag", 4))


def test_numbers_go_on_after_a_restart(checkpoints, tmp_path):
    write(checkpoints, 1, 2, 3)
    again = Checkpoints(tmp_path / "checkpoints", IDENTITY)
    write(again, 4)
    again.close()
    assert [path.name for path in again.paths()] == ["00000004.safetensors", "00000003.safetensors"]


def truncated(payload: bytes) -> bytes:
    return payload[:-1]


def flipped(payload: bytes) -> bytes:
    return payload[:-9] + bytes([payload[-9] ^ 1]) + payload[-8:]


DAMAGES = [truncated, flipped, lambda payload: b"", lambda payload: b"junk"]


@pytest.mark.parametrize("damage", DAMAGES, ids=["truncated", "flipped", "empty", "junk"])
def test_the_older_one_is_taken_when_the_newest_is_damaged(checkpoints, damage):
    write(checkpoints, 1, 2)
    newest = checkpoints.paths()[0]
    newest.write_bytes(damage(newest.read_bytes()))
    warnings: list[str] = []
    found = checkpoints.latest(CPU, warnings.append)
    assert found is not None
    assert bits(found[0]) == bits(state_of("diag", 1))
    assert len(warnings) == 1
    assert str(newest) in warnings[0]


def test_when_all_are_damaged_it_says_so_and_changes_nothing(checkpoints):
    write(checkpoints, 1, 2)
    for path in checkpoints.paths():
        path.write_bytes(b"junk")
    warnings: list[str] = []
    with pytest.raises(DamagedFileError, match="every checkpoint is damaged; start over with --fresh"):
        checkpoints.latest(CPU, warnings.append)
    assert len(warnings) == 2
    assert [path.read_bytes() for path in checkpoints.paths()] == [b"junk", b"junk"]


def test_other_files_in_the_folder_are_left_alone(checkpoints, tmp_path):
    foreign = [
        tmp_path / "checkpoints" / name for name in ("notes.txt", "best.safetensors", ".00000001.safetensors.tmp")
    ]
    for path in foreign:
        path.write_text("mine")
    write(checkpoints, 1, 2, 3)
    assert all(path.read_text() == "mine" for path in foreign[:2])
    assert len(checkpoints.paths()) == 2
    found = checkpoints.latest(CPU, silent)
    assert found is not None


def test_a_file_of_another_kind_is_refused(tmp_path):
    random_mixture("diag", K, D).save(tmp_path / "m")
    with pytest.raises(DamagedFileError, match="holds 'streamgmm-model', not a streamgmm checkpoint"):
        load_state(tmp_path / "m", CPU)
    with pytest.raises(DataError, match="cannot be read"):
        load_state(tmp_path / "absent", CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("candidates", None),
        ("candidates", "x"),
        ("candidates", [None]),
        ("candidates", [{"digest": "0"}]),
        ("candidates", [{}]),
        ("covariance_type", "round"),
        ("version", 1),
        ("opened", None),
        ("opened", [{"segment": 1}]),
        ("rows_read", []),
        ("trees", 3),
        ("trees", [[["x", 0, True]]]),
        ("trees", [[[0, 1, False]] * 9]),
        ("trees", [[[99, 0, False]]]),
        ("trees", [[[0, 64, False]]]),
        ("digests", ["0"]),
        ("identity", []),
        ("history", {}),
    ],
)
def test_a_verified_file_with_impossible_contents_is_refused(tmp_path, name, value):
    save_state(tmp_path / "c", state_of("diag"), HISTORY, IDENTITY)
    tensors, metadata = load_tensors(tmp_path / "c")
    save_tensors(tmp_path / "c", tensors, {**metadata, name: value})
    with pytest.raises(DamagedFileError, match="c: not a usable checkpoint"):
        load_state(tmp_path / "c", CPU)


@pytest.mark.parametrize("name", ["frame.shift", "candidate.1.means", "open.1.0.counts"])
def test_a_verified_file_that_lacks_a_tensor_is_refused(tmp_path, name):
    save_state(tmp_path / "c", state_of("diag"), HISTORY, IDENTITY)
    tensors, metadata = load_tensors(tmp_path / "c")
    del tensors[name]
    save_tensors(tmp_path / "c", tensors, metadata)
    with pytest.raises(DamagedFileError, match="c: not a usable checkpoint"):
        load_state(tmp_path / "c", CPU)


def test_a_failed_write_is_told_and_leaves_the_generations_before_it(checkpoints, monkeypatch):
    write(checkpoints, 1, 2)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_state", full)
    checkpoints.save(state_of("diag", 3), HISTORY)
    with pytest.raises(OSError, match="No space"):
        checkpoints.flush()
    found = checkpoints.latest(CPU, silent)
    assert found is not None
    assert bits(found[0]) == bits(state_of("diag", 2))
