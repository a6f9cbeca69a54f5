"""An S3 emulator that answers some requests with an error, as object stores do under load."""

import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import fsspec
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

BUCKET = "rehearsal"
KEY = "rehearsal"
ERROR = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


class FaultyStore:
    """A running store.

    Args:
        host: Address to listen on.

    Attributes:
        error_rate: Share of requests answered with an error: 0 for none, 1 while the store is down.
        requests: Requests so far.
        errors: Requests answered with an error so far.
    """

    def __init__(self, host: str):
        self.error_rate = 0.0
        self.requests = self.errors = 0
        self._random = random.Random(0)
        self._store = DomainDispatcherApplication(create_backend_app)
        self._front = self._serve(host, self._answer)
        # For those who look from the side, without errors.
        self._side = self._serve("127.0.0.1", self._store)
        self.files = fsspec.filesystem(
            "s3", key=KEY, secret=KEY, endpoint_url=_url(self._side), use_listings_cache=False
        )
        self.files.mkdir(BUCKET)

    def environment(self) -> dict[str, str]:
        """What a client of it needs."""
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": KEY}
        return {"AWS_ENDPOINT_URL": _url(self._front), "AWS_DEFAULT_REGION": "us-east-1"} | keys

    def count(self, folder: str) -> int:
        """Number of objects below a folder of the bucket."""
        return len(self.files.find(f"{BUCKET}/{folder}"))

    def read(self, name: str) -> str:
        """An object of the bucket."""
        return self.files.cat_file(f"{BUCKET}/{name}").decode()

    def stop(self) -> None:
        """End it."""
        self._front.shutdown()
        self._side.shutdown()

    def _serve(self, host: str, application: Callable[..., Any]) -> BaseWSGIServer:
        server = make_server(host, 0, application, threaded=True, request_handler=_QuietHandler)
        threading.Thread(target=server.serve_forever, name="store", daemon=True).start()
        return server

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.requests += 1
        if self._random.random() >= self.error_rate:
            return self._store(environ, start_response)
        self.errors += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
        return [ERROR]


class _QuietHandler(MotoRequestHandler):
    def log_request(self, *_: Any) -> None:
        """A line a request says nothing here."""


def _url(server: BaseWSGIServer) -> str:
    host, port = server.server_address[:2]
    return f"http://{host}:{port}"
