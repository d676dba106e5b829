"""In which order operators are captured: experts by ascending popularity, non-expert operators last (paper 3.2).

Popular experts come late, stay frozen longest in a conversion and save the most weight gradients.
"""

from collections.abc import Mapping

from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.types import OperatorKind

_RANK = {
    OperatorKind.EXPERT: 0,
    OperatorKind.NON_EXPERT: 1,
    OperatorKind.ROUTER: 2,
    OperatorKind.EMBEDDING: 3,
    OperatorKind.OUTPUT: 4,
}


def capture_order(table: OperatorTable, popularity: Mapping[str, int]) -> tuple[str, ...]:
    """Operator names in capture order.

    Args:
        table: the operators of this rank.
        popularity: expert operator -> tokens routed to it, counted over the whole data-parallel group. Experts that
            are missing count 0. Ties are broken by name, so that equal counts give equal orders everywhere.
    """
    return tuple(o.name for o in sorted(table, key=lambda o: (_RANK[o.kind], popularity.get(o.name, 0), o.name)))


def should_reorder(at_last_order: Mapping[str, int], now: Mapping[str, int], change: float, share: float) -> bool:
    """Whether at least `share` of the experts changed their activation frequency by more than `change`.

    Frequencies are shares of all tokens counted, so that windows of different length compare. Without any count
    before, any count now is a change.
    """
    experts = sorted(set(at_last_order) | set(now))
    if not experts:
        return False
    total_before, total_now = sum(at_last_order.values()), sum(now.values())
    if total_now == 0:
        return False
    if total_before == 0:
        return True
    changed = 0
    for expert in experts:
        # Cross-multiplied integers: the decision is the same on every rank, with no rounding.
        before, after = at_last_order.get(expert, 0) * total_now, now.get(expert, 0) * total_before
        changed += abs(after - before) > change * before
    return changed >= share * len(experts)
