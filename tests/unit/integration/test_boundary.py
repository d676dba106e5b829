"""Core's real schedules, one stage at a time with neighbours that are not there: what crosses is what the keys say."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.moevement.errors import RecoveryError
from megatron.moevement.events import EventLog
from megatron.moevement.integration.boundary import (
    LoggedP2P,
    ReplayP2P,
    boundary_of,
    boundary_recorder,
    log_boundary,
    replay_boundary,
    transcribed,
)
from megatron.moevement.integration.boundary_recorder import BoundaryRecorder
from megatron.moevement.integration.fingerprint import fingerprint
from megatron.moevement.integration.log_copy import HostCopier
from megatron.moevement.transcript.keys import Boundary, Direction, Pipeline
from megatron.moevement.transcript.log import TranscriptLog
from megatron.moevement.transcript.packing import Bundle
from megatron.moevement.transcript.plan import plan_transcript
from megatron.moevement.transcript.records import Receipt, Record
from moevement_ext import DigestPool

SHAPE, NBYTES = (2, 1, 4), 32
FORWARD, BACKWARD = Direction.FORWARD, Direction.BACKWARD


class Group:
    """A process group of which there is only this process."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class Request:
    """A request that notes that it was waited for."""

    def __init__(self, tensor: torch.Tensor | None, value: float) -> None:
        self._tensor, self._value = tensor, value

    def wait(self) -> None:
        """Only now the tensor has its values."""
        if self._tensor is not None:
            with torch.no_grad():
                self._tensor.fill_(self._value)


class Nobody(P2PCommunicator):  # type: ignore[misc]
    """Receives, in each direction, tensors filled with their order."""

    def __init__(self, group: Group, config: Any) -> None:
        super().__init__(group, config)
        self.counts = dict.fromkeys(Direction, 0)
        self.sends = 0
        self.lost_at = -1

    def _communicate(self, *, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool,
                     tensor_shape: Any, wait_on_reqs: bool = True) -> Any:  # fmt: skip
        if self.counts[BACKWARD] == self.lost_at:
            raise ConnectionError("the peer is gone")
        requests, found = {}, []
        for name, tensor in (("send_next", tensor_send_next), ("send_prev", tensor_send_prev)):
            if tensor is not None:
                requests[name] = Request(None, 0.0)
                self.sends += 1
        for name, wanted, direction in (("recv_prev", recv_prev, FORWARD), ("recv_next", recv_next, BACKWARD)):
            tensor = torch.full(tuple(tensor_shape), -1.0, requires_grad=True) if wanted else None
            if wanted:
                requests[name] = Request(tensor, self.counts[direction])
                self.counts[direction] += 1
            found.append(tensor)
        if wait_on_reqs:
            for request in requests.values():
                request.wait()
        return found[0], found[1], None if wait_on_reqs else requests


def code(micro_batch: int, chunk: int) -> float:
    """What a chunk makes of a micro-batch, in either direction."""
    return float(micro_batch * 8 + chunk)


class Tag(torch.autograd.Function):
    """Gives the same number forward and backward; notes what came from the other side."""

    @staticmethod
    def forward(context: Any, source: torch.Tensor, chunk: "Chunk", micro_batch: int) -> torch.Tensor:
        context.chunk, context.micro_batch = chunk, micro_batch
        chunk.inputs[micro_batch] = float(source.reshape(-1)[0])
        return torch.full(SHAPE, code(micro_batch, chunk.vp_stage))

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        context.chunk.gradients[context.micro_batch] = float(gradients[0].reshape(-1)[0])
        return torch.full(SHAPE, code(context.micro_batch, context.chunk.vp_stage)), None, None


