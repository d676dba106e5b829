"""Leaving a generation that has failed and joining the next one."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from megatron.moevement.errors import JobEnded, PeerLost
from megatron.moevement.integration import groups, train_loop
from megatron.moevement.integration.generations import Generations
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.schedule.agreement import Agreement


class Link:
    """Stands in for the link of a world of one rank; a test says when a generation fails."""

    def __init__(self) -> None:
        self.generation, self.failed, self.replacement = 0, False, False
        self.rank, self.world_size = 0, 1
        self.ends = self.ending = self.stopping = ""
        self.points: list[str] = []
        self.abort: Callable[[], None] = print

    def watch(self, abort: Callable[[], None]) -> None:
        """Remembers it."""
        self.abort = abort

    def next_generation(self) -> int:
        """Opens the next generation at once."""
        if self.ends:
            raise JobEnded(self.ends)
        self.generation, self.failed = self.generation + 1, False
        return self.generation

    def check(self) -> None:
        """As the real one does."""
        if self.failed:
            raise PeerLost("failed")

    def store(self) -> Any:
        """A new one."""
        return groups.nowhere()

    def beat(self, point: str, iteration: int | None = None, resting: bool = False) -> None:
        """Remembers it."""
        self.points.append(point)


def test_groups_of_the_job_and_its_users_are_new(build: Callable[..., TrainingJob]) -> None:
    job, link = build(), Link()
    agreement = Agreement(job.topology.control)
    generations = Generations(job, link, [agreement])  # type: ignore[arg-type]
    for number in (1, 2, 3):
        before = job.topology.control
        generations.leave()
        generations.join()
        assert link.generation == number and job.topology.control is not before
        assert agreement.gather(number) == [number] and dist.is_initialized()
        train_loop.train_iteration(job, train_loop.NoHooks())
    link.ends = "no spare left"
    generations.leave()
    with pytest.raises(JobEnded, match="no spare"):
        generations.join()
    link.ends = ""
    # Half a join before a failure is no obstacle.
    generations.leave()
    generations.join()
    assert agreement.gather("x") == ["x"]


def test_leaving_forgets_what_waits_for_the_old_groups(build: Callable[..., TrainingJob]) -> None:
    job = build(use_distributed_optimizer=True)
    generations = Generations(job, Link(), [])  # type: ignore[arg-type]
    group = job.chunks[0].bucket_groups[0]
    group.grad_reduce_handle = group.param_gather_handle = object()
    group.is_last_microbatch, group.per_param_grad_ready_counts = False, {object(): 1}
    generations.leave()
    assert group.grad_reduce_handle is group.param_gather_handle is None
    assert group.is_last_microbatch and not group.per_param_grad_ready_counts
    generations.join()
    train_loop.train_iteration(job, train_loop.NoHooks())


def test_an_error_is_a_lost_peer_only_if_the_agent_says_so(
    build: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.moevement.integration.generations.NEWS_SECONDS", 0.05)
    link = Link()
    generations = Generations(build(), link, [])  # type: ignore[arg-type]
    assert not generations.is_failure(RuntimeError("a shape is wrong"))
    assert generations.is_failure(PeerLost("gone"))
    monkeypatch.setattr("megatron.moevement.integration.generations.NEWS_SECONDS", 20.0)

    def news() -> None:
        time.sleep(0.05)
        link.failed = True

    threading.Thread(target=news).start()
    assert generations.is_failure(RuntimeError("Connection closed by peer"))
    assert not generations.is_failure(ValueError("Connection closed by peer"))
