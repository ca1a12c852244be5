from __future__ import annotations

from streamgmm.progress import TerminalProgress


def test_one_of_several_processes_takes_the_others_to_be_as_fast_until_they_meet():
    rows_done = TerminalProgress(quiet=False, processes=4)._rows_done
    assert [rows_done(known, 1000, known) for known in (10, 20, 200)] == [40, 80, 800]
    # They met: the others had summed 150 each, and 30 rows later may have as many more.
    assert rows_done(650 + 30, 1000, 230) == 680
    assert rows_done(650 + 60, 1000, 260) == 710 + 3 * 30
    assert rows_done(650 + 200, 1000, 400) == 1000
    # Another pass.
    assert rows_done(10, 1000, 410) == 10
    assert rows_done(20, 1000, 420) == 20 + 3 * 10


def test_a_process_alone_tells_what_it_knows():
    rows_done = TerminalProgress(quiet=False)._rows_done
    assert [rows_done(known, 100, own) for known, own in ((40, 40), (100, 100), (0, 100), (30, 130))] == [
        40, 100, 100, 30,
    ]  # fmt: skip
