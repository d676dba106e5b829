import dataclasses
from dataclasses import asdict

import pytest

from megatron.moevement.agent.channel import EXIT_REPLACE_ME
from megatron.moevement.agent.head import Head, Limits
from megatron.moevement.agent.marks import NO_ITERATION
from tests.support.cluster import FRESH, Cluster, does


def test_workers_start_when_every_node_is_there() -> None:
    cluster = Cluster(nodes=0)
    cluster.head = Head(2, Limits(), lambda a, m: cluster.orders.append((a, m)), print, lambda: cluster.now)
    cluster.enter(0, 1, 1)
    assert not cluster.orders
    cluster.enter(1, 0, 2)
    # Ranks go by node rank, whoever came first.
    assert does(cluster.taken()) == [(1, "start", 0), (1, "start", 1), (0, "start", 2)]
    cluster.enter(2, 1)
    assert cluster.taken()[0][1]["status"] == 2


def test_a_death_fails_the_generation_and_is_replaced() -> None:
    cluster = Cluster()
    cluster.taken()
    cluster.die(1)
    assert does(cluster.taken()) == [(0, "fail", 0), (0, "start", 1)]
    cluster.ready(1)
    assert not cluster.taken()
    cluster.ready(0)
    assert does(cluster.taken()) == [(0, "open", 1)]
    assert cluster.head.generation == 1


def test_all_agents_may_be_told_to_stop_and_one_of_them_again() -> None:
    cluster = Cluster(nodes=2, slots=1)
    for agent in (1, 0):
        cluster.head.handle({"is": "told to stop", "agent": agent, "why": f"agent {agent} was told to"})
        assert cluster.head.end is None
    cluster.head.handle({"is": "told to stop", "agent": 0, "why": "agent 0 was told to"})
    assert cluster.head.end == (75, "agent 0 was told to")


def test_who_is_waited_for_is_said() -> None:
    cluster = Cluster(slots=3)
    cluster.die(1)
    cluster.ready(0)
    cluster.now = 9.0
    cluster.tick()
    assert not any("waits for" in line for line in cluster.said)
    for _ in range(2):
        cluster.now += 2.0
        cluster.tick()
    assert [line for line in cluster.said if "waits for" in line] == [
        "generation 1 waits for rank 1 (starting for 11 s), rank 2 (leaving for 11 s)"
    ]
    cluster.ready(1, 2)
    cluster.now += 20
    cluster.tick()
    early = Head(3, Limits(), lambda agent, message: None, cluster.said.append, lambda: cluster.now)
    early.handle({"is": "enter", "agent": 0, "node": 1, "slots": 1})
    cluster.now += 20
    early.tick({0: (1, [])})
    assert cluster.said[-2:] == ["generation 1 opens", "waiting for the agents of node rank 0, 2"]


def test_a_death_before_the_next_generation_opens_is_replaced_again() -> None:
    cluster = Cluster()
    cluster.die(1)
    cluster.ready(1)
    cluster.taken()
    cluster.die(1)
    assert does(cluster.taken()) == [(0, "start", 1)]
    cluster.ready(0)
    assert not cluster.taken()  # the dead one's word is void
    cluster.ready(1)
    assert does(cluster.taken()) == [(0, "open", 1)]


def test_a_survivor_that_has_nothing_to_go_on_from_is_no_failure() -> None:
    cluster = Cluster(limits=Limits(failures=1, idle_failures=3))
    cluster.die(1)
    cluster.ready(0, 1)
    cluster.taken()
    cluster.about(0, "ended", status=EXIT_REPLACE_ME, why="exit status 76")
    cluster.about(1, "ended", status=EXIT_REPLACE_ME, why="exit status 76")
    assert does(cluster.taken()) == [(0, "fail", 1), (0, "start", 0), (0, "start", 1)]
    assert "rank 0: has nothing to go on from and is started anew" in cluster.said
    # Once: nothing else has failed since.
    cluster.ready(0, 1)
    cluster.about(0, "ended", status=EXIT_REPLACE_ME, why="exit status 76")
    assert cluster.said[-2:] == ["rank 0: exit status 76", "stopping: more than --max-failures 1 failures"]


def test_asking_to_be_replaced_again_and_again_ends_the_job() -> None:
    cluster = Cluster(limits=Limits(failures=10, idle_failures=3))
    busy = dataclasses.replace(FRESH, iteration=NO_ITERATION)
    for _ in range(12):
        assert cluster.head.end is None
        now = dataclasses.replace(busy, generation=cluster.head.generation)
        cluster.about(0, "ended", now, status=EXIT_REPLACE_ME, why="exit status 76")
        for rank in range(2):
            cluster.about(rank, "ready", now)
    assert cluster.head.end is not None and "more than --max-failures 10" in cluster.head.end[1]


