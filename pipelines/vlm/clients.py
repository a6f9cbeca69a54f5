"""Servers behind one interface: OpenAI-compatible chat (also vLLM and SGLang) and the Gemini REST API.

A client makes one attempt; retries, caching, pace and budget belong to ``session``. Keys come from the environment only
and are never written anywhere.
"""

import base64
import os
import time
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests

from loomvideo.pipelines.vlm.requests import VLMMedia, VLMRequest
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Attributes:
        text: The answer.
        model: The model version the provider says answered.
        tokens_in: Input tokens billed; 0 when the provider does not say.
        tokens_out: Output tokens billed, thinking included.
        latency_s: Seconds the call took.
    """

    text: str
    model: str
    tokens_in: int
    tokens_out: int
    latency_s: float


class VLMError(Exception):
    """A call that gave no answer.

    Attributes:
        reason: blocked, timeout, rate limited, server error, bad request, unreachable or empty.
        retryable: Whether the same call may succeed later.
        retry_after_s: What the provider asks to wait, if it says.
        tokens_in: Input tokens billed all the same, if the provider says.
        tokens_out: Output tokens billed all the same, if the provider says.
    """

    def __init__(
        self,
        reason: str,
        retryable: bool,
        detail: str = "",
        retry_after_s: float | None = None,
        tokens_in: int = 0,
        tokens_out: int = 0,
    ):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.retryable, self.retry_after_s = reason, retryable, retry_after_s
        self.tokens_in, self.tokens_out = tokens_in, tokens_out


class VLMClient(Protocol):
    """Something that answers a request once."""

    def identity(self) -> dict[str, Any]:
        """What makes two clients' answers comparable: kind, model, temperature and the like, for the cache key."""

    def complete(self, request: VLMRequest) -> Reply:
        """Answer, or raise :class:`VLMError`."""


