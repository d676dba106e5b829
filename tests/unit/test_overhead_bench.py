"""The overhead benchmark: its refusals, results of a job that didn't come to its end, and its clock."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scripts.bench import overhead
from scripts.bench.overhead_worker import Clock


def parsed(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["overhead.py", *flags])
    return overhead.parse()


@pytest.mark.parametrize(
    "flags",
    [
        ("--blocks", "1", "--block", "2"),
        ("--blocks", "0"),
        ("--blocks", "-2", "--block", "-2"),
        ("--block", "1"),
        ("--slow-iterations", "1"),
        ("--variants", "sparse"),
        ("--variants", "off,sparsely"),
    ],
)
def test_bad_flags_are_refused(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        parsed(monkeypatch, *flags)
    assert refusal.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--blocks", "1", "--block", "3"), ("--blocks", "2", "--block", "2")])
def test_two_iterations_are_enough(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    options = parsed(monkeypatch, *flags, "--slow-iterations", "2")
    raw = {
        "blocks": {"off": [[1.0, 1.0]], "sparse": [[1.0, 1.5]]},
        "processor_seconds": {"off": [1.0, 1.0], "sparse": [1.0, 2.0]},
        "peak_device_mib": {"off": 0.0, "sparse": 0.0},
        "slots": {"by_variant": {"sparse": {"copy_seconds": [0.1]}}, "begin_seconds": [0.01]},
        "parameters": 1,
        "device": "CPU",
        "torch": "2",
    }
    found = overhead.summarize(options, raw)["variants"]
    assert found["sparse"]["overhead"] == 0.25 and found["sparse"]["slot"] == {"copy_seconds": 0.1}


def test_a_job_that_takes_too_long_is_ended() -> None:
    assert overhead.run_job([sys.executable, "-c", "import sys; sys.exit(3)"], None) == 3
    assert overhead.run_job([sys.executable, "-c", "import time; time.sleep(1000)"], 0.2) == 124


def test_on_a_gpu_nothing_waits_for_the_device_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    log = list[str]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = float(sum(item == "iteration" for item in log))
            log.append("mark")

        def elapsed_time(self, later: "Event") -> float:
            return 1e3 * (later.at - self.at)

    monkeypatch.setattr(dist, "barrier", lambda: log.append("barrier"))
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Event, synchronize=lambda: log.append("synchronize")))
    seconds = Clock(on_gpu=True).block(lambda: log.append("iteration"), 3)
    assert [wall for wall, _ in seconds] == [1.0, 1.0, 1.0]
    assert log == ["synchronize", "barrier", "mark", *["iteration", "mark"] * 3, "synchronize", "barrier"]


def test_on_the_cpu_iterations_begin_and_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    log = list[str]()
    monkeypatch.setattr(dist, "barrier", lambda: log.append("barrier"))
    times = iter([1.0, 2.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    seconds = Clock(on_gpu=False).block(lambda: log.append("iteration"), 2)
    assert [wall for wall, _ in seconds] == [1.0, 2.0]
    assert log == ["barrier", "iteration", "barrier", "iteration", "barrier", "barrier"]
