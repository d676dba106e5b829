"""What crosses stage boundaries: logged while training, given from neighbours' transcripts in a replay.

Core's schedules are passed a `P2PCommunicator`; here are two that override the one method through which all its public
ones go. No schedule is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron.moevement.errors import RecoveryError
from megatron.moevement.events import EventLog
from megatron.moevement.integration.boundary_recorder import BoundaryRecorder
from megatron.moevement.integration.fingerprint import fingerprint
from megatron.moevement.integration.host_copies import to_host
from megatron.moevement.integration.job import TrainingJob, build_communicator
from megatron.moevement.integration.log_copy import LogCopier
from megatron.moevement.integration.model import compute_dtype
from megatron.moevement.transcript.keys import Boundary, BoundaryKey, Direction, Pipeline
from megatron.moevement.transcript.log import TranscriptLog
from megatron.moevement.transcript.packing import Bundle

Exchanged = tuple[torch.Tensor | None, torch.Tensor | None, Any]
Fetch = Callable[[int], Sequence[Bundle]]


def boundary_of(job: TrainingJob) -> Boundary:
    """This rank's place in the job's pipeline, the schedule's shape, and the bytes of the tensors that cross."""
    config, stages = job.config, job.config.pipeline_model_parallel_size
    # Core's own choice for the interleaved schedule unless told otherwise; with one chunk it makes no difference.
    group = job.model_config.microbatch_group_size_per_vp_stage or stages
    pipeline = Pipeline(stages, job.topology.pipeline_rank, config.num_micro_batches, len(job.chunks), group)
    elements = config.seq_length * config.micro_batch_size * config.hidden_size
    if config.sequence_parallel:
        elements //= config.tensor_model_parallel_size
    return Boundary(pipeline, elements * compute_dtype(config).itemsize)


def _nothing_more(_iteration: int) -> Sequence[Bundle]:
    return ()


class _Arriving:
    """Request of a tensor that is on its way: takes the receipt when it has been waited for."""

    def __init__(self, request: Any, recorder: BoundaryRecorder, key: BoundaryKey, tensor: torch.Tensor) -> None:
        self._request, self._recorder, self._key = request, recorder, key
        self._tensor: torch.Tensor | None = tensor

    def wait(self) -> Any:
        """Waits for the tensor."""
        result = self._request.wait()
        if self._tensor is not None:
            self._recorder.received(self._key, self._tensor)
            self._tensor = None
        return result


class BoundaryP2P(P2PCommunicator):  # type: ignore[misc]
    """What both communicators share.

    Args:
        inner: moves the tensors.
        recorder: writes the transcript.
    """

    def __init__(self, inner: P2PCommunicator, recorder: BoundaryRecorder) -> None:
        super().__init__(inner.pp_group, inner.config)
        self.inner, self.recorder = inner, recorder

    def begin(self, iteration: int) -> None:
        """Before the schedule of an iteration runs."""
        self.recorder.begin(iteration)

    def finish(self) -> None:
        """After the schedule of the iteration has run."""
        self.recorder.finish()

    def abandon(self) -> None:
        """Instead of `finish` where the schedule was interrupted."""
        self.recorder.abandon()

    def exchange(
        self, sends: dict[Direction, torch.Tensor | None], receives: dict[Direction, bool], shape: Any, wait: bool
    ) -> Exchanged:
        """Sends and receives with neighbours that are there, and takes the receipts."""
        keys = {direction: self.recorder.expect(direction) for direction, wanted in receives.items() if wanted}
        from_prev, from_next, requests = self.inner._communicate(
            tensor_send_next=sends[Direction.FORWARD],
            tensor_send_prev=sends[Direction.BACKWARD],
            recv_prev=receives[Direction.FORWARD],
            recv_next=receives[Direction.BACKWARD],
            tensor_shape=shape,
            wait_on_reqs=wait,
        )
        names = {Direction.FORWARD: ("recv_prev", from_prev), Direction.BACKWARD: ("recv_next", from_next)}
        for direction, key in keys.items():
            name, tensor = names[direction]
            if not requests:
                self.recorder.received(key, tensor)
            else:
                requests[name] = _Arriving(requests[name], self.recorder, key, tensor)
        return from_prev, from_next, requests


