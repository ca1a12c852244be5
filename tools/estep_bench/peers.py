"""Finding the peers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def peer_module(name: str, path: Path | None) -> ModuleType | None:
    """``name`` from ``path`` if given, or else as installed; None where it is missing."""
    if path is not None:
        sys.path.insert(0, str(path.resolve()))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"# {name}: {error}; not measured", flush=True)
        return None
