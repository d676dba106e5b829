"""What killed workers cost: for each kill, from where training went on, what it replayed and how long it took."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from megatron.moevement.report.compare import Comparison
from megatron.moevement.report.read_events import Attempt


@dataclass(frozen=True, slots=True)
class Kill:
    """A killed worker: its rank, when (seconds since the epoch), and whether a recovery was under way."""

    rank: int
    time: float
    in_recovery: bool


@dataclass(frozen=True, slots=True)
class Recovery:
    """What followed a kill.

    Attributes:
        rank: of the killed worker.
        life: index of the life that the kill ended.
        finished: iterations that were finished when it happened; in a recovery, the end of what was replayed.
        in_recovery: whether a recovery was under way.
        source: `slots`, `dense` or `scratch`; empty if there is no later life.
        first_step: the step from which training went on.
        replayed: iterations that the conversion replayed.
        run_again: iterations that were run a second time after it.
        conversion_seconds: None without a finished conversion.
        back_seconds: from the kill to the beginning of the next iteration; None if a further kill came first.
    """

    rank: int
    life: int
    finished: int
    in_recovery: bool
    source: str
    first_step: int
    replayed: int
    run_again: int
    conversion_seconds: float | None
    back_seconds: float | None


def recoveries(kills: Sequence[Kill], lives: Sequence[Attempt]) -> list[Recovery]:
    """What followed each kill, by the lives of one rank."""
    return [_recovery(kill, lives) for kill in kills]


def _recovery(kill: Kill, lives: Sequence[Attempt]) -> Recovery:
    life = max((i for i, a in enumerate(lives) if a.started <= kill.time), default=0)
    following = lives[life + 1] if life + 1 < len(lives) else None
    newest = max((int(e["iteration"]) + 1 for a in lives[: life + 1] for e in a.iterations), default=0)
    own = [int(e["iteration"]) + 1 for e in lives[life].iterations] if lives else []
    converted = [number + 1 for number in lives[life].replayed] if lives else []
    seconds = following.recovery_seconds if following else None
    back = None
    if following is not None and following.iterations:
        first = following.iterations[0]
        back = float(first["time"]) - float(first["seconds"]) - kill.time
    return Recovery(
        rank=kill.rank,
        life=life,
        finished=max(own or converted or [lives[life].first_step if lives else 0]),
        in_recovery=kill.in_recovery,
        source=following.source if following else "",
        first_step=following.first_step if following else 0,
        replayed=len(following.replayed) if following else 0,
        run_again=sum(int(e["iteration"]) < newest for e in following.iterations) if following else 0,
        conversion_seconds=seconds,
        back_seconds=back,
    )


def recovery_table(found: Sequence[Recovery]) -> Table:
    """The kills as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, title="kills", title_justify="left", title_style="bold")
    for name in ("killed", "in", "from"):
        table.add_column(name, no_wrap=True)
    for name in ("replayed", "run again", "convert", "back in"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in found:
        table.add_row(
            f"rank {item.rank}",
            "a recovery" if item.in_recovery else f"iteration {item.finished + 1}",
            "scratch" if item.source == "scratch" else f"step {item.first_step}",
            str(item.replayed),
            str(item.run_again),
            _seconds(item.conversion_seconds),
            _seconds(item.back_seconds) if item.back_seconds is not None else "killed",
        )
    return table


def verdict_table(comparison: Comparison, found: Sequence[Recovery]) -> Table:
    """The result in numbers as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title="result", title_justify="left", title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    back = [item.back_seconds for item in found if item.back_seconds is not None]
    rows: list[tuple[str, int | str]] = [
        ("workers killed", len(found)),
        ("iterations replayed in conversions", sum(item.replayed for item in found)),
        ("iterations run again", sum(item.run_again for item in found)),
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


def summary_json(comparison: Comparison, found: Sequence[Recovery]) -> dict[str, Any]:
    """Everything that the tables show, for programs."""
    return {
        "equal": comparison.equal,
        "tensors_compared": comparison.tensors,
        "tensors_different": list(comparison.different_tensors),
        "figures_compared": comparison.figures,
        "figures_different": list(comparison.different_figures),
        "kills": [asdict(item) for item in found],
    }


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
