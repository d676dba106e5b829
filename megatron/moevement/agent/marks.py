"""Progress marks of a node's workers, in memory that they share with their agent.

The agent makes the memory (a memfd that its workers inherit) and reads it; each worker writes its own place: its main
thread what it does, its watcher thread whether the main thread waits for other ranks. Fields are read while they are
written: a mark may be older than another by one write, which no reader minds.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

_HEADER = struct.Struct("<qq")  # nanoseconds: when the agent was last heard by the head, after how long it is fenced
_MAIN = struct.Struct("<qqqqq40s")  # beats, nanoseconds of the last, generation, iteration, resting, point
_WATCH = struct.Struct("<qq")  # nanoseconds of the last look, waiting
_PLACE_BYTES = 128
_WATCH_OFFSET = 96
NO_ITERATION = -1


@dataclass(frozen=True, slots=True)
class Mark:
    """What a worker said of itself last.

    Attributes:
        beats: marks so far; 0: none yet.
        age: seconds since the last one.
        generation: that it was made in.
        iteration: newest iteration that was named; -1: none.
        resting: whether the worker asked to be left alone until its next mark.
        point: what it does.
        waiting: whether its main thread waits for other ranks.
    """

    beats: int
    age: float
    generation: int
    iteration: int
    resting: bool
    point: str
    waiting: bool


class Marks:
    """The shared memory.

    Args:
        descriptor: of the memory, as `create` or the environment gives it.
    """

    # A look of the watcher thread that is older than this says nothing: the thread may starve.
    STALE_SECONDS = 2.0

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)

    @classmethod
    def create(cls, workers: int) -> Marks:
        """New memory for so many workers."""
        descriptor = os.memfd_create("moevement-marks")
        os.ftruncate(descriptor, mmap.PAGESIZE * (1 + workers * _PLACE_BYTES // mmap.PAGESIZE + 1))
        return cls(descriptor)

    def close(self) -> None:
        """Gives the memory back."""
        self._memory.close()

    def clear(self, place: int) -> None:
        """Forgets the worker that had the place before."""
        start = self._start(place)
        self._memory[start : start + _PLACE_BYTES] = bytes(_PLACE_BYTES)

    def beat(self, place: int, beats: int, generation: int, iteration: int, resting: bool, point: str) -> None:
        """Written by the main thread."""
        text = point.encode()[:40]
        now = time.monotonic_ns()
        _MAIN.pack_into(self._memory, self._start(place), beats, now, generation, iteration, resting, text)

    def look(self, place: int, waiting: bool) -> None:
        """Written by the watcher thread."""
        _WATCH.pack_into(self._memory, self._start(place) + _WATCH_OFFSET, time.monotonic_ns(), waiting)

    def read(self, place: int, since_ns: int = 0) -> Mark:
        """The mark of a worker; ages count from `since_ns` at the earliest."""
        start, now = self._start(place), time.monotonic_ns()
        beats, beat_ns, generation, iteration, resting, point = _MAIN.unpack_from(self._memory, start)
        look_ns, waiting = _WATCH.unpack_from(self._memory, start + _WATCH_OFFSET)
        fresh = (now - max(look_ns, since_ns)) / 1e9 < self.STALE_SECONDS
        return Mark(
            beats=beats,
            age=(now - max(beat_ns, since_ns)) / 1e9,
            generation=generation,
            iteration=iteration if beats else NO_ITERATION,
            resting=bool(resting),
            point=point.rstrip(b"\0").decode(errors="replace"),
            waiting=bool(waiting) and fresh,
        )

    def renew(self, heard_ns: int, fence_seconds: float) -> None:
        """Written by the agent: when the head answered last, and after how long without an answer workers must end."""
        _HEADER.pack_into(self._memory, 0, heard_ns, int(fence_seconds * 1e9))

    @property
    def fenced(self) -> bool:
        """Whether this node's agent has been silent for so long that the head gives its ranks away."""
        heard_ns, fence_ns = _HEADER.unpack_from(self._memory, 0)
        return bool(fence_ns > 0 and time.monotonic_ns() - heard_ns > fence_ns)

    def _start(self, place: int) -> int:
        return _PLACE_BYTES * (place + 1)
