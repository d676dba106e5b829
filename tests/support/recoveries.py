"""Training under a real agent with faults on purpose, and what its events say of the recoveries."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.launcher import ROOT, Outcome
from tests.support.recovery_worker import SETTINGS

Event = dict[str, Any]
WORKER = ROOT / "tests" / "support" / "recovery_worker.py"
_ID = "MOEVEMENT_TEST_RUN"


@dataclass
class Recovery:
    """One recovery as its ranks told it.

    Attributes:
        generation: that it happened in.
        decision: the event of the lowest rank.
        replays: iterations that a rank replayed, by rank; only ranks that replayed.
        finished: ranks that went on to train.
    """

    generation: int
    decision: Event
    replays: dict[int, list[int]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)

    @property
    def segments(self) -> list[list[int]]:
        """Stages that replayed together."""
        return [list(segment["stages"]) for segment in self.decision["segments"]]


@dataclass
class Campaign:
    """How a job under an agent ended."""

    outcome: Outcome
    events: dict[int, list[Event]]
    processes: dict[int, list[Event]]
    left: list[str]
    seconds: float

    @property
    def output(self) -> str:
        """What agent and workers printed."""
        return self.outcome.output

    def told(self, kind: str) -> list[Event]:
        """Events of a kind of all ranks, in order of time."""
        found = [event for events in self.events.values() for event in events if event["kind"] == kind]
        return sorted(found, key=lambda event: float(event["time"]))

    def recoveries(self) -> list[Recovery]:
        """All that came to a decision, in order; those that a further failure interrupted too."""
        found: dict[int, Recovery] = {}
        for rank, events in self.events.items():
            current: Recovery | None = None
            for event in events:
                if event["kind"] == "decision":
                    current = found.setdefault(event["generation"], Recovery(event["generation"], event))
                elif current is not None and event["kind"] == "conversion" and event["replayed"]:
                    current.replays.setdefault(rank, []).append(event["step"])
                elif event["kind"] == "resumed" and current is not None:
                    current.finished.add(rank)
                    current = None
                elif event["kind"] == "failure_noticed":
                    current = None
        return [found[generation] for generation in sorted(found)]

    def completed(self) -> list[Recovery]:
        """Recoveries after which all ranks went on."""
        return [recovery for recovery in self.recoveries() if len(recovery.finished) == len(self.events)]


@dataclass
class AgentJob:
    """A training job under one agent, whose workers are forked.

    Attributes:
        directory: for output, events and digests.
        arguments: of pretrain_gpt.py.
        plan: faults for `--sparse-ckpt-inject`.
        faults: of `tests/support/faults.py`.
        flags: of the agent.
        meanwhile: called again and again with this job while the agent runs.
    """

    directory: Path
    world_size: int
    arguments: list[str]
    plan: str = ""
    faults: list[dict[str, Any]] = field(default_factory=list)
    flags: tuple[str, ...] = ()
    timeout_seconds: float = 1200.0
    meanwhile: Callable[[AgentJob], None] | None = None
    _word: str = field(default_factory=lambda: uuid.uuid4().hex)

    def run(self) -> Campaign:
        """Runs the job to its end."""
        self.directory.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        command = [sys.executable, "-m", "megatron.moevement.agent", "--nproc-per-node", str(self.world_size)]
        command += self.words()
        with (self.directory / "output.txt").open("w") as output:
            agent = subprocess.Popen(command, cwd=ROOT, env=self.environment(), stdout=output, stderr=output)
        try:
            status = self._wait(agent)
            left = self.left()
        finally:
            agent.kill()
            agent.wait()
            self.kill_what_is_left()
        return self.campaign(status, left, time.monotonic() - started)

    def environment(self) -> dict[str, str]:
        """Of the agent."""
        settings = {"folder": str(self.directory), "faults": self.faults}
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
            SETTINGS: json.dumps(settings),
            _ID: self._word,
        }

    def campaign(self, status: int, left: list[str], seconds: float) -> Campaign:
        """How it ended."""
        outcome = Outcome([status], (self.directory / "output.txt").read_text())
        for rank in range(self.world_size):
            path = self.directory / f"digest.rank{rank:05d}.json"
            if path.exists():
                outcome.digests[rank] = json.loads(path.read_text())
        return Campaign(outcome, self.events(), self.processes(), left, seconds)

    def words(self) -> list[str]:
        """The agent's command line, without the node's place in the job."""
        # No limit of its own counts a job whose purpose is to fail; a busy machine makes no worker hang.
        limits = [
            "--replacement",
            "fork",
            "--max-failures",
            "1000",
            "--max-failures-without-progress",
            "20",
            "--hang-timeout-seconds",
            "60",
        ]
        arguments = [*self.arguments, "--state-digest", str(self.directory / "digest")]
        arguments += ["--sparse-ckpt-log-dir", str(self.directory / "events")]
        plan = ["--sparse-ckpt-inject", self.plan] if self.plan else []
        return [*limits, *self.flags, str(WORKER), *arguments, *plan]

    def _wait(self, agent: subprocess.Popen[bytes]) -> int:
        deadline = time.monotonic() + self.timeout_seconds
        while agent.poll() is None and time.monotonic() < deadline:
            if self.meanwhile is not None:
                self.meanwhile(self)
            time.sleep(0.05)
        return -signal.SIGALRM if agent.returncode is None else agent.returncode

    def events(self) -> dict[int, list[Event]]:
        """What every rank has told so far."""
        return {
            rank: _lines(self.directory / "events" / f"events.rank{rank:05d}.jsonl") for rank in range(self.world_size)
        }

    def processes(self) -> dict[int, list[Event]]:
        """The processes of every rank so far, the first one first: `pid` on its `host`, and `generation`."""
        return {rank: _lines(self.directory / f"processes.{rank}") for rank in range(self.world_size)}

    def left(self) -> list[str]:
        """Processes of this job that are still there: pid and what runs."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._word.encode() in path.read_bytes():
                    command = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append(f"{path.parent.name} {command[:80]}")
            except OSError:
                continue  # it has ended, or is not ours
        return found

    def kill_what_is_left(self) -> None:
        """Kills every process of this job."""
        for line in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)


def _lines(path: Path) -> list[Event]:
    """A killed worker may leave half a line, which its replacement goes on behind."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
