"""A reward server as training scripts bring along: HTTP, one sample a forward pass, one at a time.

python -m benchmarks.reward_single MODEL PORT
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import Qwen2ForSequenceClassification


class Handler(BaseHTTPRequestHandler):
    """POST {"input": [[id, ...]]} -> {"data": [{"probs": [score]}]}; GET says that it is there."""

    protocol_version = "HTTP/1.1"
    model: Qwen2ForSequenceClassification
    lock = threading.Lock()

    def do_GET(self) -> None:
        """Health."""
        self._answer({})

    def do_POST(self) -> None:
        """Scores one sample."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (ids,) = body["input"]
        with self.lock, torch.inference_mode():
            score = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0]
        self._answer({"data": [{"probs": [float(score)]}]})

    def _answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: logs cost time."""


if __name__ == "__main__":
    Handler.model = Qwen2ForSequenceClassification.from_pretrained(sys.argv[1]).eval()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
