"""Small operator tables for unit tests."""

from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.types import Operator, OperatorKind, ParameterSlice


def part(name: str, elements: int, start: int = 0, end: int | None = None, weight_bytes: int = 2) -> ParameterSlice:
    """A slice of parameter `name`, by default wholly owned."""
    return ParameterSlice(name, start, elements if end is None else end, elements, weight_bytes)


def small_table(
    layers: int = 2, experts: int = 4, expert_elements: int = 100, other_elements: int = 60
) -> OperatorTable:
    """Experts, routers and non-expert parts of some layers, an embedding and an output layer."""
    operators = [Operator("embedding", OperatorKind.EMBEDDING, None, None, (part("embedding.w", other_elements),))]
    for layer in range(layers):
        for expert in range(experts):
            name = f"layer{layer:03d}.expert{expert:03d}"
            slices = (part(f"{name}.fc1", expert_elements), part(f"{name}.fc2", expert_elements // 2))
            operators.append(Operator(name, OperatorKind.EXPERT, layer, expert, slices))
        for kind in (OperatorKind.ROUTER, OperatorKind.NON_EXPERT):
            name = f"layer{layer:03d}.{kind.value}"
            operators.append(Operator(name, kind, layer, None, (part(f"{name}.w", other_elements),)))
    operators.append(Operator("output", OperatorKind.OUTPUT, None, None, (part("output.w", other_elements),)))
    return OperatorTable(operators)
