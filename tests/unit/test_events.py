"""Events: whole lines, one object each, appended; a listener gets them whatever happens to the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.moevement.errors import ConfigError
from megatron.moevement.events import EventLog


def read(path: Path) -> list[dict[str, Any]]:
    """All events of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_appended_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "log" / "events.rank00003.jsonl"
    for generation in range(2):
        log = EventLog(tmp_path / "log", 3)
        log.emit("start", generation=generation)
        assert len(read(path)) == generation + 1, "written before the log is closed"
        log.close()
    assert [(e["kind"], e["rank"], e["generation"]) for e in read(path)] == [("start", 3, 0), ("start", 3, 1)]
    assert read(path)[0]["time"] <= read(path)[1]["time"]


def test_listeners_get_every_later_event(tmp_path: Path) -> None:
    log, heard = EventLog(None, 0), []
    log.emit("before")
    log.listen(heard.append)
    log.emit("slot", data_bytes=7)
    log.close()
    log.emit("after")
    assert [event["kind"] for event in heard] == ["slot", "after"] and heard[0]["data_bytes"] == 7
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_counted_and_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.rank00000.jsonl"
    path.symlink_to("/dev/full")
    log, heard = EventLog(tmp_path, 0), []
    log.listen(heard.append)
    log.emit("slot")
    assert log.dropped == 1 and len(heard) == 1
    log.close()


def test_a_directory_that_cannot_be_written_is_refused_by_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--sparse-ckpt-log-dir"):
        EventLog(tmp_path / "file", 0)
