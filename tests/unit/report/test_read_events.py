import json
from pathlib import Path

from megatron.moevement.report.read_events import Tail, attempts, parse_lines, read_events, start_of
from tests.unit.report.synthetic import disturbed_run, event, start


def _line(kind: str, time: float, rank: int = 0) -> str:
    return json.dumps(event(kind, time, rank))


def test_torn_line_is_counted_and_the_event_behind_it_is_kept() -> None:
    torn = _line("iteration", 2.0)[:25]
    events, count = parse_lines([_line("start", 1.0), torn + _line("start", 3.0), "", torn])
    assert [e["time"] for e in events] == [1.0, 3.0]
    assert count == 2


def test_lines_that_are_no_events_are_torn() -> None:
    assert parse_lines(["3", "[]", '{"time": 1}']) == ([], 3)


def test_all_ranks_in_the_order_of_time(tmp_path: Path) -> None:
    for rank in (1, 0):
        lines = [_line("start", 1.0 + rank / 10, rank), _line("iteration", 2.0 + rank / 10, rank)]
        (tmp_path / f"events.rank{rank:05d}.jsonl").write_text("\n".join(lines) + '\n{"time": 9, "ra')
    run = read_events(tmp_path)
    assert [(e["time"], e["rank"]) for e in run.events] == [(1.0, 0), (1.1, 1), (2.0, 0), (2.1, 1)]
    assert run.torn_lines == 2
    assert run.ranks == (0, 1)
    assert [e["time"] for e in run.of("start", "iteration", rank=1)] == [1.1, 2.1]


def test_no_files_are_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path).events == ()


def test_lives_of_a_disturbed_run() -> None:
    lives = attempts(disturbed_run())
    assert [a.source for a in lives] == ["scratch", "scratch", "slots", "slots"]
    assert [len(a.iterations) for a in lives] == [2, 9, 0, 9]
    assert [a.replayed for a in lives] == [(), (), (4,), (4, 5, 6)]
    assert [a.recovery_seconds for a in lives] == [None, None, None, 4.0]


def test_source_of_a_start() -> None:
    assert start_of(start(0.0, [3, 6], 5)) == ("slots", 6)
    assert start_of(start(0.0, None, 5)) == ("dense", 5)
    assert start_of(start(0.0, None, 0)) == ("dense", 0)
    assert start_of(start(0.0)) == ("scratch", 0)


def test_tail_gives_complete_lines_once(tmp_path: Path) -> None:
    path, tail = tmp_path / "log", Tail()
    assert tail.lines(path) == []
    path.write_text("one\ntw")
    assert tail.lines(path) == ["one"]
    with path.open("a") as file:
        file.write("o\n")
    assert tail.lines(path) == ["two"]
    assert tail.lines(path) == []
