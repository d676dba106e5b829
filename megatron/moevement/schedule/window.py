"""The window: how many slots (W), and which operators each captures in full (paper section 3.2, Algorithm 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.types import Operator, OperatorKind

Groups = tuple[tuple[str, ...], ...]
_TIED = (OperatorKind.EMBEDDING, OperatorKind.OUTPUT)


@dataclass(frozen=True, slots=True)
class WindowCost:
    """What a window of `window` slots costs on one rank: bytes of its largest slot, and of all its slots."""

    window: int
    worst_slot_bytes: int
    window_bytes: int


def _sizes(operators: Sequence[Operator], nominal: bool) -> tuple[list[int], list[int]]:
    if nominal:
        return [o.nominal_full_bytes for o in operators], [o.nominal_weights_bytes for o in operators]
    return [o.full_bytes for o in operators], [o.weights_bytes for o in operators]


def slot_bytes(table: OperatorTable, groups: Groups, mode: str) -> list[int]:
    """Bytes of operators in each slot of a window, as this rank owns them."""
    weights = {o.name: o.weights_bytes for o in table}
    later = sum(weights.values())
    sizes = []
    for group in groups:
        own = sum(weights[name] for name in group)
        later -= own
        companions = later if mode == "fixed" else sum(weights.values()) - own
        sizes.append(sum(table[name].full_bytes for name in group) + companions)
    return sizes


def _fill(full: list[int], weights: list[int], limit: int, mode: str) -> list[int] | None:
    """Greedy group lengths with no slot above `limit` bytes, or None if one operator alone exceeds it."""
    total, lengths, start = sum(weights), [], 0
    later = total
    while start < len(full):
        used, end, rest = 0, start, later
        while end < len(full):
            companions = rest - weights[end] if mode == "fixed" else total - (later - rest) - weights[end]
            if used + full[end] + companions > limit:
                break
            used += full[end]
            rest -= weights[end]
            end += 1
        if end == start:
            return None
        lengths.append(end - start)
        start, later = end, rest
    return lengths


def divide(table: OperatorTable, order: Sequence[str], window: int, mode: str) -> Groups:
    """Divides the ordered operators into `window` consecutive groups with the smallest possible largest slot.

    Sizes are nominal (whole operators), so that all data-parallel ranks of a stage divide alike. The embedding and
    the output layer are always in the last slot, whatever the order: tied copies of them on the first and the last
    stage must be frozen and active together, or the frozen one's share of their common gradient is missing.
    Where fewer groups suffice, the first slots capture nothing in full.
    """
    operators = [table[name] for name in order if table[name].kind not in _TIED]
    tied = tuple(name for name in order if table[name].kind in _TIED)
    full, weights = _sizes(operators, nominal=True)
    low, high = 0, sum(full) + sum(weights)
    while low < high:
        middle = (low + high) // 2
        lengths = _fill(full, weights, middle, mode)
        low, high = (low, middle) if lengths is not None and len(lengths) <= window else (middle + 1, high)
    lengths = _fill(full, weights, high, mode) or []
    names = [o.name for o in operators]
    groups: list[tuple[str, ...]] = [()] * (window - len(lengths))
    start = 0
    for length in lengths:
        groups.append(tuple(names[start : start + length]))
        start += length
    groups[-1] = groups[-1] + tied
    return tuple(groups)


def cost(table: OperatorTable, order: Sequence[str], window: int, mode: str) -> WindowCost:
    """Prices a window on this rank with real owned sizes."""
    sizes = slot_bytes(table, divide(table, order, window, mode), mode)
    return WindowCost(window, max(sizes), sum(sizes))


def smallest_window(
    table: OperatorTable, order: Sequence[str], mode: str, budget_bytes: float, max_window: int
) -> WindowCost:
    """The smallest W whose worst slot on this rank is at most `budget_bytes` (bandwidth times iteration time).

    If none is, the W with the smallest worst slot up to `max_window`: the stall is then as short as it can be. Unlike
    Algorithm 1 it has no floor of two operators a slot, and prices every slot instead of the first.
    """
    best = cost(table, order, 1, mode)
    for window in range(1, max(1, min(max_window, len(table))) + 1):
        candidate = cost(table, order, window, mode)
        if candidate.worst_slot_bytes <= budget_bytes:
            return candidate
        if candidate.worst_slot_bytes < best.worst_slot_bytes:
            best = candidate
    return best
