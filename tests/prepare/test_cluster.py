"""Real Dask workers: the same bytes; and what a person is told when they cannot be had."""

from __future__ import annotations

import os
import signal

import dask.array
import numpy as np
import pytest

from streamgmm.errors import RequestError
from streamgmm.prepare import prepare
from tests.prepare.conftest import contents, raw_rows

distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {"steps": "standardise,pca=3", "shuffle": True, "holdout": 0.2, "ids": True, "shard_size": "8KiB"}


@pytest.fixture
def expected(here):
    prepare("x.npy", "a.zarr", **SETTINGS)
    return {name[2:]: value for name, value in contents(here).items()}


def made(folder):
    return {name[2:]: value for name, value in contents(folder).items() if name.startswith("y.")}


def test_two_workers_give_the_same_bytes(here, expected, cluster):
    prepare("x.npy", "y.zarr", **SETTINGS, scheduler=cluster.scheduler_address)
    assert made(here) == expected


def test_a_client_of_one_s_own_and_a_dask_array(here, expected, cluster):
    with distributed.Client(cluster, set_as_default=False) as client:
        prepare(dask.array.from_array(raw_rows(), chunks=(500, 8)), "y.zarr", **SETTINGS, scheduler=client)
        assert client.status == "running"
    assert made(here) == expected


def test_a_worker_that_dies_is_made_up_for(here, expected, cluster):
    with distributed.Client(cluster, set_as_default=False) as client:
        first = next(iter(client.run(os.getpid).values()))

        class Killing:
            """After the first shard, while others are under way."""

            writing, killed = False, False

            def stage(self, name, total):
                self.writing = name == "writing"

            def advance(self):
                if self.writing and not self.killed:
                    self.killed = True
                    os.kill(first, signal.SIGKILL)

            def tell(self, text): ...

        progress = Killing()
        prepare("x.npy", "y.zarr", **SETTINGS, scheduler=client, progress=progress)
        assert progress.killed
    assert made(here) == expected


def test_processes_of_this_machine(here, expected):
    prepare("x.npy", "y.zarr", **SETTINGS, scheduler="processes", workers=2)
    assert made(here) == expected


def test_what_the_workers_cannot_read_is_refused(here, cluster):
    with pytest.raises(RequestError, match="where the scheduler's workers cannot read it"):
        prepare(raw_rows(), "y.zarr", scheduler=cluster.scheduler_address)
    assert not list(here.glob("*.preparing"))


def test_an_error_of_a_worker_is_told_as_here(here, cluster):
    x = raw_rows()
    x[2500, 3] = np.nan
    np.save("bad.npy", x)
    with pytest.raises(ValueError, match=r"row 2500 of .*bad\.npy: holds NaN or infinity; add the step drop"):
        prepare("bad.npy", "y.zarr", "pca=2", scheduler=cluster.scheduler_address)


def test_an_address_that_leads_nowhere(here, monkeypatch):
    monkeypatch.setattr("streamgmm.cluster.connecting.ANSWER_SECONDS", 1)
    with pytest.raises(RequestError, match=r"scheduler tcp://127\.0\.0\.1:9: does not answer within 1 s"):
        prepare("x.npy", "y.zarr", scheduler="tcp://127.0.0.1:9")
    with pytest.raises(RequestError, match="must be threads, processes or an address"):
        prepare("x.npy", "y.zarr", scheduler="fast")


def test_a_scheduler_without_workers(here, monkeypatch):
    monkeypatch.setattr("streamgmm.cluster.connecting.ANSWER_SECONDS", 1)
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=None, processes=False) as empty,
        pytest.raises(RequestError, match="has no workers; start one with dask worker"),
    ):
        prepare("x.npy", "y.zarr", scheduler=empty.scheduler_address)


def test_a_worker_without_the_package(here, cluster, monkeypatch):
    def missing(self, function, *arguments, **options):
        return {"tcp://w:1": ModuleNotFoundError("No module named 'streamgmm'")}

    monkeypatch.setattr(distributed.Client, "run", missing)
    with pytest.raises(RequestError, match="worker tcp://w:1 cannot import streamgmm"):
        prepare("x.npy", "y.zarr", scheduler=cluster.scheduler_address)
