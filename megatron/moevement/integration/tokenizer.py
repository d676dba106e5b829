"""megatron.core's tokenizers by flag, and the vocabulary size that the model is built with."""

from __future__ import annotations

import importlib.util

from megatron.core.tokenizers import MegatronTokenizer
from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

from megatron.moevement.argument_checks import UsageError

# A byte-level document may hold any byte, so its end and its padding get ids that no byte has.
BYTE_END_OF_DOCUMENT = 256
BYTE_PADDING = 257
BYTE_VOCABULARY = 258


def build_tokenizer(kind: str, model: str | None = None, vocab_size: int | None = None) -> MegatronTokenizerBase:
    """The tokenizer that `--tokenizer-type` names.

    Args:
        kind: ByteLevelTokenizer, NullTokenizer (text is numbers) or HuggingFaceTokenizer.
        model: name or folder of a Hugging Face tokenizer.
        vocab_size: ids of a NullTokenizer, the end-of-document id not counted.

    Raises:
        UsageError: where a value or a package is missing.
    """
    if kind == "ByteLevelTokenizer":
        return MegatronTokenizer.from_pretrained(
            metadata_path={"library": "byte-level"},
            vocab_size=BYTE_VOCABULARY,
            _eos_id=BYTE_END_OF_DOCUMENT,
            _pad_id=BYTE_PADDING,
        )
    if kind == "NullTokenizer":
        if vocab_size is None:
            raise UsageError("--vocab-size", "is required with --tokenizer-type NullTokenizer", "add it")
        return MegatronTokenizer.from_pretrained(metadata_path={"library": "null"}, vocab_size=vocab_size)
    if kind != "HuggingFaceTokenizer":
        raise UsageError("--tokenizer-type", f"{kind} is not supported", "use ByteLevelTokenizer")
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("--tokenizer-type", "HuggingFaceTokenizer needs a package", "pip install transformers")
    try:
        return MegatronTokenizer.from_pretrained(tokenizer_path=model, metadata_path={"library": "huggingface"})
    except (OSError, ValueError) as error:
        raise UsageError("--tokenizer-model", f"{model} cannot be loaded ({error})", "name an existing one") from error


def padded_vocab_size(vocab_size: int, multiple: int, tensor_parallel_size: int) -> int:
    """The vocabulary size rounded up so that every tensor-parallel rank gets an equal, aligned share."""
    unit = multiple * tensor_parallel_size
    return -(-vocab_size // unit) * unit
