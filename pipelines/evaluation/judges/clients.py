"""Judges behind one interface: OpenAI-compatible chat (also vLLM and SGLang) and the Gemini REST API.

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

from loomvideo.pipelines.evaluation.judges.requests import JudgeRequest, Media
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class Reply:
    """What a judge answered.

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


class JudgeError(Exception):
    """A call that gave no answer.

    Attributes:
        reason: blocked, timeout, rate limited, server error, bad request, unreachable or empty.
        retryable: Whether the same call may succeed later.
        retry_after_s: What the provider asks to wait, if it says.
    """

    def __init__(self, reason: str, retryable: bool, detail: str = "", retry_after_s: float | None = None):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.retryable, self.retry_after_s = reason, retryable, retry_after_s


class JudgeClient(Protocol):
    """Something that answers a request once."""

    def identity(self) -> dict[str, Any]:
        """What makes two clients' answers comparable: kind, model, temperature and the like, for the cache key."""

    def complete(self, request: JudgeRequest) -> Reply:
        """Answer, or raise :class:`JudgeError`."""


@dataclass(frozen=True)
class OpenAIClient:
    """Chat completions of an OpenAI-compatible server.

    Attributes:
        base_url: Such as ``http://localhost:8000/v1``.
        model: Model name.
        api_key_env: Environment variable with the key; may be unset for a server on this machine.
        temperature: Sampling temperature; None leaves the server's own.
        max_tokens: Most output tokens.
        timeout_s: Seconds before a call is given up.
        structured: ``json_schema``, ``json_object`` or ``none``, as far as the server goes.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int = 2048
    timeout_s: float = 120.0
    structured: str = "json_schema"

    def identity(self) -> dict[str, Any]:
        """See :class:`JudgeClient`."""
        return {
            "kind": "openai",
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
        }

    def complete(self, request: JudgeRequest) -> Reply:
        """See :class:`JudgeClient`."""
        content: list[dict[str, Any]] = [{"type": "text", "text": request.text}]
        for media in request.media:
            content.append({"type": "text", "text": f"{media.label}:"})
            content += _openai_parts(media)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if request.structured and self.structured == "json_schema":
            schema = {"name": "scores", "strict": True, "schema": request.schema()}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.structured and self.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        key = api_key(self.api_key_env, self.base_url)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        started = time.monotonic()
        answer = post_json(f"{self.base_url.rstrip('/')}/chat/completions", body, headers, self.timeout_s)
        choices = answer.get("choices") or []
        if not choices:
            raise JudgeError("empty", retryable=True, detail="no choices in the answer")
        message = choices[0].get("message", {})
        if choices[0].get("finish_reason") == "content_filter" or message.get("refusal"):
            raise JudgeError("blocked", retryable=False, detail=str(message.get("refusal") or "content filter"))
        text = message.get("content") or ""
        if not text:
            raise JudgeError("empty", retryable=True, detail="empty message")
        usage = answer.get("usage") or {}
        return Reply(
            text,
            answer.get("model", self.model),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            time.monotonic() - started,
        )


@dataclass(frozen=True)
class GeminiClient:
    """``generateContent`` of the Gemini REST API.

    Attributes:
        model: Model name.
        base_url: API root; ``https://generativelanguage.googleapis.com/v1beta``.
        api_key_env: Environment variable with the key.
        temperature: Sampling temperature; None leaves the model's own.
        max_tokens: Most output tokens, thinking included.
        timeout_s: Seconds before a call is given up.
    """

    model: str
    base_url: str = "https://generativelanguage.googleapis.com/v1beta"
    api_key_env: str = "GEMINI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int = 8192
    timeout_s: float = 120.0

    def identity(self) -> dict[str, Any]:
        """See :class:`JudgeClient`."""
        return {
            "kind": "gemini",
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def complete(self, request: JudgeRequest) -> Reply:
        """See :class:`JudgeClient`."""
        parts: list[dict[str, Any]] = [{"text": request.text}]
        for media in request.media:
            parts.append({"text": f"{media.label}:"})
            parts += _gemini_parts(media)
        generation: dict[str, Any] = {"maxOutputTokens": self.max_tokens}
        if self.temperature is not None:
            generation["temperature"] = self.temperature
        if request.structured:
            properties: dict[str, Any] = {"reasoning": {"type": "STRING"}}
            properties |= {axis: {"type": "INTEGER", "minimum": 1, "maximum": 5} for axis in request.axes}
            generation["responseMimeType"] = "application/json"
            generation["responseSchema"] = {"type": "OBJECT", "properties": properties, "required": list(properties)}
        body = {"contents": [{"role": "user", "parts": parts}], "generationConfig": generation}
        key = api_key(self.api_key_env, self.base_url)
        headers = {"x-goog-api-key": key} if key else {}
        started = time.monotonic()
        url = f"{self.base_url.rstrip('/')}/models/{self.model}:generateContent"
        answer = post_json(url, body, headers, self.timeout_s)
        blocked = (answer.get("promptFeedback") or {}).get("blockReason")
        if blocked:
            raise JudgeError("blocked", retryable=False, detail=blocked)
        candidates = answer.get("candidates") or []
        if not candidates:
            raise JudgeError("empty", retryable=True, detail="no candidates in the answer")
        finish = candidates[0].get("finishReason", "")
        if finish in ("SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "IMAGE_SAFETY", "RECITATION"):
            raise JudgeError("blocked", retryable=False, detail=finish)
        parts_out = (candidates[0].get("content") or {}).get("parts") or []
        text = "".join(part.get("text", "") for part in parts_out if not part.get("thought"))
        if not text:
            raise JudgeError("empty", retryable=True, detail=f"no text, finish reason {finish}")
        usage = answer.get("usageMetadata") or {}
        out = int(usage.get("candidatesTokenCount") or 0) + int(usage.get("thoughtsTokenCount") or 0)
        version = answer.get("modelVersion", self.model)
        return Reply(text, version, int(usage.get("promptTokenCount") or 0), out, time.monotonic() - started)


def api_key(variable: str, base_url: str) -> str | None:
    """The key from the environment; None is allowed for a server on this machine.

    Raises:
        UserError: if the variable is unset and the server is elsewhere.
    """
    key = os.environ.get(variable)
    if key or urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1"):
        return key or None
    raise UserError(f"judge at {base_url}: set {variable} in the environment, or judge.api_key_env to another variable")


def post_json(url: str, body: dict[str, Any], headers: dict[str, str], timeout_s: float) -> dict[str, Any]:
    """POST and read JSON; HTTP and network errors become :class:`JudgeError` by kind."""
    try:
        response = requests.post(url, json=body, headers=headers, timeout=timeout_s)
    except requests.Timeout as error:
        raise JudgeError("timeout", retryable=True, detail=f"{timeout_s:g} s") from error
    except requests.RequestException as error:
        raise JudgeError("unreachable", retryable=True, detail=type(error).__name__) from error
    if response.status_code == 200:
        try:
            return response.json()
        except ValueError as error:
            raise JudgeError("server error", retryable=True, detail="answer is not JSON") from error
    detail = f"HTTP {response.status_code}: {response.text[:200]}"
    if response.status_code == 429:
        raise JudgeError("rate limited", True, detail, _retry_after(response.headers.get("Retry-After")))
    if response.status_code >= 500 or response.status_code == 408:
        raise JudgeError("server error", True, detail, _retry_after(response.headers.get("Retry-After")))
    if "content_filter" in response.text or "content management policy" in response.text:
        raise JudgeError("blocked", False, detail)
    raise JudgeError("bad request", False, detail)


def _retry_after(value: str | None) -> float | None:
    return float(value) if value and value.replace(".", "", 1).isdigit() else None


def _openai_parts(media: Media) -> list[dict[str, Any]]:
    if media.film is not None:
        return [{"type": "video_url", "video_url": {"url": _data_url("video/mp4", media.film)}}]
    return [{"type": "image_url", "image_url": {"url": _data_url("image/jpeg", frame)}} for frame in media.frames]


def _gemini_parts(media: Media) -> list[dict[str, Any]]:
    if media.film is not None:
        return [{"inline_data": {"mime_type": "video/mp4", "data": _base64(media.film)}}]
    return [{"inline_data": {"mime_type": "image/jpeg", "data": _base64(frame)}} for frame in media.frames]


def _data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{_base64(content)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
