"""What a run was asked for, and where its lines go."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TextIO

import torch

Record = dict[str, Any]
"""One line of output: what was measured, then what was found."""


class Skipped(Exception):
    """A measurement given up for a reason that is no failure."""


@dataclass(frozen=True)
class Session:
    """Options of the command; ``only`` is searched for in the words of a measurement's labels."""

    device: torch.device
    rows: int
    repeats: int
    quick: bool
    only: re.Pattern[str]
    output: TextIO
    flash_kmeans: ModuleType | None = None
    flash_gmm: ModuleType | None = None

    def wants(self, labels: Record) -> bool:
        return self.only.search(" ".join(str(value) for value in labels.values())) is not None

    def attempt(self, labels: Record, measure: Callable[[], Record]) -> Record:
        """One line of output; an error is told in it, and stops nothing else."""
        begun = time.perf_counter()
        try:
            record = labels | measure()
        except Skipped as reason:
            record = labels | {"verdict": f"skipped: {reason}"}
        except Exception as error:
            torch.cuda.empty_cache()
            message = (str(error).splitlines() or [""])[0][:160]
            record = labels | {"verdict": f"failed: {type(error).__name__}: {message}"}
        record["took_s"] = time.perf_counter() - begun
        if record["verdict"].startswith("skipped"):
            print(f"# {' '.join(str(value) for value in labels.values())}: {record['verdict']}", flush=True)
        print(json.dumps(record, default=str), file=self.output, flush=True)
        return record
