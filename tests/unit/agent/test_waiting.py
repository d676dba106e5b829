import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron.moevement.agent.waiting import waits_for_ranks


class Handle:
    """Waits in native code, as the handle of a collective does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.wait = self._lock.acquire
        # As torch.cuda.synchronize() does in the end, by a name like this, and as values of the device are read.
        self.cuda_synchronize = self.item = self.tolist = self._lock.acquire
        self.free = self._lock.release


def looked_at(work: Callable[[], object], free: Callable[[], object], expected: bool) -> bool:
    """Whether a thread that does the work is said, at any look, to wait as expected."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    looks = []
    for _ in range(200):
        time.sleep(0.005)
        looks.append(waits_for_ranks(thread.ident))
        if looks[-1] == expected and len(looks) > 20:
            break
    free()
    thread.join(60)
    return looks[-1]


def test_a_handle_is_waited_for() -> None:
    handle = Handle()
    assert looked_at(lambda: handle.wait(), handle.free, True)
    nested = Handle()
    assert looked_at(lambda: [nested.wait(-1)], nested.free, True)


def test_the_device_is_waited_for() -> None:
    for work in (lambda one: one.cuda_synchronize(), lambda one: one.item() + 1, lambda one: [one.tolist()]):
        handle = Handle()
        assert looked_at(lambda work=work, handle=handle: work(handle), handle.free, True)  # type: ignore[misc]


def test_other_calls_are_none() -> None:
    handle = Handle()
    acquire = handle.wait
    assert not looked_at(lambda: acquire(), handle.free, False)
    event = threading.Event()
    assert not looked_at(lambda: time.sleep(0.2), event.set, False)
    assert not waits_for_ranks(None)
    assert not waits_for_ranks(-1)


def test_a_frame_of_torch_distributed_is_one() -> None:
    started = threading.Event()

    class Blocks:
        """Blocks where torch.distributed looks at its argument."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.lock.acquire()

        def __eq__(self, other: object) -> bool:
            started.set()
            return self.lock.acquire()

        __hash__ = None  # type: ignore[assignment]

    blocks = Blocks()
    acquire = blocks.lock.acquire
    assert not looked_at(lambda: acquire(timeout=0.1), lambda: None, False)
    assert looked_at(lambda: dist.get_rank(group=blocks), blocks.lock.release, True)
    assert started.is_set()