class Chunk(torch.nn.Module):
    """A model chunk that computes numbers which say where they come from."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.config, self.vp_stage, self.model_type = config, number, ModelType.encoder_or_decoder
        self.start = torch.nn.Parameter(torch.zeros(SHAPE))
        self.pre_process = self.post_process = False
        self.received: torch.Tensor | None = None
        self.calls = 0
        self.inputs: dict[int, float] = {}
        self.gradients: dict[int, float] = {}

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        (self.received,) = tensors

    def forward(self) -> torch.Tensor:
        source = self.received if self.received is not None else self.start
        self.calls += 1
        return Tag.apply(source, self, self.calls - 1)


class Stage:
    """One stage of a pipeline, with core's schedule."""

    def __init__(self, pipeline: Pipeline, overlap: bool = False) -> None:
        self.pipeline = pipeline
        config = TransformerConfig(
            num_layers=pipeline.stages * pipeline.chunks,
            hidden_size=SHAPE[2],
            num_attention_heads=1,
            pipeline_model_parallel_size=pipeline.stages,
            virtual_pipeline_model_parallel_size=pipeline.chunks if pipeline.chunks > 1 else None,
            microbatch_group_size_per_vp_stage=pipeline.group if pipeline.chunks > 1 else None,
            pipeline_dtype=torch.float32,
            batch_p2p_comm=False,
            overlap_p2p_comm=overlap,
            deallocate_pipeline_outputs=False,
        )
        self.chunks = [Chunk(config, number) for number in range(pipeline.chunks)]
        self.inner = Nobody(Group(pipeline.stages, pipeline.stage), config)

    def run(self, communicator: P2PCommunicator, iteration: int) -> None:
        """An iteration."""
        one = Group(1, 0)
        virtual = self.pipeline.chunks if self.pipeline.chunks > 1 else None
        schedule = get_forward_backward_func(pp_size=self.pipeline.stages, vp_size=virtual)
        for chunk in self.chunks:
            chunk.calls = 0
        with transcribed(communicator, iteration):
            schedule(
                forward_step_func=lambda _, chunk: (chunk(), lambda output: (output.sum(), {})),
                data_iterator=[None] * len(self.chunks),
                model=self.chunks if virtual else self.chunks[0],
                num_microbatches=self.pipeline.micro_batches,
                seq_length=SHAPE[0],
                micro_batch_size=SHAPE[1],
                forward_only=False,
                p2p_communicator=communicator,
                pg_collection=SimpleNamespace(tp=one, cp=one, embd=None, pos_embd=None, pp=one, dp_cp=one),
            )

    def recorder(self, path: Path) -> tuple[BoundaryRecorder, TranscriptLog]:
        """With a transcript of two iterations."""
        plan = plan_transcript(Boundary(self.pipeline, NBYTES), 1, 0.0, 1 << 30)
        log = TranscriptLog.create(path, {"rank": 1, "run_id": "run"}, plan.shape, DigestPool())
        return BoundaryRecorder(self.pipeline, log, HostCopier(), torch.device("cpu"), EventLog(None, 0)), log


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, topology: object) -> None:
    """Ranks of a group are those of the world."""
    monkeypatch.setattr(dist, "get_global_rank", lambda _group, rank: rank)


ONE_BY_ONE = [(2, 4, 1, 2), (3, 6, 1, 3), (4, 2, 1, 4)]
INTERLEAVED = [(2, 4, 2, 2), (2, 6, 3, 3), (3, 7, 2, 4), (4, 8, 2, 4)]
# Only the interleaved schedule may overlap its exchange.
SCHEDULES = [(*shape, False) for shape in ONE_BY_ONE + INTERLEAVED] + [(*shape, True) for shape in INTERLEAVED]


