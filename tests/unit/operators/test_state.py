"""The protocol of a training state, on the toy that stands in for a model in other tests."""

import pytest

from megatron.moevement.operators.state import MemoryRange, RecordedOperator, TrainingState
from megatron.moevement.snapshot.layout import piece_sizes
from megatron.moevement.types import Presence
from tests.support.tables import small_table
from tests.support.toy import ToyState

TABLE = small_table()


def recorded(state: TrainingState, name: str, presence: Presence) -> RecordedOperator:
    """An operator as a slot would give it, straight from the memory of another state."""
    return RecordedOperator(name, presence, tuple(state.pieces(name, presence)), state.adam_steps(name))


@pytest.mark.parametrize("presence", list(Presence))
def test_pieces_are_those_that_the_layout_makes_room_for(presence: Presence) -> None:
    state: TrainingState = ToyState(TABLE)
    for operator in TABLE:
        pieces = state.pieces(operator.name, presence)
        assert [piece.nbytes for piece in pieces] == piece_sizes(operator, presence)
        expected = operator.full_bytes if presence is Presence.FULL else operator.weights_bytes
        assert sum(piece.nbytes for piece in pieces) == expected
        assert len(state.adam_steps(operator.name)) == len(operator.slices)


def test_loading_in_full_gives_the_weights_too() -> None:
    trained, fresh = ToyState(TABLE), ToyState(TABLE, seed=9)
    trained.train()
    names = ["output", "layer000.expert001"]
    full = [recorded(trained, name, Presence.FULL) for name in names]
    light = [recorded(trained, name, Presence.WEIGHTS_ONLY) for name in names]
    assert fresh.differing_weights(light) == tuple(names)
    fresh.load(full)
    assert fresh.differing_weights(light) == ()
    assert fresh.adam_steps("output") == (1.0,) and fresh.adam_steps("embedding") == (0.0,)


def test_frozen_operators_do_not_change_and_do_count() -> None:
    one, other = ToyState(TABLE), ToyState(TABLE)
    before = one.contents("output", Presence.FULL)
    frozen = frozenset({"output"})
    assert one.train(frozen=frozen) == other.train(), "the forward pass is that of all operators"
    assert one.contents("output", Presence.FULL) == before != other.contents("output", Presence.FULL)
    assert one.train(frozen=frozen) != other.train()


def test_a_range_is_a_value() -> None:
    assert MemoryRange(1, 2) == MemoryRange(1, 2) != MemoryRange(1, 3)
