"""Addresses of object stores, and the Zarr stores behind them."""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING, Any

from streamgmm.errors import DataError
from streamgmm.io.optional import require
from streamgmm.io.wording import reason_of

if TYPE_CHECKING:
    from zarr.abc.store import Store

CLOUDS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
WEB = ("http", "https")
MEMORY = "memory"

REQUEST_SECONDS = "60s"
"""How long one request may take: a range of 16 MiB over a link of 0.3 MB/s."""

CONNECT_SECONDS = "10s"


def scheme_of(path: str) -> str:
    """``s3`` of ``s3://bucket/x.zarr``; empty for a path of the file system."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    return found[1].lower() if found else ""


def open_store(url: str) -> Store:
    """The store whose root ``url`` names. Credentials are found as the cloud's own tools find them, in the environment.

    Raises
    ------
    DataError
        No such scheme, or an address that cannot be one.
    RequestError
        obstore is not installed.
    """
    scheme = scheme_of(url)
    if scheme == MEMORY:
        return _in_memory(url)
    if scheme not in (*CLOUDS, *WEB):
        known = "s3://, gs://, az://, http(s):// or memory://"
        raise DataError(f"{url}: {scheme}:// is no store that is known; give {known}, or a path")
    require("obstore", "s3", url)
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    try:
        # Its own retries would wait without end that we can see; ours are bounded, and told.
        store = from_url(url.rstrip("/"), client_options=_client_options(scheme), retry_config=_ONCE)
        return ObjectStore(store, read_only=True)
    except Exception as error:
        raise DataError(f"{url}: is no usable address ({reason_of(error)[:160]}); check it") from None


_ONCE: Any = {"max_retries": 0}


def _client_options(scheme: str) -> Any:
    plain = scheme == "http" or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    options = {"timeout": REQUEST_SECONDS, "connect_timeout": CONNECT_SECONDS}
    return {**options, **({"allow_http": True} if plain else {})}


def _in_memory(url: str) -> Store:
    """fsspec's files in the memory of this process."""
    from zarr.storage import FsspecStore

    # It warns that the file system is not asynchronous, which it then makes it.
    with warnings.catch_warnings(action="ignore"):
        return FsspecStore.from_url(url, read_only=True)
