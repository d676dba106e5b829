"""The operator table of one rank: every owned element of the training state belongs to exactly one operator."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from megatron.moevement.errors import UnsupportedError
from megatron.moevement.types import Operator, OperatorKind, ParameterSlice


class OperatorTable:
    """All operators of this rank by name, in the order of the model.

    Raises:
        UnsupportedError: two operators have one name, or two slices of one parameter overlap.
    """

    def __init__(self, operators: Iterable[Operator]) -> None:
        self._operators: dict[str, Operator] = {}
        for operator in operators:
            if operator.name in self._operators:
                raise UnsupportedError(f"two operators are named {operator.name!r}: the model can't be told apart")
            self._operators[operator.name] = operator
        self._check_slices()

    def _check_slices(self) -> None:
        ranges: dict[str, list[tuple[int, int, str]]] = {}
        for operator in self:
            for part in operator.slices:
                if not 0 <= part.start <= part.end:
                    raise UnsupportedError(f"{part.parameter}: range [{part.start}, {part.end}) is not a range")
                if part.owned:
                    ranges.setdefault(part.parameter, []).append((part.start, part.end, operator.name))
        for parameter, parts in ranges.items():
            parts.sort()
            for (_, end, first), (start, _, second) in itertools.pairwise(parts):
                if start < end:
                    raise UnsupportedError(f"{parameter}: operators {first} and {second} both hold element {start}")

    def check_owned(self, owned: dict[str, tuple[int, int]]) -> None:
        """Checks that the slices are exactly the ranges that this rank owns.

        Args:
            owned: parameter -> element range [start, end) that the optimizer of this rank holds.

        Raises:
            UnsupportedError: an owned element belongs to no operator, or a slice is not owned.
        """
        covered: dict[str, int] = {}
        for operator in self:
            for part in operator.slices:
                low, high = owned.get(part.parameter, (0, 0))
                if part.owned and not low <= part.start <= part.end <= high:
                    raise UnsupportedError(f"{part.parameter}: operator {operator.name} has elements of another rank")
                covered[part.parameter] = covered.get(part.parameter, 0) + part.owned
        for parameter, (low, high) in owned.items():
            if covered.get(parameter, 0) != high - low:
                raise UnsupportedError(
                    f"{parameter}: {high - low} elements are owned, {covered.get(parameter, 0)} belong to an operator"
                )

    def __iter__(self) -> Iterator[Operator]:
        return iter(self._operators.values())

    def __len__(self) -> int:
        return len(self._operators)

    def __getitem__(self, name: str) -> Operator:
        return self._operators[name]

    def __contains__(self, name: object) -> bool:
        return name in self._operators

    @property
    def names(self) -> frozenset[str]:
        """Names of all operators."""
        return frozenset(self._operators)

    def to_json(self) -> str:
        """A stable text of the whole table; equal tables have equal texts."""
        return json.dumps([asdict(operator) for operator in self], separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "OperatorTable":
        """The table that `to_json` wrote."""
        return OperatorTable(
            Operator(
                name=item["name"],
                kind=OperatorKind(item["kind"]),
                layer=item["layer"],
                expert=item["expert"],
                slices=tuple(ParameterSlice(**part) for part in item["slices"]),
            )
            for item in json.loads(text)
        )
