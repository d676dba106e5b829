"""Fake clock, network and agent: events in order of time, channels that keep their order, generations of groups."""

import heapq
from collections.abc import Callable, Generator
from typing import Any, Protocol

from tests.simulation.case import Case, Failure, Violation

EVENTS_LIMIT = 400_000
STORE = -1
Steps = Generator[None, None, None]


class PeerLost(Exception):
    """The generation has failed: raised where a process waits."""


class Killed(Exception):
    """The process dies here."""


class Process:
    """One worker process: a coroutine that stops where it waits for a message."""

    def __init__(self, kernel: "Kernel", rank: int, incarnation: int) -> None:
        self.kernel, self.rank, self.incarnation = kernel, rank, incarnation
        self.alive, self.joined = True, False
        self.generation = self.posted = -1
        self.waiting: Any = None
        self.points: dict[tuple[int, str], int] = {}
        self.coroutine: Steps | None = None
        self._mail: dict[Any, Any] = {}

    def boundary(self, phase: str) -> None:
        """A message boundary: where failures strike."""
        key = (self.generation, phase)
        self.points[key] = self.points.get(key, 0) + 1
        failures = self.kernel.failures.get((self.rank, *key))
        if failures:
            for failure in failures:
                if failure.point == self.points[key]:
                    failures.remove(failure)
                    self.kernel.struck(self, failure)
                    raise Killed

    def post(self, destination: int, key: Any, value: Any) -> None:
        """Sends without waiting; in order with all else that goes the same way."""
        self.kernel.send(self.rank, destination, self.generation, key, value)

    def take(self, key: Any) -> Generator[None, None, Any]:
        """Waits for a message of this generation."""
        full = (self.generation, key)
        if full not in self._mail:
            self.waiting = full
            yield
            self.waiting = None
        return self._mail.pop(full)

    def wait(self, what: str) -> Steps:
        """Waits for an event of the process itself (`woken`)."""
        self.waiting = what
        yield
        self.waiting = None

    def woken(self, what: Any) -> None:
        """Goes on if the process waits for this."""
        if self.alive and self.waiting == what:
            self.kernel.resume(self)

    def deliver(self, generation: int, key: Any, value: Any) -> None:
        """A message arrives; those of generations gone by find their connection shut."""
        if self.alive and (generation > self.generation or (generation == self.generation and self.joined)):
            self._mail[(generation, key)] = value
            self.woken((generation, key))

    def join(self) -> Steps:
        """Posts that it is ready for the next generation, and waits until that opens."""
        self.joined = False
        self.kernel.post_ready(self)
        yield from self.wait("open")
        self._mail = {key: value for key, value in self._mail.items() if key[0] >= self.generation}


class Worker(Protocol):
    """What the kernel needs of a rank's program."""

    process: Process

    def main(self) -> Steps:
        """The program."""
        ...

    def died(self) -> None:
        """What is not in host memory is gone."""
        ...


