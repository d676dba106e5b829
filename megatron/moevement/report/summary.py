"""What killed workers cost: for each kill who rolled back, what was replayed and how long each part took."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from megatron.moevement.recovery.phase_log import REPLAYING
from megatron.moevement.report.compare import Comparison
from megatron.moevement.report.read_events import Event
from megatron.moevement.report.recoveries import Kill, LocalRecovery, listed


@dataclass(frozen=True, slots=True)
class Outcome:
    """What followed a kill, until training went on or the next kill interrupted the recovery.

    Attributes:
        rank: of the killed worker.
        finished: iterations that all ranks had finished when it happened.
        in_recovery: whether a recovery was under way.
        recovery: index of its recovery; -1 without one.
        source: "local", or what all ranks rolled back to; empty if nothing was decided.
        scope: stages that rolled back.
        replays: iterations that the decision asked to replay.
        replayed: iterations that were replayed until training went on, or until a further kill was noticed.
        replayed_after: iterations that were replayed from then on.
        target: Step at which training was to go on.
        detect_seconds: from the kill to the first survivor that noticed it; None where all stood still already.
        join_seconds: from then to the decision: a process for the killed rank, and groups.
        replay_seconds: from the decision to training again; None if a further kill came first.
        back_seconds: from the kill to training again, further kills or not.
    """

    rank: int
    finished: int
    in_recovery: bool
    recovery: int = -1
    source: str = ""
    scope: tuple[int, ...] = ()
    replays: int = 0
    replayed: int = 0
    replayed_after: int = 0
    target: int = 0
    detect_seconds: float | None = None
    join_seconds: float | None = None
    replay_seconds: float | None = None
    back_seconds: float | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a further kill came before training went on."""
        return self.back_seconds is not None and self.replay_seconds is None


def outcomes(events: Sequence[Event], kills: Sequence[Kill], found: Sequence[LocalRecovery]) -> list[Outcome]:
    """What followed each kill. `events` are those of all ranks, in the order of their times."""
    return [_outcome(events, kill, found) for kill in kills]


def _outcome(events: Sequence[Event], kill: Kill, found: Sequence[LocalRecovery]) -> Outcome:
    index = next((i for i, recovery in enumerate(found) if kill in recovery.kills), -1)
    done: dict[int, int] = {}
    for event in events:
        if event["kind"] == "iteration" and event["time"] <= kill.time:
            done[int(event["rank"])] = max(done.get(int(event["rank"]), 0), int(event["iteration"]) + 1)
    finished = min(done.values(), default=0)
    if index < 0:
        return Outcome(kill.rank, finished, kill.in_recovery)
    recovery = found[index]
    until = min((other.time for other in recovery.kills if other.time > kill.time), default=recovery.ended)
    own = [e for e in events if kill.time < e["time"] <= until]
    noticed = next((float(e["time"]) for e in own if e["kind"] == "failure_noticed"), None)
    decision = next((e for e in reversed(recovery.decisions) if kill.time < e["time"] <= until), None)
    last = until == recovery.ended
    # Who replays goes on until it notices the further kill.
    again = min((float(e["time"]) for e in recovery.decisions if e["time"] > until), default=recovery.ended)
    stood = until if last else again
    base = Outcome(
        kill.rank,
        finished,
        kill.in_recovery,
        index,
        replayed=_replayed([e for e in events if kill.time < e["time"] <= stood]),
        replayed_after=_replayed([e for e in events if stood < e["time"] <= recovery.ended]),
        detect_seconds=None if noticed is None else noticed - kill.time,
        back_seconds=recovery.ended - kill.time,
    )
    return base if decision is None else _decided(base, kill, noticed, decision, recovery.ended if last else None)


def _replayed(events: Sequence[Event]) -> int:
    done = (e for e in events if e["kind"] == "recovery_phase" and e["phase"] in REPLAYING and e["done"])
    return len({e["iteration"] for e in done})


