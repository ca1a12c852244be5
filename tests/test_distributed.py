"""Several processes fit what one does, to the last bit, whichever of them fails and however many go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgmm.checkpoint import newest
from streamgmm.distributed import ALONE, Message, Team, World, share_of
from streamgmm.errors import DataError, Interrupted, PeerLost, Reported, RequestError, RunError, StreamGMMError
from streamgmm.fitting import assist, fit
from streamgmm.io.plan import Span, segment_spans
from streamgmm.io.ring import Ring
from streamgmm.io.sources import open_source
from streamgmm.io.sources.array import ArraySource
from streamgmm.processes import join_world, launched
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.run import RunFolder
from streamgmm.seeding import sample_size, uniform_rows
from streamgmm.state import TrainingState
from tests.kills import Killed, KilledAt
from tests.oracles import COVARIANCE_TYPES, clustered
from tests.worlds import Hub, MemoryLinks, run_world

ROWS = clustered(400_001, 5, 4, spread=1.0).astype(np.float32)  # seven blocks in as many segments
CHUNK_ROWS = 16_384


def request(kind: str = "diag", **changes: object) -> FitRequest:
    settings = {"covariance_type": kind, "max_iter": 3, "tol": 0.0, "device": "cpu", "init": "random_from_data"}
    return FitRequest(**{"n_components": 4, **settings, **changes})


def fit_with(
    size: int,
    asked: FitRequest,
    output: Path | None = None,
    rows: np.ndarray = ROWS,
    progress: Callable[[int], Progress] = lambda rank: Progress(),
) -> list[FitResult | BaseException | None]:
    """The outcome of each process; only the leader's is a result."""

    def work(world: World) -> FitResult | None:
        source = ArraySource(rows)
        if world.leads:
            return fit(source, asked, output, progress(world.rank), world=world)
        return assist(source, asked, progress(world.rank), world=world)

    return run_world(size, work)


def result_of(outcomes: list[FitResult | BaseException | None]) -> FitResult:
    assert isinstance(outcomes[0], FitResult), outcomes
    assert outcomes[1:] == [None] * (len(outcomes) - 1)
    return outcomes[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, FitResult]:
    return {kind: fit(ArraySource(ROWS), request(kind)) for kind in COVARIANCE_TYPES}


class Stopped(Progress):
    """Was sent SIGTERM after a number of chunks."""

    def __init__(self, chunks: int) -> None:
        self._left = chunks

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        self._left -= 1

    def stop_requested(self) -> int | None:
        return signal.SIGTERM if self._left <= 0 else None


def only(rank: int, progress: Progress) -> Callable[[int], Progress]:
    """``progress`` in one process, silence in the others."""
    return lambda own: progress if own == rank else Progress()


@given(st.lists(st.integers(1, 10**6), max_size=70), st.integers(1, 9))
def test_shares_are_contiguous_and_balanced(rows, size):
    edges = np.cumsum([0, *rows]).tolist()
    spans = [Span(start, stop, i) for i, (start, stop) in enumerate(pairwise(edges))]
    shares = [share_of(spans, rank, size) for rank in range(size)]
    assert [span for share in shares for span in share] == spans
    largest = max(rows, default=0)
    assert all(sum(span.rows for span in share) <= sum(rows) / size + largest for share in shares)


def test_whole_passes_are_shared_so_that_few_sums_travel():
    spans = segment_spans(64 * 65_536)
    assert [len(share_of(spans, rank, 4)) for rank in range(4)] == [16] * 4


@pytest.fixture(params=[(1, CHUNK_ROWS), (64, 1 << 17)], ids=["short", "shared"])
def chunk_rows(request, monkeypatch) -> int:
    """Rows of chunks that are less than a segment, or that two segments share, as on a GPU."""
    segments, rows = request.param
    monkeypatch.setattr("streamgmm.memory._segments_at_once", lambda *_: segments)
    return rows


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_bits(kind, size, alone, chunk_rows):
    result = result_of(fit_with(size, request(kind, chunk_rows=chunk_rows)))
    assert result.mixture.digest == alone[kind].mixture.digest
    assert result.lower_bounds == alone[kind].lower_bounds
    counted = ("n_passes", "bytes_read", "skipped")
    assert [getattr(result, name) for name in counted] == [getattr(alone[kind], name) for name in counted]


