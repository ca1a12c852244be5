"""Runs as JSON lines, written as they end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def note(path: Path, run: Mapping[str, Any]) -> None:
    """Append ``run`` to the file, and print it."""
    line = json.dumps(run)
    with path.open("a") as file:
        print(line, file=file)
    print(line, flush=True)


def noted(path: Path) -> list[dict[str, Any]]:
    """The runs in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
