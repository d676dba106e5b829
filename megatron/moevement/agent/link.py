"""A worker's link to the agent of its node: how it hears of failures, moves on to the next generation, shows progress.

A *generation* is one set of process groups. A failure anywhere ends it; `watch` frees the main thread, which leaves
its groups, calls `next_generation` and builds new ones over the new `store`.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron.moevement.agent import sockets, waiting
from megatron.moevement.agent.board import connect
from megatron.moevement.agent.channel import (
    CHANNEL_VARIABLE,
    EXIT_AGAIN,
    GENERATION_VARIABLE,
    MARKS_VARIABLE,
    STORE_VARIABLE,
    Channel,
)
from megatron.moevement.agent.marks import NO_ITERATION, Marks
from megatron.moevement.errors import JobEnded, PeerLost

_LOOK_SECONDS = 0.25
_ABORT_SECONDS = 0.05


class WorkerLink:
    """The worker's side of the agent; made by `from_environment`, once in a process.

    Attributes:
        rank: of this process.
        world_size: ranks of the job.
        replacement: whether this process took over the rank of one that died: it must build its job without any
            communication and call `next_generation` before it uses a process group.
    """

    def __init__(self, channel: Channel, marks: Marks, environment: Mapping[str, str]) -> None:
        self.rank, self.world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        joins = int(environment[GENERATION_VARIABLE])
        self.replacement = joins > 0
        self._place = int(environment["LOCAL_RANK"])
        host, _, port = environment[STORE_VARIABLE].rpartition(":")
        self._address = (host, int(port))
        self._channel, self._marks = channel, marks
        # A replacement stands in the failed generation before the one that it joins.
        self._generation = joins - self.replacement
        self._failed = self._acknowledged = self.replacement
        self._opened, self._end_reason, self._stop_reason = self._generation, "", ""
        self._beats, self._iteration = 0, NO_ITERATION
        self._abort: Callable[[], None] | None = None
        self._store: Store | None = None
        self._store_ports: frozenset[int] = frozenset()
        self._between = self._closed = False
        self._changed = threading.Condition()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="moevement-link", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> WorkerLink | None:
        """The link that the agent prepared for this process; None where it has none, as under torchrun."""
        if CHANNEL_VARIABLE not in environment:
            return None
        channel = Channel.adopt(int(environment[CHANNEL_VARIABLE]))
        return cls(channel, Marks(int(environment[MARKS_VARIABLE])), environment)

    @property
    def generation(self) -> int:
        """The current generation; a replacement stands in the failed one until `next_generation` returns."""
        return self._generation

    @property
    def failed(self) -> bool:
        """Whether the current generation has failed, or the whole job ends."""
        return self._failed

    @property
    def ending(self) -> str:
        """Why the whole job ends; empty while it doesn't."""
        return self._end_reason

    @property
    def stopping(self) -> str:
        """Why the job is to stop after an iteration that all ranks agree on; empty while it isn't."""
        return self._stop_reason

    def check(self) -> None:
        """Raises where the current generation has failed.

        Raises:
            PeerLost: it has.
        """
        if self._failed:
            raise PeerLost(f"generation {self._generation} has failed")

    def store(self, timeout: timedelta = timedelta(minutes=5)) -> Store:
        """A store of the current generation alone, for `init_process_group`.

        A failure of the generation also frees who waits in it: its connection is shut then.
        """
        if self._store is None:
            before = sockets.local_ports_to(self._address[1])
            self._store = connect(*self._address, timeout)
            with self._changed:
                self._store_ports = sockets.local_ports_to(self._address[1]) - before
        return PrefixStore(f"g{self._generation}/", self._store)

    def watch(self, abort: Callable[[], None]) -> None:
        """Has `abort` called from a thread when the current generation fails: it frees the main thread.

        It is called again every 50 ms until the main thread is in `next_generation`.
        """
        self._abort = abort

    def next_generation(self) -> int:
        """Gives up the current generation and waits until the next one opens; returns its number.

        Whoever calls it before the current generation has failed, makes it fail.

        Raises:
            JobEnded: the job ends, for the reason in the message.
        """
        with self._changed:
            self._acknowledged = self._between = True
            self._store, self._store_ports = None, frozenset()
            if not self._end_reason and not self._channel.send({"is": "ready", "generation": self._generation + 1}):
                self._end_reason = "the agent of this node is gone"
            self._changed.wait_for(lambda: self._end_reason or self._opened > self._generation)
            if self._end_reason:
                raise JobEnded(self._end_reason)
            self._generation = self._opened
            self._acknowledged = self._between = False
        self.beat("opened")
        return self._generation

    def beat(self, point: str, iteration: int | None = None, resting: bool = False) -> None:
        """A progress mark of the main thread, for the price of a few writes to memory.

        Args:
            point: what the worker does now, for people.
            iteration: the iteration that it is in; a job whose iterations don't rise from failure to failure is ended.
            resting: what follows may take long while all others wait (a file is written, say): no hang is suspected
                until the next mark.
        """
        self._beats += 1
        self._iteration = self._iteration if iteration is None else iteration
        self._marks.beat(self._place, self._beats, self._generation, self._iteration, resting, point)

    def close(self) -> None:
        """Ends the watcher thread; the process should end soon after."""
        self._closed = True
        self._thread.join()
        self._channel.close()
        self._store = None

    def _watch(self) -> None:
        while not self._closed:
            aborting = self._failed and not self._acknowledged
            if select.select([self._channel], [], [], _ABORT_SECONDS if aborting else _LOOK_SECONDS)[0]:
                message, _ = self._channel.receive()
                if message is None:
                    # Nobody would stop or replace an orphan.
                    os._exit(EXIT_AGAIN)
                self._hear(message)
            if self._marks.fenced:
                # The head has given this rank to another process, which must not meet this one in a file.
                print(f"rank {self.rank}: the agent was silent for too long; ending", file=sys.stderr, flush=True)
                os._exit(EXIT_AGAIN)
            self._marks.look(self._place, self._between or waiting.waits_for_ranks(self._main))
            self._free()

    def _hear(self, message: dict[str, Any]) -> None:
        with self._changed:
            if message["do"] == "fail" and message["generation"] == self._opened:
                self._failed = True
            elif message["do"] == "open":
                self._opened, self._failed = message["generation"], False
            elif message["do"] == "finish":
                self._stop_reason = message["reason"]
            elif message["do"] == "end":
                self._failed, self._end_reason = True, message["reason"]
            self._changed.notify_all()

    def _free(self) -> None:
        """Frees the main thread from whatever waits for other ranks."""
        with self._changed:
            if not self._failed or self._acknowledged:
                return
            sockets.shut_down_local_ports(self._store_ports)
            sockets.break_gloo_listeners(self.world_size)
            # Under the lock: the main thread can't be in the next generation's groups before this returns.
            try:
                # Before `watch` is called a process builds its first groups.
                (self._abort or sockets.shut_down_sockets)()
            except (RuntimeError, OSError) as error:
                # The next call may do better; who is never freed is killed by the agent.
                print(f"rank {self.rank}: freeing the main thread: {error}", file=sys.stderr, flush=True)
