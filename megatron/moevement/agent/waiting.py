"""Whether a thread waits for other ranks, from where its Python code stands."""

from __future__ import annotations

import linecache
import os
import re
import sys
from types import FrameType

import torch.distributed

from megatron.moevement.agent import gloo_waits

_COLLECTIVES = (os.path.dirname(torch.distributed.__file__) + os.sep, gloo_waits.__file__)
# The handle of an asynchronous collective is waited for in native code, which leaves no frame of torch.distributed.
_WAITING_CALL = re.compile(r"\.(wait|synchronize)\(.*\)\s*$", re.DOTALL)


def waits_for_ranks(thread: int | None) -> bool:
    """Whether the thread is in a call of torch.distributed, or in `handle.wait()` itself.

    A wait for something else that is spelled in the same way counts too: then a hang is taken for a wait, and
    ends with the collective time-out of the other ranks.
    """
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return False
    if _WAITING_CALL.search(_call_text(frame)):
        return True
    caller: FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith(_COLLECTIVES):
            return True
        caller = caller.f_back
    return False


def _call_text(frame: FrameType) -> str:
    """The source of the expression that the frame is in; empty where there is no source."""
    positions = list(frame.f_code.co_positions())
    place = frame.f_lasti // 2
    if not 0 <= place < len(positions):
        return ""
    first, last, start, end = positions[place]
    if first is None or last is None or start is None or end is None or first != last:
        return ""
    line = linecache.getline(frame.f_code.co_filename, first).encode()
    return line[start:end].decode(errors="replace")
