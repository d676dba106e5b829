"""Text into megatron.core's indexed datasets: one document per text, each with its end-of-document token."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable

import numpy
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

from megatron.moevement.integration.tokenizer import build_tokenizer


@dataclasses.dataclass(frozen=True)
class CorpusSize:
    """What was written: documents, tokens (end-of-document tokens included)."""

    documents: int
    tokens: int


def write_corpus(
    texts: Iterable[str],
    prefix: str,
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
    progress: Callable[[CorpusSize], None] = lambda _size: None,
) -> CorpusSize:
    """Tokenize `texts` and write `prefix.bin` and `prefix.idx`; both appear complete or not at all.

    Args:
        texts: the documents; empty ones are left out.
        prefix: path without extension.
        tokenizer_type: as `--tokenizer-type`.
        tokenizer_model: as `--tokenizer-model`.
        vocab_size: as `--vocab-size`.
        progress: called after each document.

    Raises:
        UsageError: for a tokenizer that cannot be built.
        OSError: where the files cannot be written.
        ValueError: where there is no document, or a text that the tokenizer cannot read.
    """
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model, vocab_size)
    partial = f"{prefix}.partial"
    documents = tokens = 0
    try:
        builder = IndexedDatasetBuilder(get_bin_path(partial), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for text in texts:
            ids = tokenizer.tokenize(text)
            if not ids:
                continue
            ids.append(tokenizer.eod)
            builder.add_document(torch.from_numpy(numpy.asarray(ids, dtype=numpy.int64)), [len(ids)])
            documents, tokens = documents + 1, tokens + len(ids)
            progress(CorpusSize(documents, tokens))
        if documents == 0:
            raise ValueError("no text was found")
        builder.finalize(get_idx_path(partial))
        # The index moves last: a reader that finds it finds the data too.
        os.replace(get_bin_path(partial), get_bin_path(prefix))
        os.replace(get_idx_path(partial), get_idx_path(prefix))
    finally:
        for path in (get_bin_path(partial), get_idx_path(partial)):
            if os.path.exists(path):
                os.remove(path)
    return CorpusSize(documents, tokens)
