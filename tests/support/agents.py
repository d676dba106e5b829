"""Agents as processes of their own, with the workers of `agent_worker.py`, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "agent_worker.py"
PATIENCE_SECONDS = 120.0
_ID = "MOEVEMENT_TEST_RUN"
T = TypeVar("T")
Note = dict[str, Any]


class Agents:
    """The agents of one job; whatever they leave behind is found by a word in its environment.

    Args:
        folder: where workers write what happens to them.
        iterations: that the job makes; it ends earlier with `finish`.
        seconds: an iteration at least.
    """

    def __init__(self, folder: Path, iterations: int = 100_000, seconds: float = 0.02) -> None:
        self.folder, self.id = folder, uuid.uuid4().hex
        self.arguments = [str(SCRIPT), str(folder), str(iterations), str(seconds)]
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, *flags: str) -> subprocess.Popen[str]:
        """One more agent."""
        errors = (self.folder / f"agent-{len(self.agents)}.err").open("w")
        with errors:
            agent = subprocess.Popen(self.command(*flags), env=self.environment(), cwd=ROOT, stderr=errors, text=True)
        self.agents.append(agent)
        return agent

    def command(self, *flags: str) -> list[str]:
        """What an agent is started with."""
        return [sys.executable, "-m", "megatron.moevement.agent", *flags, *self.arguments]

    def environment(self) -> dict[str, str]:
        """Of an agent."""
        return {**os.environ, _ID: self.id, "OMP_NUM_THREADS": "1"}

    def said(self, agent: int = 0) -> str:
        """What an agent (and its workers) printed."""
        return (self.folder / f"agent-{agent}.err").read_text()

    def notes(self, rank: int, what: str | None = None) -> list[Note]:
        """What a rank noted, of one kind if it is named."""
        path = self.folder / f"rank-{rank}"
        # A killed worker may leave half a line.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        notes = [json.loads(line) for line in lines if line.endswith("}")]
        return [note for note in notes if what in (None, note["what"])]

    def pid(self, rank: int) -> int:
        """The newest process of a rank."""
        return int(self.notes(rank)[-1]["pid"])

    def wait_in(self, generation: int, ranks: int) -> list[Note]:
        """Waits until all ranks are in the generation and have made an iteration there; their notes."""

        def there() -> list[Note] | None:
            found = [note for r in range(ranks) for note in self.notes(r, "works") if note["generation"] == generation]
            return found if len(found) == ranks else None

        return wait(there, self._complain(f"generation {generation}"))

    def order(self, rank: int, fault: str) -> None:
        """The rank does this next: see `agent_worker.py`."""
        (self.folder / f"fault-{rank}").write_text(fault)

    def finish(self) -> None:
        """The workers end after a few more iterations."""
        (self.folder / "finish").touch()

    def end(self, agent: int = 0) -> int:
        """Waits for an agent; its status."""
        try:
            return self.agents[agent].wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._complain("its end")()) from None

    def left(self) -> list[int]:
        """Processes of this job that are still there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.id.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue  # it has ended, or is not ours
        return found

    def close(self) -> None:
        """Kills everything."""
        for agent in self.agents:
            agent.kill()
            agent.wait()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)

    def _complain(self, wanted: str) -> Callable[[], str]:
        def text() -> str:
            said = "\n".join(self.said(number) for number in range(len(self.agents)))
            notes = "\n".join(f"rank {rank}: {self.notes(rank)[-4:]}" for rank in range(4))
            return f"waited in vain for {wanted}\n{said}\n{notes}"

        return text


def wait(
    look: Callable[[], T | None],
    complain: Callable[[], str] = lambda: "waited in vain",
    seconds: float = PATIENCE_SECONDS,
    pause: float = 0.02,
) -> T:
    """Looks until there is something, for so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(pause)
    raise AssertionError(complain())
