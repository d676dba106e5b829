"""Tests of batches: a pure function of the position, different in every iteration."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.moevement.argument_checks import UsageError
from megatron.moevement.errors import DataError
from megatron.moevement.integration import groups
from megatron.moevement.integration.corpus import write_corpus
from megatron.moevement.integration.data import Batch, BatchLayout, BatchSource, build_train_dataset
from megatron.moevement.integration.job import TrainingJob
from megatron.moevement.integration.tokenizer import build_tokenizer
from megatron.moevement.training_config import TrainingConfig

CPU = torch.device("cpu")


def layout(rank: int = 0) -> BatchLayout:
    return BatchLayout(micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=3, num_micro_batches=2)


class Numbered:
    """A dataset whose sample n holds n everywhere."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = torch.full((4,), number)
        return {"tokens": row, "labels": row, "loss_mask": row.float(), "position_ids": row}


def test_ranks_and_micro_batches_share_out_every_sample_once() -> None:
    numbers = [n for m in range(2) for rank in range(3) for n in layout(rank).sample_numbers(12, m)]
    assert numbers == list(range(12, 24))


def test_a_micro_batch_beyond_the_iteration_is_refused() -> None:
    with pytest.raises(IndexError):
        layout().sample_numbers(0, 2)


def test_the_same_position_gives_the_same_batch() -> None:
    source = BatchSource(Numbered(), layout(1), 100, CPU)  # type: ignore[arg-type]
    first = source.batch(12, 1)
    list(source.iterator(24))
    assert torch.equal(source.batch(12, 1).tokens, first.tokens)
    assert first.tokens[:, 0].tolist() == [20, 21]
    assert [batch.tokens[0, 0].item() for batch in source.iterator(0)] == [2, 8]
    assert first.attention_mask is None


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    source = BatchSource(Numbered(), layout(), 3, CPU)  # type: ignore[arg-type]
    source.batch(0, 0)
    with pytest.raises(DataError, match="--data-path holds token 7"):
        source.batch(0, 1)


def test_a_rank_without_data_says_so() -> None:
    with pytest.raises(RuntimeError, match="reads no data"):
        BatchSource(None, layout(), 3, CPU).batch(0, 0)


def test_batches_of_a_real_dataset(build: Callable[..., TrainingJob]) -> None:
    job = build()
    batches = [batch for t in range(4) for batch in job.batches.iterator(job.samples_before(t))]
    for batch in batches:
        assert batch.tokens.shape == (2, 16)
        assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        assert batch.loss_mask.sum() == 32
    assert len({tuple(batch.tokens.flatten().tolist()) for batch in batches}) == len(batches)


def test_missing_files_are_named(make_config: Callable[..., TrainingConfig]) -> None:
    config = make_config(data_path=("/nowhere/corpus",))
    with pytest.raises(UsageError, match=r"--data-path /nowhere/corpus.bin does not exist: .*prepare_data.py"):
        build_train_dataset(config, build_tokenizer("ByteLevelTokenizer"), reads_data=True)


@pytest.mark.parametrize(
    ("suffix", "damage", "text"),
    [
        (".idx", lambda content: b"garbage", r"corpus.idx is damaged \(no index header"),
        (".idx", lambda content: content[:20], r"corpus.idx is damaged"),
        (".idx", lambda content: content[:-9], r"corpus.idx is damaged"),
        (".bin", lambda content: content[:-1], r"corpus.bin has \d+ bytes, its index says \d+"),
        (".bin", lambda content: b"", r"corpus.bin"),
    ],
)
def test_damaged_files_are_named(
    make_config: Callable[..., TrainingConfig], tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes], text: str
) -> None:
    prefix = tmp_path / "corpus"
    write_corpus(["some text", "and more"], str(prefix), "ByteLevelTokenizer")
    path = prefix.with_suffix(suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=f"--data-path .*{text}.*prepare it again"):
        build_train_dataset(make_config(data_path=(str(prefix),)), build_tokenizer("ByteLevelTokenizer"), True)


def test_a_cache_that_a_killed_process_has_left_is_built_again(
    build: Callable[..., TrainingJob], tmp_path: Path
) -> None:
    first = build(data_cache_path=str(tmp_path)).batches.batch(0, 0)
    files = sorted(tmp_path.rglob("*.npy"))
    whole = {path: path.read_bytes() for path in files}
    assert len(files) == 3
    for number, path in enumerate(files):
        path.write_bytes(whole[path][: 50 * number])
    assert torch.equal(build(data_cache_path=str(tmp_path)).batches.batch(0, 0).tokens, first.tokens)
    assert {path: path.read_bytes() for path in files} == whole


def test_who_takes_over_a_rank_does_without_a_cache(
    make_config: Callable[..., TrainingConfig],
    build: Callable[..., TrainingJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, text_tokenizer = (
        make_config(data_cache_path=str(tmp_path)),
        build_tokenizer("ByteLevelTokenizer", None, None),
    )
    first = build_train_dataset(build().config, text_tokenizer, True)
    # Rank 0 would build it, and died before that.
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 1)
    with pytest.raises(FileNotFoundError):
        build_train_dataset(config, text_tokenizer, True)
    monkeypatch.setattr(groups, "alone", lambda: True)
    again = build_train_dataset(config, text_tokenizer, True)
    assert first is not None and again is not None and len(first) == len(again)
    assert torch.equal(first[3]["tokens"], again[3]["tokens"]) and not list(tmp_path.rglob("*.npy"))


def test_a_cache_folder_that_cannot_be_made_is_named(
    make_config: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    config = make_config(data_cache_path=str(blocked / "cache"))
    with pytest.raises(UsageError, match=r"--data-cache-path .*file/cache: Not a directory"):
        build_train_dataset(config, build_tokenizer("ByteLevelTokenizer"), reads_data=True)


def test_a_rank_that_reads_no_data_builds_none(make_config: Callable[..., TrainingConfig], topology: object) -> None:
    assert build_train_dataset(make_config(), build_tokenizer("ByteLevelTokenizer"), reads_data=False) is None


def test_a_batch_cannot_be_changed() -> None:
    batch = BatchSource(Numbered(), layout(), 100, CPU).batch(0, 0)  # type: ignore[arg-type]
    assert isinstance(batch, Batch)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.tokens = batch.labels  # type: ignore[misc]
