"""Dense checkpoints of a training job with megatron.core's dist_checkpointing, in its format torch_dist.

Core's own `save` lets rank 0 write while the others wait for it in a collective, and writes from forked processes: an
error on one rank, or a killed writer, would leave the rest waiting. Here the same parts of core are called one by
one; each write is local, and after it all ranks agree on whether it went well. The shards themselves are written by
`torch.distributed.checkpoint.save`, which agrees in the same way.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as core_torch
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from megatron.moevement.dense import directory as layout
from megatron.moevement.dense import manifest as manifests
from megatron.moevement.dense.manifest import FileEntry, Manifest
from megatron.moevement.errors import ConfigError, MoevementError, RecoveryError, StoreError
from megatron.moevement.integration import dense_state
from megatron.moevement.integration.job import TrainingJob

_BACKEND, _BACKEND_VERSION = "torch_dist", 1
_RANK_STATE = "moevement.rank_state"
_CHECKPOINT_VERSION = 3.0  # of Megatron's weight layouts; its tools ask for it


@dataclasses.dataclass(frozen=True, slots=True)
class SaveResult:
    """How a save went, equal on all ranks but for `seconds`.

    Attributes:
        step: the state that was to be saved.
        ok: whether a restart finds the checkpoint.
        seconds: how long training stood still for it on this rank.
        nbytes: bytes of the whole checkpoint on disk, 0 if it failed.
        error: what went wrong and where, one line; empty if nothing did.
    """

    step: int
    ok: bool
    seconds: float
    nbytes: int
    error: str


class _SaveFailed(MoevementError):
    """A save that all ranks have agreed to give up; the message is one line."""


def find_dense(directory: Path | str, before: int | None = None) -> layout.Newest:
    """The newest complete checkpoint as rank 0 sees it, the same answer on every rank. Collective.

    Args:
        directory: of `--save` or `--load`.
        before: pass over checkpoints of this step and later ones.
    """
    found = layout.newest_complete(Path(directory), before) if dist.get_rank() == 0 else None
    answer: layout.Newest = _gather(found)[0]
    return answer


def save_dense(job: TrainingJob, directory: Path | str) -> SaveResult:
    """Writes a dense checkpoint of `Step job.step`; the state is not changed. Collective over the world.

    What goes wrong on any rank is agreed by all and returned, never raised: the former checkpoint stays. The rename
    that completes the checkpoint comes after every byte is durable.
    """
    started, save, step = time.perf_counter(), Path(directory), job.step
    try:
        nbytes = _save(job, save, step)
        error = ""
    except _SaveFailed as failure:
        nbytes, error = 0, str(failure)
        if job.topology.rank == 0:
            layout.discard(save, step)
        _gather(None)  # nobody goes on before the rest of it is gone
    return SaveResult(step, not error, time.perf_counter() - started, nbytes, error)


def load_dense(job: TrainingJob, directory: Path | str, step: int) -> None:
    """Restores the dense checkpoint of `step` exactly and in place, and sets `job.step`. Collective over the world.

    Tensors keep their storage: addresses of weights, master weights and moments stay valid.

    Raises:
        ConfigError: a flag differs from those of the save; the message names it and the remedy.
        StoreError: the checkpoint is damaged; nothing of the state was changed, an older one may serve.
        RecoveryError: reading failed half-way, the state is neither the old nor the saved one; load another checkpoint.
    """
    path = layout.checkpoint_path(Path(directory), step)
    manifest = _checked_manifest(job, path, step)
    job.pristine = False
    job.gather_parameters()
    dense_state.create_moments(job)
    kept = dense_state.Kept(job)
    sharded = _sharded_state(job, manifest.sharding_type, loading=True)
    try:
        loaded = dist_checkpointing.load(sharded, str(path), strict=StrictHandling.RAISE_ALL)
    except (CheckpointException, CheckpointingException) as error:
        raise RecoveryError(f"{path}: {_one_line(error)}; the state is lost, load another checkpoint") from error
    for number, chunk in enumerate(dense_state.bare_chunks(job)):
        chunk.load_state_dict(loaded[_model_key(job, number)], strict=True)
    dense_state.complete_steps(loaded["optimizer"])
    job.optimizer.load_state_dict(loaded["optimizer"])
    kept.put_back()
    job.reset_temporary_state()
    dense_state.restore_rank_state(job, loaded["rank_state"])
    job.step = step


# ------------------------------------------------------------------------------------------------------------ saving


def _save(job: TrainingJob, save: Path, step: int) -> int:
    """The steps of a save; returns bytes on disk.

    Raises:
        _SaveFailed: on all ranks.
    """
    rank = job.topology.rank
    partial = layout.partial_path(save, step)
    job.gather_parameters()
    dense_state.create_moments(job)
    sharding_type = _agree_on_sharding_type(job)
    sharded, common = save_preprocess(_sharded_state(job, sharding_type, loading=False))
    required = sum(_gather(_own_bytes(sharded)))

    def write_common() -> None:
        layout.prepare(save, step)
        layout.check_space(partial, required)
        content = io.BytesIO()
        torch.save(common, content)
        (partial / layout.COMMON).write_bytes(content.getbuffer())
        layout.sync(partial / layout.COMMON)

    _together(rank == 0, write_common)
    _write_shards(sharded, partial)
    files = _describe_files(rank, partial)

    def complete() -> None:
        save_config(CheckpointingConfig(_BACKEND, _BACKEND_VERSION), str(partial))
        core_config = partial / layout.CORE_CONFIG
        layout.sync(core_config)
        entries = {**files, core_config.name: manifests.describe(core_config)}
        manifests.write(partial, Manifest(step, dense_state.identity(job.config), sharding_type, entries))
        layout.publish(save, step)

    _together(rank == 0, complete)
    return sum(entry.nbytes for entry in files.values())


class _ShardWriter(FileSystemWriter):
    """Torch's writer, with the operating system's reason for a failed write instead of the archive's symptom."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__cause__ or reason.__context__
            raise (reason or error) from None


