"""Compares a device's digests with the host's before anything relies on them.

A device that digested wrongly would cost every slot, and that would show in a recovery only, when it is too late.
"""

import numpy as np

from megatron.moevement.operators.state import TrainingState, full_pieces
from moevement_ext import CopyEngine, DeviceDigests, DigestPool, EngineError

# Several leaves, and a last one that fills no stripe.
_PIECE_BYTES = (1 << 20) + 1000
# One for every width of the loads from memory that may be needed.
_SKEWS = (0, 1, 2, 4, 8, 16)
_TIMEOUT_SECONDS = 60.0
# What the check needs room for.
RANGES = 2 * len(_SKEWS)
BYTES = RANGES * _PIECE_BYTES


def check_device_digests(digests: DeviceDigests, engine: CopyEngine, state: TrainingState) -> None:
    """Digests the beginnings of the largest and of the smallest piece, from several addresses on, here and there.

    Raises:
        EngineError: they differ, or the device fails.
    """
    pieces = full_pieces(state)
    pieces = sorted((piece for piece in pieces if piece.nbytes), key=lambda piece: piece.nbytes)
    ranges = [
        (piece.address + skew, min(piece.nbytes, _PIECE_BYTES) - skew)
        for piece in pieces[:1] + pieces[-1:]
        for skew in _SKEWS
        if piece.nbytes > skew
    ]
    sources = np.array([address for address, _ in ranges], dtype=np.uint64)
    sizes = np.array([nbytes for _, nbytes in ranges], dtype=np.uint64)
    host = np.zeros(int(sizes.sum()), dtype=np.uint8)
    copies = np.cumsum(sizes) - sizes + np.uint64(host.ctypes.data)
    engine.copy_now(sources, copies, sizes, state.stream(), "check of digests", _TIMEOUT_SECONDS)
    ticket = digests.submit(sources, sizes, state.stream(), "the check")
    found = digests.wait(ticket, _TIMEOUT_SECONDS)
    if found is None:
        digests.cancel(ticket)
        raise EngineError(f"the check of digests took longer than {_TIMEOUT_SECONDS:g} s")
    with DigestPool() as pool:
        if pool.wait(pool.submit(copies, sizes), _TIMEOUT_SECONDS) != found:
            raise EngineError("the device's digests are not those of the same bytes on the host")
