"""The localized recoveries of a run, from the events of all its ranks: who did what when, and what was replayed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron.moevement.recovery.phases import Phase
from megatron.moevement.report.read_events import Event

# What a rank does between a kill and the first word of the process that replaces it.
DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Kill:
    """A killed worker: its rank, when (seconds since the epoch), and whether a recovery was under way."""

    rank: int
    time: float
    in_recovery: bool


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A stretch of a recovery on one rank, in seconds since the epoch. `iterations` were replayed or served in it."""

    rank: int
    phase: str
    started: float
    ended: float
    iterations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LocalRecovery:
    """From the first kill to training again.

    Attributes:
        started: the first kill, or the first notice where no kill is known.
        ended: when the last rank trained again.
        target: Step at which training went on.
        scope: stages that rolled back, those of interrupted attempts included.
        source: "local", or what all rolled back to in the end.
        decisions: the `decision` events of one rank, one an attempt.
        kills: that began or interrupted it, in order.
        spans: what each rank did.
    """

    started: float
    ended: float
    target: int
    scope: tuple[int, ...]
    source: str
    decisions: tuple[Event, ...]
    kills: tuple[Kill, ...]
    spans: tuple[PhaseSpan, ...]

    @property
    def who(self) -> str:
        """Who rolled back, for people."""
        return "all stages" if self.source != "local" else listed("stage", self.scope)

    def replayed(self, *phases: str) -> tuple[int, ...]:
        """Iterations that some rank replayed in these phases."""
        return tuple(sorted({i for span in self.spans if span.phase in phases for i in span.iterations}))


def listed(what: str, numbers: Iterable[int]) -> str:
    """`stage 1`, or `stages 1, 2`."""
    words = [str(number) for number in numbers]
    return f"{what}{'s' if len(words) > 1 else ''} {', '.join(words)}"


def local_recoveries(events: Sequence[Event], kills: Sequence[Kill]) -> list[LocalRecovery]:
    """The finished recoveries, in order.

    Args:
        events: of all ranks, in the order of their times.
        kills: that are known from outside; the events of a killed process don't tell of its end.
    """
    ends: dict[int, float] = {}
    for event in events:
        if event["kind"] == "resumed":
            ends[int(event["generation"])] = float(event["time"])
    found = []
    before = float("-inf")
    for _, end in sorted(ends.items()):
        found.append(_recovery([e for e in events if before < e["time"] <= end], before, end, kills))
        before = end
    return found


def processes(events: Sequence[Event]) -> dict[int, list[int]]:
    """The process ids of every rank, in order."""
    pids: dict[int, list[int]] = defaultdict(list)
    for event in events:
        if event["kind"] == "process":
            pids[int(event["rank"])].append(int(event["pid"]))
    return dict(pids)


def stages(events: Sequence[Event]) -> dict[int, int]:
    """The pipeline stage of every rank."""
    return {int(e["rank"]): int(e["stage"]) for e in events if e["kind"] == "process"}


def _recovery(events: Sequence[Event], after: float, end: float, kills: Sequence[Kill]) -> LocalRecovery:
    own = tuple(kill for kill in kills if after < kill.time <= end)
    resumed = next(e for e in reversed(events) if e["kind"] == "resumed")
    noticed = [float(e["time"]) for e in events if e["kind"] == "recovery_phase" and e["phase"] != Phase.TRAIN]
    decisions: dict[int, Event] = {}
    for event in events:
        if event["kind"] == "decision":
            decisions.setdefault(int(event["generation"]), event)
    by_rank: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        by_rank[int(event["rank"])].append(event)
    spans = [span for rank in sorted(by_rank) for span in _spans(rank, by_rank[rank], own, end)]
    return LocalRecovery(
        started=min([*(kill.time for kill in own), *noticed]),
        ended=end,
        target=int(resumed["step"]),
        scope=tuple(sorted({stage for decision in decisions.values() for stage in decision["scope"]})),
        source=resumed["source"],
        decisions=tuple(decisions.values()),
        kills=own,
        spans=tuple(spans),
    )


def _spans(rank: int, events: Sequence[Event], kills: Sequence[Kill], end: float) -> Iterator[PhaseSpan]:
    """The phases of one rank; a kill ends the one that it hits."""
    deaths = [kill.time for kill in kills if kill.rank == rank]
    changes: list[tuple[float, str, int]] = [(time, DEAD, -1) for time in deaths]
    for event in events:
        if event["kind"] == "recovery_phase":
            iteration = int(event["iteration"]) if event["done"] else -1
            changes.append((float(event["time"]), event["phase"], iteration))
    phase, started, iterations = str(Phase.TRAIN), 0.0, list[int]()
    for time, following, iteration in sorted(changes, key=lambda change: change[0]):
        if iteration >= 0:
            iterations.append(iteration)
            continue
        if phase != Phase.TRAIN and time > started:
            yield PhaseSpan(rank, phase, started, time, tuple(iterations))
        phase, started, iterations = following, time, []
    if phase != Phase.TRAIN and started < end:
        yield PhaseSpan(rank, phase, started, end, tuple(iterations))
