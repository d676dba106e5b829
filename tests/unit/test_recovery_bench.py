"""The recovery benchmark's figures, from notes whose figures are known; and its refusals."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import recovery_figures as figures
from scripts.bench import recovery_worker as worker

ROOT = Path(__file__).resolve().parents[2]
Mark = dict[str, Any]


def mark(time: float, rank: int, kind: str, **values: Any) -> Mark:
    return {"time": time, "rank": rank, "pid": 1, "kind": kind, "busy": time / 10, "thread": 0.0, **values}


def calm(rank: int) -> list[Mark]:
    """Iterations 0 to 9 of one rank: passes of 0.6 s (0.9 in stage 1), 0.1 s of update."""
    passes = 0.9 if rank == 1 else 0.6
    spent = {"seconds": 2.0, "thread_seconds": passes + 0.1, "passes_thread_seconds": passes}
    return [mark(rank / 100 + i, rank, "iteration", iteration=i, **spent) for i in range(10)]


def local_recovery() -> list[Mark]:
    """Three stages; rank 1 dies at 100 in iteration 10, its replacement replays 7 to 9, training goes on at 111."""
    kill = mark(100.0, 1, "kill", iteration=10, number=0)
    survivors = [
        mark(100.5 + 0.1 * rank + extra, rank, kind)
        for rank in (0, 2)
        for extra, kind in ((0.0, "failure_noticed"), (1.0, "left"))
    ]
    replacement = [mark(101.0, 1, "process", created=50.0), mark(101.9, 1, "imported"), mark(102.5, 1, "built")]
    together = [mark(104.0, rank, "joined") for rank in range(3)] + [
        mark(104.5, rank, "decision", source="local") for rank in range(3)
    ]
    spent = {"seconds": 1.0, "thread_seconds": 0.8, "passes_thread_seconds": 0.7}
    replays = [mark(105.0 + i, 1, "replay", iteration=7 + i, frozen=2 - i, **spent) for i in range(3)]
    replays.append(mark(106.5, 1, "recovery_finished"))
    again = [mark(109.0 + rank, rank, "begins", iteration=10) for rank in range(3)]
    later = [mark(120.0, 0, "begins", iteration=10), mark(121.0, 0, "iteration", iteration=3, **spent)]
    before = [one for rank in range(3) for one in calm(rank)]
    return sorted(
        [*before, kill, *survivors, *replacement, *together, *replays, *again, *later], key=lambda m: m["time"]
    )


def test_phases_of_a_local_recovery() -> None:
    found = figures.figures(local_recovery(), 1, True, 6)
    (one,) = found["recoveries"]
    wanted = {"noticed": 0.7, "left": 1.0, "started": 0.2, "built": 0.6, "joined": 1.5, "agreed": 0.5, "loaded": 2.0}
    wanted |= {"replayed": 0.5, "met": 4.0}
    assert one["phases"] == pytest.approx(wanted)
    assert sum(one["phases"].values()) == pytest.approx(one["seconds"]) == pytest.approx(11.0)
    assert (one["iterations"], one["iterations_of_other_stages"], one["source"]) == (3, 0, "local")
    # From the decision to the iteration's begin, by rank.
    assert one["busy_seconds"] == pytest.approx({"0": 0.45, "1": 0.55, "2": 0.65})
    assert one["replay_seconds"] == pytest.approx(6.5)


def test_critical_path_is_fill_and_drain_and_the_slowest_stage() -> None:
    found = figures.training(local_recovery(), 1, 6)
    assert found["critical_path_seconds"] == pytest.approx(0.1 + 0.15 + 0.1 + 5 * 0.15 + 0.1)
    assert found["seconds"] == 2.0


def test_an_iteration_with_a_wait_for_a_stand_by_process_counts_for_nothing() -> None:
    spent = {"seconds": 30.0, "thread_seconds": 0.7, "passes_thread_seconds": 0.6}
    slow = [mark(9.5, rank, "iteration", iteration=9, **spent) for rank in range(3)]
    wait = mark(9.2, 1, "stand_by", iteration=9, seconds=29.0, ready=True)
    rest = [
        one for one in local_recovery() if not (one["kind"] == "iteration" and one.get("iteration") in range(6, 10))
    ]
    without = figures.figures(sorted([*rest, *slow], key=lambda m: m["time"]), 1, True, 6)
    found = figures.figures(sorted([*rest, *slow, wait], key=lambda m: m["time"]), 1, True, 6)
    assert without["training"]["seconds"] > found["training"]["seconds"] == 2.0
    assert (without["recoveries"][0]["stood_by"], found["recoveries"][0]["stood_by"]) == (None, True)
    gave_up = figures.figures(sorted([*rest, {**wait, "ready": False}], key=lambda m: m["time"]), 1, True, 6)
    assert gave_up["recoveries"][0]["stood_by"] is False
    assert gave_up["recoveries"][0]["phases"] == found["recoveries"][0]["phases"], "it is before the kill"


def said(*lines: str) -> str:
    return "".join(f"agent: {line}\n" for line in lines)


def test_a_process_stands_by_until_it_has_replaced_a_rank() -> None:
    ready, taken = "a warm process stands by", "rank 1: a warm process replaces it"
    assert not worker.stands_by(said("generation 0 opens"))
    assert worker.stands_by(said("generation 0 opens", ready))
    assert not worker.stands_by(said(ready, "rank 1: SIGKILL", taken))
    assert not worker.stands_by(said(ready, "rank 1: SIGKILL", taken, "rank 2: a half-warm process replaces it"))
    assert worker.stands_by(said(ready, taken, ready, "generation 1 opens"))


def test_a_victim_waits_for_a_stand_by_process_once_and_not_for_ever(tmp_path: Path) -> None:
    output = tmp_path / "output.log"
    output.write_text("")
    marks = worker.Marks(tmp_path, 1)
    options = argparse.Namespace(agent_output=output, stand_by_iterations=3, stand_by_seconds=0.0)
    killer = worker.Killer("10:1,20:1,30:2", 1, marks, worker.StandBy(options, marks))
    killer.begin(7)
    output.write_text(said("a warm process stands by"))
    for iteration in (16, 17, 20, 27):
        killer.begin(iteration)
    (tmp_path / "kill1").touch()
    killer.begin(17)
    found = [(note["iteration"], note["ready"]) for note in figures.read(tmp_path)]
    assert found == [(7, False), (17, True)]


def test_a_rank_that_never_came_back_is_an_error() -> None:
    marks = [one for one in local_recovery() if not (one["rank"] == 2 and one["kind"] == "begins")]
    with pytest.raises(ValueError, match=r"only ranks \[0, 1\]"):
        figures.figures(marks, 1, True, 6)


def test_phases_of_a_restart_and_what_runs_again_elsewhere_counts() -> None:
    kill = mark(100.0, 1, "kill", iteration=10, number=0)
    spent = {"seconds": 1.0, "thread_seconds": 0.8, "passes_thread_seconds": 0.7}
    marks = [one for rank in range(3) for one in calm(rank)] + [kill]
    for rank in range(3):
        marks += [
            mark(103.0, rank, "process", created=102.0),
            mark(104.0, rank, "imported"),
            mark(105.0, rank, "groups"),
        ]
        marks += [mark(106.0, rank, "built"), mark(107.0, rank, "loaded")]
        marks += [
            mark(108.0, rank, "iteration", iteration=8, **spent),
            mark(109.0, rank, "iteration", iteration=9, **spent),
        ]
        marks += [mark(109.5, rank, "begins", iteration=10)]
    one = figures.figures(marks, 1, False, 6)["recoveries"][0]
    wanted = {"noticed": 2.0, "left": 0.0, "started": 2.0, "joined": 1.0, "built": 1.0, "agreed": 0.0, "loaded": 1.0}
    assert one["phases"] == pytest.approx({**wanted, "replayed": 2.0, "met": 0.5})
    assert (one["iterations"], one["iterations_of_other_stages"]) == (2, 2)


def test_comparison_and_the_paper_s_intervals() -> None:
    local = figures.figures(local_recovery(), 1, True, 6)
    result: dict[str, Any] = {
        "window": 3,
        "dense_interval": 22,
        "variants": {"local rolling": local, "global rolling": local, "dense": local},
    }
    figures.compare(result)
    rolling = result["comparison"]["rolling"]
    assert (rolling["iterations_most"], rolling["iterations_bound"], rolling["all_local"]) == (3, 4, True)
    assert rolling["stages"]["1"]["gain"] == 0.0
    assert rolling["stages"]["1"]["gain_on_own_cores"] == pytest.approx(1 - 0.8 / 1.2)
    assert rolling["busy_share_of_others"] == pytest.approx(1.1 / 1.65)
    assert set(result["dense_computed"]) == {"Gemini, MTBF 1 h", "CheckFreq"}
    computed = result["dense_computed"]["CheckFreq"]
    assert computed["seconds"] == pytest.approx(11.0 - 0.5 + 39 * 0.5 / 3)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--variants", "local,elsewhere"], "--variants local,elsewhere"),
        (["--repeat", "0"], "--repeat 0"),
        (["--dense-interval", "5"], "--dense-interval 5"),
        (["--stages", "1,1"], "--stages 1,1"),
    ],
)
def test_bad_options_are_one_line(words: list[str], flag: str) -> None:
    command = [sys.executable, "scripts/bench/recovery.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert flag in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
