"""Every rule of the decision, each on the smallest world that shows it; then invariants over any offers."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moevement.errors import AgreementError
from megatron.moevement.recovery.decide import Decision, Offer, Position, decide
from megatron.moevement.recovery.plan import is_window
from megatron.moevement.recovery.scope import Grid
from megatron.moevement.types import IterationRecord, Run, SlotInfo
from tests.support.grids import line

OPERATORS = frozenset("ab")


def rolling(steps: Iterable[int]) -> dict[int, SlotInfo]:
    """Slots of a rolling window of two: even steps hold `a` in full, odd ones `b`."""
    return {s: SlotInfo(s, s + 1, frozenset("ab"[s % 2]), frozenset("ba"[s % 2]), 0) for s in steps}


def record(iteration: int) -> IterationRecord:
    """The decisions of an iteration."""
    return IterationRecord(iteration, 1.0, 1.0, False, (), (), 1.0, 0)


def offer(rank: int, step: int | None = 9, position: Position = Position.RUNNING, slots: Iterable[int] = ()) -> Offer:
    """A rank in iteration 9 with slots 6 to 8, transcripts and records of the iterations since 5."""
    done = range(5, step if step is not None else 9)
    return Offer(
        rank,
        step,
        position,
        "job",
        rolling(slots or range(6, 9)),
        OPERATORS,
        frozenset(done),
        {iteration: record(iteration) for iteration in done},
        None,
    )


def lost(rank: int) -> Offer:
    """A replacement on another node."""
    return Offer(rank, None, Position.RUNNING, "", {}, OPERATORS, frozenset(), {}, None, ("no slots",))


def world(grid: Grid, *special: Offer) -> Decision:
    """The decision when all ranks but the special ones are in iteration 9."""
    offers = {rank: offer(rank) for rank in range(len(grid.stages))} | {o.rank: o for o in special}
    return decide(grid, list(offers.values()))


def test_one_failed_rank_rolls_back_its_stage() -> None:
    decision = world(line(3, 2), offer(2, None))
    assert (decision.source, decision.target, decision.roll_forward) == ("local", 9, frozenset())
    (plan,) = decision.segments
    assert (plan.stages, plan.ranks, plan.run) == ((1,), {2, 3}, Run(7, 8))
    assert plan.feeders == {0, 1, 4, 5}
    # Ranks 0 and 1 are the lowest that have the records and keep their state.
    assert decision.record_source == {7: 0, 8: 0}
    assert decision.loadable_everywhere == 8


def test_a_slot_of_the_target_itself_needs_no_replay_behind_it() -> None:
    decision = world(line(2), offer(0, None, slots=range(7, 10)))
    assert decision.segments[0].run == Run(8, 9)
    assert decision.record_source == {8: 1}
    assert decision.loadable_everywhere == 8, "the others can't end a window at step 9"


def test_slots_behind_the_target_are_left_out() -> None:
    ahead = offer(0, None, slots=range(6, 11))
    assert world(line(2), ahead).segments[0].run == Run(8, 9)
    assert world(line(2), replace(ahead, slots=rolling([10, 11]))).source == "scratch"


def test_all_who_are_final_roll_forward_if_somebody_healthy_has_updated() -> None:
    grid = line(3)
    failed, final, updated = offer(0, None), offer(1, 9, Position.FINAL), offer(2, 10, Position.UPDATED)
    final = replace(final, transcript=final.transcript | {9})
    decision = decide(grid, [failed, final, updated])
    assert (decision.source, decision.target, decision.roll_forward) == ("local", 10, {1})
    assert decision.record_source == {7: 1, 8: 1, 9: 2}
    assert decide(grid, [failed, final, replace(final, rank=2)]).target == 9
    # The one who has updated is rolled back himself.
    gone = decide(grid, [failed, replace(final, rank=1), replace(updated, rank=2, step=None)])
    assert (gone.target, gone.roll_forward) == (9, frozenset())


def test_only_updated_ranks_of_the_failed_stage_move_nobody_forward() -> None:
    grid = line(2, 2)
    decision = decide(
        grid, [offer(0, None), offer(1, 10, Position.UPDATED), *(offer(r, 9, Position.FINAL) for r in (2, 3))]
    )
    assert (decision.target, decision.roll_forward, decision.segments[0].ranks) == (9, frozenset(), {0, 1})


def test_a_rank_that_has_begun_the_next_iteration_counts_as_updated() -> None:
    decision = decide(line(2), [offer(0, 10), offer(1, 9, Position.FINAL)])
    assert (decision.source, decision.target, decision.roll_forward) == ("none", 10, {1})
    assert decision.record_source == {9: 0}


def test_without_the_record_nobody_rolls_forward() -> None:
    ahead = offer(2, 10, Position.UPDATED)
    ahead = replace(ahead, records={8: record(8)}, transcript=ahead.transcript)
    decision = decide(line(4), [offer(0), offer(1, 9, Position.FINAL), ahead, replace(ahead, rank=3)])
    assert decision.source == "global"
    assert any("record of iteration 9" in text for text in decision.reasons)
    wrong = replace(ahead, records={9: record(8)})
    assert decide(line(2), [offer(0, 9, Position.FINAL), replace(wrong, rank=1)]).source == "global"


def test_who_is_behind_and_not_final_joins_the_scope() -> None:
    grid = line(5, tied=True)
    offers = [offer(rank, 10, slots=range(7, 10)) for rank in range(4)]
    decision = decide(grid, [*offers, offer(4, 9, slots=range(7, 10))])
    assert [plan.stages for plan in decision.segments] == [(0, 4)]
    assert decision.target == 10
    assert any("ranks [4] stand at step 9, others at 10" in text for text in decision.reasons)
    far = decide(line(3), [offer(0), offer(1), replace(offer(2, 7), position=Position.FINAL)])
    assert [plan.stages for plan in far.segments] == [(2,)]


def test_a_joining_stage_may_take_the_target_back() -> None:
    # Rank 1 alone is at step 10, and rolls back with rank 0 of its stage, who can do neither.
    decision = decide(line(2, 2), [offer(0, 8), offer(1, 10), offer(2, 9), offer(3, 9)])
    assert (decision.source, decision.target, decision.segments[0].ranks) == ("local", 9, {0, 1})


def test_segments_apart_have_their_own_runs() -> None:
    decision = world(line(5), offer(0, None), offer(2, None, slots=[5, 6, 7]), offer(3, None))
    assert [(plan.stages, plan.run) for plan in decision.segments] == [((0,), Run(7, 8)), ((2, 3), Run(6, 7))]
    assert decision.segments[1].feeders == {1, 4}
    assert set(decision.record_source) == {6, 7, 8}
    assert decision.loadable_everywhere == 7


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (replace(offer(0), transcript=frozenset({8})), "rank 0 has no complete transcript of iteration 7"),
        (replace(offer(1, None), slots=rolling([6, 8])), "no window is complete on all its ranks"),
        (replace(offer(1, None), run_id="old"), "ranks [1] have no slots of the run that the others are in"),
        (lost(1), "ranks [1] have no slots of the run"),
    ],
)
def test_a_segment_that_lacks_something_takes_all_back(broken: Offer, reason: str) -> None:
    decision = world(line(5), offer(1, None), offer(4, None), broken)
    assert decision.source in ("global", "scratch")
    assert not decision.segments
    assert any(reason in text for text in decision.reasons), decision.reasons
    assert decision.target == (decision.run.last if decision.run else 0)


def test_a_missing_record_takes_all_back() -> None:
    offers = [replace(offer(rank), records={8: record(8)}) for rank in range(2)]
    decision = decide(line(3), [*offers, replace(offer(2, None), records={})])
    assert decision.source == "global"
    assert "stage 2: nobody has the record of iteration 7" in decision.reasons


def test_no_replay_needs_no_transcript_and_no_record() -> None:
    whole = {9: SlotInfo(9, 1, OPERATORS, frozenset(), 0)}
    bare = replace(offer(1), transcript=frozenset(), records={})
    decision = decide(line(2), [replace(bare, rank=0, step=None, slots=whole), bare])
    assert (decision.source, decision.segments[0].run, decision.record_source) == ("local", Run(9, 9), {})


@pytest.mark.parametrize("grid", [line(1, 2), line(2, 1, tied=True)])
def test_a_scope_of_the_whole_world_is_global(grid: Grid) -> None:
    decision = world(grid, offer(1, None))
    assert (decision.source, decision.run, decision.target) == ("global", Run(7, 8), 8)


def test_dense_only_where_it_is_newer() -> None:
    def choice(dense: int | None, *more: int | None) -> tuple[str, int]:
        seen = [dense, *more] if more else [dense, dense]
        decision = decide(line(1, 2), [replace(offer(r, None), dense_step=step) for r, step in enumerate(seen)])
        return decision.source, decision.target

    assert choice(None) == ("global", 8)
    assert choice(7) == choice(8) == ("global", 8)
    assert choice(9) == ("dense", 9)
    assert choice(12, 10) == ("dense", 10)
    assert choice(12, None) == ("global", 8)


def test_total_loss() -> None:
    everybody = [lost(rank) for rank in range(2)]
    assert decide(line(2), everybody).source == "scratch"
    dense = decide(line(2), [replace(o, dense_step=4) for o in everybody])
    assert (dense.source, dense.target, dense.loadable_everywhere) == ("dense", 4, -1)


def test_a_lost_node_needs_a_dense_checkpoint() -> None:
    offers = [replace(offer(0), dense_step=4), replace(lost(1), dense_step=4)]
    decision = decide(line(2), offers)
    assert (decision.source, decision.target) == ("dense", 4)
    assert "rank 1: no slots" in decision.reasons
    assert "only ranks [0] have slots of one run" in decision.reasons


def test_offers_are_of_every_rank_once() -> None:
    for offers in ([offer(0)], [offer(0), offer(0)], [offer(0), offer(2)], []):
        with pytest.raises(AgreementError, match="for a world of 2"):
            decide(line(2), offers)


# ------------------------------------------------------------------------------------------------- invariants


@st.composite
def offers_of(draw: st.DrawFn, rank: int) -> Offer:
    """Any offer near iteration 9."""
    step = draw(st.one_of(st.none(), st.integers(7, 10)))
    some = st.frozensets(st.integers(4, 10))
    return Offer(
        rank,
        step,
        draw(st.sampled_from(Position)),
        draw(st.sampled_from(["job", "job", "job", "", "old"])),
        rolling(draw(st.one_of(some, st.just(frozenset(range(5, 9)))))),
        OPERATORS,
        draw(st.one_of(some, st.just(frozenset(range(4, 11))))),
        {iteration: record(iteration) for iteration in draw(st.one_of(some, st.just(frozenset(range(4, 11)))))},
        draw(st.one_of(st.none(), st.integers(0, 9))),
    )


@settings(max_examples=400)
@given(st.data())
def test_any_decision_can_be_carried_out(data: st.DataObject) -> None:
    grid = line(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2)), data.draw(st.booleans()))
    offers = [data.draw(offers_of(rank)) for rank in range(len(grid.stages))]
    decision = decide(grid, offers)
    assert decision == decide(grid, offers[::-1])
    scope = frozenset().union(*(plan.ranks for plan in decision.segments))
    if decision.source in ("local", "none"):
        for o in offers:
            if o.rank in decision.roll_forward:
                assert (o.step, o.position) == (decision.target - 1, Position.FINAL)
                assert decision.target - 1 in decision.record_source
            elif o.rank not in scope:
                assert o.step == decision.target
        assert all(it in offers[rank].records for it, rank in decision.record_source.items())
    assert (decision.source == "local") == bool(scope)
    assert not scope & decision.roll_forward
    for plan in decision.segments:
        assert plan.run.last <= decision.target
        assert all(is_window(offers[rank].slots, OPERATORS, plan.run) for rank in plan.ranks)
        assert not plan.feeders & scope
        assert all(set(range(plan.run.first, decision.target)) <= offers[rank].transcript for rank in plan.feeders)
    if decision.source == "global":
        assert decision.run is not None
        assert all(is_window(o.slots, OPERATORS, decision.run) for o in offers)
    if decision.source == "dense":
        assert all(o.dense_step is not None and o.dense_step >= decision.target for o in offers)
