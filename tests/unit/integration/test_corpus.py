"""Tests of writing corpora."""

from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron.moevement.integration import corpus


def test_documents_end_with_their_token(tmp_path: Path) -> None:
    prefix = str(tmp_path / "text")
    seen: list[corpus.CorpusSize] = []
    size = corpus.write_corpus(["ab", "", "c"], prefix, "ByteLevelTokenizer", progress=seen.append)
    assert size == corpus.CorpusSize(documents=2, tokens=5)
    assert seen[-1] == size
    written = IndexedDataset(prefix)
    assert [document.tolist() for document in (written[0], written[1])] == [[97, 98, 256], [99, 256]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.bin", "text.idx"]


def test_nothing_is_left_behind_without_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text"):
        corpus.write_corpus([""], str(tmp_path / "text"), "ByteLevelTokenizer")
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        corpus.write_corpus(["words"], str(tmp_path / "text"), "NullTokenizer", vocab_size=10)
    assert list(tmp_path.iterdir()) == []