def _write_shards(sharded: Any, partial: Path) -> None:
    """Every rank writes its shards into one file and syncs it; a failure on any rank is raised on all."""
    by_key: dict[str, list[Any]] = {}
    for part in nested_values(sharded):
        if is_main_replica(part.replica_id):
            by_key.setdefault(part.unique_key if isinstance(part, ShardedObject) else part.key, []).append(part)
    try:
        save_shards(
            core_torch.mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_ShardWriter(partial, sync_files=True),
            planner=core_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    except CheckpointException as error:
        raise _SaveFailed(_one_line(error)) from error


def _describe_files(rank: int, partial: Path) -> dict[str, FileEntry]:
    """Size and digest of every file so far; each rank reads back its own, rank 0 also the common ones. Collective."""
    entries: dict[str, FileEntry] = {}

    def describe() -> None:
        names = [path.name for path in partial.glob(f"__{rank}_*")]
        for name in names + ([layout.COMMON, layout.SHARD_METADATA] if rank == 0 else []):
            entries[name] = manifests.describe(partial / name)

    _together(True, describe)
    return {name: entry for part in _gather(entries) for name, entry in part.items()}


def _together(mine: bool, action: Callable[[], None]) -> None:
    """Runs `action` where `mine`; if it fails on any rank, raises `_SaveFailed` on all. Collective.

    The action must not be collective.
    """
    problem = ""
    if mine:
        try:
            action()
        except (OSError, RuntimeError, MoevementError) as error:  # torch.save reports a full disk as RuntimeError
            problem = " ".join(str(error).split()) or type(error).__name__
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(_gather(problem)) if text]
    if problems:
        raise _SaveFailed(problems[0])


def _own_bytes(sharded: Any) -> int:
    """Bytes that this rank writes; the small pickled objects are covered by the spare room of the check."""
    tensors = (v for v in nested_values(sharded) if isinstance(v, ShardedTensor) and is_main_replica(v.replica_id))
    return sum(t.data.numel() * t.data.element_size() for t in tensors)


