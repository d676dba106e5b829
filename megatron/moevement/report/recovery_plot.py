"""PNG plot of recoveries: what every rank did from the kill to training again; who waited, who replayed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron.moevement.recovery.phases import Phase
from megatron.moevement.report.plots import (
    BLUE,
    DPI,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PALE_BLUE,
    RED,
    STYLE,
    YELLOW,
)
from megatron.moevement.report.recoveries import DEAD, LocalRecovery, PhaseSpan, listed

# What is alike for who looks on has one colour.
_WAITS, _AGREES = "#dfe4ea", "#8c959f"
COLOURS: Mapping[str, str] = {
    DEAD: "white",
    Phase.LEAVE: _WAITS,
    Phase.JOIN: _WAITS,
    Phase.AGREE: _AGREES,
    Phase.LOAD: BLUE,
    Phase.CONVERT: ORANGE,
    Phase.CATCH_UP: YELLOW,
    Phase.SERVE: GREEN,
    Phase.ROLL_FORWARD: BLUE,
    Phase.MEET: _WAITS,
}
_HATCHES: Mapping[str, str] = {DEAD: "xxxx", Phase.CONVERT: "////"}
# Training on either side of a recovery that is shown, as a share of the recovery.
_MARGIN_SHARE = 0.06
# What a letter needs, and the edges of a text, as shares of the recovery.
_LETTER_SHARE, _EDGE_SHARE = 0.007, 0.012


def plot_recoveries(found: Sequence[LocalRecovery], stages: Mapping[int, int], path: Path) -> None:
    """Draws a panel a recovery, with a row a rank.

    Args:
        found: the recoveries of a run.
        stages: the pipeline stage of every rank.
        path: of the PNG.
    """
    ranks = sorted(stages)
    with rc_context(STYLE):
        height = 0.34 * len(ranks) + 0.95
        figure = Figure(figsize=(11, height * len(found) + 1.0), dpi=DPI, layout="constrained")
        figure.suptitle("Recoveries: who replayed, who waited", x=0.01, ha="left", fontweight="bold")
        panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
        for number, (axes, recovery) in enumerate(zip(panels, found, strict=True), start=1):
            _draw(axes, number, recovery, ranks, stages)
        panels[-1].set_xlabel("seconds since the kill")
        figure.legend(handles=_legend(), loc="outside lower center", ncols=8, frameon=False, fontsize=8)
        figure.savefig(path)


def _draw(axes: Axes, number: int, recovery: LocalRecovery, ranks: Sequence[int], stages: Mapping[int, int]) -> None:
    origin, length = recovery.started, recovery.ended - recovery.started
    margin = _MARGIN_SHARE * length
    for row, rank in enumerate(ranks):
        spans = [span for span in recovery.spans if span.rank == rank]
        first = min((span.started for span in spans), default=recovery.ended) - origin
        axes.barh(row, first + margin, left=-margin, height=0.72, color=PALE_BLUE, linewidth=0)
        axes.barh(row, margin, left=length, height=0.72, color=PALE_BLUE, linewidth=0)
        for span in spans:
            _bar(axes, row, span, origin, length)
    for kill in recovery.kills:
        place = (kill.time - origin, ranks.index(kill.rank))
        axes.plot(*place, marker="X", color=RED, markersize=9, markeredgecolor="white", zorder=6, clip_on=False)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}, stage {stages[rank]}" for rank in ranks])
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_xlim(-margin, length + margin)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left"]].set_visible(False)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.set_title(_title(number, recovery), loc="left", fontsize=9, color=INK)


def _bar(axes: Axes, row: int, span: PhaseSpan, origin: float, length: float) -> None:
    left, width = span.started - origin, span.ended - span.started
    axes.barh(
        row,
        width,
        left=left,
        height=0.72,
        color=COLOURS[span.phase],
        hatch=_HATCHES.get(span.phase),
        edgecolor=_WAITS if span.phase == DEAD else "white",
        linewidth=0.4,
    )
    text = _text(span)
    if text and width > (_LETTER_SHARE * len(text) + _EDGE_SHARE) * length:
        dark = span.phase in (Phase.LOAD, Phase.SERVE, Phase.ROLL_FORWARD)
        axes.text(
            left + width / 2,
            row,
            text,
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else INK,
            clip_on=True,
            bbox={"boxstyle": "square,pad=0.15", "facecolor": COLOURS[span.phase], "edgecolor": "none"},
        )


def _text(span: PhaseSpan) -> str:
    if span.iterations:
        first, last = span.iterations[0] + 1, span.iterations[-1] + 1
        return f"{first} to {last}" if last > first else f"{first}"
    return {DEAD: "no process", Phase.MEET: "waits", Phase.JOIN: "waits"}.get(span.phase, "")


def _title(number: int, recovery: LocalRecovery) -> str:
    killed = listed("rank", [kill.rank for kill in recovery.kills]) if recovery.kills else "nobody known"
    return (
        f"recovery {number}: {killed} killed; {recovery.who} rolled back; training went on with iteration "
        f"{recovery.target + 1} after {recovery.ended - recovery.started:.1f} s"
    )


def _legend() -> list[Patch]:
    rows = (
        (PALE_BLUE, "", "trains"),
        (COLOURS[DEAD], _HATCHES[DEAD], "killed"),
        (_WAITS, "", "waits"),
        (_AGREES, "", "agrees"),
        (COLOURS[Phase.LOAD], "", "loads, rolls forward"),
        (COLOURS[Phase.CONVERT], _HATCHES[Phase.CONVERT], "converts (iterations)"),
        (COLOURS[Phase.CATCH_UP], "", "catches up"),
        (COLOURS[Phase.SERVE], "", "serves its transcript"),
    )
    return [Patch(facecolor=c, hatch=h, edgecolor=MUTED if c == "white" else "white", label=t) for c, h, t in rows]
