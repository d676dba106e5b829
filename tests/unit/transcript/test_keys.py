"""Keys: both sides of a boundary name a tensor alike, and every tensor of the model is there once."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.transcript.keys import BoundaryKey, Delivery, Direction, Pipeline, deliveries

FORWARD, BACKWARD = Direction.FORWARD, Direction.BACKWARD


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Any schedule; the last group of micro-batches may be shorter."""
    stages = draw(st.integers(1, 6))
    micro_batches, chunks, group = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    return Pipeline(stages, draw(st.integers(0, stages - 1)), micro_batches, chunks, group)


def test_one_forward_one_backward() -> None:
    middle = Pipeline(3, 1, 2, 1, 3)
    assert middle.sent(FORWARD) == (BoundaryKey(FORWARD, 0, 0, 0), BoundaryKey(FORWARD, 1, 1, 0))
    assert middle.received(BACKWARD) == (BoundaryKey(BACKWARD, 0, 0, 0), BoundaryKey(BACKWARD, 1, 1, 0))
    first, last = middle.at(0), middle.at(2)
    assert not first.sent(BACKWARD) and not first.received(FORWARD) and not first.has_sender(FORWARD)
    assert not last.sent(FORWARD) and not last.received(BACKWARD) and last.has_sender(FORWARD)


def test_interleaved() -> None:
    last = Pipeline(2, 1, 4, 2, 2)
    # The second chunk of the last stage is the end of the model.
    assert [(key.micro_batch, key.chunk) for key in last.sent(FORWARD)] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    pairs = [(0, 1), (1, 1), (0, 0), (1, 0), (2, 1), (3, 1), (2, 0), (3, 0)]
    assert [(key.micro_batch, key.chunk) for key in last.sent(BACKWARD)] == pairs
    assert last.at(0).received(FORWARD) == last.sent(FORWARD) and last.at(0).has_sender(FORWARD)


@given(pipelines())
def test_every_boundary_of_the_model_is_crossed_once(pipeline: Pipeline) -> None:
    for direction in Direction:
        keys = [(stage, key) for stage in range(pipeline.stages) for key in pipeline.at(stage).sent(direction)]
        crossings = Counter((stage, key.micro_batch, key.chunk) for stage, key in keys)
        assert set(crossings.values()) <= {1}
        assert len(crossings) == (pipeline.stages * pipeline.chunks - 1) * pipeline.micro_batches
    for direction in Direction:
        keys_there = pipeline.sender(direction).sent(direction)
        assert pipeline.received(direction) == keys_there
        assert [key.order for key in keys_there] == [*range(len(keys_there))]


@given(pipelines())
def test_a_neighbour_in_one_direction_is_one_in_the_other(pipeline: Pipeline) -> None:
    for direction in Direction:
        assert pipeline.has_sender(direction) == bool(pipeline.sent(direction.opposite))


def test_deliveries_come_from_outside_only() -> None:
    pipeline = Pipeline(4, 2, 2, 1, 4)
    assert deliveries(pipeline, frozenset({1, 2})) == (Delivery(0, 1, FORWARD), Delivery(3, 2, BACKWARD))
    assert deliveries(pipeline, frozenset({0})) == (Delivery(1, 0, BACKWARD),)
    chunks = Pipeline(4, 2, 4, 2, 4)
    assert deliveries(chunks, frozenset({3, 0})) == (Delivery(1, 0, BACKWARD), Delivery(2, 3, FORWARD))
    assert deliveries(chunks, frozenset({0})) == (Delivery(3, 0, FORWARD), Delivery(1, 0, BACKWARD))
    assert deliveries(chunks, frozenset(range(4))) == ()


@given(pipelines(), st.sets(st.integers(0, 5)))
def test_deliveries_cover_what_comes_from_outside(pipeline: Pipeline, stages: set[int]) -> None:
    scope = frozenset(stage for stage in stages if stage < pipeline.stages)
    found = deliveries(pipeline, scope)
    assert len(set(found)) == len(found)
    for stage in scope:
        for direction in Direction:
            outside = pipeline.at(stage).sender(direction).stage not in scope
            there = Delivery(pipeline.at(stage).sender(direction).stage, stage, direction) in found
            assert there == (outside and bool(pipeline.at(stage).received(direction)))
