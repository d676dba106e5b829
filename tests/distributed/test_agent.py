"""One agent with real workers that are killed, stopped, hung and refused; survivors keep their process and memory."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.moevement.agent.board import serve
from tests.support.agents import Agents, wait

pytestmark = pytest.mark.distributed
QUICK = ("--replacement", "fork", "--preload", "torch.distributed")


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    agents = Agents(tmp_path)
    yield agents
    agents.close()


def processes(agents: Agents, generation: int, ranks: int) -> list[tuple[int, float]]:
    """Pid and memory's sum of every rank, once all work in the generation."""
    return [(note["pid"], note["memory"]) for note in agents.wait_in(generation, ranks)]


def test_survivors_stay_and_one_is_replaced_again_and_again(agents: Agents) -> None:
    agents.start("--nproc-per-node", "3", "--hang-timeout-seconds", "4", *QUICK)
    before = processes(agents, 0, 3)
    # The same rank twice; one that is stopped; one that hangs; one whose replacement dies before it is ready.
    for generation, (victim, how) in enumerate(
        [(1, "SIGKILL"), (1, "SIGKILL"), (0, "SIGSTOP"), (2, "hang"), (1, "SIGKILL")], start=1
    ):
        agents.order(victim, f"forward {how}")
        if generation == 5:
            wait(lambda: len(agents.notes(1, "fault")) == 3)
            agents.order(1, "early SIGKILL")
        after = processes(agents, generation, 3)
        for rank in range(3):
            assert after[rank][1] == before[rank][1]
            assert (after[rank][0] == before[rank][0]) == (rank != victim)
        before = after
    assert len(agents.notes(1, "start")) >= 4
    agents.finish()
    assert agents.end() == 0
    assert not agents.left()
    assert all(len(agents.notes(rank, "done")) == 1 for rank in range(3))
    said = agents.said()
    assert "rank 0: was stopped for 2 s" in said
    assert said.count("rank 1: a forked process replaces it") == 4
    assert "rank 2: no progress for" in said and "in 'forward' while others wait" in said


@pytest.mark.long
def test_two_at_once_and_warm_processes(agents: Agents) -> None:
    agents.start("--nproc-per-node", "3", "--preload", "torch.distributed")
    before = processes(agents, 0, 3)
    wait(lambda: "a warm process stands by" in agents.said())
    for rank in (0, 2):
        os.kill(before[rank][0], signal.SIGKILL)
    after = agents.wait_in(max(note["generation"] for note in _latest(agents, before[0][0])), 3)
    assert after[1]["pid"] == before[1][0]
    assert {after[0]["pid"], after[2]["pid"]}.isdisjoint({before[0][0], before[2][0]})
    agents.finish()
    assert agents.end() == 0
    assert not agents.left()
    kinds = re.findall(r"rank [02]: a (\S+) process replaces it", agents.said())
    # One process stands by: for the second failure within a moment there is none.
    assert kinds == ["warm", "cold"]


def _latest(agents: Agents, old_pid: int) -> list[dict[str, int]]:
    """Notes of rank 0's replacement at work."""
    return wait(lambda: [note for note in agents.notes(0, "works") if note["pid"] != old_pid])


@pytest.mark.long
def test_a_cold_replacement(agents: Agents) -> None:
    agents.start("--nproc-per-node", "2", "--replacement", "cold", "--stop-timeout-seconds", "0")
    before = processes(agents, 0, 2)
    agents.order(0, "forward SIGKILL")
    after = processes(agents, 1, 2)
    assert after[0][0] != before[0][0] and after[1] == before[1]
    # The agent is told to stop: workers hear why and end by themselves, with everything persisted.
    agents.agents[0].send_signal(signal.SIGTERM)
    assert agents.end() == 75
    assert all("SIGTERM" in agents.notes(rank, "ended")[0]["reason"] for rank in range(2))
    assert agents.said().strip().endswith("agent: stopping: agent 0 was told to (SIGTERM)")
    assert not agents.left()


