"""Who is killed when in the demo: a random plan, carried out as the events of the run come in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.moevement.report.read_events import Event
from megatron.moevement.report.recoveries import Kill

_REPLAYING = ("convert", "catch_up")


@dataclass(frozen=True)
class PlannedKill:
    """A kill of `rank` once some rank has finished `finished` iterations.

    Where that is None, it is a kill in the next recovery, once `replayed` iterations are replayed in it. `delay` is the
    part of an iteration (or of a replay) to wait then, so that kills hit any moment of it.
    """

    rank: int
    finished: int | None
    delay: float
    replayed: int = 0


def plan_kills(kills: int, iters: int, seed: int, ranks: int, window: int) -> list[PlannedKill]:
    """Kills all over the run, one of them of rank 0, and one more in the recovery from another.

    The first window must be complete: before it nothing but a new start is possible.
    """
    chance = random.Random(seed)
    nested = int(kills > 1)
    regular = kills - nested
    first, last = min(window + 2, iters - 1), max(iters - 2, 1)
    share = (last - first + 1) / max(regular, 1)
    zero, interrupted = (chance.randrange(regular) for _ in range(2)) if regular else (0, 0)
    plan: list[PlannedKill] = []
    for index in range(regular):
        # Not in the last third of its share, so that the next recovery finds a process that stands by.
        moment = int(first + share * (index + 0.67 * chance.random()))
        rank = 0 if index == zero else chance.randrange(1, ranks)
        plan.append(PlannedKill(rank, moment, chance.random()))
        if index == interrupted and nested:
            other = chance.choice([r for r in range(1, ranks) if r != rank])
            plan.append(PlannedKill(other, None, chance.random(), chance.randint(0, 2)))
    return plan


class Killer:
    """Carries out planned kills.

    Args:
        plan: in order; the next one waits until training goes on after the one before, or for its recovery.
        kill: ends a process, given its id, and returns whether it was there.
    """

    def __init__(self, plan: Sequence[PlannedKill], kill: Callable[[int], bool]) -> None:
        self.done: list[Kill] = []
        self._plan = list(plan)
        self._kill = kill
        self._due: float | None = None
        self._pids: dict[int, int] = {}
        self._last_kill = 0.0

    def take(self, event: Event) -> None:
        """Looks at one event of any rank; may decide when the next kill is due."""
        if event["kind"] == "process":
            self._pids[event["rank"]] = event["pid"]
        if not self._plan or self._due is not None or event["time"] < self._last_kill:
            return
        kind, planned = event["kind"], self._plan[0]
        if planned.finished is not None:
            trained = kind == "iteration" and not event["replayed"]
            if trained and event["iteration"] + 1 >= planned.finished:
                self._due = event["time"] + planned.delay * event["seconds"]
        elif kind == "recovery_phase" and event["phase"] in _REPLAYING:
            if not planned.replayed:
                self._due = event["time"] + planned.delay * event.get("seconds", 0.5)
            elif event["done"] >= planned.replayed:
                self._due = event["time"] + planned.delay * event["seconds"] / event["done"]

    def act(self) -> Kill | None:
        """Kills if it is time."""
        if self._due is None or time.time() < self._due:
            return None
        planned = self._plan[0]
        # The time before, so that no event of the dead process is later than its death.
        now = time.time()
        if planned.rank not in self._pids or not self._kill(self._pids[planned.rank]):
            return None
        self._last_kill, self._due = now, None
        del self._plan[0]
        self.done.append(Kill(planned.rank, now, planned.finished is None))
        return self.done[-1]
