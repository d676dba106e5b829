"""The overhead benchmark: its refusals, results of a job that didn't come to its end, and its clock."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.moevement import arguments
from scripts.bench import overhead
from scripts.bench.device_time import awaited, covered, idle_before
from scripts.bench.overhead_worker import Clock, Record
from scripts.bench.variants import of_round


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
        ("--baseline-every", "0"),
        ("--variants", "sparse"),
        ("--variants", "off,sparsely"),
        ("--variants", "off,sparse-copy:digests=off"),
        # One stage.
        ("--variants", "off,transcript", "--model", "16-experts"),
        ("--variants", "off,sparse-transcript:copies=off", "--model", "64-experts"),
        ("--window", "auto", "--variants", "off,transcript"),
    ],
)
def test_bad_flags_are_refused(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        parsed(monkeypatch, *flags)
    assert refusal.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_transcript_is_measured_where_there_are_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("demo", "8-experts-pp4-gloo", "16-experts-pp2"):
        parsed(monkeypatch, "--variants", "off,transcript,sparse-transcript:digests=host", "--model", model)
    parsed(monkeypatch, "--variants", "off,transcript,sparse", "--window", "auto")


def test_experts_of_the_large_models_have_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("16-experts", "32-experts", "64-experts"):
        options = parsed(monkeypatch, "--model", model)
        command = overhead.job_command(options, Path("text"), Path("raw.json"), "name")
        words = command[command.index(str(overhead.WORKER)) + 1 : command.index("--sparse-ckpt")]
        config, _ = arguments.parse(words, environ={"WORLD_SIZE": "1"})
        assert config.num_experts == int(model.partition("-")[0])
        tokens = config.global_batch_size * config.seq_length
        assert config.moe_router_topk is not None and config.num_experts is not None
        assert tokens * config.moe_router_topk == 8192 * config.num_experts


def raw_of(blocks: dict[str, list[list[float]]], off_beside: dict[str, list[int]], **more: Any) -> dict[str, Any]:
    """What the ranks write."""
    return {
        "blocks": blocks,
        "off_beside": off_beside,
        "processor_seconds": {name: [s for block in of for s in block] for name, of in blocks.items()},
        "peak_device_mib": dict.fromkeys(blocks, 0.0),
        "slots": {},
        "transcript": {},
        "profile": {"off": {"kernels": 3.0, "busy_seconds": 0.2, "idle_seconds": 0.1, "awaited_seconds": 0.0}},
        "parameters": 1,
        "device": "CPU",
        "torch": "2",
        **more,
    }


@pytest.mark.parametrize("flags", [("--blocks", "1", "--block", "3"), ("--blocks", "2", "--block", "2")])
def test_two_iterations_are_enough(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    options = parsed(monkeypatch, *flags, "--slow-iterations", "2")
    slots = {"by_variant": {"sparse": {"copy_seconds": [0.1]}}, "begin_seconds": [0.01]}
    raw = raw_of({"off": [[1.0, 1.0]], "sparse": [[1.0, 1.5]]}, {"sparse": [0]}, slots=slots)
    found = overhead.summarize(options, raw)["variants"]
    assert found["sparse"]["overhead"] == 0.25 and found["sparse"]["slot"] == {"copy_seconds": 0.1}
    assert found["sparse"]["overhead_of_block_pairs"] == [0.25]
    assert found["off"]["on_device"]["idle_seconds"] == 0.1
    assert found["sparse"]["overhead_interval_95"] is None, "one pair says nothing about others"


def test_baselines_take_part_in_some_rounds_only() -> None:
    blocks = dict.fromkeys(("off", "sparse", "dense-sync", "sparse-copy"), print)
    taken = [list(of_round(blocks, number, 3)) for number in range(4)]
    assert taken == [list(blocks), ["off", "sparse"], ["off", "sparse"], list(blocks)]


def test_every_block_has_one_without_beside_it() -> None:
    record, order, seconds = Record(on_gpu=False), list[str](), iter(range(1, 1000))

    def block(name: str) -> Any:
        def run(iterations: int) -> list[tuple[float, float]]:
            order.append(name)
            return [(float(next(seconds)), 0.0) for _ in range(iterations)]

        return run

    for _ in range(4):
        record.round({name: block(name) for name in ("off", "a", "b")}, 2)
    assert len(order) == 16 and order[:8] == ["off", "a", "b", "off", "off", "b", "a", "off"]
    for name in ("a", "b"):
        pairs = zip(record.off_beside[name], record.blocks[name], strict=True)
        assert all(abs(record.blocks["off"][place][0] - block[0]) == 2 for place, block in pairs)
        places = [i for i, one in enumerate(order) if one == name]
        assert {(place % 2) for place in places} == {0, 1}, "off is first and second"


def test_overhead_is_that_of_pairs_and_its_interval_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    options = parsed(monkeypatch)
    # The machine gets slower all the time; the variant costs 2%, more or less.
    plain = [[1.0 + 0.1 * i] * 2 for i in range(20)]
    beside = [[block[0] * (1.02 + 0.001 * (i % 5 - 2))] * 2 for i, block in enumerate(plain)]
    found = overhead.summarize(options, raw_of({"off": plain, "sparse": beside}, {"sparse": list(range(20))}))
    one = found["variants"]["sparse"]
    low, high = one["overhead_interval_95"]
    assert low <= one["overhead_median_of_pairs"] <= high
    assert low >= one["overhead_of_block_pairs"][0] and high <= one["overhead_of_block_pairs"][-1]
    assert one["overhead_interval_95"] == overhead.interval_of_median(one["overhead_of_block_pairs"]), "a fixed seed"
    wide = overhead.interval_of_median(one["overhead_of_block_pairs"][::3])
    assert wide is not None and high - low < wide[1] - wide[0]
    assert overhead.interval_of_median([0.0] * 5) is None
    # Pairs that are no neighbours would show the machine's drift.
    far = overhead.summarize(options, raw_of({"off": plain, "sparse": beside}, {"sparse": list(range(19, -1, -1))}))
    wrong = far["variants"]["sparse"]["overhead_of_block_pairs"]
    assert wrong[-1] - wrong[0] > 1


def test_a_transcript_that_was_not_written_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    options = parsed(monkeypatch, "--variants", "off,transcript")

    def problem(by_variant: dict[str, Any]) -> str:
        blocks = {"off": [[1.0, 1.0]], "transcript": [[1.0, 1.0]]}
        raw = raw_of(blocks, {"transcript": [0]}, transcript={"memory_bytes": 1, "by_variant": by_variant})
        return overhead.transcript_problem(overhead.summarize(options, raw))

    assert not problem({"transcript": {"iterations": 3, "left_out_by_rank": [0, 0], "reasons": []}})
    assert "2 of 3" in problem({"transcript": {"iterations": 3, "left_out_by_rank": [0, 2], "reasons": ["full"]}})
    assert "nothing" in problem({"transcript": {"iterations": 0, "left_out_by_rank": [0, 0], "reasons": []}})
    assert "nothing" in problem({})


def test_a_job_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    slots.mkdir()
    with overhead.running([sys.executable, "-c", "import sys; sys.exit(3)"], tmp_path / "none") as job:
        assert overhead.wait(job, None) == 3
    with overhead.running([sys.executable, "-c", "import time; time.sleep(1000)"], slots) as job:
        assert overhead.wait(job, 0.2) == 124 and job.poll() is None
    assert job.poll() is not None and not slots.exists()


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


def test_time_that_spans_share_counts_once() -> None:
    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.5)]) == 4.0
    assert covered([]) == 0.0


def test_what_is_waited_for_before_small_copies() -> None:
    spans = [(0.0, 2.0, False), (3.0, 3.1, True), (3.5, 5.0, False), (4.0, 4.1, True), (6.0, 7.0, False)]
    assert awaited(spans[::-1]) == 1.0
    assert awaited([(1.0, 2.0, True)]) == 0.0


def test_which_kernels_the_device_was_idle_before() -> None:
    spans = [(0.0, 2.0, "gemm"), (3.0, 4.0, "adam"), (3.5, 3.8, "copy"), (4.5, 5.0, "gemm"), (7.0, 8.0, "adam")]
    assert idle_before(spans[::-1]) == {"adam": 3.0, "gemm": 0.5}
    assert idle_before([(1.0, 2.0, "gemm")]) == {}
