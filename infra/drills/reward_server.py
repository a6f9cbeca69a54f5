"""A reward server for the drill that breaks one: how red a result is, which anybody can compute again.

python infra/drills/reward_server.py PORT
"""

import base64
import http.server
import io
import json
import sys

import numpy as np
from PIL import Image

REWARD = "redness"


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers ``prefer.rewards.server`` as `docs/distillation.md` says."""

    def do_POST(self) -> None:
        """The share of red in a result's pixels."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        frames = [np.asarray(Image.open(io.BytesIO(base64.b64decode(frame)))) for frame in asked["result"]]
        redness = float(np.mean([frame[..., 0].mean() / 255 for frame in frames]))
        body = json.dumps({"rewards": {REWARD: redness}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing: the drill counts what comes of it."""


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
