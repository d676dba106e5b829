import io
import os
import sys

import pytest

from megatron.moevement.report.progress import ProgressDisplay, ProgressSettings, plain_line
from tests.unit.report.synthetic import disturbed_run, event, iteration, local_run, start


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("gone")


def _settings(mode: str, log_interval: int = 1) -> ProgressSettings:
    return ProgressSettings(train_iters=16, tokens_per_iteration=1024, log_interval=log_interval, mode=mode)


def _shown(mode: str, stream: io.StringIO, log_interval: int = 1) -> str:
    display = ProgressDisplay(_settings(mode, log_interval), stream)
    for item in disturbed_run():
        display(item)
    display.close()
    return stream.getvalue()


def test_plain_line_has_every_figure() -> None:
    line = plain_line(iteration(3, 1.0, oldest_age_bound_steps=7, failed_slots=2), _settings("plain"))
    assert line == (
        "iteration  4/16 | loss 4.7000 | grad norm 1.750 | 1.000 s | 1,024 tokens/s | slot 4/4 3.0 MiB | "
        "stall 12.5 ms | oldest 3/7 steps | memory 5.0 MiB/10.0 MiB | failed slots 2"
    )


def test_plain_line_without_slots_loss_or_update() -> None:
    bare = iteration(0, 1.0, loss=None, grad_norm=None, skipped=True, window=0)
    line = plain_line(bare, _settings("plain"))
    assert line == "iteration  1/16 | loss n/a | grad norm skipped (overflow) | 1.000 s | 1,024 tokens/s"


def test_plain_narrates_a_recovery() -> None:
    text = _shown("plain", io.StringIO())
    assert "start: from scratch" in text
    assert "start: slots of steps 4 to 7 can be loaded by every rank" in text
    assert "recovery: converting slots of steps 4 to 7 from own host memory, 3 iterations to replay" in text
    assert "  slot 2/4: 3 operators loaded, 6 still frozen, replayed iteration 6, 1.00 s" in text
    assert "dense state of step 7 after 3 replays in 4.00 s; 12 recorded values compared, all bitwise equal" in text


def test_log_interval_leaves_out_lines_but_not_the_last() -> None:
    lines = [line for line in _shown("plain", io.StringIO(), 10).splitlines() if line.startswith("iteration")]
    assert [line.split(" | ")[0] for line in lines] == ["iteration 10/16", "iteration 16/16"]


def test_reasons_of_several_ranks_are_one_line() -> None:
    stream = io.StringIO()
    item = start(0.0)
    item["reasons"] = [*(f"rank {rank}: no slots" for rank in range(3)), "only ranks [3] have slots of one run"]
    ProgressDisplay(_settings("plain"), stream)(item)
    assert stream.getvalue() == (
        "start: from scratch\n  ranks 0, 1, 2: no slots\n  only ranks [3] have slots of one run\n"
    )


def test_troubles_are_told() -> None:
    stream = io.StringIO()
    display = ProgressDisplay(_settings("plain"), stream)
    display(event("slot_failed", 1.0, step=3, reason="no free slot", failed_slots=1))
    display(event("transcript", 1.0, segments=5, memory_bytes=1 << 30))
    display(event("transcript_off", 1.0, reason="it needs 4 GiB"))
    display(event("transcript_failed", 1.0, iteration=7, reason="a copy failed"))
    display(event("window_given_up", 1.0, step=2, reason="no free slot"))
    display(event("reorder", 1.0, step=8, refused=True))
    display(event("injected", 1.0, fault="rank 1: SIGKILL"))
    display(event("a kind of another version", 1.0))
    assert stream.getvalue().splitlines() == [
        "slot of step 3 failed, training goes on: no free slot",
        "boundary transcript: 5 iterations, 1.00 GiB of host memory a rank",
        "no boundary transcript, training goes on: it needs 4 GiB",
        "no boundary transcript of iteration 7: a copy failed",
        "slot of step 2 given up: no free slot",
        "order of experts changed at step 8, refused: the new order's slots would not fit",
        "fault injected: rank 1: SIGKILL",
    ]


def test_live_table_on_a_terminal() -> None:
    text = _shown("auto", Terminal())
    assert "iteration 16/16" in text
    assert "last recovery" in text
    assert "step 7, 3 replays, 4.0 s" in text
    assert not text.endswith("\x1b[?25l")


def test_auto_is_plain_without_a_terminal() -> None:
    assert ProgressDisplay(_settings("auto"), io.StringIO()).mode == "plain"


def test_off_writes_nothing() -> None:
    assert _shown("off", io.StringIO()) == ""


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_a_broken_stream_turns_the_display_off(mode: str) -> None:
    display = ProgressDisplay(_settings(mode), Broken())
    for item in disturbed_run():
        display(item)
    display.close()
    assert display.mode == "off"


def test_a_closed_stream_turns_the_display_off() -> None:
    stream = io.StringIO()
    stream.close()
    display = ProgressDisplay(_settings("plain"), stream)
    display(iteration(0, 1.0))
    assert display.mode == "off"


def test_later_prints_survive_a_broken_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        display = ProgressDisplay(_settings("plain"), stream)
        display(iteration(0, 1.0))
        assert display.mode == "off"
        print("more", file=stream, flush=True)


def test_default_stream_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay(_settings("plain"), sys.stdout)(iteration(0, 1.0))
    assert capsys.readouterr().out.startswith("iteration  1/16")


def _local(mode: str, stream: io.StringIO, rank: int = 0) -> str:
    display = ProgressDisplay(_settings(mode), stream)
    for item in local_run():
        if item["rank"] == rank:
            display(item)
    display.close()
    return stream.getvalue()


def test_a_localized_recovery_is_narrated_and_its_replays_are_no_iterations() -> None:
    text = _local("plain", io.StringIO(), rank=1)
    assert "recovery: process 2001 has taken over rank 1" in text
    assert "  catching up 1/1: replayed iteration 5" in text
    assert "recovery: training goes on at step 5 after 7.7 s; 5 iterations replayed" in text
    numbers = [line.split()[1] for line in text.splitlines() if line.startswith("iteration")]
    assert numbers == [f"{number}/16" for number in range(1, 10)]


def test_the_live_display_shows_the_recovery_while_it_goes_on() -> None:
    text = _local("live", Terminal())
    assert "recovery: serving" in text
    assert "2/4" in text
    last = text[text.rindex("iteration 9/16") :]
    assert "recovery: " not in last
    assert "step 5, 5 replays, 7.7 s" in last


def test_less_severe_events_are_not_narrated_in_a_recovery_either() -> None:
    stream = io.StringIO()
    settings = ProgressSettings(train_iters=16, tokens_per_iteration=1, log_interval=1, mode="plain", level="error")
    display = ProgressDisplay(settings, stream)
    for item in local_run():
        display(item)
    assert "recovery" not in stream.getvalue()