def _decided(base: Outcome, kill: Kill, noticed: float | None, decision: Event, ended: float | None) -> Outcome:
    values: dict[str, Any] = {
        "source": decision["source"],
        "scope": tuple(decision["scope"]),
        "replays": max((decision["target"] - segment["run"][0] for segment in decision["segments"]), default=0),
        "target": int(decision["target"]),
        "join_seconds": float(decision["time"]) - (kill.time if noticed is None else noticed),
        "replay_seconds": None if ended is None else ended - float(decision["time"]),
    }
    return Outcome(**{**asdict(base), **values})


# What the column "replayed" says of kills in recoveries.
_AFTER_A_FURTHER_KILL = (
    "a + b: b after a further kill in the recovery, side by side with its stage (counted once below)"
)


def recovery_table(found: Sequence[Outcome]) -> Table:
    """The kills as a table for a terminal."""
    # Narrow enough for 80 columns.
    table = Table(box=box.SIMPLE_HEAD, title="kills", title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for name in ("killed", "in", "rolls back"):
        table.add_column(name, no_wrap=True)
    for name in ("replayed", "detect", "join", "replay", "back in"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in found:
        table.add_row(
            f"rank {item.rank}",
            "recovery" if item.in_recovery else f"iteration {item.finished + 1}",
            _scope_text(item),
            _replays_text(item),
            _seconds(item.detect_seconds),
            _seconds(item.join_seconds),
            "killed" if item.interrupted else _seconds(item.replay_seconds),
            _seconds(item.back_seconds),
        )
    if any(item.replayed_after for item in found):
        table.caption, table.caption_justify = _AFTER_A_FURTHER_KILL, "left"
    return table


def _replays_text(item: Outcome) -> str:
    if item.replayed_after:
        return f"{item.replayed} + {item.replayed_after}"
    return f"{item.replayed} of {max(item.replays, item.replayed)}" if item.source else "-"


def _scope_text(item: Outcome) -> str:
    if not item.source:
        return "-"
    if item.source != "local":
        return f"all, {item.source}"
    return listed("stage", item.scope)


def replaced_wrongly(pids: Mapping[int, Sequence[int]], kills: Sequence[Kill]) -> tuple[int, ...]:
    """Ranks that had more or fewer processes than one, and one more for every kill."""
    wanted = {rank: 1 + sum(kill.rank == rank for kill in kills) for rank in pids}
    return tuple(rank for rank, own in sorted(pids.items()) if len(set(own)) != wanted[rank])


def verdict_table(comparison: Comparison, found: Sequence[Outcome], pids: Mapping[int, Sequence[int]]) -> Table:
    """The result in numbers as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title="result", title_justify="left", title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    back = [item.back_seconds for item in found if item.back_seconds is not None]
    rows: list[tuple[str, int | str]] = [
        ("workers killed", len(found)),
        ("processes started", sum(len(set(own)) for own in pids.values())),
        ("iterations replayed", sum(item.replayed for item in found)),
        ("seconds from a kill to training again", f"{sum(back) / len(back):.1f} on average" if back else "n/a"),
        ("tensors compared", comparison.tensors),
        ("tensors different", len(comparison.different_tensors)),
        ("losses and gradient norms compared", comparison.figures),
        ("losses and gradient norms different", len(comparison.different_figures)),
    ]
    for name, value in rows:
        bad = name.endswith("different") and value != 0
        good = name.endswith("different") and not bad
        table.add_row(name, Text(str(value), style="bold red" if bad else "bold green" if good else ""))
    return table


def verdict(comparison: Comparison) -> str:
    """The comparison in one sentence."""
    return (
        f"{len(comparison.different_figures)} of {comparison.figures} losses and gradient norms and "
        f"{len(comparison.different_tensors)} of {comparison.tensors} tensors of the training state differ, bit for bit"
    )


def summary_json(comparison: Comparison, found: Sequence[Outcome], pids: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Everything that the tables show, for programs."""
    return {
        "equal": comparison.equal,
        "tensors_compared": comparison.tensors,
        "tensors_different": list(comparison.different_tensors),
        "figures_compared": comparison.figures,
        "figures_different": list(comparison.different_figures),
        "kills": [asdict(item) for item in found],
        "pids": {str(rank): list(own) for rank, own in sorted(pids.items())},
    }


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
