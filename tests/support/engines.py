"""Copy engines of the CPU that behave like one of a GPU in one respect."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from moevement_ext import CopyEngine, DeviceDigests, EngineError


class PinningEngine(CopyEngine):
    """Pins host memory, and notes what is pinned. Each range after the first waits for `go`.

    `fail_at` is the range, from 1, that can't be pinned.
    """

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.go = threading.Event()
        self.fail_at = fail_at
        self.registered: list[int] = []

    def register_host(self, address: int, nbytes: int) -> bool:
        if self.registered:
            assert self.go.wait(20)
        if len(self.registered) + 1 == self.fail_at:
            raise EngineError("no more memory may be pinned")
        self.registered.append(address)
        return True

    def unregister_host(self, address: int) -> bool:
        self.registered.remove(address)
        return True


class SlowDigests(DeviceDigests):
    """Digests that are never over, and a note of those that were given up."""

    def __init__(self, **limits: int) -> None:
        super().__init__(**limits)
        self.cancelled: list[int] = []

    def wait(self, ticket: int, timeout_seconds: float) -> bytes | None:
        """Nothing, at once."""
        return None

    def cancel(self, ticket: int) -> bool:
        """Gives up a ticket."""
        self.cancelled.append(ticket)
        return super().cancel(ticket)


@contextlib.contextmanager
def only_when_the_gil_is_free(action: Callable[[], object]) -> Iterator[None]:
    """Runs `action` on a thread that gets the GIL no sooner than native code within the block lets it go."""
    waiting = threading.Event()

    def act() -> None:
        waiting.wait()
        action()

    thread = threading.Thread(target=act)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        waiting.set()
        yield
    finally:
        sys.setswitchinterval(interval)
        thread.join()