@dataclass(frozen=True)
class OpenAIClient:
    """Chat completions of an OpenAI-compatible server.

    Attributes:
        base_url: Such as ``http://localhost:8000/v1``.
        model: Model name.
        api_key_env: Environment variable with the key; may be unset for a server on this machine.
        temperature: Sampling temperature; None leaves the server's own.
        max_tokens: Most output tokens; None leaves the server's own.
        timeout_s: Seconds before a call is given up.
        structured: ``json_schema``, ``json_object`` or ``none``, as far as the server goes.
        film_part: The kind of part that carries a film: ``video_url``, or ``image_url`` as gateways to Gemini take it.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int | None = 2048
    timeout_s: float = 120.0
    structured: str = "json_schema"
    film_part: str = "video_url"

    def identity(self) -> dict[str, Any]:
        """See :class:`VLMClient`."""
        # How a film is packed changes nothing of what the model sees.
        return {
            "kind": "openai",
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
        }

    def complete(self, request: VLMRequest) -> Reply:
        """See :class:`VLMClient`."""
        started = time.monotonic()
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        answer = post_json(url, self.body(request), self.headers(), self.timeout_s)
        return self.reply(answer, time.monotonic() - started)

    def headers(self) -> dict[str, str]:
        """What authorises a call."""
        key = api_key(self.api_key_env, self.base_url)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, request: VLMRequest) -> dict[str, Any]:
        """A request in the form of the API."""
        content: list[dict[str, Any]] = []
        for part in request.parts:
            is_media = isinstance(part, VLMMedia)
            content += _openai_parts(part, self.film_part) if is_media else [{"type": "text", "text": part}]
        messages: list[dict[str, Any]] = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": content}],
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if request.structured and self.structured == "json_schema":
            schema = {"name": "scores", "strict": True, "schema": request.schema()}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.structured and self.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def reply(self, answer: dict[str, Any], latency_s: float) -> Reply:
        """The reply in an answer of the API.

        Raises:
            VLMError: if it holds none.
        """
        usage = answer.get("usage") or {}
        tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        choices = answer.get("choices") or []
        if not choices:
            raise VLMError("empty", True, "no choices in the answer", None, *tokens)
        message = choices[0].get("message", {})
        if choices[0].get("finish_reason") == "content_filter" or message.get("refusal"):
            raise VLMError("blocked", False, str(message.get("refusal") or "content filter"), None, *tokens)
        text = message.get("content") or ""
        if not text:
            raise VLMError("empty", True, "empty message", None, *tokens)
        return Reply(text, answer.get("model", self.model), *tokens, latency_s)


@dataclass(frozen=True)
class GeminiClient:
    """``generateContent`` of the Gemini REST API.

    Attributes:
        model: Model name.
        base_url: API root; ``https://generativelanguage.googleapis.com/v1beta``.
        api_key_env: Environment variable with the key.
        temperature: Sampling temperature; None leaves the model's own.
        max_tokens: Most output tokens, thinking included; None leaves the model's own.
        timeout_s: Seconds before a call is given up.
    """

    model: str
    base_url: str = "https://generativelanguage.googleapis.com/v1beta"
    api_key_env: str = "GEMINI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int | None = 8192
    timeout_s: float = 120.0

    def identity(self) -> dict[str, Any]:
        """See :class:`VLMClient`."""
        return {
            "kind": "gemini",
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def complete(self, request: VLMRequest) -> Reply:
        """See :class:`VLMClient`."""
        started = time.monotonic()
        url = f"{self.base_url.rstrip('/')}/models/{self.model}:generateContent"
        answer = post_json(url, self.body(request), self.headers(), self.timeout_s)
        return self.reply(answer, time.monotonic() - started)

    def headers(self) -> dict[str, str]:
        """What authorises a call."""
        key = api_key(self.api_key_env, self.base_url)
        return {"x-goog-api-key": key} if key else {}

    def body(self, request: VLMRequest) -> dict[str, Any]:
        """A request in the form of the API."""
        parts: list[dict[str, Any]] = []
        for part in request.parts:
            parts += _gemini_parts(part) if isinstance(part, VLMMedia) else [{"text": part}]
        generation: dict[str, Any] = {}
        if self.max_tokens is not None:
            generation["maxOutputTokens"] = self.max_tokens
        if self.temperature is not None:
            generation["temperature"] = self.temperature
        if request.structured:
            generation["responseMimeType"] = "application/json"
            generation["responseSchema"] = _gemini_schema(request.schema())
        body: dict[str, Any] = {"contents": [{"role": "user", "parts": parts}], "generationConfig": generation}
        if request.system:
            body["systemInstruction"] = {"parts": [{"text": request.system}]}
        return body

    def reply(self, answer: dict[str, Any], latency_s: float) -> Reply:
        """The reply in an answer of the API.

        Raises:
            VLMError: if it holds none.
        """
        usage = answer.get("usageMetadata") or {}
        out = int(usage.get("candidatesTokenCount") or 0) + int(usage.get("thoughtsTokenCount") or 0)
        tokens = (int(usage.get("promptTokenCount") or 0), out)
        blocked = (answer.get("promptFeedback") or {}).get("blockReason")
        if blocked:
            raise VLMError("blocked", False, blocked, None, *tokens)
        candidates = answer.get("candidates") or []
        if not candidates:
            raise VLMError("empty", True, "no candidates in the answer", None, *tokens)
        finish = candidates[0].get("finishReason", "")
        if finish in ("SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "IMAGE_SAFETY", "RECITATION"):
            raise VLMError("blocked", False, finish, None, *tokens)
        parts_out = (candidates[0].get("content") or {}).get("parts") or []
        text = "".join(part.get("text", "") for part in parts_out if not part.get("thought"))
        if not text:
            raise VLMError("empty", True, f"no text, finish reason {finish}", None, *tokens)
        return Reply(text, answer.get("modelVersion", self.model), *tokens, latency_s)


def api_key(variable: str, base_url: str) -> str | None:
    """The key from the environment; None is allowed for a server on this machine.

    Raises:
        UserError: if the variable is unset and the server is elsewhere.
    """
    key = os.environ.get(variable)
    if key or urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1"):
        return key or None
    raise UserError(f"model at {base_url}: set {variable} in the environment, or api_key_env to another variable")


def post_json(url: str, body: dict[str, Any], headers: dict[str, str], timeout_s: float) -> dict[str, Any]:
    """POST and read JSON; HTTP and network errors become :class:`VLMError` by kind."""
    return answered_json(call("POST", url, headers, timeout_s, json=body))


def call(method: str, url: str, headers: dict[str, str], timeout_s: float, **content: Any) -> requests.Response:
    """One HTTP call; anything but success becomes a :class:`VLMError` by kind."""
    try:
        response = requests.request(method, url, headers=headers, timeout=timeout_s, **content)
    except requests.Timeout as error:
        raise VLMError("timeout", retryable=True, detail=f"{timeout_s:g} s") from error
    except requests.RequestException as error:
        raise VLMError("unreachable", retryable=True, detail=type(error).__name__) from error
    if response.status_code != 200:
        raise refusal(response.status_code, response.text, _retry_after(response.headers.get("Retry-After")))
    return response


def answered_json(response: requests.Response) -> dict[str, Any]:
    """The JSON of an answer."""
    try:
        return response.json()
    except ValueError as error:
        raise VLMError("server error", retryable=True, detail="answer is not JSON") from error


def refusal(status: int, text: str, retry_after_s: float | None = None) -> VLMError:
    """The error that an HTTP status and the words beside it stand for."""
    detail = f"HTTP {status}: {text[:200]}"
    if status == 429:
        return VLMError("rate limited", True, detail, retry_after_s)
    if status >= 500 or status == 408:
        return VLMError("server error", True, detail, retry_after_s)
    if "content_filter" in text or "content management policy" in text:
        return VLMError("blocked", False, detail)
    return VLMError("bad request", False, detail)


def _gemini_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema of flat fields in the provider's dialect, which knows no integers in an enumeration."""
    properties: dict[str, Any] = {}
    for name, kind in schema["properties"].items():
        if kind.get("type") == "integer":
            properties[name] = {"type": "INTEGER", "minimum": min(kind["enum"]), "maximum": max(kind["enum"])}
        elif kind.get("type") == "boolean":
            properties[name] = {"type": "BOOLEAN"}
        else:
            properties[name] = {"type": "STRING"} | ({"enum": kind["enum"]} if "enum" in kind else {})
    return {"type": "OBJECT", "properties": properties, "required": list(properties)}


def _retry_after(value: str | None) -> float | None:
    return float(value) if value and value.replace(".", "", 1).isdigit() else None


def _openai_parts(media: VLMMedia, film_part: str) -> list[dict[str, Any]]:
    if media.film is not None:
        return [{"type": film_part, film_part: {"url": _data_url("video/mp4", media.film)}}]
    return [picture_part(media.mime, frame) for frame in media.frames]


def picture_part(mime: str, content: bytes) -> dict[str, Any]:
    """A picture in a chat message of the OpenAI dialect."""
    return {"type": "image_url", "image_url": {"url": _data_url(mime, content)}}


def _gemini_parts(media: VLMMedia) -> list[dict[str, Any]]:
    if media.film is not None:
        return [{"inline_data": {"mime_type": "video/mp4", "data": _base64(media.film)}}]
    return [{"inline_data": {"mime_type": media.mime, "data": _base64(frame)}} for frame in media.frames]


def _data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{_base64(content)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
