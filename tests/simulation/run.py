"""Runs cases, and makes a failing one as small as it gets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron.moevement.errors import MoevementError
from tests.simulation.case import Case, Violation
from tests.simulation.kernel import Kernel
from tests.simulation.memory import Rules
from tests.simulation.shared import Shared
from tests.simulation.worker import RankProgram

SHRINKING_RUNS = 400


@dataclass(frozen=True)
class Outcome:
    """How a case went. `kind` and `text` say which promise was broken; empty if none."""

    kind: str
    text: str
    events: int
    sources: tuple[str, ...]
    longest_replay: int
    most_iterations: int
    probed: int
    rolled_forward: int
    died_in: tuple[str, ...]


def run_case(case: Case, rules: Rules | None = None, trace: Callable[[str], None] | None = None) -> Outcome:
    """One simulated job, from the start to the end or to the first broken promise."""
    shared = Shared(case, rules or Rules())
    kernel = Kernel(case, lambda k, process, replacement: RankProgram(k, process, shared, replacement))
    kernel.trace = trace
    kind = text = ""
    try:
        kernel.run(lambda: shared.probe(kernel.workers))
    except Violation as error:
        kind, text = error.kind, str(error)
    except (MoevementError, AssertionError, KeyError, ValueError, IndexError) as error:
        kind, text = "crash", f"crash: {type(error).__name__}: {error}"
    return Outcome(
        kind,
        text,
        kernel.events,
        tuple(shared.sources),
        shared.longest_replay,
        shared.most_iterations,
        shared.probed,
        shared.rolled_forward,
        tuple(kernel.died_in),
    )


def shrink(case: Case, kind: str, rules: Rules | None = None) -> Case:
    """A smaller case that breaks the same promise: fewer failures, delays, ranks, iterations."""
    budget = SHRINKING_RUNS
    smaller = True
    while smaller and budget > 0:
        smaller = False
        for candidate in _simpler(case):
            budget -= 1
            if run_case(candidate, rules).kind == kind:
                case, smaller = candidate, True
                break
            if budget <= 0:
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    for name in ("failures", "failed_slots", "damaged", "probes", "jitter"):
        values = getattr(case, name)
        if values:
            yield _with(case, name, ())
        for index in range(len(values) if len(values) > 1 else 0):
            yield _with(case, name, values[:index] + values[index + 1 :])
    if case.width > 1:
        yield _fit(replace(case, width=case.width - 1))
    if case.stages > 1 + case.wraps:
        yield _fit(replace(case, stages=case.stages - 1))
    for name, value in (
        ("reorder", False),
        ("tied", False),
        ("wraps", False),
        ("dense_every", 0),
        ("micro_batches", 1),
    ):
        simpler = _with(case, name, value)
        if simpler != case:
            yield simpler
    if case.window > 1:
        yield replace(case, window=case.window - 1)
    for less in (case.iterations // 2, case.iterations - 1):
        if 0 < less < case.iterations:
            yield replace(case, iterations=less)
    for index, failure in enumerate(case.failures):
        for point in (failure.point // 2, failure.point - 1):
            if 0 < point < failure.point:
                changed = (*case.failures[:index], replace(failure, point=point), *case.failures[index + 1 :])
                yield replace(case, failures=changed)


def _with(case: Case, name: str, value: Any) -> Case:
    return replace(case, **{name: value})


def _fit(case: Case) -> Case:
    return replace(
        case,
        failures=tuple(failure for failure in case.failures if failure.rank < case.world),
        jitter=tuple(rank for rank in case.jitter if rank < case.world),
        failed_slots=tuple((rank, step) for rank, step in case.failed_slots if rank < case.world),
        damaged=tuple((rank, step) for rank, step in case.damaged if rank < case.world),
        tied=case.tied and case.stages > 1,
        wraps=case.wraps and case.stages > 1,
    )
