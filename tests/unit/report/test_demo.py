"""The parts of scripts/demo.py that decide; the whole of it runs in `make demo`."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import demo
from tests.unit.report.synthetic import event, iteration, start


def test_planned_kills() -> None:
    for seed in range(50):
        plan = demo.plan_kills(5, 24, seed)
        moments = [kill.finished for kill in plan]
        early, first, nested, *later = moments
        assert early in (1, 2)
        assert nested is None
        ordered = [m for m in (early, first, *later) if m is not None]
        assert len(ordered) == 4
        assert ordered == sorted(ordered)
        assert ordered[-1] <= 23
        ranks = [kill.rank for kill in plan]
        assert set(ranks) == set(range(demo.RANKS))
        assert all(a != b for a, b in itertools.pairwise(ranks))
    assert demo.plan_kills(3, 24, 7) == demo.plan_kills(3, 24, 7)
    assert demo.plan_kills(0, 24, 7) == []
    assert len(demo.plan_kills(1, 24, 7)) == 1


def test_killer_follows_its_plan() -> None:
    killed: list[int] = []
    plan = [demo.PlannedKill(2, 3, 0.0), demo.PlannedKill(0, None, 0.0)]
    killer = demo.Killer(plan, lambda rank: killed.append(rank) is None)
    now = time.time()
    killer.take(start(now))
    killer.take(iteration(1, now))
    assert killer.act() is None
    killer.take(iteration(2, now, rank=1))
    assert killer.act() is None
    killer.take(iteration(2, now))
    assert killer.act() == killer.done[0]
    stale = now - 1
    killer.take(iteration(3, stale))
    assert killer.act() is None
    later = time.time()
    killer.take(start(later, [0, 3]))
    killer.take(event("recovery_started", later, first=0, last=3, replays=3))
    assert killer.act() is None
    killer.take(event("conversion", later, step=0, replayed=True, seconds=1.0))
    assert killer.act() is not None
    assert killed == [2, 0]
    assert [kill.in_recovery for kill in killer.done] == [False, True]


def test_killer_tries_again_if_the_worker_is_not_there() -> None:
    answers = [False, True]
    killer = demo.Killer([demo.PlannedKill(0, 1, 0.0)], lambda _rank: answers.pop(0))
    killer.take(iteration(0, time.time()))
    assert killer.act() is None
    assert killer.act() is not None


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_launch_kills_by_rank_and_leaves_nothing_behind(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    parent = (
        "import os, subprocess, sys, time\n"
        "for rank in range(2):\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {child!r}], env={{**os.environ, 'RANK': str(rank)}},\n"
        "        start_new_session=True)\n"
        "    print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    with demo.Launch([sys.executable, "-c", parent], log) as run:
        deadline = time.monotonic() + 60
        while len(log.read_text().splitlines()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        first, second = map(int, log.read_text().split())
        while not run.kill(1) and time.monotonic() < deadline:
            time.sleep(0.02)
        while _alive(second) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _alive(first)
        assert not _alive(second)
    while _alive(first) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(first)


def test_a_launch_that_fails_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('Error: no data')"]
    with (
        demo.Launch(command, tmp_path / "log") as run,
        pytest.raises(demo.DemoError, match=r"status 1.*\n.*Error: no data"),
    ):
        for _ in run.polls():
            pass


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--iters", "3"])
    assert stopped.value.code == 2
    assert "--iters must be at least 8" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    script = Path(demo.__file__)
    code = f"import runpy, sys; sys.argv = ['demo.py', '--help']; runpy.run_path({str(script)!r}, run_name='__main__')"
    probe = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
