"""Reads the JSONL events of all ranks of a run, and sorts them into what displays and plots need."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_LINE_START = '{"time":'


@dataclass(frozen=True, slots=True)
class RunEvents:
    """The events of a run in the order of their times, and how many lines were torn by a killed worker."""

    events: tuple[Event, ...]
    torn_lines: int

    def of(self, *kinds: str, rank: int | None = None) -> tuple[Event, ...]:
        """The events of the kinds, of one rank or of all."""
        return tuple(e for e in self.events if e["kind"] in kinds and rank in (None, e["rank"]))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that wrote events, ascending."""
        return tuple(sorted({int(e["rank"]) for e in self.events}))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One life of a worker, between two starts.

    Attributes:
        started: when it chose its source, seconds since the epoch.
        first_step: the step that training went on from; 0 is from scratch.
        source: `slots`, `dense` or `scratch`.
        replayed: iterations that a conversion replayed, empty if there was none or it was interrupted before one.
        iterations: the `iteration` events, in order.
        recovery_seconds: of a finished conversion, else None.
    """

    started: float
    first_step: int
    source: str
    replayed: tuple[int, ...]
    iterations: tuple[Event, ...]
    recovery_seconds: float | None


class Tail:
    """Follows files that others append to."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}

    def lines(self, path: Path) -> list[str]:
        """The lines that were completed since the last call; none as long as the file doesn't exist."""
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offsets[path] = self._offsets.get(path, 0) + len(complete)
        return complete.decode(errors="replace").splitlines()


def parse_lines(lines: Iterable[str]) -> tuple[list[Event], int]:
    """The events in the lines, and the number of torn lines.

    A replacement worker goes on in the same file, so that its first event may stand behind a torn one on one line;
    such an event is not lost.
    """
    events: list[Event] = []
    torn = 0
    for line in lines:
        if not line.strip():
            continue
        event = _event(line)
        if event is None:
            torn += 1
            event = _event(line[max(line.rfind(_LINE_START), 0) :])
        if event is not None:
            events.append(event)
    return events, torn


def read_events(directory: Path) -> RunEvents:
    """Reads `events.rank*.jsonl` of a directory; without such files the result is empty.

    Raises:
        OSError: a file can't be read.
    """
    events: list[Event] = []
    torn = 0
    for path in sorted(directory.glob("events.rank*.jsonl")):
        found, torn_here = parse_lines(path.read_text(encoding="utf-8", errors="replace").splitlines())
        events += found
        torn += torn_here
    return RunEvents(tuple(sorted(events, key=lambda e: float(e["time"]))), torn)


def attempts(events: Sequence[Event]) -> list[Attempt]:
    """Divides one rank's events at its `start` events."""
    return [_attempt(life) for life in _lives(events)]


def start_of(event: Event) -> tuple[str, int]:
    """Source and step that a `start` event tells of."""
    if event.get("run"):
        return "slots", int(event["run"][1])
    if event.get("dense_step") is not None:
        return "dense", int(event["dense_step"])
    return "scratch", 0


def _event(text: str) -> Event | None:
    try:
        event = json.loads(text)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and {"time", "rank", "kind"} <= event.keys() else None


def _lives(events: Sequence[Event]) -> Iterator[list[Event]]:
    life: list[Event] = []
    for event in events:
        if event["kind"] == "start":
            if life:
                yield life
            life = [event]
        elif life:
            life.append(event)
    if life:
        yield life


def _attempt(life: Sequence[Event]) -> Attempt:
    source, first_step = start_of(life[0])
    finished = [e for e in life if e["kind"] == "recovery_finished"]
    return Attempt(
        started=float(life[0]["time"]),
        first_step=first_step,
        source=source,
        replayed=tuple(int(e["step"]) for e in life if e["kind"] == "conversion" and e["replayed"]),
        iterations=tuple(e for e in life if e["kind"] == "iteration"),
        recovery_seconds=float(finished[0]["seconds"]) if finished else None,
    )
