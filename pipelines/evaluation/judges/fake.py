"""Judges without a model: one that looks at pixels, and an HTTP server that speaks both real protocols.

The pixel judge lets tiny runs and tests go through the whole path: copying the source scores low on doing the edit and
high on keeping the rest, noise scores low on quality. It knows nothing of what a picture shows, so it is no measure.
"""

import base64
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np
from PIL import Image

from loomvideo.pipelines.vlm.clients import Reply
from loomvideo.pipelines.vlm.requests import VLMRequest, decode_frames


class PixelJudge:
    """Deterministic scores from simple picture statistics and a hash, in the form asked for."""

    def __init__(self, noise: float = 0.6):
        self.noise = noise

    def identity(self) -> dict[str, Any]:
        """See :class:`~loomvideo.pipelines.vlm.clients.VLMClient`."""
        return {"kind": "fake", "model": "pixel-judge-1", "noise": self.noise}

    def complete(self, request: VLMRequest) -> Reply:
        """Score the last medium, or the last two against each other, beside the first one when it is a source."""
        source = decode_frames(request.media[0]) if request.media[0].label == "Before editing" else None
        if len(request.media) > 1 and request.media[-2].label == "Result A":
            worth = [np.mean(_statistics(decode_frames(media), source)) for media in request.media[-2:]]
            # 3 is no difference; a tenth of the scale is worth a step.
            done = kept = quality = float(np.clip(0.5 + 2.5 * (worth[1] - worth[0]), 0, 1))
        else:
            done, kept, quality = _statistics(decode_frames(request.media[-1]), source)
        scores: dict[str, int | str] = {}
        # Official rubrics name their axes in the text alone.
        for position, axis in enumerate(request.axes or ("Compliance", "Quality", "Preservation")):
            name = axis.lower()
            keeps = any(word in name for word in ("preserv", "consisten", "identity", "keep", "scene"))
            base = done if position == 0 or name.startswith("done/") else kept if keeps else quality
            seed = hashlib.sha256(f"{request.key(self.identity())}/{axis}".encode()).digest()
            noise = (int.from_bytes(seed[:4], "big") / 2**31 - 1) * self.noise
            if isinstance(request.choices[0], str):
                # The same noise as a score has, a step of which is a quarter.
                scores[axis] = request.choices[0 if base + noise / 4 > 0.5 else -1]
            else:
                scores[axis] = int(np.clip(round(1 + 4 * base + noise), 1, 5))
        if request.structured or "json" in request.text.lower():
            text = json.dumps({"reasoning": "scored from pixel statistics", **scores})
        else:
            text = "\n".join(f"{axis}: {value}" for axis, value in scores.items())
        return Reply(text, "pixel-judge-1", request.estimated_tokens(), 12 * len(scores), 0.0)


def _statistics(result: np.ndarray, source: np.ndarray | None) -> tuple[float, float, float]:
    """How much was done, how much was kept, and how clean it looks, each 0 to 1."""
    noise = np.mean([np.abs(f.astype(np.float32) - cv2.medianBlur(f, 3)).mean() for f in result])
    detail = np.mean([f.std() for f in result])
    quality = float(np.clip(1 - noise / 20, 0, 1) * np.clip(detail / 25, 0, 1))
    if source is None:
        return quality, quality, quality
    frames = min(len(result), len(source))
    size = source.shape[2], source.shape[1]
    resized = np.stack([cv2.resize(f, size) for f in result[:frames]])
    change = np.abs(resized.astype(np.float32) - source[:frames]).max(-1)
    done = float(np.clip(np.quantile(change, 0.9) / 60, 0, 1))
    return done, float(np.clip(1 - np.median(change) / 60, 0, 1)), quality


Behaviour = Callable[[int], str]


class FakeJudgeServer:
    """A judge on 127.0.0.1 that answers OpenAI chat completions and Gemini ``generateContent``.

    Attributes:
        behaviour: Call number to ok, garbage, refuse, empty, slow or an HTTP status such as 429.
        score: What it answers to every question, such as 4 or yes.
        calls: Every request's path and body, in order.
        base_url: Root to give a client, without the ``/v1`` or ``/v1beta``.
    """

    def __init__(self, behaviour: Behaviour = lambda call: "ok", score: int | str = 4):
        self.behaviour, self.score = behaviour, score
        self.calls: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["FakeJudgeServer"]:
        """Serve in a thread for the duration."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def pictures(self, call: int) -> list[np.ndarray]:
        """The pictures a call sent, decoded."""
        path, body, _ = self.calls[call]
        if path.endswith("chat/completions"):
            urls = [p["image_url"]["url"] for p in body["messages"][0]["content"] if p["type"] == "image_url"]
            contents = [url.split(",", 1)[1] for url in urls]
        else:
            parts = [p["inline_data"] for p in body["contents"][0]["parts"] if "inline_data" in p]
            contents = [p["data"] for p in parts if p["mime_type"] == "image/jpeg"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(c)))) for c in contents]

    def _answer(self, path: str, body: dict[str, Any], act: str) -> dict[str, Any]:
        openai = path.endswith("chat/completions")
        if openai:
            schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema", {})
        else:
            schema = body["generationConfig"].get("responseSchema", {})
        axes = [name for name in schema.get("properties", {}) if name != "reasoning"]
        text = json.dumps({"reasoning": "ok", **dict.fromkeys(axes, self.score)})
        if act == "garbage":
            text = "The video looks nice."
        if openai:
            message = {"role": "assistant", "content": "" if act == "empty" else text}
            if act == "refuse":
                message = {"role": "assistant", "content": None, "refusal": "I cannot judge this."}
            usage = {"prompt_tokens": 1000, "completion_tokens": 50}
            return {
                "model": f"{body['model']}-0613",
                "choices": [{"message": message, "finish_reason": "stop"}],
                "usage": usage,
            }
        if act == "refuse":
            return {"promptFeedback": {"blockReason": "SAFETY"}}
        parts = [] if act == "empty" else [{"text": "thinking", "thought": True}, {"text": text}]
        return {
            "modelVersion": "gemini-fake-001",
            "candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}],
            "usageMetadata": {"promptTokenCount": 1000, "candidatesTokenCount": 30, "thoughtsTokenCount": 20},
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    number = len(owner.calls)
                    owner.calls.append((self.path, body, dict(self.headers)))
                act = owner.behaviour(number)
                if act == "slow":
                    threading.Event().wait(1.0)
                status = int(act) if act.isdigit() else 200
                answer = {"error": {"message": act}} if status != 200 else owner._answer(self.path, body, act)
                content = json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    if status == 429:
                        self.send_header("Retry-After", "0.01")
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except BrokenPipeError:
                    # The client gave up waiting, which is what a slow answer is for.
                    return

            def log_message(self, *arguments: Any) -> None:
                return

        return Handler
