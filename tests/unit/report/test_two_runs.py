import json
from pathlib import Path

from megatron.moevement.report.two_runs import report_two_runs
from tests.unit.report.synthetic import local_run
from tests.unit.report.test_recoveries import KILLS


def write_run(folder: Path, first: int, state: str) -> None:
    folder.mkdir(parents=True)
    figures = {str(n): {"loss": (5.0 - 0.1 * n).hex(), "grad_norm": (1.0 + 0.25 * n).hex()} for n in range(first, 9)}
    content = {"step": 9, "state": {"a": state}, "history": figures}
    for rank in range(3):
        (folder / f"digest.rank{rank:05d}.json").write_text(json.dumps(content))


def write_events(folder: Path) -> None:
    for rank in range(3):
        lines = [json.dumps(event) for event in local_run() if event["rank"] == rank]
        (folder / f"events.rank{rank:05d}.jsonl").write_text("\n".join(lines) + "\n")


def _report(tmp_path: Path, state: str) -> bool:
    write_run(tmp_path / "one", 0, "00")
    write_run(tmp_path / "other", 5, state)
    write_events(tmp_path / "other")
    found = report_two_runs(tmp_path / "one", tmp_path / "other", KILLS, tmp_path)
    assert len(found.outcomes) == 2
    assert found.pids[2] == [1002, 3002]
    assert (tmp_path / "losses.png").exists()
    assert (tmp_path / "window.png").exists()
    assert (tmp_path / "recovery.png").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["equal"] is found.comparison.equal
    assert summary["torn_event_lines"] == 0
    return found.comparison.equal


def test_equal_runs(tmp_path: Path) -> None:
    assert _report(tmp_path, "00")


def test_one_different_tensor(tmp_path: Path) -> None:
    assert not _report(tmp_path, "01")
