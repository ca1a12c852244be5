"""The command line run inside the test's process: importing torch anew for every call would take most of the time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgmm.cli import main
from tests.oracles import clustered


@dataclass(frozen=True)
class Outcome:
    """What a call left in the terminal."""

    status: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """Lines that tell of an error; usage lines may stand before them."""
        return [line for line in self.stderr.splitlines() if line.startswith("streamgmm: error: ")]

    @property
    def json(self) -> dict[str, Any]:
        """The object that ``--json`` prints as the last line."""
        return json.loads(self.stdout.splitlines()[-1])


Call = Callable[..., Outcome]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """``call("fit", path, "-k", 3)`` as a user would type it."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        return Outcome(int(left.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def refused(call: Call) -> Call:
    """As ``call``, for what must end with one line that holds every fragment; gives that line."""

    def run(*arguments: object, told: tuple[str, ...] = (), status: int = 2) -> Outcome:
        outcome = call(*arguments)
        assert outcome.status == status, outcome
        assert len(outcome.errors) == 1, outcome.stderr
        assert outcome.stderr.splitlines()[-1] == outcome.errors[0]
        assert all(line.startswith("Usage: ") for line in outcome.stderr.splitlines()[:-1]), outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert len(outcome.errors[0]) < 700
        for fragment in told:
            assert fragment in outcome.errors[0], outcome.errors[0]
        return outcome

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in that holds ``x.npy``, 2000 rows of 4 features."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", clustered(2000, 3, 4, spread=2.0).astype(np.float32))
    return tmp_path


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` and its bytes; folders too, so that a new empty one is seen."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }
