"""What the head agent decides: a state machine over events of agents, with no process and no socket of its own.

It is the only one that decides, so that a death, a ready replacement and the opening of a generation have one order.
A generation is *open*, or its successor *gathers*: every rank must become ready before that opens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.moevement.agent.channel import EXIT_AGAIN, EXIT_REPLACE_ME
from megatron.moevement.agent.hang import Patience, hung, started
from megatron.moevement.agent.marks import NO_ITERATION, Mark

Message = dict[str, Any]
_EXIT_USAGE = 2
# How often people are told who is waited for.
_AWAITED_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Limits:
    """When the head gives up waiting, or the job.

    Attributes:
        failures: deaths of workers in the whole job.
        idle_failures: failures since the job made progress.
        hang_seconds: silence of a worker while others wait.
        start_seconds: until all agents are there, and until a replacement is ready.
        heartbeat_seconds: silence of an agent.
        stop_seconds: from being told to stop until the workers have ended by themselves, after a whole iteration.
    """

    failures: int = 100
    idle_failures: int = 5
    hang_seconds: float = 8.0
    start_seconds: float = 600.0
    heartbeat_seconds: float = 2.5
    stop_seconds: float = 60.0


@dataclass
class Member:
    """A rank, and the process that holds it now.

    Attributes:
        incarnation: counts the processes that have held it; what an older one says is void.
        state: `up`, `leaving` (of a failed generation), `starting` (a replacement), `ready`, `finished`.
        since: when the state began.
    """

    rank: int
    agent: int
    local_rank: int
    local_world_size: int
    incarnation: int = 0
    state: str = "up"
    since: float = 0.0


@dataclass
class Agent:
    """An agent as the head sees it.

    Attributes:
        node: its node rank; None: a spare.
        slots: workers that it can run.
        life: number of its last sign of life.
        heard: when that came.
    """

    node: int | None
    slots: int
    life: int = 0
    heard: float = 0.0


class Head:
    """The decisions.

    Args:
        nodes: how many must be there before workers start.
        limits: when to give up.
        order: tells an agent (by number) what to do.
        say: prints a line for people.
        clock: seconds.
    """

    def __init__(
        self,
        nodes: int,
        limits: Limits,
        order: Callable[[int, Message], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes, self._limits, self._order, self._say, self._clock = nodes, limits, order, say, clock
        self._began = self._awaiting_since = clock()
        self.agents: dict[int, Agent] = {}
        self.members: dict[int, Member] = {}
        self.generation, self.gathering = 0, False
        self.end: tuple[int, str] | None = None
        # Why the job is to stop after an iteration, and until when; whether a worker has done so before its end.
        self._stopping: tuple[str, float] | None = None
        self._told_to_stop: set[int] = set()
        self._stopped_early = False
        self._failures = self._idle_generations = 0
        self._idle_deaths: dict[int, int] = {}
        # Ranks that have asked to be replaced since the last failure, which is what they may ask for once.
        self._excused: set[int] = set()
        self._killed: dict[int, int] = {}
        self._patience = Patience(limits.hang_seconds)
        self._iteration, self._progress = NO_ITERATION, False

    # ---------------------------------------------------------------------------------------------- events

    def handle(self, event: Message) -> None:
        """Takes note of what an agent has posted."""
        agent = event["agent"]
        if self.end is not None:
            if event["is"] == "gone":
                self.agents.pop(agent, None)
        elif event["is"] == "enter":
            self._enter(agent, event["node"], event["slots"])
        elif agent not in self.agents:
            return  # declared dead before it said this
        elif event["is"] == "gone":
            self._lose(agent, "its agent has ended")
        elif event["is"] == "told to stop":
            self._stop_soon(agent, event["why"])
        else:
            member = self.members[event["rank"]]
            if (member.agent, member.incarnation) == (agent, event["incarnation"]):
                self._marked([Mark(**event["mark"])])
                if event["is"] == "ready":
                    self._ready(member)
                elif event["is"] == "ended":
                    self._ended(member, event["status"], event["why"])

    def tick(self, lives: Mapping[int, tuple[int, list[Message]]]) -> None:
        """Judges silence: of agents and of workers.

        Args:
            lives: the last sign of life of each agent: its number, and what its workers do.
        """
        now, marks = self._clock(), dict[int, Mark]()
        for number, (life, reports) in lives.items():
            agent = self.agents.get(number)
            if agent is None:
                continue
            if life != agent.life:
                agent.life, agent.heard = life, now
            for report in reports:
                member = self.members.get(report["rank"])
                if member is not None and (member.agent, member.incarnation) == (number, report["incarnation"]):
                    marks[member.rank] = Mark(**report["mark"])
        self._marked(list(marks.values()))
        silent = [n for n, agent in self.agents.items() if now - agent.heard > self._limits.heartbeat_seconds]
        if self.end is not None:
            for number in silent:
                del self.agents[number]  # nobody waits for its goodbye
            return
        for number in silent:
            self._lose(number, f"no sign of life for {self._limits.heartbeat_seconds} s")
        if self.end is None and not self.members and now - self._began > self._limits.start_seconds:
            there = len([agent for agent in self.agents.values() if agent.node is not None])
            self.stop(EXIT_AGAIN, f"{there} of {self._nodes} agents came within {self._limits.start_seconds:.0f} s")
        if self.end is None and self._stopping is not None and now > self._stopping[1]:
            self.stop(EXIT_AGAIN, f"{self._stopping[0]}; workers took too long (--stop-timeout-seconds)")
        if self.end is None:
            self._judge(now, marks)
            self._say_who_is_awaited(now, marks)

    def _stop_soon(self, number: int, why: str) -> None:
        """Has the workers stop after an iteration; at once if that can't be, or if an agent is told so again."""
        again, started = number in self._told_to_stop, bool(self.members) and not self.gathering
        self._told_to_stop.add(number)
        if self._stopping is not None and not again:
            return  # whoever stops a job may well tell all its agents
        if again or not started or not self._limits.stop_seconds:
            self.stop(EXIT_AGAIN, why)
            return
        self._stopping = (why, self._clock() + self._limits.stop_seconds)
        self._say(f"stopping after this iteration: {why}; tell it again to stop at once")
        self._tell_all({"do": "finish", "reason": why})

    def stop(self, status: int, reason: str) -> None:
        """Ends the job: every agent ends with this status."""
        if self.end is None:
            self.end = (status, reason)
            if status:
                self._say(f"stopping: {reason}")
            for number in self.agents:
                self._order(number, {"do": "end", "status": status, "reason": reason})

    # ------------------------------------------------------------------------------------------------ ranks

    def _enter(self, number: int, node: int | None, slots: int) -> None:
        taken = any(agent.node == node for agent in self.agents.values()) if node is not None else False
        if taken or (node is not None and node >= self._nodes):
            why = f"--node-rank {node}: the job has {self._nodes} nodes; give 0 to {self._nodes - 1}, or --spare"
            if taken:
                why = f"--node-rank {node} is taken by another agent of this job; give another, or --spare"
            self._order(number, {"do": "end", "status": _EXIT_USAGE, "reason": why})
            return
        if node is not None and self.members:
            node = None  # it comes back after its ranks were given away: a spare
        self.agents[number] = Agent(node, slots, heard=self._clock())
        homes = sorted((agent.node, n) for n, agent in self.agents.items() if agent.node is not None)
        if self.members or len(homes) < self._nodes:
            return
        for _, home in homes:
            slots = self.agents[home].slots
            for local_rank in range(slots):
                member = Member(len(self.members), home, local_rank, slots)
                self.members[member.rank] = member
        where = "this node" if len(homes) == 1 else f"{len(homes)} nodes"
        self._say(f"starting {len(self.members)} workers on {where}")
        for member in self.members.values():
            self._start(member, first=True)

    def _start(self, member: Member, first: bool = False) -> None:
        member.incarnation += 1
        self._set(member, "up" if first else "starting")
        placed = {"rank": member.rank, "local_rank": member.local_rank, "incarnation": member.incarnation}
        sizes = {"world_size": len(self.members), "local_world_size": member.local_world_size}
        generation = 0 if first else self.generation + 1
        self._order(member.agent, {"do": "start", **placed, **sizes, "generation": generation})

    def _set(self, member: Member, state: str) -> None:
        member.state, member.since = state, self._clock()

    def _ready(self, member: Member) -> None:
        if not self.gathering:
            self._say(f"rank {member.rank} has left generation {self.generation}: a connection of it broke")
            self._fail()
            self._give_up_if_hopeless()
        self._set(member, "ready")
        self._open_if_complete()

    def _open_if_complete(self) -> None:
        if self.end is not None or any(member.state != "ready" for member in self.members.values()):
            return
        self.generation, self.gathering = self.generation + 1, False
        for member in self.members.values():
            self._set(member, "up")
        self._say(f"generation {self.generation} opens")
        self._tell_all({"do": "open", "generation": self.generation})

    def _ended(self, member: Member, status: int, why: str) -> None:
        stopped = status == EXIT_AGAIN and self._stopping is not None
        if status == 0 or stopped:
            self._set(member, "finished")
            self._stopped_early |= stopped
            if all(other.state == "finished" for other in self.members.values()):
                if self._stopped_early and self._stopping is not None:
                    self.stop(EXIT_AGAIN, self._stopping[0])
                else:
                    self.stop(0, "finished")
            elif self.gathering:
                self.stop(EXIT_AGAIN, f"rank {member.rank} finished and others can't go on without it")
        elif status == _EXIT_USAGE:
            self.stop(_EXIT_USAGE, f"rank {member.rank} refused its input (exit status 2)")
        elif status == EXIT_REPLACE_ME:
            excused = member.rank not in self._excused
            self._die([member], "has nothing to go on from and is started anew" if excused else why, not excused)
            self._excused.add(member.rank)
        else:
            self._die([member], why)

    def _die(self, dead: list[Member], why: str, counted: bool = True) -> None:
        """Replaces the dead, on their agents."""
        ranks = " ".join(str(member.rank) for member in dead)
        self._say(f"rank {ranks}: {why}")
        if not self.gathering:
            self._fail(counted)
        if counted:
            self._excused.clear()
            for member in dead:
                self._failures += 1
                self._idle_deaths[member.rank] = self._idle_deaths.get(member.rank, 0) + 1
        self._give_up_if_hopeless()
        if self.end is None:
            for member in dead:
                self._start(member)

    def _fail(self, counted: bool = True) -> None:
        """The open generation fails; unless it is counted it does so as a consequence of an earlier failure."""
        if self._stopping is not None:
            # The slots are what a later start has; nobody waits for a recovery.
            self.stop(EXIT_AGAIN, f"{self._stopping[0]}; a failure came before that")
            return
        self.gathering, self._awaiting_since = True, self._clock()
        self._idle_generations = 0 if self._progress else self._idle_generations + counted
        if self._progress:
            self._idle_deaths.clear()
        self._progress = False
        for member in self.members.values():
            if member.state == "up":
                self._set(member, "leaving")
        self._tell_all({"do": "fail", "generation": self.generation})
        finished = [member.rank for member in self.members.values() if member.state == "finished"]
        if finished:
            self.stop(EXIT_AGAIN, f"a rank failed after rank {finished[0]} had finished")

    def _give_up_if_hopeless(self) -> None:
        idle = max([self._idle_generations, *self._idle_deaths.values()])
        if self._failures > self._limits.failures:
            self.stop(EXIT_AGAIN, f"more than --max-failures {self._limits.failures} failures")
        elif idle > self._limits.idle_failures:
            most = f"--max-failures-without-progress {self._limits.idle_failures}"
            self.stop(EXIT_AGAIN, f"{idle} failures without progress, more than {most}")

    def _marked(self, marks: list[Mark]) -> None:
        """Progress: a new iteration; where none are named, any mark of the open generation."""
        for mark in marks:
            if mark.iteration > self._iteration:
                self._iteration, self._progress = mark.iteration, True
            elif self._iteration == NO_ITERATION and mark.beats > 1 and mark.generation == self.generation:
                self._progress = True

    # ---------------------------------------------------------------------------------------------- silence

    def _lose(self, number: int, why: str) -> None:
        """An agent is lost: its ranks go to a spare."""
        lost = self.agents.pop(number)
        orphans = [member for member in self.members.values() if member.agent == number]
        where = f"agent {number}" + ("" if lost.node is None else f" (node rank {lost.node})")
        if not orphans:
            self._say(f"{where}: {why}")
            return
        taken = {member.agent for member in self.members.values()}
        free = [n for n, agent in self.agents.items() if n not in taken and agent.slots >= len(orphans)]
        if not free:
            self._say(f"{where}: {why}")
            self.stop(EXIT_AGAIN, f"{where} is lost and no spare with {len(orphans)} slots is left")
            return
        for member in orphans:
            member.agent = free[0]
        self._die(orphans, f"{where}: {why}; agent {free[0]} takes over")

    def _judge(self, now: float, marks: Mapping[int, Mark]) -> None:
        limits = self._limits
        self._patience.see(marks)
        if not self.gathering:
            stood = {member.rank: now - member.since for member in self.members.values() if member.state == "up"}
            if stood.keys() <= marks.keys():
                own = {rank: marks[rank] for rank in stood}
                for rank in hung(own, self.generation, self._patience, stood, limits.start_seconds):
                    self._kill(rank, _silence(own[rank], self.generation, limits.start_seconds))
            return
        for member in self.members.values():
            mark, waited = marks.get(member.rank), now - member.since
            if member.state == "leaving" and mark is not None and not mark.resting:
                # One that has never made a mark is still importing.
                limit = limits.hang_seconds if mark.beats else limits.start_seconds
                if min(waited, mark.age) > limit:
                    self._kill(member.rank, f"did not leave the failed generation within {limit:.0f} s")
            elif member.state == "starting" and waited > limits.start_seconds:
                self._kill(member.rank, f"was not ready within {limits.start_seconds:.0f} s")

    def _say_who_is_awaited(self, now: float, marks: Mapping[int, Mark]) -> None:
        if now - self._awaiting_since < _AWAITED_EVERY_SECONDS:
            return
        self._awaiting_since = now
        if self.gathering:
            waits = [
                # One that has never made a mark has nothing to leave yet.
                f"rank {member.rank} ({member.state if marks[member.rank].beats else 'starting'} "
                f"for {now - member.since:.0f} s)"
                for member in self.members.values()
                if member.state in ("leaving", "starting") and member.rank in marks
            ]
            if waits:
                self._say(f"generation {self.generation + 1} waits for {', '.join(waits)}")
        elif not self.members:
            there = sorted(agent.node for agent in self.agents.values() if agent.node is not None)
            missing = [str(node) for node in range(self._nodes) if node not in there]
            self._say(f"waiting for the agents of node rank {', '.join(missing)}")

    def _kill(self, rank: int, why: str) -> None:
        member = self.members[rank]
        if self._killed.get(rank) == member.incarnation:
            return  # its end is an event like any other, and on its way
        self._killed[rank] = member.incarnation
        self._order(member.agent, {"do": "kill", "rank": rank, "incarnation": member.incarnation, "why": why})

    def _tell_all(self, message: Message) -> None:
        for number in self.agents:
            self._order(number, message)


def _silence(mark: Mark, generation: int, start_seconds: float) -> str:
    """Why a rank that hangs is killed."""
    if started(mark, generation):
        return f"no progress for {mark.age:.0f} s in '{mark.point}' while others wait (--hang-timeout-seconds)"
    return f"no sign of work within {start_seconds:.0f} s of its start (--start-timeout-seconds) while others wait"