def test_more_processes_than_segments(alone, chunk_rows):
    assert result_of(fit_with(9, request(chunk_rows=chunk_rows))).mixture.digest == alone["diag"].mixture.digest


@given(attempts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_processes_resume_under_other_numbers_of_them(attempts, alone, chunk_rows, tmp_path_factory):
    run = tmp_path_factory.mktemp("killed") / "run"
    asked = request(chunk_rows=chunk_rows, checkpoint_every=0.0)
    for size, rank, chunks in attempts:
        outcomes = fit_with(size, asked, run, progress=only(rank % size, KilledAt(chunks)))
        assert all(
            outcome is None or isinstance(outcome, (FitResult, Killed, PeerLost, Reported)) for outcome in outcomes
        )
    result = result_of(fit_with(2, request(), run))
    assert result.mixture.digest == alone["diag"].mixture.digest
    assert result.lower_bounds == alone["diag"].lower_bounds
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in history] == [1, 2, 3]


def test_a_checkpoint_holds_what_every_process_has_summed(tmp_path):
    asked = request(chunk_rows=CHUNK_ROWS, checkpoint_every=0.0)
    fit_with(3, asked, tmp_path / "run", progress=only(0, KilledAt(3)))
    loaded, _ = newest(tmp_path / "run" / "checkpoints", torch.device("cpu"), print)
    assert loaded is not None
    state = loaded[0]
    begun = {opened.segment for opened in state.opened} | state.finished
    empty = 64 - len(segment_spans(len(ROWS)))
    assert len(begun) >= empty + 3  # each came with a chunk at least
    assert state.rows_read >= state.rows_summed(len(ROWS)) > 2 * CHUNK_ROWS


def test_what_the_leader_has_is_saved_when_another_is_killed(alone, tmp_path):
    """No checkpoint was due yet."""
    outcomes = fit_with(2, request(chunk_rows=CHUNK_ROWS), tmp_path / "run", progress=only(1, KilledAt(5)))
    assert isinstance(outcomes[0], PeerLost)
    assert isinstance(outcomes[1], Killed)
    loaded, _ = newest(tmp_path / "run" / "checkpoints", torch.device("cpu"), print)
    assert loaded is not None
    assert loaded[0].rows_summed(len(ROWS)) > 0
    resumed = fit(ArraySource(ROWS), request(), tmp_path / "run")
    assert resumed.resumed
    assert resumed.mixture.digest == alone["diag"].mixture.digest


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_asked_of_one_process_stops_all(rank, alone, tmp_path):
    asked = request(chunk_rows=CHUNK_ROWS)
    outcomes = fit_with(3, asked, tmp_path / "run", progress=only(rank, Stopped(4)))
    assert isinstance(outcomes[0], Interrupted)
    assert str(outcomes[0]) == "stopped by SIGTERM; run the same command again to go on"
    assert [type(outcome) for outcome in outcomes[1:]] == [Reported] * 2
    assert {outcome.exit_status for outcome in outcomes if isinstance(outcome, StreamGMMError)} == {143}
    resumed = result_of(fit_with(4, request(), tmp_path / "run"))
    assert resumed.resumed
    assert resumed.mixture.digest == alone["diag"].mixture.digest
    assert resumed.n_passes == alone["diag"].n_passes  # nothing was read twice


@pytest.mark.parametrize("row", [0, 250_000, 400_000])
def test_a_row_that_is_not_finite_is_told_once_by_the_leader(row):
    x = ROWS.copy()
    x[row, 1] = np.nan
    outcomes = fit_with(3, request(), rows=x)
    assert isinstance(outcomes[0], DataError)
    assert f"row {row} of array: column 1 is nan" in str(outcomes[0])
    assert all(isinstance(outcome, Reported) and outcome.exit_status == 2 for outcome in outcomes[1:])


