"""A fingerprint of a tensor's bytes, computed where the tensor is: exact, 64 bits, the same on every device.

A multilinear hash in arithmetic modulo 2^64: the sum of every 32-bit word times an odd key of its place. Such sums are
exact in any order, so it doesn't matter how a device adds; a change of one word always changes the result, and one of
several words with all but a chance of about 2^-32.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

# Words that are hashed at a time: 16 MiB of keys, and twice 16 MiB while they are multiplied.
BLOCK_WORDS = 1 << 21


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 of every number, made odd."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


@lru_cache(maxsize=8)
def _keys(device: torch.device, words: int) -> torch.Tensor:
    # No more than are needed: a replacement makes them while all others wait for its first replay.
    return torch.from_numpy(_mixed(np.arange(words, dtype=np.uint64))).to(device)


@lru_cache(maxsize=4096)
def _block_key(number: int) -> int:
    return int(_mixed(np.array([(1 << 40) + number], dtype=np.uint64))[0])


def fingerprint(tensor: torch.Tensor, result: torch.Tensor) -> None:
    """Writes the fingerprint of `tensor` to `result`, int64 of no dimension on the same device; nobody waits for it."""
    flat = tensor.detach().contiguous().reshape(-1)
    nbytes = flat.numel() * flat.element_size()
    if nbytes % 4 or flat.data_ptr() % 4 or flat.storage_offset() * flat.element_size() % 4:
        padded = torch.zeros(-(-nbytes // 4) * 4, dtype=torch.uint8, device=flat.device)
        padded[:nbytes] = flat.view(torch.uint8)
        flat = padded
    needed = min(flat.numel() * flat.element_size() // 4, BLOCK_WORDS)
    keys = _keys(flat.device, 1 << max(needed - 1, 0).bit_length())
    result.fill_(nbytes)
    for number, words in enumerate(flat.view(torch.int32).split(BLOCK_WORDS)):
        result.add_((words.to(torch.int64) * keys[: words.numel()]).sum(), alpha=_block_key(number))
