import json
from pathlib import Path

from megatron.moevement.report.two_runs import report_two_runs
from tests.unit.report.synthetic import disturbed_run
from tests.unit.report.test_summary import KILLS


def _write_digest(folder: Path, first: int, state: str) -> None:
    folder.mkdir()
    figures = {str(n): {"loss": (5.0 - 0.1 * n).hex(), "grad_norm": (1.0 + 0.25 * n).hex()} for n in range(first, 16)}
    content = {"step": 16, "state": {"a": state}, "history": figures}
    (folder / "digest.rank00000.json").write_text(json.dumps(content))


def _report(tmp_path: Path, state: str) -> bool:
    _write_digest(tmp_path / "one", 0, "00")
    _write_digest(tmp_path / "other", 7, state)
    lines = [json.dumps(event) for event in disturbed_run()]
    (tmp_path / "other" / "events.rank00000.jsonl").write_text("\n".join(lines) + "\n")
    found = report_two_runs(tmp_path / "one", tmp_path / "other", KILLS, tmp_path)
    assert len(found.recoveries) == 3
    assert (tmp_path / "losses.png").exists()
    assert (tmp_path / "window.png").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["equal"] is found.comparison.equal
    assert summary["torn_event_lines"] == 0
    return found.comparison.equal


def test_equal_runs(tmp_path: Path) -> None:
    assert _report(tmp_path, "00")


def test_one_different_tensor(tmp_path: Path) -> None:
    assert not _report(tmp_path, "01")