@pytest.mark.parametrize(("stages", "micro_batches", "chunks", "group", "overlap"), SCHEDULES)
def test_keys_are_what_the_schedule_does(
    tmp_path: Path, stages: int, micro_batches: int, chunks: int, group: int, overlap: bool
) -> None:
    for number in range(stages):
        stage = Stage(Pipeline(stages, number, micro_batches, chunks, group), overlap)
        recorder, log = stage.recorder(tmp_path / str(number))
        stage.run(LoggedP2P(stage.inner, recorder), 5)
        recorder.close()
        assert log.iterations == {5}
        for direction in Direction:
            records = log.records(5, direction)
            assert [record.key for record in records] == [*stage.pipeline.sent(direction)]
            for record in records:
                assert np.frombuffer(record.data, np.float32)[0] == code(record.key.micro_batch, record.key.chunk)
            receipts = log.receipts(5, direction)
            assert [receipt.key for receipt in receipts] == [*stage.pipeline.received(direction)]
            assert all(receipt.fingerprint == print_of(receipt.key.order) for receipt in receipts)
        check_arrivals(stage)


def print_of(value: float) -> int:
    """Fingerprint of a tensor filled with a number."""
    result = torch.zeros((), dtype=torch.int64)
    fingerprint(torch.full(SHAPE, float(value)), result)
    return int(result)


def check_arrivals(stage: Stage) -> None:
    """Every received tensor has gone to the micro-batch and chunk that its key says."""
    pipeline = stage.pipeline
    for key in pipeline.received(FORWARD):
        chunk = key.chunk + (pipeline.stage == 0)
        assert stage.chunks[chunk].inputs[key.micro_batch] == key.order
    for key in pipeline.received(BACKWARD):
        chunk = key.chunk - (pipeline.stage == pipeline.stages - 1)
        assert stage.chunks[chunk].gradients[key.micro_batch] == key.order


def bundle(pipeline: Pipeline, direction: Direction, iteration: int = 5) -> Bundle:
    """What a neighbour would give: its tensors are filled with their order, and it has received ours."""
    records = tuple(
        Record(key, memoryview(bytearray(np.full(SHAPE, key.order, np.float32).tobytes())), "")
        for key in pipeline.received(direction)
    )
    receipts = tuple(
        Receipt(key, print_of(code(key.micro_batch, key.chunk))) for key in pipeline.sent(direction.opposite)
    )
    return Bundle(pipeline.sender(direction).stage, "run", iteration, direction, records, receipts)


def replaying(tmp_path: Path, pipeline: Pipeline, overlap: bool = False) -> tuple[Stage, ReplayP2P, TranscriptLog]:
    stage = Stage(pipeline, overlap)
    recorder, log = stage.recorder(tmp_path / "t")
    return stage, ReplayP2P(stage.inner, recorder, False, False), log


