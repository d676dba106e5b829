"""Tests of tokenizers by flag."""

import importlib.util

import pytest

from megatron.moevement.argument_checks import UsageError
from megatron.moevement.integration import tokenizer


def test_bytes_and_special_ids_do_not_meet() -> None:
    built = tokenizer.build_tokenizer("ByteLevelTokenizer")
    assert built.tokenize("a\0é") == [97, 0, 195, 169]
    assert (built.eod, built.pad, built.vocab_size) == (256, 257, 258)


def test_numbers_as_text() -> None:
    built = tokenizer.build_tokenizer("NullTokenizer", vocab_size=10)
    assert built.tokenize("1 2 3") == [1, 2, 3]
    assert (built.eod, built.vocab_size) == (10, 11)


def test_missing_values_are_named() -> None:
    with pytest.raises(UsageError, match="--vocab-size"):
        tokenizer.build_tokenizer("NullTokenizer")
    with pytest.raises(UsageError, match="--tokenizer-type"):
        tokenizer.build_tokenizer("SentencePieceTokenizer")


def test_a_missing_package_is_named() -> None:
    if importlib.util.find_spec("transformers"):
        pytest.skip("transformers is installed")
    with pytest.raises(UsageError, match="pip install transformers"):
        tokenizer.build_tokenizer("HuggingFaceTokenizer", "gpt2")


@pytest.mark.parametrize(
    ("size", "multiple", "ranks", "padded"), [(258, 128, 1, 384), (258, 128, 2, 512), (256, 1, 1, 256)]
)
def test_padding_of_the_vocabulary(size: int, multiple: int, ranks: int, padded: int) -> None:
    assert tokenizer.padded_vocab_size(size, multiple, ranks) == padded
