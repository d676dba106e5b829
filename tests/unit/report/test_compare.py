import json
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.report.compare import compare_runs, losses, read_digests
from tests.unit.report.synthetic import iteration


def _digest(first: int = 0, last: int = 4) -> dict[str, Any]:
    history = {
        str(n): {"loss": (5.0 - 0.1 * n).hex(), "grad_norm": (1.0 + 0.25 * n).hex(), "skipped": False}
        for n in range(first, last)
    }
    return {"step": last, "state": {"a": "00", "b": "01"}, "history": history}


def _events() -> list[dict[str, Any]]:
    numbers = [0, 1, 2, 1, 2, 3]
    return [iteration(number, 1.0 * at, rank) for rank in (0, 1) for at, number in enumerate(numbers)]


def test_equal_runs() -> None:
    found = compare_runs({r: _digest() for r in (0, 1)}, {r: _digest(3) for r in (0, 1)}, _events())
    assert found.equal
    assert found.tensors == 4
    assert found.figures == 24


@pytest.mark.parametrize("change", ["tensor", "missing tensor", "rank", "event", "history", "never ran"])
def test_every_difference_is_found(change: str) -> None:
    one = {r: _digest() for r in (0, 1)}
    other: dict[int, Any] = {r: _digest(3) for r in (0, 1)}
    events = _events()
    if change == "tensor":
        other[1]["state"]["b"] = "02"
    elif change == "missing tensor":
        del other[1]["state"]["b"]
    elif change == "rank":
        del other[1]
    elif change == "event":
        events[3]["loss"] += 1e-15
    elif change == "history":
        other[0]["history"]["3"]["grad_norm"] = (1.0).hex()
    else:
        events = [e for e in events if e["iteration"] != 0]
    found = compare_runs(one, other, events)
    assert not found.equal
    assert found.different_tensors or found.different_figures


def test_nothing_to_compare_is_not_equal() -> None:
    assert not compare_runs({}, {}, []).equal


def test_names_say_where() -> None:
    other = {0: _digest()}
    other[0]["state"]["b"] = "02"
    events = [iteration(2, 1.0, grad_norm=7.0)]
    found = compare_runs({0: _digest()}, other, events)
    assert found.different_tensors == ("rank 0: b",)
    assert found.different_figures == ("rank 0, iteration 3: grad_norm",)


def test_a_skipped_update_has_no_norm() -> None:
    one = {0: _digest()}
    one[0]["history"]["0"]["grad_norm"] = None
    other = {0: _digest(1)}
    assert compare_runs(one, other, [iteration(0, 1.0, grad_norm=None)]).equal
    assert not compare_runs(one, other, [iteration(0, 1.0)]).equal


def test_files_by_rank(tmp_path: Path) -> None:
    for rank in (0, 3):
        (tmp_path / f"digest.rank{rank:05d}.json").write_text(json.dumps(_digest()))
    digests = read_digests(tmp_path / "digest")
    assert sorted(digests) == [0, 3]
    assert losses(digests)[1] == 4.9
    assert losses({}) == {}