@pytest.mark.parametrize(("chunks", "overlap"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stage_alone_is_given_what_it_received(tmp_path: Path, number: int, chunks: int, overlap: bool) -> None:
    stage, replay, log = replaying(tmp_path, Pipeline(3, number, 6, chunks, 3), overlap)
    for direction in Direction:
        replay.feed(bundle(stage.pipeline, direction))
    stage.run(replay, 5)
    replay.recorder.close()
    check_arrivals(stage)
    assert stage.inner.sends == 0 and not any(stage.inner.counts.values())
    for direction in Direction:
        assert [record.key for record in log.records(5, direction)] == [*stage.pipeline.sent(direction)]
        found = [receipt.fingerprint for receipt in log.receipts(5, direction)]
        assert found == [print_of(key.order) for key in stage.pipeline.received(direction)]
    if stage.pipeline.has_sender(FORWARD):
        with pytest.raises(RecoveryError, match="no transcript of the forward neighbour"):
            stage.run(replay, 5)


def test_one_neighbour_inside(tmp_path: Path) -> None:
    stage, outside, _ = replaying(tmp_path, Pipeline(3, 1, 4, 1, 3))
    replay = ReplayP2P(stage.inner, outside.recorder, False, True)
    replay.feed(bundle(stage.pipeline, FORWARD))
    stage.run(replay, 5)
    check_arrivals(stage)
    assert stage.inner.sends == 4 and stage.inner.counts == {FORWARD: 0, BACKWARD: 4}


def changed(what: str, given: Bundle) -> Bundle:
    """A neighbour's transcript that is not what it should be."""
    records, receipts = given.records, given.receipts
    keys = [record.key for record in records]
    if what == "shifted":
        records = tuple(dataclasses.replace(r, key=k) for r, k in zip(records, [*keys[1:], keys[0]], strict=True))
    elif what == "dropped":
        records = records[:-1]
    elif what == "left over":
        records = (*records, records[0])
    elif what == "short":
        records = (dataclasses.replace(records[0], data=records[0].data[:-4]), *records[1:])
    elif what == "other receipt":
        receipts = (*receipts[:2], dataclasses.replace(receipts[2], fingerprint=receipts[2].fingerprint ^ 1))
        receipts += given.receipts[3:]
    elif what == "no receipt":
        receipts = receipts[1:]
    return dataclasses.replace(given, records=records, receipts=receipts)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("shifted", "iteration 5: transcript of rank 0, sent: activation 1 .* where activation 0 .* belongs"),
        ("dropped", "transcript of rank 0, sent: 5 records of 6"),
        ("left over", "transcript of rank 0, sent: 7 records of 6"),
        ("short", "iteration 5: activation 0 .micro-batch 0, model chunk 0. has 28 bytes"),
        ("other receipt", "iteration 5: the replayed gradient 2 .micro-batch 2, model chunk 0. differs .* rank 0"),
        ("no receipt", "transcript of rank 0, received: gradient 1 .* where gradient 0 .* belongs"),
    ],
)
def test_a_wrong_transcript_is_noticed(tmp_path: Path, what: str, text: str) -> None:
    stage, replay, log = replaying(tmp_path, Pipeline(3, 1, 6, 1, 3))
    replay.feed(changed(what, bundle(stage.pipeline, FORWARD)))
    replay.feed(bundle(stage.pipeline, BACKWARD))
    with pytest.raises(RecoveryError, match=text):
        stage.run(replay, 5)
    replay.recorder.close()
    assert log.iterations == frozenset()


def test_an_interrupted_iteration_can_be_run_again(tmp_path: Path) -> None:
    stage = Stage(Pipeline(3, 1, 6, 1, 3))
    recorder, log = stage.recorder(tmp_path / "t")
    communicator, stage.inner.lost_at = LoggedP2P(stage.inner, recorder), 2
    for _ in range(9):
        stage.inner.counts = dict.fromkeys(Direction, 0)
        with pytest.raises(ConnectionError):
            stage.run(communicator, 5)
    assert recorder.iteration is None and not log.iterations
    stage.inner.counts, stage.inner.lost_at = dict.fromkeys(Direction, 0), -1
    stage.run(communicator, 5)
    recorder.close()
    assert log.iterations == {5} and len(log.records(5, FORWARD)) == 6
    check_arrivals(stage)


def test_an_incomplete_replay_is_noticed(tmp_path: Path) -> None:
    stage, replay, log = replaying(tmp_path, Pipeline(3, 1, 6, 1, 3))
    for direction in Direction:
        replay.feed(bundle(stage.pipeline, direction))
    stage.pipeline = dataclasses.replace(stage.pipeline, micro_batches=5)
    with pytest.raises(RecoveryError, match="iteration 5: 5 of 6 forward tensors were sent"):
        stage.run(replay, 5)
    replay.recorder.close()
    assert log.iterations == frozenset()


def test_a_job_and_its_communicators(build: Any, make_config: Any, tmp_path: Path) -> None:
    job = build()
    assert boundary_of(job) == Boundary(Pipeline(1, 0, 2, 1, 1), 16 * 2 * 16 * 2)
    recorder = boundary_recorder(job, None, HostCopier(), EventLog(None, 0))
    assert isinstance(log_boundary(job, recorder), LoggedP2P)
    first = job.communicator
    log_boundary(job, recorder)
    assert job.communicator is not first and type(job.communicator.inner) is P2PCommunicator
    assert replay_boundary(job, recorder, frozenset({0})) is job.communicator
    recorder.close()
