from __future__ import annotations

import pytest

from streamgmm.cluster.members import Member, describe, device_for, host_of, places_of
from streamgmm.errors import RequestError


def member(name, machine="a", gpus="", n_gpus=0):
    return Member(f"tcp://{machine}:{name}", machine, name, n_gpus, gpus, ())


@pytest.mark.parametrize(
    ("masks", "locals_"),
    [
        (["", "", ""], [0, 1, 2]),  # plain workers, which see every GPU, take one each
        (["0,1,2", "1,2,0", "2,0,1"], [0, 0, 0]),  # dask-cuda gave each its own, first
    ],
)
def test_each_worker_of_a_machine_takes_a_gpu_of_its_own(masks, locals_):
    members = [member(i, gpus=mask, n_gpus=3) for i, mask in enumerate(masks)]
    places = places_of([*members, member(9, "b")])
    assert [place.local_rank for place in places] == [*locals_, 0]
    assert [place.local_size for place in places] == [3, 3, 3, 1]
    assert [(place.rank, place.size) for place in places] == [(rank, 4) for rank in range(4)]


def test_one_kind_of_device_for_all():
    with_gpu, without = member(1, n_gpus=2), member(2)
    assert device_for([with_gpu, with_gpu], "auto") == "cuda"
    assert device_for([without], "auto") == "cpu"
    assert device_for([with_gpu, without], "cpu") == "cpu"
    with pytest.raises(RequestError, match="worker tcp://a:2 sees no GPU and others do"):
        device_for([with_gpu, without], "auto")


def test_a_process_describes_itself():
    own = describe("tcp://10.1.2.3:40000")
    assert own.host == host_of(own.address) == "10.1.2.3"
    assert dict(own.versions).keys() == {"streamgmm", "torch", "Python"}
    assert own.process > 1
