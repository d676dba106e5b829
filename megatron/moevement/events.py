"""JSONL events: what happened, when, on which rank. One object a line, appended and flushed at once.

A killed worker loses at most the line that it was writing; its replacement goes on in the same file.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.moevement.errors import ConfigError

Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Writes events of one rank to `<directory>/events.rank00000.jsonl` and hands them to listeners.

    Every event has `time` (seconds since the epoch), `rank` and `kind`. Byte counts end in `_bytes`, durations in
    `_seconds`. A full disk never ends training: the write error is counted in `dropped`, and the listeners still
    get the event.

    Raises:
        ConfigError: the file can't be opened.
    """

    def __init__(self, directory: Path | None, rank: int) -> None:
        self.rank = rank
        self.dropped = 0
        self._listeners: list[Listener] = []
        self._file = None
        if directory is not None:
            path = directory / f"events.rank{rank:05d}.jsonl"
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", buffering=1, encoding="utf-8")
            except OSError as error:
                reason = f"{path}: {error.strerror}; choose a directory that can be written"
                raise ConfigError(f"--sparse-ckpt-log-dir {reason}") from error

    def listen(self, listener: Listener) -> None:
        """Calls `listener` with every later event, on the emitting thread."""
        self._listeners.append(listener)

    def emit(self, kind: str, **values: Any) -> None:
        """Writes one event. Values must be JSON-serialisable."""
        event: dict[str, Any] = {"time": time.time(), "rank": self.rank, "kind": kind, **values}
        if self._file is not None:
            try:
                self._file.write(json.dumps(event) + "\n")
            except OSError:
                self.dropped += 1
        for listener in self._listeners:
            listener(event)

    def close(self) -> None:
        """Closes the file; later events only reach the listeners."""
        if self._file is not None:
            # What a full disk has lost was counted when it was written.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
