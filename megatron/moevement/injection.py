"""Faults on purpose (`--sparse-ckpt-inject`): what a plan says, when a fault is due, and what it does to the process.

Code that a fault can hit calls `reached(point)`; without a plan that is one comparison. A plan is faults and at most
one `random`, joined by `;`:

    kill@rank=3,point=forward:2,iteration=7; stop@rank=0+1,point=convert,occurrence=2; random@seed=1,mtbf=30s
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron.moevement.errors import ConfigError

if TYPE_CHECKING:
    import torch

FLAG = "--sparse-ckpt-inject"
KINDS = ("kill", "stop", "exception", "oom", "hang")
# On other threads than the main one only a signal does to the process what the plan says.
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
# The points of a run in their order, then those of a recovery.
POINTS = (
    *"start begin capture forward backward before_optimizer decided optimizer updated after_optimizer".split(),
    *"commit dense_save".split(),
    *"join agree convert catch_up serve wait roll_forward meet".split(),
)
_MICRO_BATCHED = ("forward", "backward")
_OFF_MAIN_THREAD = ("commit",)
_IMPOSSIBLE_BYTES = 1 << 60
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


class InjectedError(Exception):
    """The exception of a fault of kind `exception`; nothing expects it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a plan.

    Attributes:
        kind: of `KINDS`.
        ranks: that it hits, each of them on its own.
        point: of `POINTS`.
        micro_batch: at `forward` and `backward` only; None is any.
        iteration: None is any.
        occurrence: how many times a process must have been there, filters considered.
        times: how often it happens to a rank in the whole job.
    """

    kind: str
    ranks: frozenset[int]
    point: str
    micro_batch: int | None = None
    iteration: int | None = None
    occurrence: int = 1
    times: int = 1

    def is_at(self, point: str, iteration: int | None, micro_batch: int | None) -> bool:
        """Whether this is the place of the fault."""
        return (
            self.point == point
            and self.iteration in (None, iteration)
            and (self.micro_batch is None or self.micro_batch == micro_batch)
        )


@dataclass(frozen=True, slots=True)
class RandomFaults:
    """Faults at random moments: `mtbf_seconds` is the mean time between two of them in the whole job.

    Every process draws its own moment; `until` is the iteration from which on nothing happens any more.
    """

    seed: int
    mtbf_seconds: float
    kinds: tuple[str, ...] = ("kill",)
    until: int | None = None

    def draw(self, rank: int, generation: int, world_size: int) -> tuple[float, str]:
        """After how many seconds what happens to the process of `rank` that started in `generation`."""
        dice = random.Random(f"{self.seed}/{rank}/{generation}")
        return dice.expovariate(1.0 / (self.mtbf_seconds * world_size)), dice.choice(self.kinds)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a value of the flag says."""

    faults: tuple[Fault, ...] = ()
    random: RandomFaults | None = None

    def check(self, world_size: int) -> None:
        """Raises ConfigError if a fault is for a rank that the job doesn't have."""
        for fault in self.faults:
            if max(fault.ranks) >= world_size:
                raise ConfigError(f"{FLAG}: rank={max(fault.ranks)}: the job has ranks 0 to {world_size - 1}")


def parse(text: str) -> Plan:
    """Parses a value of the flag, for argparse.

    Raises:
        ArgumentTypeError: names the part that is wrong and what is right.
    """
    faults, drawn = [], list[RandomFaults]()
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        kind, at, rest = part.partition("@")
        given = _fields(part, rest) if at else _refuse(part, "give KIND@key=value,...")
        if kind == "random":
            drawn.append(_random_faults(part, given))
        elif kind in KINDS:
            faults.append(_fault(part, kind, given))
        else:
            _refuse(part, f"{kind!r} is none of {', '.join((*KINDS, 'random'))}")
    if len(drawn) > 1:
        _refuse(text, "random@ can be given once")
    if not faults and not drawn:
        _refuse(text, "the plan has no fault")
    return Plan(tuple(faults), drawn[0] if drawn else None)


