"""A small client of the page's interface: ask, wait, save; it goes on when the server restarts."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from loomvideo.platform.errors import UserError
from loomvideo.platform.time_limits import PAGE_ANSWER

POLL_S = 0.5
_BUSY = (429, 502, 503, 504)
_AWAY = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class ServiceError(UserError):
    """The server refused, or a generation failed; the message is the server's own line.

    Attributes:
        status: The HTTP status; 0 for a generation that failed.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Generated:
    """A finished generation: its state as the interface describes it, and its file."""

    state: dict[str, Any]
    content: bytes

    def save(self, path: str | Path) -> Path:
        """Write the file."""
        Path(path).write_bytes(self.content)
        return Path(path)


class Client:
    """Asks a page for generations.

    Args:
        url: Such as ``http://localhost:8000``.
        token: What the page asks for, if anything.
        patience_s: How long to try again while the server is away or busy.
    """

    def __init__(self, url: str, token: str = "", patience_s: float = 300.0) -> None:
        self._url, self._patience_s = url.rstrip("/"), patience_s
        self._session = requests.Session()
        if token:
            self._session.headers["authorization"] = f"Bearer {token}"

    def generate(
        self,
        prompt: str,
        task: str = "t2v",
        source: str | Path | None = None,
        references: Sequence[str | Path] = (),
        on_progress: Callable[[int, int], None] = lambda step, steps: None,
        **settings: Any,
    ) -> Generated:
        """Upload, ask, wait and fetch.

        Args:
            prompt: Instruction or caption.
            task: t2i, t2v, edit, ref_edit or mi2v.
            source: A video or picture to edit.
            references: Reference pictures.
            on_progress: Called with the steps done and all.
            settings: ``seed``, ``steps``, ``guidance_scale``, ``num_frames``, ``width``, ``height``, ``whole``,
                ``negative_prompt``, ``deadline_s``.

        Raises:
            ServiceError: for what the server refuses or cannot make.
        """
        body = {"task": task, "prompt": prompt, **settings}
        if source is not None:
            body["source"] = self.upload(source)
        body["references"] = [self.upload(reference) for reference in references]
        key = {"idempotency-key": secrets.token_urlsafe(16)}  # asked again after a lost answer, it is the same job
        job = self._call("POST", "/api/jobs", json=body, headers=key).json()
        while job["status"] in ("queued", "running"):
            on_progress(job["step"], job["steps"])
            time.sleep(POLL_S)
            job = self._call("GET", f"/api/jobs/{job['id']}").json()
        if job["status"] != "done":
            raise ServiceError(job["error"] or job["status"])
        on_progress(job["steps"], job["steps"])
        return Generated(job, self._call("GET", f"/api/jobs/{job['id']}/result").content)

    def upload(self, path: str | Path) -> str:
        """Send a file; returns its id."""
        if not Path(path).is_file():
            raise ServiceError(f"{path}: no such file")
        headers = {"content-type": "application/octet-stream"}
        return self._call("POST", "/api/uploads", data=Path(path).read_bytes(), headers=headers).json()["id"]

    def _call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request, tried again while the server is away or busy."""
        end, pause = time.monotonic() + self._patience_s, 0.2
        while True:
            try:
                answer = self._session.request(method, self._url + path, timeout=PAGE_ANSWER.here(), **options)
            except _AWAY as error:
                if time.monotonic() + pause > end:
                    raise ServiceError(f"{self._url}: does not answer ({type(error).__name__})") from error
            else:
                if answer.status_code < 400:
                    return answer
                wait_s = float(answer.headers.get("retry-after", pause))
                if answer.status_code not in _BUSY or time.monotonic() + wait_s > end:
                    raise ServiceError(_message(answer), answer.status_code)
                pause = max(pause, wait_s)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def _message(answer: requests.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError):
        return f"error {answer.status_code}"
