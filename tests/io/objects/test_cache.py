from __future__ import annotations

import os

import pytest

from streamgmm.errors import RequestError
from streamgmm.io.objects.cache import Cache, Shelf


def kept(shelf, key, size):
    """Whether an object of so many bytes was given room, and is there afterwards."""
    name = shelf.name(key, "v", size)
    with shelf.room(name, size) as descriptor:
        if descriptor is not None:
            os.pwrite(descriptor, b"x" * size, 0)
    assert (shelf.find(name, size) is None) == (descriptor is None)
    return descriptor is not None


def test_what_came_first_stays(tmp_path):
    shelf = Shelf(Cache(tmp_path, 1000), "s3://a")
    assert [kept(shelf, str(i), 400) for i in range(4)] == [True, True, False, False]
    assert kept(shelf, "small", 200)
    assert [shelf.find(shelf.name(str(i), "v", 400), 400) is not None for i in range(4)] == [True, True, False, False]


def test_only_data_that_nobody_reads_makes_room_the_oldest_first(tmp_path):
    cache = Cache(tmp_path, 1000)
    first, second, third = (Shelf(cache, f"s3://{name}") for name in "abc")
    assert all(kept(shelf, "x", 400) for shelf in (first, second))
    assert not kept(third, "x", 400)
    for shelf, time in ((first, 20), (second, 10)):
        shelf.close()
        os.utime(shelf.path / ".lock", (time, time))
    assert kept(third, "x", 400)
    assert [shelf.path.exists() for shelf in (first, second, third)] == [True, False, True]


def test_what_was_not_finished_is_neither_found_nor_counted(tmp_path):
    shelf = Shelf(Cache(tmp_path, 1000), "s3://a")
    name = shelf.name("x", "v", 900)
    with pytest.raises(ZeroDivisionError), shelf.room(name, 900):
        raise ZeroDivisionError
    assert shelf.find(name, 900) is None
    (shelf.path / f"{name}.part").write_bytes(b"x" * 900)  # of a process that was killed
    assert kept(shelf, "x", 900)


def test_two_processes_do_not_fetch_the_same_object(tmp_path):
    cache = Cache(tmp_path, 1000)
    one, other = Shelf(cache, "s3://a"), Shelf(cache, "s3://a")
    name = one.name("x", "v", 300)
    with one.room(name, 300) as descriptor:
        assert descriptor is not None
        with other.room(name, 300) as none:
            assert none is None
    assert other.find(name, 300) is not None


def test_other_versions_are_dropped(tmp_path):
    shelf = Shelf(Cache(tmp_path, 1000), "s3://a")
    assert kept(shelf, "x", 300)
    shelf.keep({shelf.name("x", "newer", 300)})
    assert shelf.find(shelf.name("x", "v", 300), 300) is None


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"file: cannot be a cache \(.*\); name another folder"):
        Shelf(Cache(tmp_path / "file", 10), "s3://a")
