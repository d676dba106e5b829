from pathlib import Path

import pytest

from megatron.moevement.report.plots import LossPlot, plot_losses, plot_window
from megatron.moevement.report.recoveries import local_recoveries
from megatron.moevement.report.summary import outcomes
from megatron.moevement.report.timeline import window_timeline
from tests.unit.report.synthetic import disturbed_run, life, local_run, start
from tests.unit.report.test_recoveries import KILLS

PNG = b"\x89PNG"


@pytest.mark.parametrize("error", [0.0, 1e-3])
def test_losses(tmp_path: Path, error: float) -> None:
    events = local_run()
    found = local_recoveries(events, KILLS)
    iterations = [e for e in events if e["kind"] == "iteration" and e["rank"] == 0]
    losses = {number: 5.0 - 0.1 * number + error * (number > 6) for number in range(9)}
    path = tmp_path / "losses.png"
    plot_losses(LossPlot(losses, iterations, found, outcomes(events, KILLS, found), "verdict", not error), path)
    assert path.read_bytes().startswith(PNG)


def test_losses_of_nothing(tmp_path: Path) -> None:
    plot_losses(LossPlot({}, [], [], [], "nothing ran", False), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("recorded", [True, False])
def test_window(tmp_path: Path, recorded: bool) -> None:
    events = disturbed_run() if recorded else [start(0.0), *life(0, 4, 1.0)]
    for item in [] if recorded else events:
        item.pop("fence_started_time", None)
        item.pop("copy_started_time", None)
    timeline = window_timeline(events)
    assert timeline is not None
    plot_window(timeline, tmp_path / "window.png")
    assert (tmp_path / "window.png").read_bytes().startswith(PNG)
