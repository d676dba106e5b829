"""The recovery protocol under failures at every message boundary, and proof that the simulator finds broken ones."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron.moevement.recovery.decide import Decision, Offer, decide
from megatron.moevement.recovery.phases import Phase
from megatron.moevement.recovery.plan import iterations_to_keep, slots_to_keep
from megatron.moevement.recovery.scope import Grid
from tests.simulation.case import Case, Failure, Undisturbed, generate
from tests.simulation.memory import Rules
from tests.simulation.run import run_case, shrink

SOME, MANY, FIND = 400, 20_000, 4000
PLAIN = Case(
    seed=1,
    stages=3,
    width=2,
    tied=False,
    wraps=False,
    mode="rolling",
    window=3,
    reorder=False,
    iterations=14,
    micro_batches=2,
    dense_every=0,
    jitter=tuple(range(6)),
    failures=(),
)


def failing(first: int, count: int, rules: Rules | None = None, kinds: Sequence[str] = ()) -> Case | None:
    """The first case of the seeds that breaks a promise (of the given kinds), or None."""
    for seed in range(first, first + count):
        case = generate(seed)
        outcome = run_case(case, rules)
        if outcome.kind and (not kinds or outcome.kind in kinds):
            return case
    return None


def report(case: Case | None) -> str:
    """What a developer needs to see it again."""
    if case is None:
        return ""
    outcome = run_case(case)
    return f"seed {case.seed}: {outcome.text}\nsmallest: {shrink(case, outcome.kind).to_json()}"


def test_no_promise_is_broken() -> None:
    assert not report(failing(0, SOME))


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_no_promise_is_broken_in_many_jobs(part: int) -> None:
    assert not report(failing(SOME + part * MANY // 10, MANY // 10))


# ------------------------------------------------------------------------------------------- broken protocols


def one_iteration_less(iterations: frozenset[int], loadable_everywhere: int, longest_run: int) -> frozenset[int]:
    return iterations_to_keep(iterations, loadable_everywhere, longest_run - (loadable_everywhere >= 0))


def one_slot_less(steps: frozenset[int], loadable_everywhere: int, longest_run: int) -> frozenset[int]:
    return slots_to_keep(steps, loadable_everywhere, longest_run - (loadable_everywhere >= 0))


def newest_of_the_slowest(minimum: tuple[int, int], longest_run: int) -> int:
    return minimum[0] if minimum[0] >= longest_run - 1 else -1


def nobody_rolls_forward(grid: Grid, offers: Sequence[Offer]) -> Decision:
    return replace(decide(grid, offers), roll_forward=frozenset())


def only_the_failed_rank(grid: Grid, offers: Sequence[Offer]) -> Decision:
    decision, dead = decide(grid, offers), {offer.rank for offer in offers if offer.step is None}
    plans = tuple(replace(plan, ranks=plan.ranks & dead or plan.ranks) for plan in decision.segments)
    return replace(decision, segments=plans)


def beyond_the_target(grid: Grid, offers: Sequence[Offer]) -> Decision:
    decision = decide(grid, offers)
    return replace(decision, target=decision.target + 1) if decision.source == "local" else decision


def before_the_target(grid: Grid, offers: Sequence[Offer]) -> Decision:
    decision = decide(grid, offers)
    return replace(decision, target=decision.target - 1) if decision.source == "local" else decision


def without_tied_stages(grid: Grid, offers: Sequence[Offer]) -> Decision:
    return decide(replace(grid, sharing=()), offers)


BROKEN = {
    "transcripts are truncated one iteration too early": (Rules(iterations_to_keep=one_iteration_less), {"retention"}),
    "slots are freed one step too early": (Rules(slots_to_keep=one_slot_less), {"retention"}),
    "a slot is used before it is committed": (Rules(offers_uncommitted=True), {"uncommitted"}),
    "nobody rolls forward": (Rules(decide=nobody_rolls_forward), {"mixed"}),
    "only the failed rank of a stage rolls back": (Rules(decide=only_the_failed_rank), {"hang"}),
    "the target is one too late": (Rules(decide=beyond_the_target), {"crash", "mixed", "hang"}),
    "the target is one too early": (Rules(decide=before_the_target), {"mixed", "crash", "inexact", "hang"}),
    "tied stages roll back apart": (Rules(decide=without_tied_stages), {"hang"}),
    "a failed copy is forgotten": (Rules(known_everywhere=newest_of_the_slowest), {"retention"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_protocol_is_found(name: str) -> None:
    rules, kinds = BROKEN[name]
    assert failing(0, FIND, rules, tuple(kinds)) is not None


# --------------------------------------------------------------------------------------- the simulator itself


def test_a_failing_case_gets_smaller_and_can_be_replayed() -> None:
    rules = Rules(decide=nobody_rolls_forward)
    case = failing(0, FIND, rules)
    assert case is not None
    kind = run_case(case, rules).kind
    small = shrink(case, kind, rules)
    assert len(small.failures) <= len(case.failures)
    assert small.iterations <= case.iterations
    assert Case.from_json(small.to_json()) == small
    assert run_case(Case.from_json(small.to_json()), rules).kind == kind
    assert run_case(small).kind == ""


def test_equal_cases_run_equally() -> None:
    for seed in range(20):
        assert run_case(generate(seed)) == run_case(generate(seed))


def test_without_a_failure_nothing_recovers() -> None:
    outcome = run_case(PLAIN)
    assert (outcome.kind, outcome.sources, outcome.died_in) == ("", (), ())


def test_one_failure_in_training_is_recovered_locally_within_the_bound() -> None:
    died, longest = 0, 0
    for point in range(150, 320, 2):
        outcome = run_case(replace(PLAIN, failures=(Failure(2, 0, "train", point),)))
        assert outcome.kind == "", outcome.text
        assert set(outcome.sources) <= {"local"}
        died, longest = died + len(outcome.died_in), max(longest, outcome.longest_replay)
    assert died > 50
    assert PLAIN.window - 1 <= longest <= PLAIN.replay_bound


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.TRAIN])
def test_a_second_failure_strikes_in_every_phase(phase: Phase) -> None:
    """In each phase of a recovery some rank dies at its first boundary; whoever may be in that phase."""
    generation = 0 if phase in (Phase.LEAVE, Phase.JOIN) else 1
    struck = 0
    for seed, point, rank in itertools.product(range(30), range(200, 260), (0, 2, 5)):
        failures = (Failure(2, 0, "train", point), Failure(rank, generation, phase, 1))
        outcome = run_case(replace(PLAIN, seed=seed, failures=failures))
        assert outcome.kind == "", outcome.text
        struck += phase in outcome.died_in
        if struck == 5:
            return
    pytest.fail(f"nobody was in {phase} when the failure was due")


def test_a_lost_node_takes_all_back_to_a_dense_checkpoint() -> None:
    case = replace(PLAIN, dense_every=3, failures=(Failure(2, 0, "train", 240, lost=True),))
    assert run_case(case).sources == ("dense",)


def test_the_undisturbed_run_depends_on_everything() -> None:
    states = {str(Undisturbed(case).full[-1]) for case in (PLAIN, replace(PLAIN, micro_batches=1))}
    assert len(states) == 2
    full = Undisturbed(PLAIN).full
    for before, after in itertools.pairwise(full):
        assert all(before[rank][name] != after[rank][name] for rank in range(6) for name in after[rank])