def test_what_a_process_raises_unforeseen_is_told_with_its_rank():
    class Failing(Progress):
        def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
            raise ZeroDivisionError("by zero")

    outcomes = fit_with(2, request(), progress=only(1, Failing()))
    assert type(outcomes[0]) is StreamGMMError
    assert str(outcomes[0]) == "process 1: ZeroDivisionError: by zero"
    assert isinstance(outcomes[1], Reported)
    assert isinstance(outcomes[1].__context__, ZeroDivisionError)  # for --debug


def test_a_failure_before_training_ends_all(tmp_path):
    held = RunFolder(tmp_path / "run")
    outcomes = fit_with(2, request(), tmp_path / "run")
    held.close()
    assert isinstance(outcomes[0], RunError)
    assert "another process is working in it" in str(outcomes[0])
    assert isinstance(outcomes[1], Reported)


def test_processes_must_see_the_same_data():
    def work(world: World) -> object:
        source = ArraySource(ROWS[: 1000 + world.rank])
        return fit(source, request(), world=world) if world.leads else assist(source, request(), world=world)

    outcomes = run_world(3, work)
    assert isinstance(outcomes[0], DataError)
    assert "process 1 sees other data" in str(outcomes[0])
    assert all(isinstance(outcome, Reported) for outcome in outcomes[1:])


def test_a_far_outlier_in_one_share_moves_precision_on_in_all():
    x = clustered(300_000, 3, 4).astype(np.float64)
    sampled = uniform_rows(len(x), sample_size(*x.shape, 4), np.random.default_rng([0, 0]))
    x[np.setdiff1d(np.arange(len(x)), sampled)[-1]] = 1e25  # its square overflows float32
    whole = fit(ArraySource(x), request())
    shared = result_of(fit_with(3, request(), rows=x))
    assert shared.history[0]["precision"] == whole.history[0]["precision"] == "highest"
    assert shared.mixture.digest == whole.mixture.digest


def test_several_sizes_weights_held_out_and_skipped_rows():
    x = ROWS.copy()
    x[[5, 200_000, 399_999], 2] = np.inf
    weights = ArraySource(np.random.default_rng(0).uniform(0.5, 3.0, (len(x), 1)))
    asked = request(n_components=(2, 5), n_init=2, holdout=0.1, nonfinite="skip", weights=weights)
    whole = fit(ArraySource(x), asked)
    shared = result_of(fit_with(3, asked, rows=x))
    assert [model.summary() for model in shared.models] == [model.summary() for model in whole.models]
    assert [model.evaluation for model in shared.models] == [model.evaluation for model in whole.models]
    assert shared.skipped == whole.skipped == 3
    assert shared.best == whole.best


def test_kmeans():
    asked = request("spherical", model="kmeans")
    whole = fit(ArraySource(ROWS), asked)
    assert result_of(fit_with(3, asked)).mixture.digest == whole.mixture.digest


def test_data_that_changed_while_a_run_was_stopped_ends_it(tmp_path):
    changed = ROWS.copy()
    changed[300_000, 2] += 0.5
    asked = request(chunk_rows=CHUNK_ROWS, checkpoint_every=0.0)
    fit_with(2, asked, tmp_path / "run", progress=only(0, KilledAt(16)))
    outcomes = fit_with(3, asked, tmp_path / "run", rows=changed)
    assert isinstance(outcomes[0], RequestError)
    assert "changed" in str(outcomes[0])
    assert all(isinstance(outcome, Reported) for outcome in outcomes[1:])


def test_a_finished_run_is_nobodys_work(tmp_path):
    first = result_of(fit_with(2, request(), tmp_path / "run"))
    again = result_of(fit_with(3, request(), tmp_path / "run"))
    assert again.resumed
    assert again.mixture.digest == first.mixture.digest
    longer = result_of(fit_with(3, request(max_iter=5), tmp_path / "run"))
    assert longer.mixture.digest == fit(ArraySource(ROWS), request(max_iter=5)).mixture.digest


