"""New process groups under a job that stays: every reference is found and replaced, and training goes on."""

import datetime
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from megatron.moevement.errors import RecoveryError
from megatron.moevement.integration import distributed, groups, train_loop
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.state_digest import digest_state, training_state


class Plain:
    """Holds a group in an attribute and nothing else, so that the collector doesn't track its dictionary."""

    def __init__(self, group: Any) -> None:
        self.group = group


class Slotted:
    """Holds a group in a slot."""

    __slots__ = ("group",)

    def __init__(self, group: Any) -> None:
        self.group = group


class Group:
    """Stands in for a process group."""


def reach(*roots: Any, old: dict[str, Any], new: dict[str, Any]) -> int:
    """Finds and replaces."""
    return groups.rebind(groups.holders(roots, old), old, new)


def test_references_of_every_kind_are_replaced() -> None:
    first, second = Group(), Group()
    slotted, listed, plain = Slotted(first), [1, first], Plain(first)
    materialized = Plain(first)
    _ = materialized.__dict__
    partial = functools.partial(print, group=first)
    nested = {"deep": [{"deeper": Plain(first)}]}

    def closure() -> Any:
        return first_here

    first_here = first
    roots = (slotted, listed, plain, materialized, partial, nested, closure)
    assert reach(*roots, old={"g": first}, new={"g": second}) == 7
    assert slotted.group is listed[1] is plain.group is materialized.group is second
    assert partial.keywords["group"] is nested["deep"][0]["deeper"].group is closure() is second  # type: ignore[index]
    # And once more: the first pass has given some of them dictionaries that the collector doesn't track.
    assert reach(*roots, old={"g": second}, new={"g": first}) == 7
    assert plain.group is materialized.group is nested["deep"][0]["deeper"].group is first  # type: ignore[index]


def test_what_cannot_be_replaced_is_an_error() -> None:
    first = Group()
    with pytest.raises(RecoveryError, match="tuple still holds"):
        reach([(first,)], old={"g": first}, new={"g": Group()})
    with pytest.raises(RecoveryError, match="changed between generations: h"):
        reach([first], old={"g": first}, new={"g": Group(), "h": Group()})


def renew(job: TrainingJob) -> int:
    """A job that goes on over new groups."""
    old = {**groups.named_groups(), "control": job.topology.control}
    groups.leave()
    found = groups.holders([job], old)
    control = distributed.connect(job.config, groups.nowhere())
    changed = groups.rebind(found, old, {**groups.named_groups(), "control": control})
    job.topology = distributed.topology_of(job.topology.device, control)
    return changed


@pytest.mark.parametrize("flags", [{}, {"use_distributed_optimizer": True}], ids=["whole", "distributed"])
def test_a_job_trains_on_over_new_groups(build: Callable[..., TrainingJob], flags: dict[str, object]) -> None:
    calm = build(**flags)
    train_loop.train(calm, train_loop.NoHooks())
    wanted = digest_state(training_state(calm))
    job = build(**flags)
    for _ in range(2):
        train_loop.train_iteration(job, train_loop.NoHooks())
        assert renew(job) > 10
    train_loop.train(job, train_loop.NoHooks())
    assert digest_state(training_state(job)) == wanted
    # Whatever the job holds is of the present generation.
    assert all(dist.get_backend(group) == "gloo" for group in groups.named_groups().values())


def test_a_job_is_built_without_communication(build: Callable[..., TrainingJob]) -> None:
    job = build()
    groups.leave()
    with groups.without_communication():
        dist.init_process_group(groups.FAKE, store=groups.nowhere(), rank=1, world_size=2)
        control = distributed.initialize_groups(job.config)
        assert dist.get_backend(control) == dist.get_backend() == groups.FAKE and dist.get_world_size() == 2
        dist.barrier(group=control)
    groups.leave()
    job.topology = distributed.topology_of(job.topology.device, distributed.connect(job.config, groups.nowhere()))


class Communicator:
    """Its abort ends when all of them are being aborted, as where each waits for the device."""

    def __init__(self, together: threading.Barrier) -> None:
        self._together = together

    def abort(self) -> None:
        """As NCCL's."""
        self._together.wait(30)
        raise RuntimeError("aborted already")


def test_communicators_are_aborted_at_once() -> None:
    together = threading.Barrier(3)
    for thread in groups.abort_all([Communicator(together) for _ in range(3)]):
        thread.join()
    assert not together.broken


class Batch(Group):
    """A group in whose batch of sends and receives an error was raised."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def _end_coalescing(self, device: Any) -> None:
        self.ended.append(device.type)
        raise RuntimeError("NCCL communicator was aborted")


def test_an_interrupted_batch_is_closed(build: Callable[..., TrainingJob]) -> None:
    job, batch = build(), Batch()
    dist.distributed_c10d._world.pg_coalesce_state[batch] = []  # type: ignore[index]
    assert renew(job) > 0
    assert batch.ended == ["cuda"]


def test_a_first_group_that_was_interrupted_leaves_no_name_behind(build: Callable[..., TrainingJob]) -> None:
    """A rank that goes on would look for the others under another name than one that has just been started."""
    job, moment = build(), datetime.timedelta(seconds=0.2)
    groups.leave()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            # The other rank never comes.
            dist.init_process_group("gloo", store=groups.nowhere(), rank=0, world_size=2, timeout=moment)
        assert not dist.is_initialized()
        groups.leave()
    job.topology = distributed.topology_of(job.topology.device, distributed.connect(job.config, groups.nowhere()))
    assert dist.group.WORLD is not None and dist.group.WORLD.group_name == "0"
