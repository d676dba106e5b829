"""What a recovery does, from what every rank has to offer: one pure function, so that all ranks decide alike."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from megatron.moevement.errors import AgreementError
from megatron.moevement.recovery.plan import common_run
from megatron.moevement.recovery.scope import Grid, closure, feeders, segments
from megatron.moevement.types import IterationRecord, Run, SlotInfo


class Position(StrEnum):
    """How far a rank has come in the iteration that the failure ended."""

    RUNNING = "running"
    FINAL = "final"
    UPDATED = "updated"


@dataclass(frozen=True, slots=True)
class Offer:
    """What one rank has after a failure.

    Attributes:
        rank: its rank.
        step: its clean Step, None if its state is of no Step: a replacement, or a recovery that was interrupted. After
            an update that is the Step behind the iteration, whatever the position says.
        position: of the aborted iteration; RUNNING between iterations. FINAL: gradients are final, and the transcript
            of the iteration is complete.
        run_id: of its slots, empty without any.
        slots: its verified slots by step.
        operators: names of its operators.
        transcript: iterations of which its transcript is complete.
        records: decisions of recent iterations. A rank that is UPDATED has that of the iteration it has updated for.
        dense_step: the newest dense checkpoint that it sees.
        problems: for people, why something is missing.
    """

    rank: int
    step: int | None
    position: Position
    run_id: str
    slots: Mapping[int, SlotInfo]
    operators: frozenset[str]
    transcript: frozenset[int]
    records: Mapping[int, IterationRecord]
    dense_step: int | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """One group of stages that replays: what its ranks load, and who outside serves transcripts to it."""

    stages: tuple[int, ...]
    ranks: frozenset[int]
    run: Run
    feeders: frozenset[int]


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do.

    Attributes:
        source: "local" (`segments` replay, the others wait), "global" (all load `run`), "dense", "scratch", or "none"
            (nobody has lost anything: go on).
        target: Step at which training goes on.
        roll_forward: ranks that finish the update of iteration `target - 1` from the record of it.
        segments: what replays; only with source local.
        run: what all load; only with source global.
        record_source: for iterations that are replayed or rolled forward, a rank that has the record.
        reasons: for people, why not something better.
        loadable_everywhere: newest Step at which all ranks can end a window now, -1 if none. Every rank's retention
            goes on from it: a segment's own run may be newer than what the others can load.
    """

    source: str
    target: int
    roll_forward: frozenset[int]
    segments: tuple[SegmentPlan, ...]
    run: Run | None
    record_source: Mapping[int, int]
    reasons: tuple[str, ...]
    loadable_everywhere: int


def decide(grid: Grid, offers: Sequence[Offer]) -> Decision:
    """The recovery that rolls back least of what is possible. Equal offers give equal decisions.

    Raises:
        AgreementError: an offer is missing or there are two of a rank.
    """
    ordered = _in_order(grid, offers)
    reasons = [f"rank {offer.rank}: {text}" for offer in ordered for text in offer.problems]
    standing = _standing(grid, ordered, reasons)
    if standing is None:
        return _all_together(ordered, reasons)
    needed = {standing.target - 1} if standing.roll_forward else set()
    plans = []
    for stages in segments(grid, standing.failed):
        plan = _plan(grid, ordered, standing, stages)
        if isinstance(plan, str):
            return _all_together(ordered, [*reasons, plan])
        plans.append(plan)
        needed.update(range(plan.run.first, standing.target))
    everywhere, _ = _common_run([_up_to(offer, standing.target) for offer in ordered])
    return Decision(
        "local" if plans else "none",
        standing.target,
        standing.roll_forward,
        tuple(plans),
        None,
        {iteration: _holder(ordered, standing.healthy, iteration) for iteration in sorted(needed)},
        tuple(reasons),
        everywhere.last if everywhere is not None else -1,
    )


def _in_order(grid: Grid, offers: Sequence[Offer]) -> tuple[Offer, ...]:
    ordered = tuple(sorted(offers, key=lambda offer: offer.rank))
    ranks = [offer.rank for offer in ordered]
    if ranks != [*range(len(grid.stages))]:
        raise AgreementError(f"offers of ranks {ranks} for a world of {len(grid.stages)}")
    return ordered


@dataclass(frozen=True, slots=True)
class _Standing:
    """The stages that have to roll back, the ranks that keep their state, and the Step at which they all meet."""

    failed: frozenset[int]
    healthy: frozenset[int]
    target: int
    roll_forward: frozenset[int]


