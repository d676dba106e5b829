"""Copies to the transcript: every byte arrives, tensors are held until then and no longer, and never too many."""

import threading
import weakref

import pytest
import torch

from megatron.moevement.integration import log_copy
from megatron.moevement.integration.log_copy import EngineCopier, HostCopier, LogCopier, log_copier
from moevement_ext import CopyEngine, EngineError


class Held(CopyEngine):
    """An engine whose copies are not known to be done before `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def wait(self, ticket: int, timeout_seconds: float) -> bool:
        assert self.go.wait(20)
        return super().wait(ticket, timeout_seconds)

    def state(self, ticket: int) -> str:  # type: ignore[override]
        return super().state(ticket) if self.go.is_set() else "running"


class Broken(CopyEngine):
    """An engine whose copies fail when they are waited for, or never end."""

    def __init__(self, hangs: bool) -> None:
        super().__init__()
        self._hangs = hangs
        self.cancelled: list[int] = []

    def wait(self, ticket: int, timeout_seconds: float) -> bool:
        if self._hangs:
            return False
        raise EngineError("the device is gone")

    def state(self, ticket: int) -> str:  # type: ignore[override]
        return "running"

    def cancel(self, ticket: int) -> bool:
        self.cancelled.append(ticket)
        return super().cancel(ticket)


def test_the_device_decides() -> None:
    assert isinstance(log_copier(CopyEngine(), torch.device("cpu")), HostCopier)
    assert isinstance(log_copier(CopyEngine(), torch.device("cuda", 0)), EngineCopier)


@pytest.mark.parametrize("copier", [HostCopier(), EngineCopier(CopyEngine(), 1 << 20)], ids=["host", "engine"])
def test_bytes_arrive(copier: LogCopier) -> None:
    target = torch.zeros(3, 64, dtype=torch.bfloat16)
    sources = [torch.randn(64).to(torch.bfloat16).requires_grad_(True), torch.randn(8, 8).to(torch.bfloat16).t()]
    for number, source in enumerate(sources):
        copier.copy(source, target[number].data_ptr())
    copier.drain()
    for number, source in enumerate(sources):
        assert torch.equal(target[number], source.detach().reshape(-1))
    assert not target[2].any()


def test_a_tensor_is_held_until_it_is_copied() -> None:
    engine, target = Held(), torch.zeros(250, dtype=torch.float32)
    copier, source = EngineCopier(engine, 1000), torch.arange(200, dtype=torch.float32)
    storage = weakref.ref(source.untyped_storage())
    copier.copy(source, target.data_ptr())
    # What core does with an output once it is sent.
    source.data = torch.empty(1)
    assert copier.outstanding_bytes == 800
    engine.go.set()
    copier.drain()
    assert copier.outstanding_bytes == 0 and torch.equal(target[:200], torch.arange(200, dtype=torch.float32))
    assert storage() is None


def test_no_more_than_the_limit_is_held() -> None:
    engine, target = Held(), torch.zeros(1000, dtype=torch.uint8)
    copier = EngineCopier(engine, 1000)
    copier.copy(torch.ones(600, dtype=torch.uint8), target.data_ptr())
    copier.copy(torch.full((400,), 2, dtype=torch.uint8), target[600:].data_ptr())
    assert copier.outstanding_bytes == 1000
    third = threading.Thread(target=copier.copy, args=(torch.full((1,), 3, dtype=torch.uint8), target.data_ptr()))
    third.start()
    third.join(0.05)
    assert third.is_alive() and copier.outstanding_bytes == 1000
    engine.go.set()
    third.join(20)
    assert not third.is_alive() and copier.outstanding_bytes <= 401
    copier.drain()
    assert target[600:].tolist() == [2] * 400 and target[0] == 3


def test_no_more_copies_than_the_engine_takes() -> None:
    engine = CopyEngine(max_queued_tickets=log_copy.MAX_OUTSTANDING_COPIES)
    copier, target = EngineCopier(engine, 1 << 20), torch.zeros(100, dtype=torch.uint8)
    for number in range(100):
        copier.copy(torch.full((1,), number, dtype=torch.uint8), target[number:].data_ptr())
    copier.drain()
    assert target.tolist() == [*range(100)]


@pytest.mark.parametrize(("hangs", "text"), [(True, "took longer than"), (False, "the device is gone")])
def test_a_failed_copy_is_told_and_holds_nothing(hangs: bool, text: str) -> None:
    engine, target = Broken(hangs), torch.zeros(8, dtype=torch.uint8)
    copier = EngineCopier(engine, 1000)
    for _ in range(3):
        copier.copy(torch.ones(8, dtype=torch.uint8), target.data_ptr())
    with pytest.raises(EngineError, match=text):
        copier.drain()
    assert copier.outstanding_bytes == 0
    assert len(engine.cancelled) == (3 if hangs else 0)
    copier.drain()
    engine.close()
    with pytest.raises(EngineError):
        copier.copy(torch.ones(8, dtype=torch.uint8), target.data_ptr())
    assert copier.outstanding_bytes == 0
