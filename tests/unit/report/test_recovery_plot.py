from pathlib import Path

from megatron.moevement.recovery.phases import Phase
from megatron.moevement.report.recoveries import DEAD, local_recoveries, stages
from megatron.moevement.report.recovery_plot import COLOURS, plot_recoveries
from tests.unit.report.synthetic import local_run
from tests.unit.report.test_recoveries import KILLS


def test_one_panel_a_recovery(tmp_path: Path) -> None:
    found = local_recoveries(local_run(), KILLS)
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        plot_recoveries(found * count, stages(local_run()), path)
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "3.png").stat().st_size > (tmp_path / "1.png").stat().st_size


def test_every_phase_has_a_colour() -> None:
    assert set(COLOURS) == {DEAD, *Phase} - {Phase.TRAIN}
