"""The parts of scripts/demo.py that decide; the whole of it runs in `make demo`."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron.moevement.report.recoveries import Kill
from scripts import demo
from scripts.demo_kills import Killer, PlannedKill, plan_kills
from tests.unit.report.synthetic import event, iteration, phase
from tests.unit.report.test_recoveries import KILLS
from tests.unit.report.test_two_runs import write_events, write_run


def _plan(kills: int, seed: int) -> list[PlannedKill]:
    return plan_kills(kills, 24, seed, demo.RANKS, demo.WINDOW)


def test_planned_kills() -> None:
    for seed in range(50):
        plan = _plan(5, seed)
        assert sum(kill.rank == 0 for kill in plan) == 1
        (nested,) = (at for at, kill in enumerate(plan) if kill.finished is None)
        assert nested > 0
        assert plan[nested].rank not in (0, plan[nested - 1].rank)
        moments = [kill.finished for kill in plan if kill.finished is not None]
        assert moments == sorted(set(moments))
        assert demo.WINDOW < moments[0] <= moments[-1] <= 22
    assert _plan(3, 7) == _plan(3, 7)
    assert {tuple(kill.rank for kill in _plan(3, seed)) for seed in range(20)} != {(0, 1, 2)}
    assert _plan(0, 7) == []
    assert [kill.rank for kill in _plan(1, 7)] == [0]


def test_killer_follows_its_plan() -> None:
    killed: list[int] = []
    plan = [PlannedKill(2, 3, 0.0), PlannedKill(1, None, 0.0, replayed=2)]
    killer = Killer(plan, lambda pid: killed.append(pid) is None)
    now = time.time()
    for rank in range(3):
        killer.take(event("process", now, rank, pid=1000 + rank, replacement=False, stage=rank))
    killer.take(iteration(1, now))
    killer.take(iteration(5, now, replayed=True))
    assert killer.act() is None
    killer.take(iteration(2, now, rank=1))
    assert killer.act() == killer.done[0]
    killer.take(phase("convert", now - 1, 2, 2, 3, seconds=0.0))
    assert killer.act() is None
    later = time.time()
    killer.take(phase("serve", later, 1, 2, 3, seconds=0.0))
    killer.take(phase("convert", later, 2, 1, 3, seconds=0.0))
    assert killer.act() is None
    killer.take(phase("convert", later, 2, 2, 3, seconds=0.0))
    assert killer.act() is not None
    assert killed == [1002, 1001]
    assert [(kill.rank, kill.in_recovery) for kill in killer.done] == [(2, False), (1, True)]


def test_killer_ends_the_newest_process_and_tries_again_if_it_is_not_there() -> None:
    answers, asked = [False, True], list[int]()
    killer = Killer([PlannedKill(0, 1, 0.0)], lambda pid: asked.append(pid) is None and answers.pop(0))
    killer.take(iteration(0, time.time()))
    assert killer.act() is None
    assert asked == []
    for pid in (10, 11):
        killer.take(event("process", time.time(), 0, pid=pid, replacement=pid > 10, stage=0))
    assert killer.act() is None
    assert killer.act() is not None
    assert asked == [11, 11]


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_launch_kills_its_own_processes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    parent = (
        "import subprocess, sys, time\n"
        "for _ in range(2):\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "    print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    with demo.Launch([sys.executable, "-c", parent], log) as run:
        deadline = time.monotonic() + 60
        while len(log.read_text().splitlines()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        first, second = map(int, log.read_text().split())
        while not run.kill(second) and time.monotonic() < deadline:
            time.sleep(0.02)
        while _alive(second) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _alive(first)
        assert not _alive(second)
        assert not run.kill(second)
        assert not run.kill(os.getpid())
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


@pytest.mark.parametrize(
    ("state", "kills", "status"), [("00", KILLS, 0), ("01", KILLS, 1), ("00", KILLS[:1], 1), ("00", (), 1)]
)
def test_the_status_tells_of_a_different_bit_and_of_a_process_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, kills: Sequence[Kill], status: int
) -> None:
    def undisturbed(self: demo.Demo, _screen: demo.Screen) -> None:
        write_run(self.output / "undisturbed", 0, "00")

    def disturbed(self: demo.Demo, _screen: demo.Screen) -> Sequence[Kill]:
        write_run(self.output / "disturbed", 5, state)
        write_events(self.output / "disturbed")
        return kills

    monkeypatch.setattr(demo.Demo, "prepare", lambda _self, _screen: None)
    monkeypatch.setattr(demo.Demo, "undisturbed", undisturbed)
    monkeypatch.setattr(demo.Demo, "disturbed", disturbed)
    assert demo.main(["--output", str(tmp_path), "--kills", str(len(kills))]) == status


def test_help_needs_no_torch() -> None:
    script = Path(demo.__file__)
    code = f"import runpy, sys; sys.argv = ['demo.py', '--help']; runpy.run_path({str(script)!r}, run_name='__main__')"
    probe = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
