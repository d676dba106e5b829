"""Copies between host and device, on the CPU, where there is nothing to wait for."""

import torch

from megatron.moevement.integration.host_copies import to_device, to_host


def test_on_the_cpu_nothing_is_pinned_and_every_bit_arrives() -> None:
    tensor = torch.tensor([1.0, float("nan"), -0.0]).requires_grad_()
    host = to_host(tensor)
    assert not host.requires_grad and not host.is_pinned()
    assert torch.equal(host.view(torch.int32), tensor.detach().view(torch.int32))
    tokens = torch.arange(6).reshape(2, 3)
    placed = to_device(tokens, torch.device("cpu"))
    assert placed.device.type == "cpu" and torch.equal(placed, tokens)