class LoggedP2P(BoundaryP2P):
    """Writes the transcript while the inner communicator moves the tensors."""

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Exchanged:
        """Overrides core's."""
        sends = {Direction.FORWARD: tensor_send_next, Direction.BACKWARD: tensor_send_prev}
        for direction, tensor in sends.items():
            if tensor is not None:
                self.recorder.sent(direction, tensor)
        receives = {Direction.FORWARD: recv_prev, Direction.BACKWARD: recv_next}
        return self.exchange(sends, receives, tensor_shape, wait_on_reqs)


class ReplayP2P(BoundaryP2P):
    """For a rank of a segment that replays: neighbours outside of it are stood in for by their transcripts.

    What they sent is given from bundles, in order; what is sent to them is compared with their receipts and dropped. A
    difference, a missing or a left-over record is a RecoveryError. Exchange inside the segment is live.

    Args:
        inner: moves tensors inside the segment.
        recorder: writes the transcript again.
        previous_inside, next_inside: whether the neighbours replay too.
        fetch: gives the bundles of an iteration that none were fed for.
    """

    def __init__(
        self,
        inner: P2PCommunicator,
        recorder: BoundaryRecorder,
        previous_inside: bool,
        next_inside: bool,
        fetch: Fetch = _nothing_more,
    ) -> None:
        super().__init__(inner, recorder)
        self._fetch = fetch
        # By direction: who sends in it, and who is sent to in it.
        self._live_from = {Direction.FORWARD: previous_inside, Direction.BACKWARD: next_inside}
        self._live_to = {Direction.FORWARD: next_inside, Direction.BACKWARD: previous_inside}
        self._bundles: dict[tuple[int, Direction], Bundle] = {}
        self._given: dict[Direction, Bundle] = {}
        self._prints: list[tuple[BoundaryKey, torch.Tensor]] = []

    def feed(self, bundle: Bundle) -> None:
        """Gives an iteration of an outside neighbour's transcript; let go when the iteration has been replayed."""
        self._bundles[bundle.iteration, bundle.direction] = bundle

    def begin(self, iteration: int) -> None:
        """Checks that the neighbours' transcripts are those of the iteration, complete, before anything is computed."""
        self._given, self._prints = {}, []
        pipeline = self.recorder.pipeline
        for fetched in self._fetch(iteration):
            self.feed(fetched)
        for direction in Direction:
            if self._live_from[direction] or not pipeline.has_sender(direction):
                continue
            wanted, checked = pipeline.received(direction), pipeline.sent(direction.opposite)
            bundle = self._bundles.get((iteration, direction))
            if bundle is None:
                raise RecoveryError(f"iteration {iteration}: no transcript of the {direction} neighbour was given")
            whose = f"iteration {iteration}: transcript of rank {bundle.rank}"
            _compare_keys(f"{whose}, sent", [record.key for record in bundle.records], wanted)
            _compare_keys(f"{whose}, received", [receipt.key for receipt in bundle.receipts], checked)
            self._given[direction] = bundle
        super().begin(iteration)

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Exchanged:
        """Overrides core's."""
        sends = {Direction.FORWARD: tensor_send_next, Direction.BACKWARD: tensor_send_prev}
        receives = {Direction.FORWARD: recv_prev, Direction.BACKWARD: recv_next}
        for direction, tensor in sends.items():
            if tensor is not None:
                key = self.recorder.sent(direction, tensor)
                if not self._live_to[direction]:
                    self._drop(key, tensor)
        live_sends = {d: tensor if self._live_to[d] else None for d, tensor in sends.items()}
        live_receives = {d: wanted and self._live_from[d] for d, wanted in receives.items()}
        found: dict[Direction, torch.Tensor | None] = dict.fromkeys(Direction)
        requests: Any = None if wait_on_reqs else {}
        if any(live_receives.values()) or any(tensor is not None for tensor in live_sends.values()):
            from_prev, from_next, requests = self.exchange(live_sends, live_receives, tensor_shape, wait_on_reqs)
            found = {Direction.FORWARD: from_prev, Direction.BACKWARD: from_next}
        for direction, wanted in receives.items():
            if wanted and not self._live_from[direction]:
                found[direction] = self._give(direction, tensor_shape)
                if not wait_on_reqs:
                    requests["recv_prev" if direction is Direction.FORWARD else "recv_next"] = _Arrived()
        return found[Direction.FORWARD], found[Direction.BACKWARD], requests

    def _give(self, direction: Direction, shape: Any) -> torch.Tensor:
        key = self.recorder.expect(direction)
        record = self._given[direction].records[key.order]
        device, dtype = torch.cuda.current_device(), self.config.pipeline_dtype
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        if tensor.numel() * tensor.element_size() != len(record.data):
            raise RecoveryError(
                f"iteration {self.recorder.iteration}: {key} has {len(record.data)} bytes in the transcript"
            )
        tensor.copy_(torch.frombuffer(record.data, dtype=dtype).view(tensor.shape))
        self.recorder.received(key, tensor)
        return tensor.requires_grad_(True)

    def _drop(self, key: BoundaryKey, tensor: torch.Tensor) -> None:
        """The comparison is made at the end of the iteration, so that nobody waits for the device here."""
        result = torch.zeros((), dtype=torch.int64, device=tensor.device)
        fingerprint(tensor, result)
        self._prints.append((key, result))

    def finish(self) -> None:
        """Compares what was sent with the receipts, and commits the transcript only if all is equal."""
        iteration = self.recorder.iteration
        self.recorder.check_complete()
        found = to_host(torch.stack([result for _, result in self._prints])).tolist() if self._prints else []
        for (key, _), value in zip(self._prints, found, strict=True):
            # The receiver of a direction is the sender of the opposite one.
            receipt = self._given[key.direction.opposite].receipts[key.order]
            if receipt.fingerprint != value:
                raise RecoveryError(
                    f"iteration {iteration}: the replayed {key} differs from what rank "
                    f"{self._given[key.direction.opposite].rank} received; the replay is not exact"
                )
        self._bundles = {place: bundle for place, bundle in self._bundles.items() if place[0] != iteration}
        self._given, self._prints = {}, []
        super().finish()