def test_a_failure_before_the_first_window_is_one_failure_without_progress() -> None:
    cluster = Cluster(limits=Limits(failures=100, idle_failures=3))
    idle = dataclasses.replace(FRESH, beats=1, iteration=NO_ITERATION)
    for _ in range(3):
        for dead in ({1: 1}, {0: EXIT_REPLACE_ME, 1: EXIT_REPLACE_ME}):
            for rank, status in dead.items():
                cluster.about(rank, "ended", idle, status=status, why=f"exit status {status}")
            for rank in range(2):
                cluster.about(rank, "ready", idle)
        assert cluster.head.end is None
    assert cluster.head.generation == 6
    cluster.about(1, "ended", idle, status=1, why="exit status 1")
    assert cluster.head.end is not None and "4 failures without progress" in cluster.head.end[1]


def test_a_survivor_can_die_while_the_generation_gathers() -> None:
    cluster = Cluster()
    cluster.die(1)
    cluster.ready(0)
    cluster.die(0)
    assert cluster.taken()[-1][1]["generation"] == 1
    cluster.ready(1, 0)
    assert does(cluster.taken()) == [(0, "open", 1)]


def test_what_an_older_process_says_is_void() -> None:
    cluster = Cluster()
    cluster.die(1)
    old = cluster.head.members[1].incarnation - 1
    event = {"agent": 0, "rank": 1, "incarnation": old, "mark": asdict(FRESH)}
    cluster.head.handle({"is": "ready", **event})
    cluster.ready(0)
    assert cluster.head.generation == 0


def test_a_broken_connection_alone_fails_the_generation() -> None:
    cluster = Cluster()
    cluster.taken()
    cluster.ready(0)
    assert does(cluster.taken()) == [(0, "fail", 0)]
    cluster.ready(1)
    assert does(cluster.taken()) == [(0, "open", 1)]


def test_all_finished_ends_with_0() -> None:
    cluster = Cluster()
    for rank in (0, 1):
        cluster.about(rank, "ended", status=0, why="")
    assert cluster.head.end == (0, "finished")


@pytest.mark.parametrize(("status", "expected"), [(2, 2), (1, None)])
def test_a_refusal_ends_with_2(status: int, expected: int | None) -> None:
    cluster = Cluster()
    cluster.about(0, "ended", status=status, why="")
    assert (cluster.head.end and cluster.head.end[0]) == expected


def test_a_failure_after_a_rank_has_finished_ends_the_job() -> None:
    cluster = Cluster()
    cluster.about(0, "ended", status=0, why="")
    cluster.die(1)
    assert cluster.head.end == (75, "a rank failed after rank 0 had finished")
    assert not any(order["do"] == "start" for _, order in cluster.taken()[2:])


def test_failures_are_counted() -> None:
    cluster = Cluster(limits=Limits(failures=3, idle_failures=100))
    for _ in range(3):
        cluster.die(1)
        cluster.ready(0, 1)
        assert cluster.head.end is None
    cluster.die(1)
    assert cluster.head.end == (75, "more than --max-failures 3 failures")


@pytest.mark.parametrize("progress", [True, False])
def test_only_failures_without_progress_are_counted_as_such(progress: bool) -> None:
    cluster = Cluster(limits=Limits(failures=100, idle_failures=3))
    for _ in range(8):
        cluster.iteration += progress
        cluster.die(1)
        cluster.ready(0, 1)
    assert (cluster.head.end is None) == progress


def test_a_job_that_names_no_iteration_makes_progress_by_marks() -> None:
    cluster = Cluster(limits=Limits(failures=100, idle_failures=3))
    cluster.iteration = -1
    for _ in range(8):
        cluster.die(1)
        cluster.ready(0, 1)
    assert cluster.head.end is None


def test_a_silent_node_is_given_to_a_spare() -> None:
    cluster = Cluster(nodes=2)
    cluster.enter(2, None, 1)
    cluster.enter(3, None, 2)
    cluster.taken()
    cluster.now = 3.0
    cluster.tick(alive=[0, 2, 3])
    # Agent 2 has too few slots.
    assert does(cluster.taken())[-2:] == [(3, "start", 2), (3, "start", 3)]
    event = {"is": "ready", "agent": 1, "rank": 2, "incarnation": 1, "mark": asdict(FRESH)}
    cluster.head.handle(event)
    assert cluster.head.members[2].state == "starting"
    cluster.ready(0, 1, 2, 3)
    assert cluster.head.generation == 1
    # The lost agent comes back as a spare, and is used.
    cluster.enter(4, 1, 2)
    cluster.now = 6.0
    cluster.tick(alive=[0, 2, 4])
    assert does(cluster.taken())[-1] == (4, "start", 3)


def test_no_spare_left_ends_the_job() -> None:
    cluster = Cluster(nodes=2)
    cluster.now = 3.0
    cluster.tick(alive=[0])
    assert cluster.head.end is not None and cluster.head.end[0] == 75
    assert "no spare" in cluster.head.end[1]


