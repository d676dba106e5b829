import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from megatron.moevement.agent.board import serve
from megatron.moevement.agent.channel import (
    CHANNEL_VARIABLE,
    GENERATION_VARIABLE,
    MARKS_VARIABLE,
    STORE_VARIABLE,
    Channel,
)
from megatron.moevement.agent.link import WorkerLink
from megatron.moevement.agent.marks import Marks
from megatron.moevement.errors import JobEnded, PeerLost


@dataclass
class Side:
    """The agent's side of a link, in the same process."""

    channel: Channel
    marks: Marks
    environment: dict[str, str]
    links: list[WorkerLink]

    def link(self, generation: int = 0) -> WorkerLink:
        link = WorkerLink.from_environment({**self.environment, GENERATION_VARIABLE: str(generation)})
        assert link is not None
        self.links.append(link)
        return link

    def tell(self, do: str, **more: Any) -> None:
        assert self.channel.send({"do": do, **more})


@pytest.fixture
def side() -> Iterator[Side]:
    _server, port = serve("127.0.0.1", 0)
    channel, other = Channel.pair()
    marks = Marks.create(2)
    environment = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        CHANNEL_VARIABLE: str(other.detach()),
        MARKS_VARIABLE: str(marks.descriptor),
        STORE_VARIABLE: f"127.0.0.1:{port}",
    }
    side = Side(channel, marks, environment, [])
    yield side
    for link in side.links:
        link.close()
    channel.close()
    os.close(marks.descriptor)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_without_an_agent_there_is_no_link() -> None:
    assert WorkerLink.from_environment({"RANK": "0"}) is None


def test_a_failure_frees_the_main_thread_until_it_moves_on(side: Side) -> None:
    link = side.link()
    assert (link.rank, link.world_size, link.generation, link.replacement) == (3, 4, 0, False)
    aborts = list[float]()
    link.watch(lambda: aborts.append(time.monotonic()))
    link.check()
    side.tell("fail", generation=0)
    until(lambda: len(aborts) >= 3)
    assert link.failed
    with pytest.raises(PeerLost):
        link.check()
    threading.Timer(0.2, lambda: side.tell("open", generation=1)).start()
    assert link.next_generation() == 1
    made = len(aborts)
    assert side.channel.receive()[0] == {"is": "ready", "generation": 1}
    assert not link.failed and link.generation == 1
    side.tell("fail", generation=0)  # old news
    time.sleep(0.2)
    assert len(aborts) == made and not link.failed


def test_a_generation_that_fails_as_soon_as_it_opens(side: Side) -> None:
    link = side.link()
    side.tell("fail", generation=0)
    side.tell("open", generation=1)
    side.tell("fail", generation=1)
    assert link.next_generation() == 1
    until(lambda: link.failed)


def test_a_replacement_joins_the_next_generation(side: Side) -> None:
    link = side.link(generation=5)
    aborts = list[int]()
    link.watch(lambda: aborts.append(1))
    assert link.replacement and link.generation == 4 and link.failed
    side.tell("fail", generation=4)
    time.sleep(0.2)
    assert not aborts  # it is in no group
    side.tell("open", generation=5)
    assert link.next_generation() == 5
    assert not link.failed


def test_the_end_of_the_job_reaches_every_wait(side: Side) -> None:
    link = side.link()
    aborts = list[int]()
    link.watch(lambda: aborts.append(1))
    side.tell("end", status=75, reason="no spare")
    until(lambda: bool(aborts))
    for _ in range(2):
        with pytest.raises(JobEnded, match="no spare"):
            link.next_generation()


def test_who_waits_in_the_store_is_freed(side: Side) -> None:
    link = side.link()
    link.watch(lambda: None)
    store = link.store(timedelta(seconds=600))
    store.set("mine", "1")
    assert store.get("mine") == b"1"
    threading.Timer(0.2, lambda: side.tell("fail", generation=0)).start()
    with pytest.raises(RuntimeError):
        store.get("of a rank that has died")
    side.tell("open", generation=1)
    link.next_generation()
    # Keys of another generation aren't seen.
    assert not link.store().check(["mine"])


def test_marks_reach_the_agent(side: Side) -> None:
    link = side.link()
    link.beat("forward", 7)
    link.beat("backward")
    mark = side.marks.read(1)
    assert (mark.beats, mark.iteration, mark.point, mark.resting) == (2, 7, "backward", False)
    link.beat("save", resting=True)
    assert side.marks.read(1).resting
    assert side.marks.read(0).beats == 0


def test_waiting_for_the_next_generation_is_no_hang(side: Side) -> None:
    link = side.link()
    waiter = threading.Thread(target=link.next_generation)
    waiter.start()
    until(lambda: side.marks.read(1).waiting)
    side.tell("open", generation=1)
    waiter.join(60)
    until(lambda: not side.marks.read(1).waiting)
