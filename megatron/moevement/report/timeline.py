"""What one rank did in the iterations of one window: spans of time, and which operators each slot holds how."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron.moevement.report.read_events import Event, attempts
from megatron.moevement.schedule.slots import SlotSchedule
from megatron.moevement.types import Presence

ABSENT = "absent"
_SINGLE = ("embedding", "output")


class Lane(StrEnum):
    """The rows of a timeline, from top to bottom. `ITERATION` is there only where its parts aren't recorded."""

    ITERATION = "iteration"
    COMPUTE = "forward, backward"
    COPY = "copy to host memory"
    STALL = "stall at the fence"
    UPDATE = "optimizer step"
    COMMIT = "digest, commit"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time on one lane, in seconds since the epoch."""

    lane: Lane
    started: float
    ended: float
    label: str = ""


@dataclass(frozen=True, slots=True)
class TimelineSlot:
    """One slot of the window: its iteration (from 0), and the presence of each group in it, or `absent`."""

    iteration: int
    started: float
    label: str
    presence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WindowTimeline:
    """One window on one rank. `groups` are the labels of the operator groups, in capture order."""

    rank: int
    groups: tuple[str, ...]
    slots: tuple[TimelineSlot, ...]
    spans: tuple[Span, ...]


def window_timeline(events: Sequence[Event], default_mode: str = "rolling") -> WindowTimeline | None:
    """The newest window whose slots were all committed, None if there is none.

    Args:
        events: those of one rank, in order.
        default_mode: window mode where the events don't tell it.
    """
    commits = [e for e in events if e["kind"] == "slot"]
    for attempt in reversed(attempts(events)):
        # Iterations that a recovery replays or that a failure interrupts have no ordinary times.
        plain = [e for e in attempt.iterations if not e.get("replayed") and not e.get("interrupted")]
        for window in reversed(list(_windows(plain))):
            # A step that runs again after a kill is committed again, behind the start of its own iteration.
            own = {
                int(e["iteration"]): c
                for e in window
                for c in commits
                if c["step"] == e["iteration"] and c["time"] >= _started(e)
            }
            if len(own) == len(window):
                return _timeline(window, own, *_schedule(events, window, default_mode))
    return None


def _windows(iterations: Sequence[Event]) -> Iterator[list[Event]]:
    """Runs of iterations whose slots are those of one whole window."""
    for at, event in enumerate(iterations):
        length = int(event.get("window") or 0)
        window = list(iterations[at : at + length])
        if length and [e.get("window_index") for e in window] == list(range(length)):
            yield window


def _schedule(events: Sequence[Event], window: Sequence[Event], default_mode: str) -> tuple[SlotSchedule, bool]:
    """The schedule in force in the window, and whether the events name the operators of its groups."""
    mode, groups, named = default_mode, tuple((f"{i}",) for i in range(len(window))), False
    for event in events:
        if float(event["time"]) > float(window[0]["time"]):
            break
        mode = str(event.get("window_mode", mode))
        if len(event.get("groups", ())) == len(window):
            groups, named = tuple(tuple(group) for group in event["groups"]), True
    return SlotSchedule(groups, mode), named


def _timeline(
    window: Sequence[Event], commits: Mapping[int, Event], schedule: SlotSchedule, named: bool
) -> WindowTimeline:
    slots = []
    spans: list[Span] = []
    for event in window:
        commit = commits[int(event["iteration"])]
        slots.append(_slot(event, commit, schedule))
        spans += _spans(event, commit)
    labels = tuple(_label(i, group if named else None) for i, group in enumerate(schedule.groups))
    return WindowTimeline(int(window[0]["rank"]), labels, tuple(slots), tuple(spans))


def _slot(event: Event, commit: Event, schedule: SlotSchedule) -> TimelineSlot:
    spec = schedule.spec(int(event["iteration"]))
    presence = []
    for group in schedule.groups:
        if not group:
            presence.append(ABSENT)
        elif group[0] in spec.full:
            presence.append(Presence.FULL.value)
        else:
            presence.append(Presence.WEIGHTS_ONLY.value if group[0] in spec.weights_only else ABSENT)
    label = f"slot {spec.index + 1}\n{commit['data_bytes'] / 2**20:.2f} MiB"
    return TimelineSlot(int(event["iteration"]), _started(event), label, tuple(presence))


def _spans(event: Event, commit: Event) -> Iterator[Span]:
    """The spans of one iteration; those whose times the events don't have are left out."""
    started, ended = _started(event), float(event["time"])
    fence = event.get("fence_started_time")
    if fence is None:
        yield Span(Lane.ITERATION, started, ended)
    else:
        stalled = float(fence) + float(event["stall_seconds"])
        yield Span(Lane.COMPUTE, started, float(fence))
        yield Span(Lane.STALL, float(fence), stalled, f"{1000 * event['stall_seconds']:.1f} ms")
        yield Span(Lane.UPDATE, stalled, ended)
    if commit.get("copy_started_time") is not None:
        copied = float(commit["copy_started_time"])
        yield Span(Lane.COPY, copied, copied + float(commit["copy_seconds"]), f"{1000 * commit['copy_seconds']:.1f} ms")
    committed, digest = float(commit["time"]), float(commit["digest_seconds"])
    yield Span(Lane.COMMIT, committed - digest, committed, f"{1000 * digest:.1f} ms")


def _started(event: Event) -> float:
    return float(event["time"]) - float(event["seconds"])


def _label(index: int, group: Sequence[str] | None) -> str:
    if group is None:
        return f"group {index + 1}"
    kinds = Counter(name.rsplit(".", 1)[-1].rstrip("0123456789") for name in group)
    parts = [
        word if word in _SINGLE else f"{count} {word.replace('_', '-')}{'s' if count > 1 else ''}"
        for word, count in kinds.items()
    ]
    return f"group {index + 1}: {', '.join(parts) or 'empty'}"
