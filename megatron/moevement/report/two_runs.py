"""From the folders of an undisturbed and a disturbed run: comparison, plots and summary."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.moevement.report.compare import Comparison, compare_runs, losses, read_digests
from megatron.moevement.report.plots import LossPlot, plot_losses, plot_window
from megatron.moevement.report.read_events import read_events
from megatron.moevement.report.recoveries import Kill, local_recoveries, processes, stages
from megatron.moevement.report.recovery_plot import plot_recoveries
from megatron.moevement.report.summary import Outcome, outcomes, summary_json, verdict
from megatron.moevement.report.timeline import window_timeline


@dataclass(frozen=True, slots=True)
class TwoRuns:
    """What was found; `pids` are those of every rank's processes, in order."""

    comparison: Comparison
    outcomes: tuple[Outcome, ...]
    pids: Mapping[int, Sequence[int]]


def report_two_runs(undisturbed: Path, disturbed: Path, kills: Sequence[Kill], output: Path) -> TwoRuns:
    """Compares the runs and writes `losses.png`, `window.png`, `recovery.png` and `summary.json` to `output`.

    Args:
        undisturbed: folder with the files of `--state-digest <folder>/digest`.
        disturbed: the same, and the events of all ranks.
        kills: the workers of the disturbed run that were killed, in order.
        output: folder of the results.

    Raises:
        OSError: a file can't be read or written.
    """
    one, other = read_digests(undisturbed / "digest"), read_digests(disturbed / "digest")
    run = read_events(disturbed)
    comparison = compare_runs(one, other, run.of("iteration"))
    first_rank = [event for event in run.events if event["rank"] == 0]
    found = local_recoveries(run.events, kills)
    followed, pids = outcomes(run.events, kills, found), processes(run.events)
    iterations = [event for event in first_rank if event["kind"] == "iteration"]
    plot_losses(
        LossPlot(losses(one), iterations, found, followed, verdict(comparison), comparison.equal), output / "losses.png"
    )
    timeline = window_timeline(first_rank)
    if timeline is not None:
        plot_window(timeline, output / "window.png")
    if found:
        plot_recoveries(found, stages(run.events), output / "recovery.png")
    content = {"torn_event_lines": run.torn_lines, **summary_json(comparison, followed, pids)}
    (output / "summary.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return TwoRuns(comparison, tuple(followed), pids)
