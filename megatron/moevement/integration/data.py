"""Training data: core's GPTDataset, and batches as a pure function of the position.

A sample has a global number; iteration, micro-batch and data-parallel rank follow from it and back. Nothing is
consumed: a replay asks for the same position and gets the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

from megatron.moevement.argument_checks import UsageError
from megatron.moevement.errors import DataError
from megatron.moevement.integration import groups
from megatron.moevement.integration.host_copies import to_device
from megatron.moevement.training_config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank, on the training device.

    Attributes:
        tokens: int64 [micro-batch, sequence], what the model reads.
        labels: int64 [micro-batch, sequence], the next token of each.
        loss_mask: float32 [micro-batch, sequence], 0 where the label is padding.
        position_ids: int64 [micro-batch, sequence].
        attention_mask: None; attention is causal and makes its own mask.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How samples are numbered: micro-batches of all data-parallel ranks follow each other, rank by rank."""

    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    num_micro_batches: int

    def sample_numbers(self, consumed_samples: int, micro_batch: int) -> range:
        """The global numbers of the samples of one micro-batch of this rank."""
        if not 0 <= micro_batch < self.num_micro_batches:
            raise IndexError(f"micro-batch {micro_batch} of {self.num_micro_batches}")
        row = consumed_samples + micro_batch * self.micro_batch_size * self.data_parallel_size
        first = row + self.data_parallel_rank * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class BatchSource:
    """Batches addressed by (samples consumed before the iteration, micro-batch number).

    Args:
        dataset: samples by number, each a dict with `tokens`, `labels`, `loss_mask`, `position_ids` of shape
            [sequence]; None on ranks whose stages read no data.
        layout: how samples are numbered.
        vocab_size: token ids at or above it are refused.
        device: where batches are placed.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, torch.Tensor]] | None,
        layout: BatchLayout,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.dataset = dataset
        self.layout = layout
        self.vocab_size = vocab_size
        self.device = device

    def batch(self, consumed_samples: int, micro_batch: int) -> Batch:
        """One micro-batch; the same arguments always give the same bytes.

        Raises:
            RuntimeError: on a rank that was given no dataset.
            IndexError: beyond the end of the dataset or of the iteration.
            DataError: where a token id is outside the vocabulary.
        """
        if self.dataset is None:
            raise RuntimeError("this pipeline stage reads no data")
        numbers = self.layout.sample_numbers(consumed_samples, micro_batch)
        samples = [self.dataset[number] for number in numbers]
        columns = {name: torch.stack([s[name] for s in samples]) for name in _COLUMNS}
        highest = int(torch.maximum(columns["tokens"].max(), columns["labels"].max()))
        if highest >= self.vocab_size:
            raise DataError(
                f"--data-path holds token {highest}, outside the vocabulary of {self.vocab_size}: use the tokenizer "
                "that the data was prepared with"
            )
        return Batch(**{name: to_device(column, self.device) for name, column in columns.items()})

    def iterator(self, consumed_samples: int) -> Iterator[Batch]:
        """The micro-batches of the iteration before which `consumed_samples` samples were used, in order."""
        for micro_batch in range(self.layout.num_micro_batches):
            yield self.batch(consumed_samples, micro_batch)


_PREPARE_AGAIN = "prepare it again with scripts/prepare_data.py"
# Magic, version, code of the token type, sequences, documents; lengths (4 bytes), starts and documents (8) follow.
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_COLUMNS = ("tokens", "labels", "loss_mask", "position_ids")


def build_train_dataset(
    config: TrainingConfig, tokenizer: MegatronTokenizerBase, reads_data: bool
) -> Sequence[dict[str, Any]] | None:
    """The training split, long enough for all iterations; collective over all ranks.

    Rank 0 builds the index caches once, the others read them. A process that takes over a rank can't wait for rank 0:
    if it finds no whole cache it does without.

    Args:
        config: the training configuration.
        tokenizer: gives the padding and end-of-document ids.
        reads_data: whether this rank has the first or the last stage.

    Raises:
        UsageError: where files are missing or damaged, or the cache folder cannot be written.
    """
    blend, folders = get_blend_from_list(list(config.data_path)), set[str]()
    for prefix in blend[0]:
        for path in (f"{prefix}.bin", f"{prefix}.idx"):
            if not os.path.isfile(path):
                raise UsageError("--data-path", f"{path} does not exist", "prepare it with scripts/prepare_data.py")
        _check_files(prefix)
        folders.add(_check_cache_folder(config.data_cache_path, prefix))
    for folder in folders if dist.get_rank() == 0 else ():
        _remove_damaged(folder)
    dataset_config = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        blend=blend,
        split=config.split,
        path_to_cache=config.data_cache_path,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [config.train_iters * config.samples_per_iteration, 0, 0]
    try:
        return _build(sizes, reads_data, dataset_config)
    except (OSError, ValueError, EOFError):
        if not groups.alone():
            raise
        dataset_config.path_to_cache = ""
        return _build(sizes, reads_data, dataset_config)


def _build(sizes: list[int], reads_data: bool, config: GPTDatasetConfig) -> Sequence[dict[str, Any]] | None:
    train, _valid, _test = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: reads_data, config).build()
    return train  # type: ignore[no-any-return]


def _remove_damaged(folder: str) -> None:
    """Removes cached indices that a process was killed in the middle of writing: they are built again."""
    for path in Path(folder).rglob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            path.unlink(missing_ok=True)


def _check_files(prefix: str) -> None:
    """Refuse an index that is cut off or none, and data that ends before its index says."""
    found = os.path.getsize(f"{prefix}.bin")
    try:
        needed = _indexed_bytes(f"{prefix}.idx")
    except ValueError as error:
        raise UsageError("--data-path", f"{prefix}.idx is damaged ({error})", _PREPARE_AGAIN) from error
    if found < needed:
        raise UsageError("--data-path", f"{prefix}.bin has {found} bytes, its index says {needed}", _PREPARE_AGAIN)


def _indexed_bytes(path: str) -> int:
    """Bytes of data that an index file describes. Core's reader asserts instead, and fails again when it is freed.

    Raises:
        ValueError: it isn't a whole index file.
    """
    with open(path, "rb") as file:
        header = file.read(_INDEX_HEADER.size)
        if len(header) < _INDEX_HEADER.size or not header.startswith(b"MMIDIDX\0\0"):
            raise ValueError("no index header")
        _magic, _version, code, sequences, documents = _INDEX_HEADER.unpack(header)
        length = _INDEX_HEADER.size + 12 * sequences + 8 * documents
        if sequences < 1 or os.path.getsize(path) != length:
            raise ValueError(f"{os.path.getsize(path)} bytes long, its header says {length}")
        file.seek(_INDEX_HEADER.size + 4 * (sequences - 1))
        (last,) = struct.unpack("<i", file.read(4))
        file.seek(_INDEX_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (start,) = struct.unpack("<q", file.read(8))
    return int(start + last * DType.size(DType.dtype_from_code(code)))


def _check_cache_folder(given: str | None, prefix: str) -> str:
    """Refuse a folder of index caches that cannot be written, before ranks wait for each other; returns it."""
    folder = given or os.path.join(prefix, "cache")  # beside the data is where core puts them
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError("--data-cache-path", f"{folder}: {error.strerror}", "name a folder to write to") from error
    return folder
