"""Starts worker processes through the fork server, restarts all of them when one dies, as torchrun does."""

import contextlib
import json
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """The fork server process, and who is waiting for its answers."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._started: queue.Queue[int] = queue.Queue()
        self._ended: dict[int, int] = {}
        self._changed = threading.Condition()
        assert self._process.stdout is not None
        first = json.loads(self._process.stdout.readline())
        assert "ready" in first
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "started" in message:
                self._started.put(message["started"])
            else:
                with self._changed:
                    self._ended[message["ended"]] = message["status"]
                    self._changed.notify_all()

    def start(self, request: dict[str, Any]) -> int:
        """Forks a worker, returns its pid."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._started.get(timeout=60)

    def wait_any(self, pids: set[int], timeout: float) -> dict[int, int]:
        """Statuses of those `pids` that have ended; waits until there is one."""
        with self._changed:
            self._changed.wait_for(lambda: any(pid in self._ended for pid in pids), timeout)
            return {pid: self._ended[pid] for pid in pids if pid in self._ended}

    def close(self) -> None:
        """Ends the server and every worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@dataclass
class Outcome:
    """How a job ended: exit status of each generation's first dead worker (0 for the last), and what was printed."""

    statuses: list[int]
    output: str
    digests: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the last generation ended well."""
        return self.statuses[-1] == 0


@dataclass
class Job:
    """A training job of `world_size` workers.

    `faults` go to every worker, which picks its own. `between` is called after a generation died, before the next,
    `started` with the generation and the pids by rank when all its workers run.
    """

    zygote: Zygote
    directory: Path
    world_size: int
    arguments: list[str]
    faults: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 4
    timeout_seconds: float = 240.0
    between: Callable[[int], None] | None = None
    started: Callable[[int, list[int]], None] | None = None
    first_generation: int = 0
    program: str = "pretrain_gpt"
    environment: dict[str, str] = field(default_factory=dict)

    def run(self) -> Outcome:
        """Runs generations until one ends well, is refused (status 2), or the restarts are used up."""
        self.directory.mkdir(parents=True, exist_ok=True)
        output = self.directory / "output.txt"
        statuses: list[int] = []
        for generation in range(self.first_generation, self.first_generation + self.restarts + 1):
            statuses.append(self._generation(generation, output))
            if statuses[-1] in (0, 2):
                break
            if self.between is not None:
                self.between(generation)
        outcome = Outcome(statuses, output.read_text() if output.exists() else "")
        for rank in range(self.world_size):
            path = self.directory / f"digest.rank{rank:05d}.json"
            if path.exists():
                outcome.digests[rank] = json.loads(path.read_text())
        return outcome

    def _generation(self, generation: int, output: Path) -> int:
        port = free_port()
        pids = {}
        for rank in range(self.world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RESTART_COUNT": str(generation),
                **self.environment,
            }
            arguments = [*self.arguments, "--state-digest", str(self.directory / "digest")]
            request = {
                "environment": environment,
                "arguments": arguments,
                "faults": self.faults,
                "output": str(output),
                "program": self.program,
            }
            pids[self.zygote.start(request)] = rank
        if self.started is not None:
            self.started(generation, list(pids))
        return self._wait(set(pids))

    def _wait(self, alive: set[int]) -> int:
        deadline = time.monotonic() + self.timeout_seconds
        while alive:
            ended = self.zygote.wait_any(alive, deadline - time.monotonic())
            failed = [status for status in ended.values() if status != 0]
            if failed or not ended:
                # A refusal is what people read; it counts before the deaths that it causes.
                settle = self.zygote.wait_any(alive, 0.0)
                for pid in alive - set(settle):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                while alive - set(settle):
                    time.sleep(0.01)
                    settle = self.zygote.wait_any(alive, 10.0)
                assert ended, f"a worker hangs; output in {self.directory}"
                return 2 if 2 in settle.values() else next(s for s in ended.values() if s != 0)
            alive -= set(ended)
        return 0


def free_port() -> int:
    """A TCP port that nobody listens on, and that the system gives to no outgoing connection meanwhile."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", secrets.choice(range(20000, 32000))))
            return int(probe.getsockname()[1])


def copy_slots(source: Path, target: Path) -> None:
    """Copies a job's slot files, as they are after a death."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
