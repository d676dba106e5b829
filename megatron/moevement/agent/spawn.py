"""Starting worker processes: cold, from an idle process that has imported everything, or by a fork of one.

A started process is *unassigned*: it runs the script once its agent sends it environment and descriptors' numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron.moevement.agent.channel import MARKS_VARIABLE, Channel

KINDS = ("cold", "warm", "fork")
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Process:
    """A worker process as its agent sees it.

    Attributes:
        channel: to the process.
        pid: None until a forked process has told it.
        pidfd: readable when the process has ended.
        popen: what started it, if it is no fork.
        status: once it is reaped.
        kind: for people; a half-warm one had not imported everything yet when it was taken.
    """

    channel: Channel
    pid: int | None = None
    pidfd: int | None = None
    popen: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    status: int = 0
    kind: str = "cold"

    def started(self, pid: int) -> None:
        """Its pid is known."""
        self.pid, self.pidfd = pid, os.pidfd_open(pid)

    @property
    def prepared(self) -> bool:
        """Whether it has said that it has imported everything, and lives."""
        return self.channel.pending and self.popen is not None and self.popen.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal to it and to whatever it has started, unless it has ended."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def reap(self) -> int:
        """Waits for its end, kills what it left behind, and returns its status (negative: the signal)."""
        if self.pid is None or self.pidfd is None:
            return -signal.SIGKILL
        if self.popen is None or self.popen.returncode is None:
            # While it is a zombie its number belongs to nobody else.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            self.signal(signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            if self.popen is not None:
                self.popen.returncode = self.status
        else:
            self.status = self.popen.returncode
        os.close(self.pidfd)
        self.channel.close()
        self.pid = self.pidfd = None
        return self.status

    def discard(self) -> None:
        """Kills and reaps it."""
        if self.popen is None or self.popen.returncode is None:
            self.signal(signal.SIGKILL)
        if self.pid is not None:
            self.reap()
        else:
            self.channel.close()


class Starter:
    """Starts worker processes for one script.

    Args:
        kind: `cold`, `warm` or `fork`.
        script: the script and its arguments.
        preload: modules that warm and forked processes have imported.
        marks: descriptor of the progress marks, which every worker inherits.
        say: prints a line for people.
    """

    def __init__(
        self, kind: str, script: Sequence[str], preload: Sequence[str], marks: int, say: Callable[[str], None]
    ) -> None:
        self._kind, self._script, self._preload, self._marks, self.say = kind, tuple(script), preload, marks, say
        self._idle: list[Process] = []
        # A forked worker's parent ends at once; the agent inherits it and hears of its end like any parent.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        if kind == "fork":
            self._idle = [self._execute("fork", preload)]

    def first(self) -> Process:
        """A process for a worker of the first generation: nobody gains from an idle one then."""
        return self.take() if self._kind == "fork" else self._execute("once", ())

    def prepare(self, count: int) -> None:
        """Has so many idle processes wait for a `take`, where that uses them; says when one is prepared."""
        if self._kind != "warm":
            return
        while len(self._idle) < count:
            self._idle.append(self._execute("once", self._preload))
        for idle in self._idle:
            if idle.kind != "warm" and idle.prepared:
                idle.kind = "warm"
                self.say("a warm process stands by")

    def take(self) -> Process:
        """A process for a replacement, as quickly as this kind can."""
        for idle in self._idle:
            if idle.popen is not None and idle.popen.poll() is not None:
                self.say(f"an idle {self._kind} process has ended (status {idle.popen.returncode}); starting cold")
                self.close()
                self._kind = "cold"
                break
        if not self._idle:
            return self._execute("once", ())
        if self._kind == "warm":
            process = self._idle.pop(0)
            # One that is half-way is still the quickest.
            process.kind = "warm" if process.prepared else "half-warm"
            return process
        channel, other = Channel.pair()
        with other:
            self._idle[0].channel.send({"is": "fork"}, (other.fileno(),))
        return Process(channel, kind="forked")

    def assign(self, process: Process, environment: Mapping[str, str]) -> None:
        """Has an unassigned process become the worker with this environment."""
        process.channel.send({"environment": {**environment, MARKS_VARIABLE: str(self._marks)}})

    @property
    def pids(self) -> frozenset[int]:
        """Of processes that belong to no worker."""
        return frozenset(idle.pid for idle in self._idle if idle.pid is not None)

    def close(self) -> None:
        """Ends what is idle."""
        for idle in self._idle:
            idle.discard()
        self._idle = []

    def _execute(self, mode: str, preload: Sequence[str]) -> Process:
        channel, other = Channel.pair()
        module = "megatron.moevement.agent.worker"
        words = [sys.executable, "-u", "-m", module, str(other.fileno()), str(os.getpid()), mode, ",".join(preload)]
        with other:
            popen = subprocess.Popen(
                [*words, *self._script],
                stdin=subprocess.DEVNULL,
                # Asking whether there is a GPU must not initialise its driver: that would not survive a fork.
                env={**os.environ, **({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} if mode == "fork" else {})},
                pass_fds=(other.fileno(), self._marks),
                start_new_session=True,
            )
            process = Process(channel, popen=popen)
        process.started(popen.pid)
        return process
