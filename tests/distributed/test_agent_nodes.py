"""Several agents on one machine as nodes of one job: a lost node, a lost head, a node that is silent and comes back."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agents import Agents, wait
from tests.support.launcher import free_port

pytestmark = pytest.mark.distributed


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    agents = Agents(tmp_path)
    yield agents
    agents.close()


def start(agents: Agents, *who: str) -> None:
    """One agent per word: its node rank, or `spare`."""
    head = f"127.0.0.1:{free_port()}"
    nodes = str(sum(word != "spare" for word in who))
    common = ("--nnodes", nodes, "--head", head, "--replacement", "fork", "--preload", "torch.distributed")
    for word in who:
        agents.start(*common, *(("--spare",) if word == "spare" else ("--node-rank", word)))


def test_a_spare_takes_a_lost_node_over(agents: Agents) -> None:
    start(agents, "0", "1", "spare")
    before = agents.wait_in(0, 2)
    agents.agents[1].kill()
    after = agents.wait_in(1, 2)
    assert after[0]["pid"] == before[0]["pid"] and after[1]["pid"] != before[1]["pid"]
    agents.finish()
    assert (agents.end(0), agents.end(2)) == (0, 0)
    assert "takes over" in agents.said()
    assert not agents.left()


@pytest.mark.long
def test_no_spare_left_ends_the_job(agents: Agents) -> None:
    start(agents, "0", "1")
    agents.wait_in(0, 2)
    agents.agents[1].kill()
    assert agents.end(0) == 75
    assert "is lost and no spare with 1 slots is left" in agents.said()
    assert "is lost" in agents.notes(0, "ended")[0]["reason"]
    assert not agents.left()


@pytest.mark.long
def test_a_lost_head_ends_the_job(agents: Agents) -> None:
    start(agents, "0", "1")
    agents.wait_in(0, 2)
    agents.agents[0].kill()
    assert agents.end(1) == 75
    assert "the head is gone" in agents.said(1)
    assert agents.notes(1, "ended")[0]["reason"] == "the head agent is gone"
    assert not agents.left()


@pytest.mark.long
def test_a_silent_head_ends_the_job(agents: Agents) -> None:
    start(agents, "0", "1")
    agents.wait_in(0, 2)
    agents.agents[0].send_signal(signal.SIGSTOP)
    assert agents.end(1) == 75
    assert "this node fences itself" in agents.said(1)
    agents.agents[0].send_signal(signal.SIGCONT)
    assert agents.end(0) == 75
    assert not agents.left()


@pytest.mark.long
def test_a_silent_node_fences_itself(agents: Agents) -> None:
    start(agents, "0", "1", "spare")
    before = agents.wait_in(0, 2)
    silent = next(n for n in (1, 2) if before[1]["pid"] in children(agents, n))
    agents.agents[silent].send_signal(signal.SIGSTOP)
    after = agents.wait_in(1, 2)
    assert after[0]["pid"] == before[0]["pid"] and after[1]["pid"] != before[1]["pid"]
    # Its worker doesn't wait for the agent to wake: it must not meet its successor.
    wait(lambda: ended(before[1]["pid"]) or None)
    agents.agents[silent].send_signal(signal.SIGCONT)
    assert agents.end(silent) == 75
    agents.finish()
    assert agents.end(0) == 0
    wait(lambda: not agents.left() or None)


def children(agents: Agents, agent: int) -> list[int]:
    """Processes whose parent is the agent."""
    path = Path(f"/proc/{agents.agents[agent].pid}/task/{agents.agents[agent].pid}/children")
    return [int(word) for word in path.read_text().split()]


def ended(pid: int) -> bool:
    """Whether a process is a zombie or gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