def _standing(grid: Grid, offers: Sequence[Offer], reasons: list[str]) -> _Standing | None:
    """Grows the failed stages until every rank outside is at the target or can be brought there; None: no rank is."""
    failed = closure(grid, grid.stages_of(offer.rank for offer in offers if offer.step is None))
    while True:
        steps = {o.rank: o.step for o in offers if grid.stages[o.rank] not in failed and o.step is not None}
        if not steps:
            return None
        target = max(steps.values())
        behind = {rank for rank, step in steps.items() if step < target}
        forward = {r for r in behind if steps[r] == target - 1 and offers[r].position is Position.FINAL}
        if forward and _holder(offers, (), target - 1) < 0:
            reasons.append(f"nobody has the record of iteration {target - 1}, ranks {sorted(forward)} roll back")
            forward = set()
        left = behind - forward
        if not left:
            return _Standing(failed, frozenset(steps), target, frozenset(forward))
        # The furthest behind first: with their stages may go those who are ahead, and with them the reason to join.
        lowest = min(steps[rank] for rank in left)
        last = sorted(rank for rank in left if steps[rank] == lowest)
        reasons.append(f"ranks {last} stand at step {lowest}, others at {target}: they roll back")
        failed = closure(grid, failed | grid.stages_of(last))


def _plan(grid: Grid, offers: Sequence[Offer], standing: _Standing, stages: tuple[int, ...]) -> SegmentPlan | str:
    """The plan of one segment, or why it can't replay on its own."""
    name = f"stage {stages[0]}" if len(stages) == 1 else f"stages {', '.join(map(str, stages))}"
    ranks = grid.ranks_of(stages)
    job = {offers[rank].run_id for rank in standing.healthy} - {""}
    foreign = sorted(rank for rank in ranks if {offers[rank].run_id} != job)
    if foreign:
        # A spare node may still hold the slots of an earlier job, which are a window, but of another history.
        return f"{name}: ranks {foreign} have no slots of the run that the others are in"
    run, _ = _common_run([_up_to(offers[rank], standing.target) for rank in sorted(ranks)])
    if run is None:
        return f"{name}: no window is complete on all its ranks"
    replays = range(run.first, standing.target)
    serving = feeders(grid, stages)
    for rank in sorted(serving):
        lost = [iteration for iteration in replays if iteration not in offers[rank].transcript]
        if lost:
            return f"{name}: rank {rank} has no complete transcript of iteration {lost[0]}"
    unknown = [iteration for iteration in replays if _holder(offers, (), iteration) < 0]
    if unknown:
        return f"{name}: nobody has the record of iteration {unknown[0]}"
    return SegmentPlan(stages, ranks, run, serving)


def _holder(offers: Sequence[Offer], preferred: Collection[int], iteration: int) -> int:
    """The lowest rank that has the iteration's record, one of the preferred if there is one; -1 if none has it."""
    holders = [o.rank for o in offers if iteration in o.records and o.records[iteration].iteration == iteration]
    return min(holders, key=lambda rank: (rank not in preferred, rank), default=-1)


def _up_to(offer: Offer, step: int) -> Offer:
    """The offer without later slots: a rank that was ahead of the target has some, of Steps that come again."""
    return replace(offer, slots={at: info for at, info in offer.slots.items() if at <= step})


def _common_run(offers: Sequence[Offer]) -> tuple[Run | None, tuple[str, ...]]:
    present = [offer.rank for offer in offers if offer.run_id]
    if len({offer.run_id for offer in offers}) > 1:
        return None, (
            (f"only ranks {present} have slots of one run",)
            if len(present) < len(offers)
            else ("slots of different runs",)
        )
    run = common_run([(offer.slots, offer.operators) for offer in offers]) if present else None
    return run, () if run is not None or not present else ("no window is complete on all ranks",)


def _all_together(offers: Sequence[Offer], why: Sequence[str]) -> Decision:
    """Everybody rolls back: to slots, else to the newest dense checkpoint that all see, else to the beginning."""
    run, why_not = _common_run(offers)
    reasons = (*why, *why_not)
    seen = [offer.dense_step for offer in offers]
    steps = [step for step in seen if step is not None]
    dense = min(steps) if len(steps) == len(seen) else None
    if run is not None and (dense is None or dense <= run.last):
        return Decision("global", run.last, frozenset(), (), run, {}, reasons, run.last)
    if dense is not None:
        return Decision("dense", dense, frozenset(), (), None, {}, reasons, -1)
    return Decision("scratch", 0, frozenset(), (), None, {}, reasons, -1)
