"""The agent's loop: workers, orders, signs of life, and on the head the decisions."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from megatron.moevement.agent.board import Board, Message, connect, serve
from megatron.moevement.agent.channel import EXIT_AGAIN
from megatron.moevement.agent.head import Head
from megatron.moevement.agent.marks import Marks
from megatron.moevement.agent.node import Node
from megatron.moevement.agent.options import PROGRAM, Options
from megatron.moevement.agent.spawn import Starter
from megatron.moevement.arguments import refuse

_TICK_SECONDS = 0.02
_RENEW_SECONDS = 0.2
# A node stops itself earlier than the head gives its ranks away.
_FENCE_SHARE = 0.8
_GOODBYE_SECONDS = 15.0


def run(options: Options) -> int:
    """Runs this node's workers until the job ends; the exit status."""
    agent = _Agent(options)
    try:
        return agent.run()
    finally:
        agent.close()


def say(line: str) -> None:
    """A line for people."""
    print(f"agent: {line}", file=sys.stderr, flush=True)


class _Agent:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._signal: int | None = None
        self._marks = Marks.create(options.nproc_per_node)
        self._starter = Starter(options.replacement, options.script, options.preload, self._marks.descriptor, say)
        # A spare takes all ranks of a node over at once.
        idle = options.nproc_per_node if options.node_rank is None else 1
        is_head = options.node_rank == 0
        try:
            # The server lives as long as this reference to it.
            port = options.head[1]
            if is_head:
                self._server, port = serve(*options.head)
            store = connect(options.head[0], port, timedelta(seconds=options.limits.start_seconds))
        except (dist.DistError, OSError, RuntimeError) as error:
            self._starter.close()
            where = f"--head {':'.join(map(str, options.head))}"
            if is_head:
                refuse(PROGRAM, f"{where}: can't listen there ({_first_line(error)}); choose another port", {})
            say(f"stopping: {where}: no head answers there ({_first_line(error)})")
            raise SystemExit(EXIT_AGAIN) from None
        self._board = Board(store, options.limits.heartbeat_seconds)
        self._number = self._board.enter()
        self._node = Node(self._starter, self._marks, (options.head[0], port), self._post, options.grace_seconds, idle)
        self._head = Head(options.nnodes, options.limits, self._board.order, say) if is_head else None
        self._heard_ns = time.monotonic_ns()
        self._renew_at = 0.0

    def _told_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _post(self, event: Message) -> None:
        self._board.post(self._number, event)

    def run(self) -> int:
        """The loop; the exit status."""
        # Not before: a signal ends an agent that still looks for its head at once, and its processes with it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told_to_stop)
        self._renew()
        if self._head is None:
            threading.Thread(target=self._fence, name="fence", daemon=True).start()
        self._post({"is": "enter", "node": self._options.node_rank, "slots": self._options.nproc_per_node})
        while self._node.end is None or self._node.workers:
            try:
                self._turn()
            except (dist.DistError, RuntimeError) as error:
                if self._head is not None:
                    raise
                return self._without_head(_first_line(error))
        status: int = self._node.end["status"]
        if status and self._head is None:
            say(f"stopping: {self._node.end['reason']}")
        self._goodbye()
        return status

    def _turn(self) -> None:
        self._node.poll(_TICK_SECONDS)
        self._renew_in_time()
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            self._post({"is": "told to stop", "why": f"agent {self._number} was told to ({name})"})
            self._signal = None
        for order in self._board.orders(self._number):
            self._node.obey(order)
        if self._head is not None:
            self._decide(self._head)

    def _decide(self, head: Head) -> None:
        for event in self._board.events():
            head.handle(event)
        # Starting processes may have taken long: the head must not take its own silence for a lost node's.
        self._renew_in_time()
        head.tick(self._board.lives(head.agents))
        if head.end is not None and self._node.end is None:
            # Whatever the head thinks of its own node: this loop must end with the job.
            status, reason = head.end
            self._node.obey({"do": "end", "status": status, "reason": reason})

    def _renew_in_time(self) -> None:
        if time.monotonic() >= self._renew_at:
            self._renew()

    def _renew(self) -> None:
        before = time.monotonic_ns()
        if self._head is None and self._silence() >= self._fence_seconds:
            # It has stood still for so long that others have its ranks, and wakes before the thread does.
            self._end_fenced()
        self._board.renew(self._number, self._node.reports())
        self._heard_ns, self._renew_at = before, time.monotonic() + _RENEW_SECONDS
        # The head never gives its own node's ranks away.
        self._marks.renew(before, 0.0 if self._head is not None else self._fence_seconds)

    def _fence(self) -> None:
        """Ends this node when the head must take it for lost; a call to a silent head never returns."""
        while (left := self._fence_seconds - self._silence()) > 0:
            time.sleep(min(left, _RENEW_SECONDS))
        self._end_fenced()

    @property
    def _fence_seconds(self) -> float:
        return float(self._options.limits.heartbeat_seconds * _FENCE_SHARE)

    def _silence(self) -> float:
        """Seconds since the head answered last."""
        return (time.monotonic_ns() - self._heard_ns) / 1e9

    def _end_fenced(self) -> NoReturn:
        say(f"stopping: the head did not answer for {self._silence():.1f} s; this node fences itself")
        # The kernel kills the workers with their parent.
        os._exit(EXIT_AGAIN)

    def _without_head(self, why: str) -> int:
        """The head is gone, and with it the job: nobody gives this node's ranks away."""
        if self._node.end is None:
            say(f"stopping: the head is gone ({why})")
        self._heard_ns = time.monotonic_ns() + int(1e9 * 3600)
        self._marks.renew(self._heard_ns, 0.0)
        self._node.obey({"do": "end", "status": EXIT_AGAIN, "reason": "the head agent is gone"})
        while self._node.workers:
            self._node.poll(_TICK_SECONDS)
        status: int = (self._node.end or {"status": EXIT_AGAIN})["status"]
        return status

    def _goodbye(self) -> None:
        """The head's store lasts until every other agent knows how the job ended."""
        if self._head is None:
            # The head may have given up waiting for it.
            with contextlib.suppress(RuntimeError):
                self._post({"is": "gone"})
            return
        deadline = time.monotonic() + self._options.grace_seconds + _GOODBYE_SECONDS
        self._post({"is": "gone"})
        while self._head.agents and time.monotonic() < deadline:
            self._decide(self._head)
            time.sleep(_TICK_SECONDS)

    def close(self) -> None:
        """Leaves no process behind."""
        self._node.close()


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:160]
