"""Agents on virtual hosts whose links go down: no connection closes, nobody hears anything of the other side."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agents import Agents, wait
from tests.support.hosts import Hosts, alive, remedy

pytestmark = [pytest.mark.distributed, pytest.mark.long]


class Lab:
    """One job: `n1` and `n2` have a rank each, `n3` is the spare."""

    def __init__(self, folder: Path) -> None:
        self.agents, self.hosts = Agents(folder), Hosts(3, folder)
        common = ("--nnodes", "2", "--head", "n1:29400", "--replacement", "fork", "--preload", "torch.distributed")
        for name, place in (("n1", ("--node-rank", "0")), ("n2", ("--node-rank", "1")), ("n3", ("--spare",))):
            self.hosts.boot(name, self.agents.command(*common, *place), self.agents.environment())

    def said(self, *names: str) -> str:
        """What agents and workers on these hosts printed."""
        return "\n".join(self.hosts.said(name) for name in names)

    def status(self, name: str) -> int:
        """Waits for the end of a host's agent."""
        return wait(lambda: (status := self.hosts.ended(name)) is not None and [status], lambda: self.said(name))[0]

    def close(self) -> None:
        """Leaves nothing behind."""
        self.hosts.close()
        self.agents.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    if missing := remedy():
        pytest.skip(missing)
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def test_a_host_that_is_cut_off_fences_itself_and_never_comes_back(lab: Lab) -> None:
    before = lab.agents.wait_in(0, 2)
    worker = lab.hosts.find("n2", before[1]["pid"])
    lab.hosts.cut("n2")
    assert lab.status("n2") == 75
    assert "this node fences itself" in lab.said("n2") and not alive(worker)
    after = lab.agents.wait_in(1, 2)
    assert after[0]["pid"] == before[0]["pid"]
    assert lab.hosts.find("n3", after[1]["pid"]) in lab.hosts.processes("n3")
    lab.hosts.mend("n2")
    lab.agents.finish()
    assert (lab.status("n1"), lab.status("n3")) == (0, 0)
    assert not lab.agents.left()


def test_a_head_that_is_cut_off_stops_both_sides(lab: Lab) -> None:
    lab.agents.wait_in(0, 2)
    lab.hosts.cut("n1")
    assert [lab.status(name) for name in ("n1", "n2", "n3")] == [75, 75, 75]
    assert "is lost and no spare with 1 slots is left" in lab.said("n1")
    assert "this node fences itself" in lab.said("n2") and "this node fences itself" in lab.said("n3")
    assert not lab.agents.left()