class Kernel:
    """Runs a case until the first rank has finished; whatever goes wrong raises Violation."""

    def __init__(self, case: Case, start: Callable[["Kernel", Process, bool], Worker]) -> None:
        self.case = case
        self.now, self.events = 0.0, 0
        self.opened, self.finished = 0, False
        self.failures: dict[tuple[int, int, str], list[Failure]] = {}
        for failure in case.failures:
            self.failures.setdefault((failure.rank, failure.generation, failure.phase), []).append(failure)
        self.workers: dict[int, Worker] = {}
        self.lost: set[int] = set()
        self.trace: Callable[[str], None] | None = None
        self._start = start
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._counts: dict[tuple[int, int], int] = {}
        self._arrival: dict[tuple[int, int], float] = {}
        self._collectives: dict[Any, dict[int, Any]] = {}
        self._ready: dict[int, int] = {}
        self._failed: set[int] = set()
        self._cut: dict[tuple[int, int], float] = {}
        self.died_in: list[str] = []

    # -------------------------------------------------------------------------------------------------- clock

    def at(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        """Calls later."""
        self.events += 1
        heapq.heappush(self._heap, (self.now + delay, self.events, call, arguments))

    def run(self, probe: Callable[[], None]) -> None:
        """All events, in order of time."""
        for rank in range(self.case.world):
            self._spawn(rank, False)
        probes = [*reversed(self.case.probes)]
        done = 0
        while self._heap and not self.finished:
            self.now, _, call, arguments = heapq.heappop(self._heap)
            call(*arguments)
            done += 1
            if probes and done >= probes[-1]:
                probes.pop()
                probe()
            if done > EVENTS_LIMIT:
                raise Violation("hang", f"no end after {EVENTS_LIMIT} events")
        if not self.finished:
            waits = {rank: worker.process.waiting for rank, worker in self.workers.items()}
            raise Violation("hang", f"nothing happens any more; ranks wait for {waits}")

    def resume(self, process: Process, error: Exception | None = None) -> None:
        """Lets a process run to where it waits next."""
        assert process.coroutine is not None
        try:
            if error is None:
                process.coroutine.send(None)
            else:
                process.coroutine.throw(error)
        except StopIteration:
            self.finished = True
        except Killed:
            pass

    def note(self, text: str) -> None:
        """A line of the narration."""
        if self.trace is not None:
            self.trace(f"{self.now:9.2f}  {text}")

    # ------------------------------------------------------------------------------------------------ network

    def delay(self, source: int, destination: int) -> float:
        """How long the next message of a channel takes: the same in every run of a seed, whatever else happens."""
        number = self._counts[(source, destination)] = self._counts.get((source, destination), 0) + 1
        if source not in self.case.jitter and destination not in self.case.jitter:
            return 1.0
        draw = random_of(self.case.seed, source, destination, number)
        return 0.2 + draw % 997 / 500 if draw % 16 else (draw >> 12) % 997 / 20

    def send(self, source: int, destination: int, generation: int, key: Any, value: Any) -> None:
        """A message, in order behind the earlier ones of its channel."""
        channel = (source, destination)
        when = max(self.now + self.delay(source, destination), self._arrival.get(channel, 0.0))
        self._arrival[channel] = when
        self.at(when - self.now, self._deliver, (source, generation, self.now), destination, key, value)

    def _deliver(self, sent: tuple[int, int, float], destination: int, key: Any, value: Any) -> None:
        source, generation, when = sent
        # What a process sent just before its death may not have left its host.
        if when > self._cut.get((source, generation), self.now):
            return
        self.workers[destination].process.deliver(generation, key, value)

    def contribute(
        self, process: Process, name: Any, members: tuple[int, ...], value: Any, reduce: Callable[[list[Any]], Any]
    ) -> None:
        """One rank's part in a collective. When all are in, each member hears of it in its own time, or never."""
        key = (process.generation, name, members)
        parts = self._collectives.setdefault(key, {})
        if process.rank in parts:
            raise Violation("crash", f"rank {process.rank} is twice in {name}")
        parts[process.rank] = value
        if len(parts) == len(members):
            result = reduce([parts[rank] for rank in members])
            del self._collectives[key]
            for rank in members:
                self.send(STORE, rank, process.generation, name, result)

    # -------------------------------------------------------------------------------------------------- agent

    def struck(self, process: Process, failure: Failure) -> None:
        """A process dies; the agent hears of it later."""
        process.alive = False
        self.workers[process.rank].died()
        if failure.lost:
            self.lost.add(process.rank)
        self.note(f"rank {process.rank} dies in {failure.phase}{' with its node' if failure.lost else ''}")
        delay = self.delay(process.rank, STORE)
        self._cut[process.rank, process.generation] = self.now - (delay if delay > 1.5 else 0.0)
        self.died_in.append(failure.phase)
        self.at(delay, self._detected, process)

    def _detected(self, process: Process) -> None:
        self._ready.pop(process.rank, None)
        if self.opened not in self._failed:
            self._failed.add(self.opened)
            self.note(f"generation {self.opened} fails")
            for worker in [*self.workers.values()]:
                self.at(self.delay(STORE, worker.process.rank), self._abort, worker.process, self.opened)
        self.at(5 * self.delay(STORE, process.rank), self._spawn, process.rank, True)

    def _spawn(self, rank: int, replacement: bool) -> None:
        old = self.workers.get(rank)
        process = Process(self, rank, old.process.incarnation + 1 if old is not None else 0)
        process.generation, process.joined = self.opened, not replacement
        worker = self._start(self, process, replacement)
        self.workers[rank] = worker
        process.coroutine = worker.main()
        self.at(0.0, self.resume, process)

    def _abort(self, process: Process, generation: int) -> None:
        if not process.alive:
            return
        if process.joined and process.generation == generation and process.waiting is not None:
            process.joined, process.waiting = False, None
            self.resume(process, PeerLost())
        elif not process.joined and process.posted == generation:
            self.post_ready(process)

    def post_ready(self, process: Process) -> None:
        """Tells the store. The message or its acknowledgement may get lost; then it is sent again."""
        process.posted = self.opened + 1
        delay = self.delay(process.rank, STORE)
        lost = random_of(self.case.seed, process.rank, process.incarnation, process.posted) % 8
        if process.rank not in self.case.jitter or lost:
            self.at(delay, self._arrived, process, process.posted)
        if process.rank in self.case.jitter and lost < 2:
            self.at(delay + 30.0, self._arrived, process, process.posted)

    def _arrived(self, process: Process, generation: int) -> None:
        current = self.workers[process.rank].process is process
        if not (current and process.alive) or generation != self.opened + 1:
            return
        self._ready[process.rank] = process.incarnation
        if len(self._ready) == self.case.world:
            self.opened = generation
            self._ready.clear()
            self.note(f"generation {generation} opens")
            for worker in [*self.workers.values()]:
                self.at(self.delay(STORE, worker.process.rank), self._open, worker.process, generation)

    def _open(self, process: Process, generation: int) -> None:
        if process.alive and process.posted == generation and process.waiting == "open":
            process.generation, process.joined = generation, True
            self.resume(process)


def random_of(*values: int) -> int:
    """A number that depends on the values alone."""
    mixed = hash(values) & 0xFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 23) * 0x2127599BF4325C37 & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ mixed >> 29) & 0xFFFFFFFFFFFF
