"""A peer is killed in the middle of a message: gloo forgets the operation, and the wait ends all the same."""

import ctypes
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.moevement.agent.gloo_waits import GlooWaits
from megatron.moevement.agent.waiting import waits_for_ranks
from megatron.moevement.errors import PeerLost

# More than the socket buffers of a connection hold.
BYTES = 256 << 20
HOPELESS_SECONDS = 600.0


def group(path: Path, rank: int) -> dist.ProcessGroupGloo:
    """Of two processes. The time-out is longer than anybody would wait for a test."""
    made = dist.ProcessGroupGloo(dist.FileStore(str(path), 2), rank, 2, timedelta(seconds=HOPELESS_SECONDS))
    # A lost wait holds one of its threads, for which its destruction would wait.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    return made


def peer(path: Path, kind: str) -> None:
    """Takes part in an operation; a receiver reads nothing of it."""
    gloo, data = group(path, 1), torch.ones(BYTES, dtype=torch.uint8)
    if kind == "send":
        work = gloo.recv([data], 0, 0)
        gloo.barrier().wait()
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "recv":
        work = gloo.send([data], 0, 0)
    else:
        work = gloo.broadcast(data, 1)
    work.wait()


def is_stopped(process: BaseProcess) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def cut_off(path: Path, kind: str) -> dist.Work:
    """An operation whose message is half here, or half gone, when its other end is killed."""
    for attempt in range(20):
        store = path / f"{kind}{attempt}"
        process = mp.get_context("spawn").Process(target=peer, args=(store, kind), daemon=True)
        process.start()
        gloo, data = group(store, 0), torch.zeros(BYTES, dtype=torch.uint8)
        if kind == "send":
            gloo.barrier().wait()
            while not is_stopped(process):
                time.sleep(0.01)
            work = gloo.send([data], 1, 0)
        else:
            work = gloo.recv([data], 1, 0) if kind == "recv" else gloo.broadcast(data, 1)
            while not data[0]:
                pass
        process.kill()
        process.join()
        if kind == "send" or not data[-1]:
            return work
    raise AssertionError("the whole message came every time")


@pytest.fixture
def failed() -> Iterator[threading.Event]:
    """Whether the generation has failed; waits are ours meanwhile."""
    event = threading.Event()
    waits = GlooWaits(event.is_set)
    waits.install()
    yield event
    waits.remove()


@pytest.mark.parametrize("kind", ["send", "recv", "broadcast"])
def test_a_wait_that_gloo_forgets_is_given_up(failed: threading.Event, tmp_path: Path, kind: str) -> None:
    work = cut_off(tmp_path, kind)
    ended = list[BaseException]()

    def wait(native: Callable[[], object]) -> None:
        try:
            native()
        except (PeerLost, RuntimeError) as error:
            ended.append(error)

    # Without a failure, and natively, it goes on; should gloo mend that one day, `GlooWaits` has had its time.
    natively = threading.Thread(target=wait, args=[lambda: work.wait(timedelta(seconds=HOPELESS_SECONDS))], daemon=True)
    waiting = threading.Thread(target=wait, args=[work.wait], daemon=True)
    for thread in [waiting] if kind == "send" else [natively, waiting]:
        thread.start()
    waiting.join(1.5)
    assert waiting.is_alive() and waits_for_ranks(waiting.ident) and not ended
    failed.set()
    waiting.join(HOPELESS_SECONDS / 2)
    assert [type(error) for error in ended] == [PeerLost]
    assert kind == "send" or natively.is_alive()


def test_what_ends_by_itself_is_as_before(failed: threading.Event, tmp_path: Path) -> None:
    gloo = [None, None]

    def join(rank: int) -> None:
        gloo[rank] = group(tmp_path / "store", rank)  # type: ignore[call-overload]

    threads = [threading.Thread(target=join, args=[rank]) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = gloo
    assert isinstance(one, dist.ProcessGroupGloo) and isinstance(two, dist.ProcessGroupGloo)
    before = threading.active_count()
    for number in range(5):
        data, there = torch.full((4,), number), torch.zeros(4, dtype=torch.int64)
        works = [one.send([data], 1, 0), two.recv([there], 0, 0)]
        assert all(work.wait() for work in works) and torch.equal(data, there)
        works = [one.allreduce(data), two.allreduce(there)]
        assert all(work.wait() for work in works) and torch.equal(data, there) and data[0] == 2 * number
    assert threading.active_count() == before + 1, "one thread waits for all messages"
    # A failure alone ends nothing that gloo ends itself, and gloo's own errors arrive.
    work = two.recv([there], 0, 0)
    threading.Timer(0.2, lambda: one.send([data], 1, 0).wait()).start()
    failed.set()
    assert work.wait()
    with pytest.raises(RuntimeError, match="Timed out"):
        two.recv([there], 0, 0).wait(timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="pair closure"):
        two.recv([there], 0, 0).wait()
