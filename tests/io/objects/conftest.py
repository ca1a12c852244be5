"""A real S3 server in this process, and what may go wrong between it and a reader."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from werkzeug.exceptions import NotFound
from werkzeug.serving import make_server
from werkzeug.utils import send_from_directory
from zarr.codecs import Crc32cCodec

from streamgmm.io.objects import store, urls
from streamgmm.io.objects.patience import Patience

N, D, CHUNK, SHARD = 1000, 4, 50, 250

Answer = Callable[[Any, Any], Any]


class Faults:
    """Between the server and its clients: counts requests, and answers some of them in its own way.

    Attributes
    ----------
    asked : list of (str, str, str or None)
        Method, path and range of every request.
    """

    def __init__(self, application: Answer) -> None:
        self._application = application
        self.asked: list[tuple[str, str, str | None]] = []
        self.rules: list[tuple[str, int, Answer]] = []
        self.lock = threading.Lock()
        self.folder = Path()

    def inject(self, path: str, times: int, answer: Answer) -> None:
        """Have ``answer`` deal with the next so many GETs of what ends in ``path``."""
        self.rules.append((path, times, answer))

    def __call__(self, environ: Any, start: Any) -> Any:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        with self.lock:
            self.asked.append((method, path, environ.get("HTTP_RANGE")))
            for index, (end, times, answer) in enumerate(self.rules):
                if method == "GET" and path.endswith(end) and times:
                    self.rules[index] = (end, times - 1, answer)
                    break
            else:
                answer = self._web if path.startswith("/web/") else self._application
        return answer(environ, start)

    def _web(self, environ: Any, start: Any) -> Any:
        """A plain web server of the files in ``folder``."""
        try:
            answer: Answer = send_from_directory(self.folder, environ["PATH_INFO"].removeprefix("/web/"), environ)
        except NotFound as error:
            answer = error
        return answer(environ, start)

    def reads(self, path: str) -> int:
        """GETs of what ends in ``path``."""
        return sum(method == "GET" and asked.endswith(path) for method, asked, _ in self.asked)


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, Faults]]:
    from moto.server import DomainDispatcherApplication, create_backend_app

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    running = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", faults
    running.shutdown()
    thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited between tries; nobody waits them."""
    found: list[float] = []

    async def note(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(store, "PATIENCE", Patience(tries=4, sleep=note))
    return found


@pytest.fixture
def s3(server: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Faults]:
    """The server as the environment tells of it, with an empty bucket."""
    import obstore

    endpoint, faults = server
    settings = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    faults.rules.clear()
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/vectors", method="PUT")):
        pass
    bucket = bucket_of("s3://vectors")
    obstore.delete(bucket, [each["path"] for batch in obstore.list(bucket) for each in batch])
    faults.asked.clear()
    yield faults
    faults.rules.clear()


def bucket_of(url: str) -> Any:
    """A store to write to."""
    from obstore.store import from_url

    return from_url(url, client_options=urls._client_options("s3"))


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def put(url: str, rows: np.ndarray, **options: object) -> str:
    """Write rows as a sharded array with checksums."""
    from zarr.storage import ObjectStore

    layout = {"chunks": (CHUNK, D), "shards": (SHARD, D), "compressors": [Crc32cCodec()], **options}
    array = zarr.create_array(
        ObjectStore(bucket_of(url)), shape=rows.shape, dtype=rows.dtype, config={"write_empty_chunks": True}, **layout
    )
    array[:] = rows
    return url