def _refuse(part: str, why: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{part!r}: {why}")


def _fields(part: str, text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in text.split(","):
        key, equals, value = (piece.strip() for piece in word.partition("="))
        if not equals or not value:
            _refuse(part, f"{word.strip()!r} is not key=value")
        if key in given:
            _refuse(part, f"{key} is given twice")
        given[key] = value
    return given


def _only(part: str, given: Mapping[str, str], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            _refuse(part, f"{key!r} is none of {', '.join(known)}")


def _number(part: str, key: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        _refuse(part, f"{key}={text}: give a whole number from {least} on")
    return int(text)


def _fault(part: str, kind: str, given: Mapping[str, str]) -> Fault:
    _only(part, given, ("rank", "point", "iteration", "occurrence", "times"))
    for key in ("rank", "point"):
        if key not in given:
            _refuse(part, f"{key}= is missing")
    point, colon, micro_batch = given["point"].partition(":")
    if point not in POINTS:
        _refuse(part, f"point {point!r} is none of {', '.join(POINTS)}")
    if colon and point not in _MICRO_BATCHED:
        _refuse(part, f"only {' and '.join(_MICRO_BATCHED)} have micro-batches")
    if point in _OFF_MAIN_THREAD and kind not in _SIGNALS:
        _refuse(part, f"{point} is on a thread of its own: use {' or '.join(_SIGNALS)}")
    return Fault(
        kind,
        frozenset(_number(part, "rank", rank, 0) for rank in given["rank"].split("+")),
        point,
        _number(part, "point", micro_batch, 0) if colon else None,
        _number(part, "iteration", given["iteration"], 0) if "iteration" in given else None,
        _number(part, "occurrence", given.get("occurrence", "1"), 1),
        _number(part, "times", given.get("times", "1"), 1),
    )


def _random_faults(part: str, given: Mapping[str, str]) -> RandomFaults:
    _only(part, given, ("seed", "mtbf", "kinds", "until"))
    for key in ("seed", "mtbf"):
        if key not in given:
            _refuse(part, f"{key}= is missing")
    duration = _DURATION.fullmatch(given["mtbf"])
    if duration is None or float(duration[1]) == 0:
        _refuse(part, f"mtbf={given['mtbf']}: give a time such as 30s, 5m or 2h")
    kinds = tuple(given.get("kinds", "kill").split("+"))
    for kind in kinds:
        if kind not in KINDS:
            _refuse(part, f"kind {kind!r} is none of {', '.join(KINDS)}")
    until = _number(part, "until", given["until"], 0) if "until" in given else None
    seconds = float(duration[1]) * _SECONDS[duration[2]]
    return RandomFaults(_number(part, "seed", given["seed"], 0), seconds, kinds, until)


@dataclass
class Marks:
    """Which faults have happened, in files that outlive the process: one a fault, rank and time, made once.

    Args:
        directory: of the job's shared memory.
        rank: whose marks.
    """

    directory: Path
    rank: int

    def take(self, number: int, times: int) -> bool:
        """Whether fault `number` may happen to this rank once more; notes that it does."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for time_ in range(times):
            with contextlib.suppress(FileExistsError):
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
                os.close(os.open(self.directory / f"{self._prefix}{number}.{time_}", flags, 0o644))
                return True
        return False

    def clear(self) -> None:
        """Forgets all of this rank's."""
        for path in self.directory.glob(f"{self._prefix}*"):
            path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Forgets them at the end; the last one to leave an empty directory removes it."""
        self.clear()
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    @property
    def _prefix(self) -> str:
        return f"rank{self.rank:05d}.injected."


@dataclass
class Injector:
    """Decides at every point whether a fault is due on this rank.

    Args:
        plan: what to do.
        rank: of this process.
        marks: of what has been done.
        strike: does it: called with the kind and a text for people.
    """

    plan: Plan
    rank: int
    marks: Marks
    strike: Callable[[str, str], None]
    iteration: int = -1
    _parts: Counter[tuple[str, Any]] = field(default_factory=Counter)
    _met: Counter[int] = field(default_factory=Counter)
    _pending: str = ""

    def begin(self, iteration: int) -> None:
        """The passes of an iteration start: micro-batches count from 0."""
        self.iteration = iteration
        self._parts.clear()

    def reached(self, point: str, iteration: int | None, part: Any) -> None:
        """Strikes if a fault is due here."""
        micro_batch = None
        if point in _MICRO_BATCHED:
            micro_batch = self._parts[point, part]
            self._parts[point, part] += 1
        if iteration is None and self.iteration >= 0:
            iteration = self.iteration
        if self._pending and point not in _OFF_MAIN_THREAD:
            kind, self._pending = self._pending, ""
            self.strike(kind, f"{kind} at random, at {point}")
        for number, fault in enumerate(self.plan.faults):
            if self.rank not in fault.ranks or not fault.is_at(point, iteration, micro_batch):
                continue
            self._met[number] += 1
            if self._met[number] >= fault.occurrence and self.marks.take(number, fault.times):
                where = "" if iteration is None else f" of iteration {iteration}"
                which = "" if micro_batch is None else f" of micro-batch {micro_batch}"
                self.strike(fault.kind, f"{fault.kind} at {point}{which}{where}")

    def strike_at_random(self, kind: str) -> None:
        """From another thread: signals at once, anything else when the main thread reaches a point."""
        faults = self.plan.random
        if faults is None or (faults.until is not None and self.iteration >= faults.until):
            return
        if kind in _SIGNALS:
            self.strike(kind, f"{kind} at random")
        else:
            self._pending = kind


_armed: Injector | None = None


def arm(plan: Plan, directory: Path, place: tuple[int, int, int], tell: Callable[[str], None]) -> None:
    """Has faults happen in this process from now on.

    Args:
        plan: what to do.
        directory: where it is noted what has been done; the shared memory of the job.
        place: rank, world size and generation that this process started in.
        tell: is told of each fault before it strikes, on any thread.
    """
    global _armed
    rank, world_size, generation = place
    marks = Marks(directory, rank)
    if generation == 0:
        marks.clear()

    def strike(kind: str, text: str) -> None:
        tell(text)
        print(f"rank {rank}: injected {text}", file=sys.stderr, flush=True)
        do(kind)

    _armed = Injector(plan, rank, marks, strike)
    if plan.random is not None:
        seconds, kind = plan.random.draw(rank, generation, world_size)
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), _armed.strike_at_random, [kind])
        timer.daemon = True
        timer.start()


def disarm(forget: bool = False) -> None:
    """Nothing happens any more.

    Args:
        forget: the job has ended well on this rank; its notes of what has happened are removed.
    """
    global _armed
    if _armed is not None and forget:
        _armed.marks.leave()
    _armed = None


def begin(iteration: int) -> None:
    """The passes of an iteration start."""
    if _armed is not None:
        _armed.begin(iteration)


def reached(point: str, iteration: int | None = None, part: Any = None) -> None:
    """A fault may happen here.

    Args:
        point: of `POINTS`.
        iteration: that the point belongs to; None is the one that this process began last.
        part: model chunk, for passes: micro-batches are counted for each.
    """
    if _armed is not None:
        _armed.reached(point, iteration, part)


def reached_in_backward(output: torch.Tensor, part: Any) -> None:
    """A fault may happen when the backward pass of this output begins."""
    if _armed is not None and output.requires_grad:
        output.register_hook(lambda _gradient: reached("backward", None, part))  # type: ignore[no-untyped-call]


def do(kind: str) -> None:
    """Does it to this process."""
    if kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[kind])
    elif kind == "exception":
        raise InjectedError("injected")
    elif kind == "oom":
        _run_out_of_memory()
    else:
        while True:
            time.sleep(3600)


def _run_out_of_memory() -> NoReturn:
    """A real allocation that no allocator can make, and that takes nothing from other processes."""
    import torch

    device = torch.get_default_device().type if not torch.cuda.is_available() else "cuda"
    try:
        torch.empty(_IMPOSSIBLE_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise torch.OutOfMemoryError(f"injected: {str(error).splitlines()[0]}") from error
    raise AssertionError("an impossible allocation was made")
