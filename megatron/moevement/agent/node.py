"""One node's workers: started, watched and ended as the head orders, reported to it."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.moevement.agent.channel import EXIT_AGAIN, GENERATION_VARIABLE, STORE_VARIABLE
from megatron.moevement.agent.marks import Marks
from megatron.moevement.agent.spawn import Process, Starter

Message = dict[str, Any]
# A stopped process is killed after this long: nothing on a node stops a worker for a purpose.
STOPPED_SECONDS = 2.0
_TERM_SECONDS = 5.0
_LOOK_SECONDS = 0.2


@dataclass
class Worker:
    """A worker process and whom it stands for.

    Attributes:
        stopped_at: since when it has been seen in state T.
        why_killed: why its agent has killed it.
    """

    process: Process
    rank: int
    local_rank: int
    incarnation: int
    stopped_at: float | None = None
    why_killed: str = ""


class Node:
    """The workers of one agent.

    Args:
        starter: starts processes.
        marks: the memory that workers mark their progress in, one place per local rank.
        store: the head's store, for the workers' environment.
        post: tells the head something.
        grace_seconds: how long workers may take to end by themselves.
        idle: processes that wait for a failure, where workers are replaced by such.
    """

    def __init__(
        self,
        starter: Starter,
        marks: Marks,
        store: tuple[str, int],
        post: Callable[[Message], None],
        grace_seconds: float,
        idle: int = 1,
    ) -> None:
        self._starter, self._marks, self._store, self._post = starter, marks, store, post
        self._grace_seconds, self._idle = grace_seconds, idle
        self.workers: dict[int, Worker] = {}
        self.end: Message | None = None
        self._signal_at, self._signals = 0.0, [signal.SIGTERM, signal.SIGKILL]
        self._selector = selectors.DefaultSelector()
        self._looked_at = time.monotonic()
        self._resumed_ns = 0

    # ----------------------------------------------------------------------------------------------- orders

    def obey(self, order: Message) -> None:
        """Does what the head orders."""
        if order["do"] == "start":
            if self.end is None:
                self._start(order)
        elif order["do"] == "kill":
            worker = self.workers.get(order["rank"])
            if worker is not None and worker.incarnation == order["incarnation"]:
                self._kill(worker, order["why"])
        elif order["do"] == "end":
            self._end(order)
        else:
            for worker in self.workers.values():
                worker.process.channel.send(order)

    def _start(self, order: Message) -> None:
        first = order["generation"] == 0
        process = self._starter.first() if first else self._starter.take()
        if not first:
            self._starter.say(f"rank {order['rank']}: a {process.kind} process replaces it")
        worker = Worker(process, order["rank"], order["local_rank"], order["incarnation"])
        self._marks.clear(worker.local_rank)
        self._starter.assign(process, self._environment(order))
        self.workers[worker.rank] = worker
        self._selector.register(process.channel, selectors.EVENT_READ, (worker, "channel"))
        if process.pidfd is not None:
            self._selector.register(process.pidfd, selectors.EVENT_READ, (worker, "end"))

    def _environment(self, order: Message) -> Mapping[str, str]:
        host, port = self._store
        threads = {} if order["local_world_size"] == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
        return {
            **threads,
            "RANK": str(order["rank"]),
            "LOCAL_RANK": str(order["local_rank"]),
            "WORLD_SIZE": str(order["world_size"]),
            "LOCAL_WORLD_SIZE": str(order["local_world_size"]),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(order["generation"]),
            GENERATION_VARIABLE: str(order["generation"]),
            STORE_VARIABLE: f"{host}:{port}",
        }

    def _end(self, order: Message) -> None:
        if self.end is not None:
            return
        self.end = order
        for worker in self.workers.values():
            worker.process.channel.send(order)
        # After a refusal there is nothing to persist; but the rank that prints the reason may not be there yet.
        grace = self._grace_seconds if order["status"] == EXIT_AGAIN else min(self._grace_seconds, _TERM_SECONDS)
        self._signal_at = time.monotonic() + grace

    # ------------------------------------------------------------------------------------------------ watch

    def poll(self, seconds: float) -> None:
        """Waits for news of workers and reports them; looks for stopped processes."""
        for key, _ in self._selector.select(seconds):
            worker: Worker = key.data[0]
            if key.data[1] == "end":
                self._ended(worker)
            elif self.workers.get(worker.rank) is worker:
                self._hear(worker)
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._look(now)
        if self.end is not None and self.workers and now > self._signal_at and self._signals:
            number = self._signals.pop(0)
            self._signal_at = now + _TERM_SECONDS
            for worker in self.workers.values():
                worker.process.signal(number)

    def _hear(self, worker: Worker) -> None:
        message, _ = worker.process.channel.receive()
        if message is None:
            # The process is ending, and its pidfd says so; a forked one that never said its pid is gone.
            self._selector.unregister(worker.process.channel)
            if worker.process.pidfd is None:
                self._ended(worker)
        elif message["is"] == "started":
            worker.process.started(message["pid"])
            self._selector.register(worker.process.pidfd or -1, selectors.EVENT_READ, (worker, "end"))
        elif self.end is None and message["is"] != "prepared":
            self._post_about(worker, message)

    def _ended(self, worker: Worker) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data[0] is worker:
                self._selector.unregister(key.fileobj)
        status = worker.process.reap()
        del self.workers[worker.rank]
        if self.end is None:
            why = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
            self._post_about(worker, {"is": "ended", "status": status, "why": worker.why_killed or why})

    def _post_about(self, worker: Worker, event: Message) -> None:
        about = {"rank": worker.rank, "incarnation": worker.incarnation}
        self._post({**event, **about, "mark": asdict(self._marks.read(worker.local_rank, self._resumed_ns))})

    def _look(self, now: float) -> None:
        if now - self._looked_at > _LOOK_SECONDS + 1.0:
            # This process itself was stopped or starved: what workers did meanwhile counts for nothing.
            self._resumed_ns = time.monotonic_ns()
        self._looked_at = now
        if self.end is None:
            self._starter.prepare(self._idle)
        for worker in self.workers.values():
            if _state(worker.process.pid) != "T":
                worker.stopped_at = None
            elif worker.stopped_at is None:
                worker.stopped_at = now
            elif now - worker.stopped_at > STOPPED_SECONDS:
                self._kill(worker, f"was stopped for {STOPPED_SECONDS:.0f} s")
        self._reap_strangers()

    def _kill(self, worker: Worker, why: str) -> None:
        if not worker.why_killed:
            worker.why_killed = why
            worker.process.signal(signal.SIGKILL)

    def _reap_strangers(self) -> None:
        """Reaps processes that workers left behind: this agent inherits them."""
        ours = {worker.process.pid for worker in self.workers.values()} | self._starter.pids
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in ours:
                return
            if not any(worker.process.pid is None for worker in self.workers.values()):
                os.waitpid(ended.si_pid, 0)
            else:
                return  # it may be a forked worker that has not been heard yet

    def reports(self) -> list[Message]:
        """What the head wants to know of each worker."""
        return [
            {
                "rank": worker.rank,
                "incarnation": worker.incarnation,
                "mark": asdict(self._marks.read(worker.local_rank, self._resumed_ns)),
            }
            for worker in self.workers.values()
        ]

    def close(self) -> None:
        """Kills whatever is left."""
        for worker in list(self.workers.values()):
            worker.process.discard()
        self.workers.clear()
        self._starter.close()
        self._selector.close()
        self._marks.close()


def _state(pid: int | None) -> str:
    """State letter of a process; empty if it is gone."""
    if pid is None:
        return ""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
