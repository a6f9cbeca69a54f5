"""Providers' batch interfaces: many requests in one file, answered within a day at a lower price.

Each provider takes the file that :mod:`~loomvideo.pipelines.vlm.batch_session` writes, tells how far it is, and gives
the answers back by the name of each request. One call is one attempt, as in ``clients``.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from loomvideo.pipelines.vlm.clients import (
    GeminiClient,
    OpenAIClient,
    Reply,
    VLMClient,
    VLMError,
    answered_json,
    call,
    post_json,
    refusal,
)
from loomvideo.pipelines.vlm.requests import VLMRequest
from loomvideo.platform.errors import UserError

UPLOAD_S = 1800.0
RUNNING, ENDED, CANCELLED, REFUSED = "running", "ended", "cancelled", "refused"


@dataclass(frozen=True)
class BatchState:
    """How far a batch is.

    Attributes:
        state: ``running``, ``ended`` (also when only some requests were answered), ``cancelled`` by a person, or
            ``refused`` as a whole.
        told: The state in the provider's words, with counts where it gives them.
        files: Files with answers.
        why: What a refused batch was refused for.
    """

    state: str
    told: str
    files: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class BatchAnswer:
    """What a batch holds of one request: an answer, or why there is none."""

    name: str
    reply: Reply | None
    error: VLMError | None = None


class BatchProvider(Protocol):
    """A batch interface."""

    def line(self, name: str, client: VLMClient, request: VLMRequest) -> dict[str, Any]:
        """A line of the file: a request under a name of its own."""

    def upload(self, path: Path, mark: str) -> str:
        """Upload a file of lines; returns how the provider calls it."""

    def submit(self, file: str, mark: str) -> str:
        """Start a batch that can be found again by its mark; returns how the provider calls it."""

    def find(self, mark: str) -> str | None:
        """A batch with this mark, if one was started."""

    def state(self, batch: str) -> BatchState:
        """How far a batch is."""

    def answers(self, file: str) -> Iterator[BatchAnswer]:
        """The answers in a file."""


def batch_provider(client: VLMClient) -> BatchProvider:
    """The batch interface of a client's provider.

    Raises:
        UserError: if it has none.
    """
    if isinstance(client, OpenAIClient):
        return OpenAIBatches(client)
    if isinstance(client, GeminiClient):
        return GeminiBatches(client)
    raise UserError("judge.batch=true: for judge.kind=openai or gemini, a judge of your own answers in batches anyway")


@dataclass(frozen=True)
class OpenAIBatches:
    """``/files`` and ``/batches`` of the OpenAI API, and of those that follow it."""

    client: OpenAIClient

    def line(self, name: str, client: VLMClient, request: VLMRequest) -> dict[str, Any]:
        """See :class:`BatchProvider`."""
        return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": client.body(request)}

    def upload(self, path: Path, mark: str) -> str:
        """See :class:`BatchProvider`."""
        with path.open("rb") as content:
            files = {"file": (f"{mark}.jsonl", content, "application/jsonl")}
            answer = self._call("POST", "files", UPLOAD_S, data={"purpose": "batch"}, files=files)
        return answered_json(answer)["id"]

    def submit(self, file: str, mark: str) -> str:
        """See :class:`BatchProvider`."""
        body = {
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {"loomvideo": mark},
        }
        return answered_json(self._call("POST", "batches", json=body))["id"]

    def find(self, mark: str) -> str | None:
        """See :class:`BatchProvider`."""
        after = {}
        while True:
            page = answered_json(self._call("GET", "batches", params={"limit": 100, **after}))
            for batch in page.get("data", []):
                if (batch.get("metadata") or {}).get("loomvideo") == mark:
                    return batch["id"]
            if not page.get("has_more") or not page.get("data"):
                return None
            after = {"after": page["data"][-1]["id"]}

    def state(self, batch: str) -> BatchState:
        """See :class:`BatchProvider`."""
        found = answered_json(self._call("GET", f"batches/{batch}"))
        counts = found.get("request_counts") or {}
        told = f"{found['status']}, {counts.get('completed', 0)} of {counts.get('total', 0)} answered"
        files = tuple(found[key] for key in ("output_file_id", "error_file_id") if found.get(key))
        if found["status"] == "failed":
            errors = (found.get("errors") or {}).get("data") or []
            return BatchState(REFUSED, told, (), "; ".join(error.get("message", "") for error in errors[:3]))
        ends = {"completed": ENDED, "expired": ENDED, "cancelled": CANCELLED}
        return BatchState(ends.get(found["status"], RUNNING), told, files)

    def answers(self, file: str) -> Iterator[BatchAnswer]:
        """See :class:`BatchProvider`."""
        for line in _lines(self._call("GET", f"files/{file}/content", UPLOAD_S).content):
            response, error = line.get("response"), line.get("error")
            name = line["custom_id"]
            if response is None:
                # Not asked: the batch ran out of time, or was called off.
                told = (error or {}).get("message") or (error or {}).get("code") or "no answer"
                yield BatchAnswer(name, None, VLMError("not answered", True, told))
            elif response["status_code"] != 200:
                yield BatchAnswer(name, None, refusal(response["status_code"], json.dumps(response.get("body"))))
            else:
                yield _answer(name, self.client, response["body"])

    def _call(self, method: str, path: str, timeout_s: float = 0.0, **content: Any) -> Any:
        url = f"{self.client.base_url.rstrip('/')}/{path}"
        return call(method, url, self.client.headers(), timeout_s or self.client.timeout_s, **content)


@dataclass(frozen=True)
class GeminiBatches:
    """``batchGenerateContent`` of the Gemini API over a file of requests."""

    client: GeminiClient

    def line(self, name: str, client: VLMClient, request: VLMRequest) -> dict[str, Any]:
        """See :class:`BatchProvider`."""
        return {"key": name, "request": client.body(request)}

    def upload(self, path: Path, mark: str) -> str:
        """See :class:`BatchProvider`."""
        headers = self.client.headers() | {
            "X-Goog-Upload-Protocol": "resumable",
            "X-Goog-Upload-Command": "start",
            "X-Goog-Upload-Header-Content-Length": str(path.stat().st_size),
            "X-Goog-Upload-Header-Content-Type": "application/jsonl",
        }
        body = {"file": {"display_name": mark}}
        begun = call("POST", self._url("files", "upload"), headers, self.client.timeout_s, json=body)
        headers = {"X-Goog-Upload-Offset": "0", "X-Goog-Upload-Command": "upload, finalize"}
        with path.open("rb") as content:
            done = call("POST", begun.headers["x-goog-upload-url"], headers, UPLOAD_S, data=content)
        return answered_json(done)["file"]["name"]

    def submit(self, file: str, mark: str) -> str:
        """See :class:`BatchProvider`."""
        body = {"batch": {"display_name": mark, "input_config": {"file_name": file}}}
        url = self._url(f"models/{self.client.model}:batchGenerateContent")
        return post_json(url, body, self.client.headers(), self.client.timeout_s)["name"]

    def find(self, mark: str) -> str | None:
        """See :class:`BatchProvider`."""
        after: dict[str, str] = {}
        while True:
            page = self._get("batches", params={"pageSize": 100, **after})
            for batch in page.get("operations", []):
                if (batch.get("metadata") or {}).get("displayName") == mark:
                    return batch["name"]
            if not page.get("nextPageToken"):
                return None
            after = {"pageToken": page["nextPageToken"]}

    def state(self, batch: str) -> BatchState:
        """See :class:`BatchProvider`."""
        found = self._get(batch)
        about = found.get("metadata") or {}
        state = about.get("state", "").split("_STATE_")[-1].lower()
        counts = about.get("batchStats") or {}
        answered = counts.get("successfulRequestCount", 0)
        told = f"{state}, {answered} of {counts.get('requestCount', 0)} answered"
        output = found.get("response") or about.get("output") or {}
        files = (output["responsesFile"],) if output.get("responsesFile") else ()
        if state == "failed":
            return BatchState(REFUSED, told, (), (found.get("error") or {}).get("message", ""))
        ends = {"succeeded": ENDED, "expired": ENDED, "cancelled": CANCELLED}
        return BatchState(ends.get(state, RUNNING), told, files)

    def answers(self, file: str) -> Iterator[BatchAnswer]:
        """See :class:`BatchProvider`."""
        url = f"{self._url(file, 'download')}:download"
        for line in _lines(call("GET", url, self.client.headers(), UPLOAD_S, params={"alt": "media"}).content):
            error = line.get("error") or line.get("status")
            if line.get("response") is not None:
                yield _answer(line["key"], self.client, line["response"])
            else:
                # Statuses are those of gRPC: 3 is a request that no second attempt would mend.
                told = str((error or {}).get("message", "no answer"))
                again = (error or {}).get("code") not in (3, 400)
                yield BatchAnswer(line["key"], None, VLMError("not answered" if again else "bad request", again, told))

    def _get(self, path: str, **content: Any) -> dict[str, Any]:
        return answered_json(call("GET", self._url(path), self.client.headers(), self.client.timeout_s, **content))

    def _url(self, path: str, service: str = "") -> str:
        root = urlsplit(self.client.base_url.rstrip("/"))
        return f"{urlunsplit(root._replace(path=f'/{service}{root.path}' if service else root.path))}/{path}"


def _answer(name: str, client: OpenAIClient | GeminiClient, body: dict[str, Any]) -> BatchAnswer:
    try:
        return BatchAnswer(name, client.reply(body, 0.0))
    except VLMError as error:
        return BatchAnswer(name, None, error)


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
    # Not splitlines: a text may hold other characters that end lines.
    for line in content.decode("utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)
