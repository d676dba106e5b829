"""The fingerprint depends on every bit and place, and on nothing but the bytes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moevement.integration.fingerprint import fingerprint

KNOWN = 3689837706994822412
BLOCK_WORDS = 1 << 21


def mixed(number: int) -> int:
    """splitmix64, made odd, in Python's own numbers."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) | 1


def of(tensor: torch.Tensor) -> int:
    result = torch.zeros((), dtype=torch.int64)
    fingerprint(tensor, result)
    return int(result)


def test_a_known_value() -> None:
    """Written into transcripts: it must not change without a new format."""
    by_hand = (4000 + sum(i * mixed(i) for i in range(1000)) * mixed(1 << 40)) % 2**64
    assert of(torch.arange(1000, dtype=torch.int32)) == by_hand == KNOWN
    words = torch.arange(1000, dtype=torch.int32)
    assert of(words.view(torch.bfloat16).view(10, 200)) == KNOWN


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=300), st.data())
def test_every_bit_counts(content: bytes, data: st.DataObject) -> None:
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    one, other = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (content, changed))
    assert of(one) != of(other)
    assert of(torch.cat([one, torch.zeros(1, dtype=torch.uint8)])) != of(one)


def test_places_are_not_interchangeable() -> None:
    tensor = torch.arange(64, dtype=torch.bfloat16)
    assert of(tensor) != of(tensor.flip(0)) != of(tensor.roll(2))


def test_layout_and_alignment_do_not_matter() -> None:
    tensor = torch.randn(9, 7).to(torch.bfloat16)
    shifted = torch.empty(64, dtype=torch.bfloat16)[1:].view(-1)[:63]
    shifted.copy_(tensor.reshape(-1))
    assert of(tensor) == of(shifted) == of(tensor.t().contiguous().t())
    even = torch.randn(8, 8).to(torch.bfloat16)
    odd = torch.empty(65, dtype=torch.bfloat16)[1:]
    odd.copy_(even.reshape(-1))
    assert of(even) == of(odd)
    assert of(even.requires_grad_(True)) == of(odd)


def test_blocks_have_keys_of_their_own() -> None:
    size = BLOCK_WORDS
    tensor = torch.zeros(2 * size + 5, dtype=torch.int32)
    seen = {of(tensor)}
    for place in (0, size, 2 * size, size - 1, 2 * size + 4):
        tensor[place] = 1
        seen.add(of(tensor))
        tensor[place] = 0
    assert len(seen) == 6


def test_an_empty_tensor_has_one() -> None:
    assert of(torch.empty(0)) == 0
