"""Fits on real Dask workers: the bits of one process, whoever dies, and one clear line where it cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import dask.array
import distributed
import numpy as np
import pytest

from streamgmm import GaussianMixture, KMeans
from streamgmm.cluster import fitting
from streamgmm.cluster.fitting import fit_on
from streamgmm.errors import DataError, Interrupted, PeerLost, RequestError
from streamgmm.fitting import fit
from streamgmm.io.sources import open_source
from streamgmm.io.sources.array import ArraySource
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest

pytestmark = pytest.mark.filterwarnings("ignore")


def request(**changes):
    settings = {"covariance_type": "diag", "max_iter": 3, "tol": 0.0, "device": "cpu", "init": "random_from_data"}
    return FitRequest(**{"n_components": 4, **settings, **changes})


class Listening(Progress):
    """Notes what is told, and does something at the second iteration, once."""

    def __init__(self, then=lambda: None):
        self.told, self.warned, self._then, self.signal = [], [], then, None

    def stage(self, text):
        self.told.append(text)

    def warn(self, text):
        self.warned.append(text)

    def iteration(self, record):
        self.told.append(record["iteration"])
        if record["iteration"] == 2:
            then, self._then = self._then, lambda: None
            then()

    def stop_requested(self):
        return self.signal


def test_two_workers_give_the_bits_of_one_process(client, path):
    alone, progress = fit(open_source(path), request()), Listening()
    result = fit_on(client, open_source(path), request(), progress=progress)
    assert result.mixture.digest == alone.mixture.digest
    assert result.lower_bounds == alone.lower_bounds
    assert result.n_passes == alone.n_passes
    assert progress.told == ["sampling", "seeding", "training", 1, 2, 3]


@pytest.mark.long
def test_estimators_and_a_dask_array(client, path, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    array = dask.array.from_array(np.load(path), chunks=(50_000, 4))
    settings = {"max_iter": 2, "tol": 0.0, "random_state": 0}
    found = GaussianMixture(3, **settings).fit(array, client=client)
    assert np.array_equal(found.means_, GaussianMixture(3, **settings).fit(str(path)).means_)
    weights = np.linspace(1, 2, len(array))
    centres = KMeans(3, **settings).fit(str(path), sample_weight=weights, client=client.scheduler.address)
    expected = KMeans(3, **settings).fit(str(path), sample_weight=weights)
    assert np.array_equal(centres.cluster_centers_, expected.cluster_centers_)
    assert not list(tmp_path.glob("streamgmm-dask-*"))


@pytest.mark.long
def test_a_stop_saves_what_there_is(client, path, tmp_path):
    asked = request(max_iter=30, chunk_rows=4096)
    progress = Listening(lambda: setattr(progress, "signal", signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as stopped:
        fit_on(client, open_source(path), asked, tmp_path / "run", progress)
    assert stopped.value.exit_status == 143
    resumed = fit(open_source(path), request(max_iter=30), tmp_path / "run")
    assert resumed.resumed
    assert resumed.mixture.digest == fit(open_source(path), request(max_iter=30)).mixture.digest


def test_what_a_worker_cannot_read(client, path, tmp_path, monkeypatch):
    np.save(tmp_path / "y.npy", np.load(path)[:1000])
    source = open_source(tmp_path / "y.npy")
    (tmp_path / "y.npy").unlink()
    with pytest.raises(DataError, match=r"worker tcp://\S+: \S+y\.npy: no such file.*must see the data under the same"):
        fit_on(client, source, request())
    rows = np.load(path)[:1000]
    small = fit_on(client, ArraySource(rows), request())
    assert small.mixture.digest == fit(ArraySource(rows), request()).mixture.digest
    monkeypatch.setattr("streamgmm.io.sources.array.TRAVELLING_BYTES", 1000)
    with pytest.raises(RequestError, match=r"array: is in the memory of this process.*save it and give its path"):
        fit_on(client, ArraySource(rows), request())


def test_what_is_wrong_with_the_data_is_told_as_here(client, path, tmp_path):
    rows = np.load(path)
    rows[100_000, 1] = np.nan
    np.save(tmp_path / "bad.npy", rows)
    with pytest.raises(DataError, match=r"row 100000 of \S+bad.npy: column 1 is nan"):
        fit_on(client, open_source(tmp_path / "bad.npy"), request())


def test_another_version(client, path, monkeypatch):
    monkeypatch.setattr("streamgmm.cluster.members.__version__", "9.9")
    with pytest.raises(RequestError, match=r"has streamgmm \S+ and this process 9\.9; install the same"):
        fit_on(client, open_source(path), request())


def test_a_worker_without_the_package(path, tmp_path):
    (tmp_path / "bare.py").write_text("import sys\nsys.modules['streamgmm'] = None\n")
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, protocol="tcp") as empty:
        address = empty.scheduler_address
        command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--no-dashboard"]
        with subprocess.Popen(
            [*command, "--preload", str(tmp_path / "bare.py")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as worker:
            try:
                told = r"worker tcp://\S+ cannot import streamgmm \(.*\); install there what is installed here"
                with pytest.raises(RequestError, match=told):
                    fit_on(address, open_source(path), request())
            finally:
                worker.kill()


def test_nobody_there(path, monkeypatch):
    monkeypatch.setattr("streamgmm.cluster.connecting.ANSWER_SECONDS", 1)
    with pytest.raises(RequestError, match=r"scheduler tcp://127\.0\.0\.1:9: does not answer within 1 s"):
        fit_on("tcp://127.0.0.1:9", open_source(path), request())
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, processes=False) as empty:
        with pytest.raises(RequestError, match="has no workers; start one with dask worker"):
            fit_on(empty.scheduler_address, open_source(path), request())
        empty.scale(2)
        with distributed.Client(empty, set_as_default=False) as both:
            both.wait_for_workers(2)
            with pytest.raises(RequestError, match="its workers share process"):
                fit_on(both, open_source(path), request())


def test_without_distributed(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RequestError, match=r"needs Dask's distributed; pip install 'streamgmm\[cluster\]'"):
        fit_on("tcp://127.0.0.1:1", open_source(path), request())


def test_a_scheduler_that_is_gone():
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, processes=False) as cluster:
        client = distributed.Client(cluster, set_as_default=False)
        client.close()
        with pytest.raises(PeerLost, match="the scheduler is gone; what was saved is intact: start one"):
            fitting._members_left(client)


def test_restarts_are_bounded(client, path, monkeypatch):
    def lose(self, task):
        raise PeerLost("lost worker x")

    monkeypatch.setattr(fitting._Attempt, "run", lose)
    progress = Listening()
    with pytest.raises(PeerLost, match="lost worker x; gave up after 3 restarts"):
        fit_on(client, open_source(path), request(), progress=progress)
    assert progress.warned == ["lost worker x; beginning again, for there is no RUN folder, on 2 workers"] * 3


@pytest.mark.long
def test_from_the_command_line(cluster, path, tmp_path):
    command = [sys.executable, "-m", "streamgmm", "fit", "x.npy", "-k", "4", "--max-iter", "3", "--tol", "0", "--json"]
    asked = [*command, "--device", "cpu", "--init", "random_from_data", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [*asked, "--scheduler", cluster.scheduler_address], cwd=path.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert fit(open_source(path), request()).mixture.digest in done.stdout.splitlines()[-1]
    assert Path(tmp_path, "run", "model.safetensors").exists()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_worker_that_is_killed_within_a_pass(rank, client, path, tmp_path):
    asked = request(max_iter=30, chunk_rows=4096, checkpoint_every=0.0)

    def kill():
        workers = client.run(os.getpid)
        os.kill(workers[sorted(workers)[rank]], signal.SIGKILL)

    progress = Listening(kill)
    result = fit_on(client, open_source(path), asked, tmp_path / "run", progress)
    assert result.mixture.digest == fit(open_source(path), request(max_iter=30)).mixture.digest
    assert result.resumed
    assert len(progress.warned) == 1
    assert progress.warned[0].startswith("lost worker tcp://127.0.0.1:")
    assert "; going on from the last checkpoint, on " in progress.warned[0]


@pytest.mark.long
def test_a_worker_that_hangs(path, tmp_path, monkeypatch):
    """It keeps its connections and answers nobody; once the scheduler gives it up, so do the others."""
    monkeypatch.setattr(fitting, "LAST_SECONDS", 3.0)
    asked = request(max_iter=30, chunk_rows=4096, checkpoint_every=0.0)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(2)
        workers = client.run(os.getpid)
        hanging = max(workers)

        def hang():
            os.kill(workers[hanging], signal.SIGSTOP)
            cluster.sync(cluster.scheduler.remove_worker, hanging, stimulus_id="as after its time to live")

        progress = Listening(hang)
        try:
            result = fit_on(client, open_source(path), asked, tmp_path / "run", progress)
        finally:
            with suppress(ProcessLookupError):
                os.kill(workers[hanging], signal.SIGKILL)
    assert progress.warned[0].startswith(f"lost worker {hanging}; going on from the last checkpoint")
    assert result.mixture.digest == fit(open_source(path), request(max_iter=30)).mixture.digest
