"""Pins the slots' memory behind the training loop, one slot after the other, so that training needn't wait for it."""

import threading
from collections.abc import Sequence

from megatron.moevement.operators.state import MemoryRange
from moevement_ext import CopyEngine, EngineError


class Pinning:
    """Registers ranges of host memory with the copy engine in the order given, on a thread of its own.

    A copy must not cross from one range into another. Memory that can't be pinned is copied to all the same, slower;
    `problem` says why. Where pinning means nothing (the CPU engine) all is done at once.
    """

    def __init__(self, engine: CopyEngine, ranges: Sequence[MemoryRange]) -> None:
        self._engine = engine
        self._ranges = list(ranges)
        self._pinned: list[int] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.problem = ""
        if self._pin(0):
            self._thread = threading.Thread(target=self._pin_the_rest, name="moevement-pinning", daemon=True)
            self._thread.start()

    def _pin(self, index: int) -> bool:
        if index == len(self._ranges):
            return False
        try:
            pinned = self._engine.register_host(self._ranges[index].address, self._ranges[index].nbytes)
        except EngineError as error:
            self.problem = str(error)
            return False
        if pinned:
            self._pinned.append(index)
        return pinned

    def _pin_the_rest(self) -> None:
        index = 1
        while not self._stop.is_set() and self._pin(index):
            index += 1

    @property
    def done(self) -> bool:
        """Whether nothing more will be pinned."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def pinned(self) -> int:
        """Ranges that are pinned so far."""
        return len(self._pinned)

    def wait(self) -> None:
        """Returns when nothing more will be pinned."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stops, and unpins what was pinned."""
        self._stop.set()
        self.wait()
        for index in self._pinned:
            self._engine.unregister_host(self._ranges[index].address)
        self._pinned.clear()