# ------------------------------------------------------------------------------------------------- what is saved


def _sharded_state(job: TrainingJob, sharding_type: str, loading: bool) -> dict[str, Any]:
    """Core's sharded state of models and optimizer, and everything else that belongs to `Step job.step`."""
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if sharding_type:
        metadata["distrib_optim_sharding_type"] = sharding_type
    models = {
        _model_key(job, number): chunk.sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(dense_state.bare_chunks(job))
    }
    optimizer = job.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    rank, ranks = job.topology.rank, job.topology.world_size
    data = None if loading else dense_state.capture_rank_state(job)
    state = {
        **models,
        "optimizer": optimizer,
        "rank_state": ShardedObject(_RANK_STATE, data, (ranks,), (rank,), replica_id=0),
    }
    if not loading:
        state["args"] = json.dumps(dataclasses.asdict(job.config))
        state["checkpoint_version"] = _CHECKPOINT_VERSION
        state["iteration"] = job.step
        state["opt_param_scheduler"] = job.scheduler.state_dict()
        state["content_metadata"] = metadata
    return state


def _model_key(job: TrainingJob, number: int) -> str:
    return "model" if len(job.chunks) == 1 else f"model{number}"


def _agree_on_sharding_type(job: TrainingJob) -> str:
    """Core's format of the distributed optimizer: bucket by bucket, unless a rank owns nothing of some bucket.

    `dp_reshardable` writes each rank's part as it lies in memory. Core asserts that no part is empty; where one is,
    `fully_reshardable` gathers whole parameters instead. Both restore exactly. Collective.
    """
    if not job.config.use_distributed_optimizer:
        return ""
    owned = _gather(dense_state.smallest_ownership(job))
    if any(whole == 0 for whole, _ in owned):
        raise _SaveFailed(
            "--use-distributed-optimizer: a rank owns no parameter of an optimizer, which megatron.core can't save; "
            "use fewer data-parallel ranks or remove the flag"
        )
    return "fully_reshardable" if any(bucket == 0 for _, bucket in owned) else "dp_reshardable"


# ----------------------------------------------------------------------------------------------------------- loading


def _checked_manifest(job: TrainingJob, path: Path, step: int) -> Manifest:
    """The manifest, once all ranks have found flags, sizes and digests right. Collective.

    Raises:
        ConfigError, StoreError: the same on all ranks.
    """
    manifest, problem, refusal, rank = None, "", "", job.topology.rank
    try:
        missing = layout.missing_part(path)
        if missing:
            raise StoreError(f"{path}: {missing}")
        manifest = manifests.read(path)
        refusal = manifests.mismatch(path, manifest.identity, dense_state.identity(job.config))
        if manifest.step != step:
            problem = f"{path}: holds step {manifest.step}"
        elif not refusal:
            common = [name for name in manifest.files if not name.startswith("__")]
            own = [name for name in manifest.files if name.startswith(f"__{rank}_")]
            problem = manifests.verify(path, manifest, own + (common if rank == 0 else []))
    except ConfigError as error:
        refusal = str(error)
    except StoreError as error:
        problem = str(error)
    answers = _gather((refusal, problem))
    for refusal, _ in answers:
        if refusal:
            raise ConfigError(refusal)
    for _, problem in answers:
        if problem:
            raise StoreError(problem)
    assert manifest is not None
    return manifest


# ------------------------------------------------------------------------------------------------------------ helpers


def _gather(value: Any) -> list[Any]:
    """Every rank's value, in order of rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _one_line(error: BaseException) -> str:
    """The first rank's failure of a `CheckpointException`, else the error itself."""
    failures = getattr(error, "failures", None)
    if not failures:
        return " ".join(str(error).split())
    rank = min(failures)
    cause = failures[rank][0]
    return f"rank {rank}: {' '.join(str(cause).split()) or type(cause).__name__}"
