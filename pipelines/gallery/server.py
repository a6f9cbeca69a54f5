"""A report with media that a browser does not reach by itself: files in object stores, parts of films, odd codecs.

Nothing but the report's own parts and the media that its rows name is served; a path is never taken from a request.
"""

import contextlib
import functools
import io
import mimetypes
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator

import fsspec
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from loomvideo.pipelines.gallery.parts import FOLDER, PART_NAME, read_rows
from loomvideo.pipelines.gallery.previews import FRAMES, Previews, roles, strip_of
from loomvideo.pipelines.gallery.report import REPORT_FILE, media_base
from loomvideo.pipelines.media.files import resolve
from loomvideo.pipelines.media.fragments import split_fragment
from loomvideo.pipelines.media.media_info import DecodeError
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.storage import Storage, patiently
from loomvideo.platform.time_limits import REPORT_STRIP

_FACTS = '<script type="application/json" id="facts">{'
_CHUNK_BYTES = 1 << 20
# Some pages of the gallery.
_KEPT_STRIPS = 1024
_MEDIA = ("video/", "image/")
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


class _MissingError(Exception):
    """Nothing of that name; the message is one line for a person."""


class Gallery:
    """What the server gives out.

    Args:
        url: The dataset folder, with its report.
    """

    def __init__(self, url: str):
        self.storage = Storage(url)
        self._base = media_base(self.storage)
        self._previews = Previews(self._base, REPORT_STRIP.here())
        # One decoder, one strip after another: a page asks for a hundred at once.
        self._decoding = threading.Lock()
        self._strips: OrderedDict[tuple[int, str], bytes | str] = OrderedDict()

    def close(self) -> None:
        """End the decoder."""
        self._previews.close()

    def page(self) -> str:
        """The report, told that it is served."""
        text = self.storage.read_bytes(REPORT_FILE).decode()
        return text.replace(_FACTS, _FACTS + '"served":true,', 1)

    def part(self, name: str) -> bytes:
        """A part of the report."""
        if not PART_NAME.fullmatch(name):
            raise _MissingError(f"{name} is no part of a report")
        return self.storage.read_bytes(f"{FOLDER}/{name}")

    def path(self, number: int, role: str) -> str:
        """The media path of a row."""
        path = self._roles(number).get(role)
        if path is None:
            raise _MissingError(f"row {number} has no {role}")
        return path

    @functools.lru_cache(4096)  # noqa: B019 - one object lives as long as its server
    def _roles(self, number: int) -> dict[str, str]:
        return roles(next(read_rows(self.storage, [number]))[1])

    def file(self, number: int, role: str) -> str:
        """Absolute path or URL of the media file of a row."""
        return resolve(split_fragment(self.path(number, role))[0], self._base)

    def strip(self, number: int, role: str) -> bytes:
        """Eight frames side by side; a picture is one of them eight times."""
        known = self._strips.get((number, role))
        if known is None:
            with self._decoding:
                known = self._strips.get((number, role)) or self._decoded(self.path(number, role))
                self._strips[number, role] = known
                if len(self._strips) > _KEPT_STRIPS:
                    self._strips.popitem(last=False)
        if isinstance(known, str):
            raise _MissingError(known)
        return known

    def _decoded(self, path: str) -> bytes | str:
        """The strip of a media file, or why there is none."""
        try:
            strip = self._previews.strip(path)
        except DecodeError as error:
            return f"{error.reason}: {str(error)[:200]}"
        return strip.jpeg if strip.frames == FRAMES else _spread(strip.jpeg, strip.frames)


def _spread(jpeg: bytes, frames: int) -> bytes:
    """A strip of fewer frames, repeated so that the page may count on the number."""
    from PIL import Image

    whole = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    parts = np.split(whole, frames, axis=1)
    return strip_of([parts[number * frames // FRAMES] for number in range(FRAMES)]).jpeg


def create_app(url: str, hosts: list[str] | None = None) -> Starlette:
    """The server of a report.

    Args:
        url: The dataset folder, with its report.
        hosts: Names that it answers as; a page of another site cannot ask it under a name of its own.
    """
    gallery = Gallery(url)

    async def page(request: Request) -> Response:
        return Response(await run_in_threadpool(gallery.page), media_type="text/html", headers=_HEADERS)

    async def part(request: Request) -> Response:
        name = request.path_params["name"]
        kind = "image/jpeg" if name.endswith(".jpg") else "text/javascript"
        return Response(await run_in_threadpool(gallery.part, name), media_type=kind, headers=_HEADERS)

    async def strip(request: Request) -> Response:
        data = await run_in_threadpool(gallery.strip, request.path_params["number"], request.path_params["role"])
        return Response(data, media_type="image/jpeg", headers=_HEADERS)

    async def media(request: Request) -> Response:
        file = await run_in_threadpool(gallery.file, request.path_params["number"], request.path_params["role"])
        kind = mimetypes.guess_type(file)[0] or ""
        if not kind.startswith(_MEDIA) or "svg" in kind:
            kind = "application/octet-stream"
        if "://" not in file:
            if not os.path.isfile(file):
                raise _MissingError(f"{file}: no such file")
            return FileResponse(file, media_type=kind, headers=_HEADERS)
        return await run_in_threadpool(_remote, file, kind, request.headers.get("range", ""))

    async def missing(request: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 404, _HEADERS)

    routes = [
        Route("/", page),
        Route(f"/{REPORT_FILE}", page),
        Route(f"/{FOLDER}/{{name}}", part),
        Route("/strip/{number:int}/{role}", strip),
        Route("/media/{number:int}/{role}", media),
    ]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["localhost", "127.0.0.1", "[::1]"])

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        gallery.close()

    handlers = dict.fromkeys((_MissingError, UserError, FileNotFoundError), missing)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers, lifespan=lifespan)


def _remote(url: str, kind: str, asked: str) -> Response:
    """A file of a store, or the range of it that a player asks for."""
    fs, path = fsspec.url_to_fs(url)
    size = patiently(url, fs.info, path)["size"]
    start, end = 0, size
    if asked.startswith("bytes=") and "," not in asked:
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if first.isdigit():
            start, end = int(first), min(int(last) + 1 if last.isdigit() else size, size)
        elif last.isdigit():
            start = max(size - int(last), 0)
    headers = _HEADERS | {"Accept-Ranges": "bytes", "Content-Length": str(max(end - start, 0))}
    if start >= end:
        return Response(status_code=416, headers=_HEADERS | {"Content-Range": f"bytes */{size}"})
    if (start, end) != (0, size) or asked:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"

    def chunks() -> Iterator[bytes]:
        for begin in range(start, end, _CHUNK_BYTES):
            yield patiently(url, fs.cat_file, path, start=begin, end=min(begin + _CHUNK_BYTES, end))

    return StreamingResponse(chunks(), 206 if "Content-Range" in headers else 200, headers, kind)


def run_app(app: Starlette, port: int) -> None:
    """Serve on this machine's loopback until interrupted."""
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def check_port(port: int) -> None:
    """See that nothing else listens on a port of the loopback.

    Raises:
        UserError: if something does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; name another") from error
