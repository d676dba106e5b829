"""From one generation of process groups to the next, under a job that stays as it is."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron.moevement.agent.gloo_waits import GlooWaits
from megatron.moevement.agent.link import WorkerLink
from megatron.moevement.agent.sockets import shut_down_sockets
from megatron.moevement.errors import PeerLost
from megatron.moevement.integration import distributed, groups
from megatron.moevement.integration.job import TrainingJob

_CONTROL = "control"
# How long the agent may take to say that a generation has failed whose connections broke here first.
NEWS_SECONDS = 10.0
# The same for an error that doesn't look like a broken connection.
_DOUBT_SECONDS = 2.0
_BROKEN = ("gloo", "NCCL", "Socket", "closed", "reset by peer", "aborted")


def failed_within(link: WorkerLink, seconds: float) -> bool:
    """Whether the agent says, now or within `seconds`, that the generation has failed."""
    deadline = time.monotonic() + seconds
    while not link.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    return link.failed


class Generations:
    """Leaves a generation that has failed and joins the next one.

    Args:
        job: its groups are replaced in place.
        link: to the agent.
        users: whatever else holds process groups.
    """

    def __init__(self, job: TrainingJob, link: WorkerLink, users: Sequence[object]) -> None:
        self._job, self._link, self._users = job, link, users
        self._held = self._now()
        # What is there now stays: collections of the rest are a matter of milliseconds then.
        gc.collect()
        gc.freeze()
        self._waits = GlooWaits(lambda: link.failed)
        if job.config.backend == "gloo":
            self._waits.install()
        link.watch(lambda: groups.free_from_collectives(job.config.backend, shut_down_sockets))

    def _now(self) -> dict[str, Any]:
        return {**groups.named_groups(), _CONTROL: self._job.topology.control}

    def is_failure(self, error: BaseException) -> bool:
        """Whether `error` is what the failure of another rank looks like here."""
        if isinstance(error, PeerLost):
            return True
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return False
        # An error of this rank's own would keep all others waiting for as long.
        broken = isinstance(error, dist.DistError) or any(word in str(error) for word in _BROKEN)
        return failed_within(self._link, NEWS_SECONDS if broken else _DOUBT_SECONDS)

    def leave(self) -> None:
        """Gives up whatever of an interrupted iteration still waits for the groups.

        Raises:
            RuntimeError: the device can't be used any more; this process must be replaced.
        """
        # Contexts of the schedule that were never left act when they are collected, which must not be later on.
        gc.collect()
        for chunk in self._job.chunks:
            for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                bucket_group.grad_reduce_handle = bucket_group.param_gather_handle = None
                bucket_group.param_gather_dispatched = False
                bucket_group.per_param_grad_ready_counts = {}
                # In its first iteration a process reduces gradients in another order than later on. A replacement is
                # in its first one, so those that share its buckets begin anew.
                bucket_group.golden_per_param_grad_ready_counts, bucket_group.is_first_batch = {}, True
                bucket_group.is_last_microbatch = True
        groups.abort()

    def join(self) -> None:
        """Waits for the next generation and makes its groups. Collective over the world.

        Raises:
            JobEnded: the job ends.
            PeerLost, RuntimeError: another rank was lost meanwhile; leave, and join again.
        """
        # While the others are waited for.
        found = groups.holders([self._job, *self._users], self._held)
        self._link.next_generation()
        # Only now, when everybody has left: to close a connection is to fail the one who writes to it.
        if self._waits.lost:
            self._waits.lost = 0
            groups.keep()
        groups.leave()
        self._link.beat("connects")
        control = distributed.connect(self._job.config, self._link.store())
        new = {**groups.named_groups(), _CONTROL: control}
        groups.rebind(found, self._held, new)
        self._held = new
        self._job.topology = distributed.topology_of(self._job.topology.device, control)
        dist.barrier(group=control)
