"""Threads that do one tile each, whatever the process around them does."""

from __future__ import annotations

import torch

from streamgmm.parallel import map_in_order, one_thread


def test_results_come_in_order():
    assert list(map_in_order(lambda item: item * item, range(50), 3)) == [item * item for item in range(50)]


def test_a_worker_keeps_to_one_thread_when_the_process_asks_for_more():
    """torch hands the process's number to a thread at its first operation, which may be long after it began."""
    before, workers = torch.get_num_threads(), 3

    def threads_after_a_product(_: int) -> int:
        matrix = torch.ones(300, 300)
        assert float((matrix @ matrix)[0, 0]) == 300
        return torch.get_num_threads()

    try:
        list(map_in_order(lambda item: item, range(workers), workers))
        torch.set_num_threads(4)
        assert set(map_in_order(threads_after_a_product, range(4 * workers), workers)) == {1}
    finally:
        torch.set_num_threads(before)


def test_one_thread_gives_back_what_was_before():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