def test_agents_that_do_not_come_end_the_job() -> None:
    cluster = Cluster(nodes=0)
    cluster.head = Head(2, Limits(start_seconds=5), lambda a, m: None, cluster.said.append, lambda: cluster.now)
    cluster.enter(0, 0)
    cluster.now = 5.1
    cluster.tick()
    assert cluster.head.end == (75, "1 of 2 agents came within 5 s")


def test_a_hung_worker_is_killed_once() -> None:
    cluster = Cluster(slots=3)
    cluster.taken()
    waits = dataclasses.replace(FRESH, waiting=True)
    late = dataclasses.replace(FRESH, age=9.0)
    for _ in range(2):
        cluster.tick(marks={0: waits, 1: late, 2: waits})
    assert does(cluster.taken()) == [(0, "kill", 1)]


def test_a_survivor_that_does_not_leave_is_killed() -> None:
    cluster = Cluster()
    cluster.die(1)
    cluster.taken()
    cluster.now = 9.0
    cluster.tick(marks={0: dataclasses.replace(FRESH, age=9.0, resting=True)})
    cluster.tick(marks={0: dataclasses.replace(FRESH, age=1.0)})
    assert not cluster.taken()
    cluster.tick(marks={0: dataclasses.replace(FRESH, age=9.0)})
    assert does(cluster.taken()) == [(0, "kill", 0)]


def test_a_replacement_that_is_never_ready_is_killed() -> None:
    cluster = Cluster(limits=Limits(start_seconds=20))
    cluster.die(1)
    cluster.ready(0)
    cluster.taken()
    cluster.now = 19.0
    cluster.tick()
    assert not cluster.taken()
    cluster.now = 21.0
    cluster.tick()
    assert does(cluster.taken()) == [(0, "kill", 1)]


STOP = {"is": "told to stop", "agent": 1, "why": "SIGTERM"}
FINISH = [(0, "finish", None), (1, "finish", None)]
END = [(0, "end", None), (1, "end", None)]


def stopping() -> Cluster:
    """One of two nodes whose agent has been told to stop."""
    cluster = Cluster(nodes=2)
    cluster.taken()
    cluster.head.handle(STOP)
    assert does(cluster.taken()) == FINISH and cluster.head.end is None
    return cluster


def test_a_job_that_is_told_to_stop_ends_when_all_workers_have() -> None:
    cluster = stopping()
    for rank in range(4):
        assert not cluster.taken()
        cluster.about(rank, "ended", status=75, why="exit status 75")
    assert does(cluster.taken()) == END
    assert cluster.head.end == (75, "SIGTERM")


def test_a_job_that_was_at_its_end_when_it_was_told_to_stop_has_finished() -> None:
    cluster = stopping()
    for rank in range(4):
        cluster.about(rank, "ended", status=0, why="")
    assert cluster.head.end == (0, "finished")


def test_told_twice_or_too_slow_it_stops_at_once() -> None:
    cluster = stopping()
    cluster.head.handle(STOP)
    assert does(cluster.taken()) == END
    cluster = stopping()
    cluster.now = 60.0
    cluster.tick()
    assert not cluster.taken()
    cluster.now = 60.1
    cluster.tick()
    assert does(cluster.taken()) == END
    assert cluster.head.end == (75, "SIGTERM; workers took too long (--stop-timeout-seconds)")


def test_a_failure_while_it_stops_ends_it() -> None:
    cluster = stopping()
    cluster.die(0)
    assert does(cluster.taken()) == END
    assert cluster.head.end == (75, "SIGTERM; a failure came before that")


def test_status_75_of_a_worker_that_was_not_told_to_stop_is_a_failure() -> None:
    cluster = Cluster()
    cluster.taken()
    cluster.about(0, "ended", status=75, why="exit status 75")
    assert (0, "start", 0) in does(cluster.taken())


def test_between_generations_it_stops_at_once() -> None:
    cluster = Cluster(nodes=2)
    cluster.die(0)
    cluster.taken()
    cluster.head.handle(STOP)
    assert does(cluster.taken()) == END


def test_without_patience_who_is_told_to_stop_stops_all() -> None:
    cluster = Cluster(nodes=2, limits=Limits(stop_seconds=0))
    cluster.taken()
    cluster.head.handle(STOP)
    assert does(cluster.taken()) == [(0, "end", None), (1, "end", None)]
    cluster.die(0)
    assert not cluster.taken()
    cluster.head.handle({"is": "gone", "agent": 1})
    assert list(cluster.head.agents) == [0]


def test_a_worker_that_never_begins_is_killed() -> None:
    cluster = Cluster(limits=Limits(start_seconds=20))
    cluster.taken()
    marks = {0: dataclasses.replace(FRESH, waiting=True), 1: dataclasses.replace(FRESH, beats=0, age=1e6)}
    cluster.now = 19.0
    cluster.tick(marks=marks)
    assert not cluster.taken()
    cluster.now = 21.0
    cluster.tick(marks=marks)
    ((_, order),) = cluster.taken()
    assert (order["do"], order["rank"]) == ("kill", 1)
    assert order["why"].startswith("no sign of work within 20 s of its start (--start-timeout-seconds)")
