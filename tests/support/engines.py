"""Copy engines of the CPU that behave like one of a GPU in one respect."""

import threading

from moevement_ext import CopyEngine, EngineError


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
