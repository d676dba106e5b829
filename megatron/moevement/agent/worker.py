"""What every worker process runs first: it waits for the agent's word, then becomes the training script.

`once` waits for one assignment, with modules imported before if any are named; `fork` is a server that imports them
once and forks a child for each assignment, before any CUDA call. Started by the agent alone.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import runpy
import signal
import sys
import time

from megatron.moevement.agent.channel import CHANNEL_VARIABLE, Channel

_PR_SET_PDEATHSIG = 1
_PARENT_SECONDS = 10.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The most that glibc takes. It comes to that by itself, after it has given larger and larger blocks back to the kernel.
_MMAP_THRESHOLD_BYTES = 32 << 20
# The first replay of a small model on the CPU touches 40,000 pages for the first time, which takes as long as two
# micro-batches while all other ranks wait. More would be memory that every node keeps idle.
_HEAP_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20


def main(argv: list[str]) -> None:
    """Becomes the script of the assignment; returns without it when the agent needs no worker any more.

    Args:
        argv: descriptor of the channel, the agent's pid, `once` or `fork`, modules to import (joined by commas), the
            script, its arguments.
    """
    channel, agent, mode = Channel.adopt(int(argv[0])), int(argv[1]), argv[2]
    preload, script = [name for name in argv[3].split(",") if name], argv[4]
    _die_with(agent)
    # As `python script.py` would have it; preloaded modules may look at the arguments.
    sys.argv = argv[4:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    for name in preload:
        importlib.import_module(name)
    if preload:
        # Neither this process nor its children look through what is imported when they collect garbage, while all
        # others wait; and children don't copy its pages.
        gc.collect()
        gc.freeze()
    if preload and mode == "once":
        _fill_heap()
        channel.send({"is": "prepared"})
    if mode == "fork":
        own = serve(channel, agent)
        if own is None:
            return
        channel = own
    message, _ = channel.receive()
    if message is None:
        return
    # The link takes the channel over by its number.
    os.environ.update({**message["environment"], CHANNEL_VARIABLE: str(channel.release())})
    runpy.run_path(script, run_name="__main__")


def _fill_heap() -> None:
    """Has the kernel give this process the pages of its heap now, and keeps freed ones.

    It isn't for a process that forks: every child would copy what it writes to.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    # As many again are kept beside those: a heap that is given back is taken page by page again.
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * _HEAP_BYTES)
    blocks = [libc.malloc(_BLOCK_BYTES) for _ in range(_HEAP_BYTES // _BLOCK_BYTES)]
    for block in filter(None, blocks):
        ctypes.memset(block, 0, _BLOCK_BYTES)
    for block in blocks:
        libc.free(block)


def serve(requests: Channel, agent: int) -> Channel | None:
    """Forks a child for every channel that arrives.

    Returns in each child, with its channel; in the server at the end, with none.
    """
    while True:
        message, descriptors = requests.receive()
        if message is None:
            return None
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise SystemExit(
                "a preloaded module has initialised CUDA, so nothing can be forked: use --replacement warm"
            )
        child = _fork_orphan()
        if child:
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        requests.close()
        _wait_for_parent(agent)
        _die_with(agent)
        channel = Channel.adopt(descriptors[0])
        channel.send({"is": "started", "pid": os.getpid()})
        return channel


def _fork_orphan() -> int:
    """Forks a process whose parent is gone at once, so that the agent, the nearest reaper, becomes its parent."""
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return between
    if os.fork():
        os._exit(0)
    os.setsid()
    return 0


def _wait_for_parent(agent: int) -> None:
    deadline = time.monotonic() + _PARENT_SECONDS
    while os.getppid() != agent:
        if time.monotonic() > deadline:
            os._exit(1)  # the agent is gone
        time.sleep(0.001)


def _die_with(agent: int) -> None:
    """Has the kernel kill this process when the agent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:
        os._exit(1)  # it died before that


if __name__ == "__main__":
    main(sys.argv[1:])