def test_a_world_of_one_exchanges_nothing():
    message = Message({"a": 1}, {"t": torch.ones(2)})
    assert ALONE.gather(message) == [message]
    assert ALONE.broadcast(message) is message
    ALONE.call()
    assert not ALONE.called()
    assert ALONE.leads


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.text(max_size=20_000))
@settings(max_examples=10, deadline=None)
def test_messages_arrive_as_they_were_sent(lengths, text):
    def work(world: World) -> object:
        own = {"x": torch.arange(float(lengths[world.rank])), "scalar": torch.tensor(7.0)}
        gathered = world.gather(Message({"rank": world.rank, "text": text}, own))
        told = world.broadcast(Message({"n": 3}, {"y": torch.ones(2, 3)}) if world.leads else None)
        return gathered, told

    outcomes = run_world(3, work)
    gathered, _ = outcomes[0]  # type: ignore[misc]
    assert [message.facts for message in gathered] == [{"rank": rank, "text": text} for rank in range(3)]
    assert [message.tensors["x"].tolist() for message in gathered] == [list(map(float, range(n))) for n in lengths]
    for received, told in outcomes[1:]:  # type: ignore[misc]
        assert received == []
        assert told.facts == {"n": 3}
        assert torch.equal(told.tensors["y"], torch.ones(2, 3))


def test_only_one_process_tells_of_a_lost_one():
    hub = Hub(3)

    def leave(rank: int) -> BaseException | None:
        try:
            with Team(MemoryLinks(hub, rank), rank, 3, rank, 3) as world:
                world.gather(Message())
        except StreamGMMError as error:
            return error
        return None

    hub.lose()
    assert [type(leave(rank)) for rank in (2, 0)] == [PeerLost, Reported]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2"}, "RANK must be a number; got ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number; got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is 0 and WORLD_SIZE 0"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_told(variables, told, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=told):
        join_world()


def test_alone_unless_launched(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert launched() == (0, 1)
    assert join_world() is ALONE


# What follows runs real processes.

N_ROWS = 700_001
FIT = ("fit", "x.npy", "-k", "4", "--tol", "0", "--init", "random_from_data", "--chunk-rows", "4096")
ON_CPU = ("--device", "cpu")
SHARING_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1",
        reason="needs NCCL 2.30 or later, which takes several processes on one GPU with NCCL_MULTI_RANK_GPU_ENABLE=1",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    np.save(folder / "x.npy", clustered(N_ROWS, 4, 8, spread=1.0).astype(np.float32))
    return folder


def digest_alone(folder: Path, max_iter: int, device: str = "cpu") -> str:
    data = ArraySource(np.load(folder / "x.npy"))
    return fit(data, request(max_iter=max_iter, device=device)).mixture.digest


@contextmanager
def started(size: int, folder: Path, *arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    """A fit by ``size`` processes as a launcher starts them, each the first of a machine if they share a GPU."""
    shared = "cuda" in arguments
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "streamgmm", *FIT, *map(str, arguments)],
                    env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(0 if shared else rank)},
                    stdout=pipe,
                    stderr=pipe,
                    text=True,
                    cwd=folder,
                )
            )
            for rank in range(size)
        ]
        try:
            yield ranks
        finally:
            for process in ranks:
                process.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without saying {text!r}: {process.communicate()[1]}")


def last_words(ranks: list[subprocess.Popen[str]]) -> list[str]:
    """What all of them say on stderr, after they ended by themselves, but for what torch says of NCCL."""
    lines = [line for process in ranks for line in process.communicate(timeout=90)[1].splitlines()]
    return [line for line in lines if "ProcessGroupNCCL" not in line]


