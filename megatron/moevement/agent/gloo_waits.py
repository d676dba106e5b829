"""Waits for gloo that end when the generation has failed, for certain.

When a connection breaks, gloo tells every operation that is pending there, except the one whose bytes were just on
their way (`Pair::signalException` leaves out the buffers of `tx_` and `rx_`; seen with torch 2.13): the wait for
that one lasts until the time-out of its group, and nothing can free the thread. So no thread may be in such a wait
while it matters.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Work

from megatron.moevement.errors import PeerLost

_SLICE_SECONDS = 0.1
# Gloo ends nearly all waits within milliseconds of the failure, and leaves nothing behind then.
_PATIENCE_SECONDS = 0.5
# What c10d says of a wait with a time limit; gloo's own time-out reads differently.
_NOT_YET = "Operation timed out!"
_POINT_TO_POINT = (12, 13, 14)
"""Numbers of c10d's operation types for sending and receiving."""
_wait_natively = Work.wait


class GlooWaits:
    """Takes the place of `Work.wait`, in the whole process, for waits without a time limit.

    A collective is waited for a slice at a time. That would close the connections of a point-to-point operation, so
    those are waited for in a thread of their own, which is given up if need be.

    Args:
        failed: whether the generation has failed.

    Attributes:
        lost: waits that were given up. Their threads, and threads of gloo's, are left in them.
    """

    def __init__(self, failed: Callable[[], bool]) -> None:
        self.lost = 0
        self._failed = failed
        self._idle: list[_Waiter] = []

    def install(self) -> None:
        """From now on all waits of this process are such waits."""
        waits = self

        def wait(work: Work, timeout: timedelta | None = None) -> bool:
            return waits.wait(work) if timeout is None else bool(_wait_natively(work, timeout))

        Work.wait = wait  # type: ignore[assignment,method-assign]

    def remove(self) -> None:
        """Undoes `install`."""
        Work.wait = _wait_natively  # type: ignore[method-assign]

    def wait(self, work: Work) -> bool:
        """Waits for the operation's end.

        Raises:
            PeerLost: the generation has failed and the operation has not ended.
            RuntimeError: gloo's, when the operation failed.
        """
        apart = work._get_op_type() in _POINT_TO_POINT  # type: ignore[attr-defined]
        look = self._apart(work) if apart else self._slices(work)
        failed_since: float | None = None
        while (done := look()) is None:
            if not self._failed():
                failed_since = None
            elif failed_since is None:
                failed_since = time.monotonic()
            elif time.monotonic() - failed_since > _PATIENCE_SECONDS:
                self.lost += 1
                raise PeerLost("an operation was under way with a rank that is lost")
        return done

    def _slices(self, work: Work) -> Callable[[], bool | None]:
        limit = timedelta(seconds=_SLICE_SECONDS)

        def look() -> bool | None:
            try:
                return bool(_wait_natively(work, limit))
            except RuntimeError as error:
                if _NOT_YET not in str(error):
                    raise
                return None

        return look

    def _apart(self, work: Work) -> Callable[[], bool | None]:
        try:
            waiter = self._idle.pop()
        except IndexError:
            waiter = _Waiter()
        waiter.begin(work)

        def look() -> bool | None:
            try:
                done = waiter.end(_SLICE_SECONDS)
            except queue.Empty:
                return None
            self._idle.append(waiter)
            if isinstance(done, BaseException):
                raise done
            return done

        return look


class _Waiter:
    """A thread that waits for one operation after another."""

    def __init__(self) -> None:
        self._works: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[bool | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="moevement-gloo-wait", daemon=True).start()

    def begin(self, work: Work) -> None:
        self._works.put(work)

    def end(self, seconds: float) -> bool | BaseException:
        """What became of it; raises queue.Empty if it takes longer."""
        return self._ends.get(timeout=seconds)

    def _run(self) -> None:
        while True:
            try:
                end: bool | BaseException = bool(_wait_natively(self._works.get()))
            except RuntimeError as error:
                end = error
            self._ends.put(end)
            del end
