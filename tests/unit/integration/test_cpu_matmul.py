"""Products of bfloat16 matrices by way of float32, and all others as torch makes them."""

from collections.abc import Callable

import pytest
import torch

from megatron.moevement.integration import cpu_matmul


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


PLAIN = [
    (cpu_matmul.mm, (random(5, 7), random(3, 7).t())),
    (cpu_matmul.bmm, (random(2, 5, 7), random(2, 7, 3))),
    (cpu_matmul.addmm, (random(3), random(5, 7), random(7, 3))),
    (cpu_matmul.baddbmm, (random(2, 5, 3), random(2, 5, 7), random(2, 7, 3))),
]


@pytest.mark.parametrize(("product", "tensors"), PLAIN, ids=lambda one: getattr(one, "__name__", ""))
def test_rounded_once(product: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> None:
    factors = {"alpha": 0.5, "beta": 2.0} if "add" in product.__name__ else {}
    halves = [one.bfloat16() for one in tensors]
    wanted = getattr(torch, product.__name__)(*(one.float() for one in halves), **factors)
    found = product(*halves, **factors)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())
    # Not what products of other types are.
    assert torch.equal(product(*tensors, **factors), getattr(torch, product.__name__)(*tensors, **factors))
    whole = [(100 * one).long() for one in tensors]
    factors = dict.fromkeys(factors, 3)
    assert torch.equal(product(*whole, **factors), getattr(torch, product.__name__)(*whole, **factors))


def test_types_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        cpu_matmul.mm(random(5, 7), random(7, 3).bfloat16())


def test_a_layer_and_its_gradients() -> None:
    cpu_matmul.install()
    cpu_matmul.install()
    layer, rows = torch.nn.Linear(7, 3, dtype=torch.bfloat16), random(5, 7).bfloat16()
    layer(rows).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert torch.equal(layer.weight.grad, rows.float().sum(0).bfloat16().expand(3, 7))
    assert layer.bias.grad.tolist() == [5.0] * 3