def test_a_refusal_stops_everything(agents: Agents) -> None:
    agents.order(1, "early refuse")
    agents.start("--nproc-per-node", "2", *QUICK)
    assert agents.end() == 2
    assert "rank 1 refused its input" in agents.said()
    assert not agents.left()


@pytest.mark.long
def test_failures_without_progress_end_the_job(agents: Agents) -> None:
    agents.order(1, "early error always")
    agents.start("--nproc-per-node", "2", "--max-failures-without-progress", "2", *QUICK)
    assert agents.end() == 75
    assert len(agents.notes(1, "start")) == 3
    assert "3 failures without progress" in agents.said()
    assert not agents.left()


@pytest.mark.long
def test_an_idle_process_that_can_not_import_is_no_end(agents: Agents, tmp_path: Path) -> None:
    (tmp_path / "broken_preload.py").write_text("raise ImportError('no such luck')\n")
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        agents.start("--nproc-per-node", "2", "--preload", "broken_preload")
    finally:
        del os.environ["PYTHONPATH"]
    before = processes(agents, 0, 2)
    wait(lambda: "no such luck" in agents.said())
    agents.order(0, "forward SIGKILL")
    assert processes(agents, 1, 2)[1] == before[1]
    assert "starting cold" in agents.said()


@pytest.mark.parametrize("kind", ["fork", pytest.param("warm", marks=pytest.mark.long)])
def test_nobody_outlives_the_agent(agents: Agents, kind: str) -> None:
    agents.start("--nproc-per-node", "2", "--replacement", kind, "--preload", "torch.distributed")
    agents.wait_in(0, 2)
    agents.agents[0].kill()
    wait(lambda: not agents.left() or None)


@pytest.mark.long
def test_fifty_recoveries_leave_nothing_behind(agents: Agents) -> None:
    agents.start("--nproc-per-node", "3", "--max-failures-without-progress", "100", *QUICK)
    agents.wait_in(0, 3)
    held = list[tuple[int, int, int, int]]()
    for generation in range(1, 51):
        agents.order(1 + generation % 2, "forward SIGKILL")
        before = agents.wait_in(generation, 3)
        held.append((*used(before[0]["pid"]), *used(agents.agents[0].pid)))
    assert len({agents.notes(0)[k]["pid"] for k in (0, -1)}) == 1
    # Descriptors and threads of the survivor and of the agent, after the first recovery and after the last.
    assert held[-1] == held[0], held
    agents.finish()
    assert agents.end() == 0
    assert not agents.left()


def used(pid: int) -> tuple[int, int]:
    """Open descriptors and threads of a process."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


BUILD = """
import sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from megatron.moevement.agent.sockets import break_gloo_listeners

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

def free():
    time.sleep(1)
    while True:
        break_gloo_listeners(2)
        time.sleep(0.05)

if sys.argv[3] == "survivor":
    threading.Thread(target=free, daemon=True).start()
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=600))
# Gloo may take the closed connection for a good one at first.
dist.all_reduce(torch.ones(1))
"""


@pytest.mark.long
@pytest.mark.parametrize("dead", [0, 1])
def test_who_waits_for_the_connection_of_a_dead_rank_is_freed(dead: int) -> None:
    store, port = serve("127.0.0.1", 0)
    command = [sys.executable, "-c", BUILD]
    with subprocess.Popen([*command, str(dead), str(port), "dead"]) as process:
        # Its address is known, and it waits for that of the other.
        wait(lambda: any(key.endswith(f"/{dead}") for key in store.list_keys()))
        process.kill()
    survivor = [*command, str(1 - dead), str(port), "survivor"]
    done = subprocess.run(survivor, stderr=subprocess.PIPE, text=True, timeout=300)
    # Whether it connects to the dead rank or waits for its connection is gloo's choice, by their addresses.
    assert done.returncode == 1 and "RuntimeError" in done.stderr
    assert "Connect timeout" not in done.stderr and "Timed out" not in done.stderr
