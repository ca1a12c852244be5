"""Libraries that only some formats need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from streamgmm.errors import RequestError


def require(module: str, extra: str, path: str) -> ModuleType:
    """``module``, which reading ``path`` needs.

    Raises
    ------
    RequestError
        It is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise RequestError(f"{path}: needs {package}; pip install 'streamgmm[{extra}]'") from error
