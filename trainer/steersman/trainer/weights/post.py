"""Messages between the lead of a sharded trainer and its other ranks: JSON and bytes over a gloo group, no pickle.

Invariants:

- each end of a line has one thread that reads and one that writes: no caller waits for the network, and messages keep
  their order;
- a line on which nothing was said for the group's timeout is lost, as is one whose process died: whoever has nothing to
  say writes an empty message every few seconds;
- a line ends by a farewell from both sides, so that no thread is left in the middle of an exchange.
"""

import contextlib
import json
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

SILENCE_SECONDS: Final = 300.0
"""Longest without a message before a line is lost: a process that stands still for longer, whole, is of no use."""
_BEAT_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 10.0
# Commands and answers: of the first there are a few for each replica.
_MAX_WAITING: Final = 1 << 16

Message = dict[str, Any]
Deliver = Callable[[Message, bytes], None]
Lost = Callable[[str], None]

_BEAT: Final[Message] = {}
_FAREWELL: Final[Message] = {"farewell": True}


def post_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for lines, or for a collective. Made by a collective of the default group."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE_SECONDS))
    return group


class Line:
    """A line to the rank `peer` of `group`. Thread-safe.

    Args:
        deliver: gets every message and its bytes, on a thread of the line.
        lost: told once, why the line ended, unless `close` ended it; on the same thread.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, deliver: Deliver, lost: Lost) -> None:
        self._group, self._peer = group, peer
        self._deliver, self._lost = deliver, lost
        self._waiting: queue.Queue[tuple[Message, bytes]] = queue.Queue(_MAX_WAITING)
        self._is_closing = False
        self._is_broken = threading.Event()
        self._lock = threading.Lock()
        name = f"steersman-rank-{peer}"
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True) for target in (self._read_all, self._write_all)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Queues a message. Into a line that is lost nothing goes, and its end has been told."""
        if not self._is_broken.is_set():
            self._waiting.put_nowait((message, payload))

    def close(self) -> None:
        """Says farewell and waits a few seconds for the other side's."""
        self._is_closing = True
        self.send(_FAREWELL)
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)

    def _write_all(self) -> None:
        message: Message | None = None
        try:
            while message is not _FAREWELL:
                try:
                    message, payload = self._waiting.get(timeout=_BEAT_SECONDS)
                except queue.Empty:
                    message, payload = _BEAT, b""
                self._write(message, payload)
        except RuntimeError as error:  # what torch raises for everything
            self._break(str(error))

    def _read_all(self) -> None:
        try:
            while (received := self._read())[0] != _FAREWELL:
                if received[0] != _BEAT:
                    self._deliver(*received)
        except RuntimeError as error:
            self._break(str(error))
        else:
            self._break("it left")
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((_FAREWELL, b""))  # the other thread ends by it

    def _break(self, why: str) -> None:
        with self._lock:
            is_news = not (self._is_broken.is_set() or self._is_closing)
            self._is_broken.set()
        if is_news:
            self._lost(why.splitlines()[0])

    def _write(self, message: Message, payload: bytes) -> None:
        text = json.dumps(message).encode()
        sizes = torch.tensor([len(text), len(payload)])
        dist.send(sizes, group=self._group, group_dst=self._peer)
        dist.send(
            torch.frombuffer(bytearray(text + payload), dtype=torch.uint8), group=self._group, group_dst=self._peer
        )

    def _read(self) -> tuple[Message, bytes]:
        sizes = torch.empty(2, dtype=torch.int64)
        dist.recv(sizes, group=self._group, group_src=self._peer)
        num_text, num_payload = sizes.tolist()
        data = torch.empty(num_text + num_payload, dtype=torch.uint8)
        dist.recv(data, group=self._group, group_src=self._peer)
        raw = data.numpy().tobytes()
        return json.loads(raw[:num_text]), raw[num_text:]
