"""The operator table: coverage and refusals."""

import pytest

from megatron.moevement.errors import UnsupportedError
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.types import Operator, OperatorKind
from tests.support.tables import part, small_table


def test_json_round_trip() -> None:
    table = small_table()
    assert OperatorTable.from_json(table.to_json()).to_json() == table.to_json()
    assert table.names == {o.name for o in table}


def test_two_operators_with_one_name_are_refused() -> None:
    operator = Operator("a", OperatorKind.ROUTER, 0, None, (part("w", 4),))
    with pytest.raises(UnsupportedError, match="two operators"):
        OperatorTable([operator, operator])


def test_overlapping_slices_are_refused() -> None:
    first = Operator("a", OperatorKind.ROUTER, 0, None, (part("w", 10, 0, 6),))
    second = Operator("b", OperatorKind.ROUTER, 0, None, (part("w", 10, 5, 10),))
    with pytest.raises(UnsupportedError, match="both hold element 5"):
        OperatorTable([first, second])


@pytest.mark.parametrize("owned", [(0, 11), (0, 9), (1, 11)])
def test_every_owned_element_must_be_in_one_operator(owned: tuple[int, int]) -> None:
    table = OperatorTable([Operator("a", OperatorKind.ROUTER, 0, None, (part("w", 12, 0, 10),))])
    with pytest.raises(UnsupportedError):
        table.check_owned({"w": owned})
    table.check_owned({"w": (0, 10)})


def test_a_parameter_without_operator_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="extra"):
        small_table().check_owned(
            {**{s.parameter: (s.start, s.end) for o in small_table() for s in o.slices}, "extra": (0, 1)}
        )


def test_byte_model_of_the_paper() -> None:
    operator = Operator("a", OperatorKind.EXPERT, 0, 0, (part("w", 100, 0, 50),))
    assert (operator.full_bytes, operator.weights_bytes) == (12 * 50, 2 * 50)
    assert (operator.nominal_full_bytes, operator.nominal_weights_bytes) == (12 * 100, 2 * 100)
