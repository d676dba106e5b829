"""PNG plots: the losses of an undisturbed and a disturbed run, the timeline of one window on one rank, recoveries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from megatron.moevement.recovery.phases import Phase
from megatron.moevement.report.read_events import Event
from megatron.moevement.report.recoveries import LocalRecovery
from megatron.moevement.report.summary import Outcome
from megatron.moevement.report.timeline import Lane, WindowTimeline

INK, MUTED, GRID = "#22272e", "#6e7781", "#e4e8ec"
BLUE, PALE_BLUE, ORANGE, RED, GREEN, YELLOW = "#1f6feb", "#a5c8f8", "#e8862e", "#cf222e", "#2da44e", "#f2cc60"
LANE_COLOURS: Mapping[Lane, str] = {
    Lane.ITERATION: PALE_BLUE,
    Lane.COMPUTE: PALE_BLUE,
    Lane.COPY: BLUE,
    Lane.STALL: RED,
    Lane.UPDATE: "#8c959f",
    Lane.COMMIT: GREEN,
}
# matplotlib's stubs name every setting as a literal.
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "grid.color": GRID,
    "hatch.linewidth": 0.6,
}
DPI = 160
# A shorter bar could not be seen.
_NARROWEST_SHARE = 0.0015
# Later kills leave no room for text at their right.
_LATE_SHARE = 0.65


@dataclass(frozen=True, slots=True)
class LossPlot:
    """What the plot of losses shows. Iterations are counted from 0 here and from 1 in the plot.

    Attributes:
        undisturbed: loss by iteration.
        iterations: `iteration` events of one rank of the disturbed run, in order.
        recoveries: of the disturbed run, in order.
        kills: what began or interrupted them.
        verdict: the sentence that states the bitwise comparison.
        equal: whether nothing differed.
    """

    undisturbed: Mapping[int, float]
    iterations: Sequence[Event]
    recoveries: Sequence[LocalRecovery]
    kills: Sequence[Outcome]
    verdict: str
    equal: bool


def plot_losses(data: LossPlot, path: Path) -> None:
    """Draws the loss of both runs, what each recovery replayed, and the difference of the losses."""
    rows = 1 + len(data.recoveries)
    heights = [4.2, 0.30 * rows + 0.35, 1.0]
    with rc_context(STYLE):
        figure = Figure(figsize=(11, sum(heights) + 1.6), dpi=DPI, layout="constrained")
        loss, replays, difference = figure.subplots(3, 1, sharex=True, height_ratios=heights)
        title = "Killed, recovered, bit-identical" if data.equal else "The runs differ"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        _draw_losses(loss, data)
        _draw_replays(replays, data)
        _draw_difference(difference, data)
        difference.set_xlabel("iteration")
        difference.xaxis.set_major_locator(MaxNLocator(nbins=13, steps=[1, 2, 5, 10], integer=True))
        difference.set_xlim(0.3, max(data.undisturbed, default=0) + 1.7)
        figure.savefig(path)


def _draw_losses(axes: Axes, data: LossPlot) -> None:
    numbers = sorted(data.undisturbed)
    axes.plot(
        [n + 1 for n in numbers],
        [data.undisturbed[n] for n in numbers],
        color=PALE_BLUE,
        linewidth=7,
        solid_capstyle="round",
        label="undisturbed run",
    )
    points = [(e["iteration"] + 1, e["loss"]) for e in _trained(data)]
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=INK,
        linewidth=1.2,
        marker="o",
        markersize=3,
        label="disturbed run",
    )
    for at in sorted({kill.finished for kill in data.kills if not kill.in_recovery}):
        axes.axvline(at + 0.5, color=RED, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_ylabel("language-model loss")
    axes.grid(axis="y")
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(handles=handles, frameon=False, loc="upper right")


def _trained(data: LossPlot) -> list[Event]:
    """Iterations that ran, without those that a recovery replayed."""
    return [e for e in data.iterations if not e.get("replayed") and e["loss"] is not None]


def _draw_replays(axes: Axes, data: LossPlot) -> None:
    """One row for training, and one a recovery: what the stages that rolled back replayed, and who was killed."""
    for event in _trained(data):
        _cell(axes, int(event["iteration"]) + 1, 0, BLUE)
    labels = ["training"]
    for row, recovery in enumerate(data.recoveries, start=1):
        for number in recovery.replayed(Phase.CATCH_UP):
            _cell(axes, number + 1, row, YELLOW)
        for number in recovery.replayed(Phase.CONVERT):
            _cell(axes, number + 1, row, ORANGE, "////")
        labels.append(f"recovery {row}\n{recovery.who}" + " alone" * (recovery.source == "local"))
        own = [kill for kill in data.kills if kill.recovery == row - 1]
        place = min((kill.finished for kill in own), default=0) + 0.5
        replayed = recovery.replayed(Phase.CONVERT, Phase.CATCH_UP)
        axes.plot(place, row, marker="X", color=RED, markersize=8, markeredgecolor="white", zorder=5)
        words = [f"rank {kill.rank}" + (" in the recovery" if kill.in_recovery else "") for kill in own]
        # Behind what was replayed, or before it where there is more room.
        behind = place < _LATE_SHARE * max(data.undisturbed, default=0)
        axes.annotate(
            f"SIGKILL {', '.join(words)}",
            (max([place, *(n + 1.5 for n in replayed)]) if behind else min([place, *(n + 0.5 for n in replayed)]), row),
            xytext=(9 if behind else -9, 0),
            textcoords="offset points",
            ha="left" if behind else "right",
            va="center",
            color=RED,
            fontsize=8,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="both", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.legend(
        handles=[
            Patch(color=BLUE, label="trained by all"),
            Patch(facecolor=ORANGE, edgecolor="white", hatch="////", label="replayed in the conversion"),
            Patch(color=YELLOW, label="caught up"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
        fontsize=8,
    )


def _cell(axes: Axes, number: int, row: int, colour: str, hatch: str = "") -> None:
    axes.add_patch(Rectangle((number - 0.46, row - 0.3), 0.92, 0.6, facecolor=colour, edgecolor="white", hatch=hatch))


def _draw_difference(axes: Axes, data: LossPlot) -> None:
    points = [
        (e["iteration"] + 1, e["loss"] - data.undisturbed[e["iteration"]])
        for e in _trained(data)
        if e["iteration"] in data.undisturbed
    ]
    colour = GREEN if data.equal else RED
    axes.axhline(0, color=GRID, linewidth=1)
    axes.plot([x for x, _ in points], [y for _, y in points], linestyle="", marker="s", markersize=4, color=colour)
    largest = max((abs(y) for _, y in points), default=0.0)
    axes.set_ylim(-1.6 * (largest or 1), 1.6 * (largest or 1))
    if not largest:
        axes.set_yticks([0])
    axes.set_ylabel("difference")
    axes.set_title(data.verdict, loc="left", fontsize=9, color=colour, fontweight="bold")


def plot_window(timeline: WindowTimeline, path: Path) -> None:
    """Draws what a rank did in the iterations of one window, and which operators each slot holds how."""
    with rc_context(STYLE):
        rows = len(timeline.groups)
        heights = [2.6, 0.42 * rows + 0.5]
        figure = Figure(figsize=(11, sum(heights) + 1.4), dpi=DPI, layout="constrained")
        lanes, matrix = figure.subplots(2, 1, height_ratios=heights)
        figure.suptitle(
            f"One window of {len(timeline.slots)} slots on rank {timeline.rank}", x=0.01, ha="left", fontweight="bold"
        )
        _draw_lanes(lanes, timeline)
        _draw_matrix(matrix, timeline)
        figure.savefig(path)


def _draw_lanes(axes: Axes, timeline: WindowTimeline) -> None:
    lanes = [lane for lane in Lane if any(span.lane is lane for span in timeline.spans)]
    origin = timeline.slots[0].started
    narrowest = _NARROWEST_SHARE * 1000 * (max(span.ended for span in timeline.spans) - origin)
    for span in timeline.spans:
        row = lanes.index(span.lane)
        left, width = 1000 * (span.started - origin), 1000 * (span.ended - span.started)
        axes.barh(row, max(width, narrowest), left=left, height=0.62, color=LANE_COLOURS[span.lane], linewidth=0)
        if span.label:
            axes.annotate(
                span.label,
                (left + width, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=MUTED,
            )
    for slot in timeline.slots:
        axes.axvline(1000 * (slot.started - origin), color=GRID, linewidth=1, zorder=0)
        axes.annotate(
            f"iteration {slot.iteration + 1}",
            (1000 * (slot.started - origin), -0.62),
            xytext=(3, 0),
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
        )
    axes.set_yticks(range(len(lanes)), [lane.value for lane in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.9)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("milliseconds since the first iteration of the window began")


def _draw_matrix(axes: Axes, timeline: WindowTimeline) -> None:
    for column, slot in enumerate(timeline.slots):
        for row, presence in enumerate(slot.presence):
            colour, text, ink = {
                "full": (BLUE, "full", "white"),
                "weights_only": (PALE_BLUE, "weights only", INK),
            }.get(presence, ("#f6f8fa", "absent", MUTED))
            axes.add_patch(
                Rectangle((column - 0.48, row - 0.44), 0.96, 0.88, facecolor=colour, edgecolor="none"),
            )
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    axes.set_xlim(-0.5, len(timeline.slots) - 0.5)
    axes.set_ylim(len(timeline.groups) - 0.5, -0.5)
    axes.set_xticks(range(len(timeline.slots)), [slot.label for slot in timeline.slots])
    axes.set_yticks(range(len(timeline.groups)), timeline.groups)
    axes.tick_params(axis="both", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title("what each slot holds", loc="left", fontsize=9, color=MUTED)