def test_torchrun(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "streamgmm"]
    done = subprocess.run(
        [*command, *FIT, *ON_CPU, "--max-iter", "3", "--json"], capture_output=True, text=True, cwd=folder, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    facts = json.loads(done.stdout)
    assert facts["digest"] == digest_alone(folder, 3)
    assert facts["bytes_read"] == round(facts["n_passes"] * N_ROWS) * 8 * 4
    # Of both processes: each reads its share of every pass, and whatever the first of them sampled is no pass.
    assert facts["n_processes"] == 2
    assert facts["bytes_streamed"] == 3 * N_ROWS * 8 * 4
    assert facts["read_rate"] == facts["bytes_streamed"] / facts["seconds"] / 1e9
    assert sum(facts["hit_rates"].values()) == pytest.approx(1)
    assert "streamgmm: error" not in done.stderr


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=SHARING_A_GPU)])
@pytest.mark.parametrize(("how", "status", "size"), [(signal.SIGKILL, 1, 3), (signal.SIGTERM, 143, 2)])
def test_a_process_that_gets_a_signal_ends_the_run_and_others_resume_it(how, status, size, device, folder, tmp_path):
    run = tmp_path / "run"
    endless = ("--device", device, "--max-iter", 10**9, "--output", run, "--checkpoint-every", "0.05")
    with started(size, folder, *endless) as ranks:
        wait_for(ranks[0], "iteration    2")
        ranks[1].send_signal(how)
        told = last_words(ranks)
        killed = how == signal.SIGKILL
        others = {process.returncode for process in (ranks[0], *ranks[2:])}
        assert others == {status}
        assert ranks[1].returncode == (-9 if killed else status)
    assert len(told) == 1, "\n".join(told)
    assert ("lost touch with another process" if killed else "stopped by SIGTERM; run the same") in told[0]
    loaded, _ = newest(run / "checkpoints", torch.device("cpu"), print)
    assert loaded is not None
    iterations = loaded[0].n_iter + 2

    def go_on(world: World) -> FitResult | None:
        source, asked = open_source(folder / "x.npy"), request(max_iter=iterations, device=device)
        return fit(source, asked, run, world=world) if world.leads else assist(source, asked, world=world)

    resumed = result_of(run_world(4, go_on)) if device == "cpu" else go_on(ALONE)
    assert resumed is not None
    assert resumed.resumed
    assert resumed.n_iter == iterations
    assert resumed.mixture.digest == digest_alone(folder, iterations, device)


@pytest.mark.parametrize("size", [pytest.param(size, marks=SHARING_A_GPU) for size in (2, 3)])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_processes_that_share_a_gpu_give_the_bits_of_one(kind, size, folder):
    options = ("--covariance", kind, "--device", "cuda", "--max-iter", 4, "--json")
    found = []
    for ranks_of in (1, size):
        with started(ranks_of, folder, *options) as ranks:
            told = [process.communicate(timeout=200) for process in ranks]
        assert [process.returncode for process in ranks] == [0] * ranks_of, told
        found.append(json.loads(told[0][0].splitlines()[-1]))
    one, several = found
    assert several["n_processes"] == size
    assert several["digest"] == one["digest"]
    assert several["n_passes"] == one["n_passes"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_two_gpus_give_the_bits_of_one(kind, folder, tmp_path):
    options = ["-k", "32", "--covariance", kind, "--device", "cuda", "--max-iter", "4", "--json"]
    fit_on = [*FIT[:2], "--tol", "0", *options]
    alone = subprocess.run(
        [sys.executable, "-m", "streamgmm", *fit_on], capture_output=True, text=True, cwd=folder, check=True
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "streamgmm"]
    both = subprocess.run(
        [*torchrun, *fit_on, "--output", str(tmp_path / "run")], capture_output=True, text=True, cwd=folder, timeout=200
    )
    assert both.returncode == 0, both.stderr
    one, two = (json.loads(done.stdout.splitlines()[-1]) for done in (alone, both))
    assert two["digest"] == one["digest"]
    assert two["n_passes"] == one["n_passes"]