class _Arrived:
    """Request of a tensor that is there already."""

    def wait(self) -> bool:
        """Nothing to wait for."""
        return True


def _compare_keys(whose: str, found: Sequence[BoundaryKey], wanted: Sequence[BoundaryKey]) -> None:
    for key, expected in zip(found, wanted, strict=False):
        if key != expected:
            raise RecoveryError(f"{whose}: {key} where {expected} belongs")
    if len(found) != len(wanted):
        raise RecoveryError(f"{whose}: {len(found)} {'records' if found else ''} of {len(wanted)}")


@contextlib.contextmanager
def transcribed(communicator: P2PCommunicator, iteration: int) -> Iterator[None]:
    """Around the schedule of an iteration: its transcript is complete afterwards, or there is none."""
    if not isinstance(communicator, BoundaryP2P):
        yield
        return
    communicator.begin(iteration)
    try:
        yield
        communicator.finish()
    except BaseException:
        communicator.abandon()
        raise


def boundary_recorder(
    job: TrainingJob, log: TranscriptLog | None, copier: LogCopier, events: EventLog
) -> BoundaryRecorder:
    """A recorder for the job's schedule; made once, it serves every communicator of this process."""
    return BoundaryRecorder(boundary_of(job).pipeline, log, copier, job.topology.device, events)


def log_boundary(job: TrainingJob, recorder: BoundaryRecorder) -> LoggedP2P:
    """Gives the job a communicator over its present process groups that writes the transcript."""
    communicator = LoggedP2P(build_communicator(job.config, job.topology, job.model_config), recorder)
    job.communicator = communicator
    return communicator


def replay_boundary(
    job: TrainingJob, recorder: BoundaryRecorder, scope: frozenset[int], fetch: Fetch = _nothing_more
) -> ReplayP2P:
    """Gives the job, on a rank of `scope`, a communicator for replays, over its present process groups.

    Args:
        job: the training job.
        recorder: writes the transcript again.
        scope: all stages that replay; what comes from others must be fed, or fetched.
        fetch: see ReplayP2P.
    """
    pipeline, inner = recorder.pipeline, build_communicator(job.config, job.topology, job.model_config)
    previous, following = (pipeline.sender(direction).stage in scope for direction in Direction)
    job.communicator = communicator = ReplayP2P(inner, recorder, previous, following, fetch)
    return communicator
