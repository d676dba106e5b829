"""The states of all random number generators of this process, as bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

_TRACKER = "tracker."


def capture() -> dict[str, bytes]:
    """Python, numpy, torch, the current GPU's, and every state of core's tracker. No device synchronisation."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    header = json.dumps([kind, int(position), int(has_gauss), float(cached)]).encode()
    states = {
        "python": json.dumps(random.getstate()).encode(),
        "numpy": len(header).to_bytes(4, "little") + header + np.asarray(keys, dtype="<u4").tobytes(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_TRACKER + name] = state.numpy().tobytes()
    return states


def restore(states: Mapping[str, bytes]) -> None:
    """Puts every generator back to what `capture` returned."""
    version, internal, gauss = json.loads(states["python"])
    random.setstate((version, tuple(internal), gauss))
    length = int.from_bytes(states["numpy"][:4], "little")
    kind, position, has_gauss, cached = json.loads(states["numpy"][4 : 4 + length])
    keys = np.frombuffer(states["numpy"][4 + length :], dtype="<u4")
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(_tensor(states["torch"]))
    if "cuda" in states:
        torch.cuda.set_rng_state(_tensor(states["cuda"]))
    tracked = {name.removeprefix(_TRACKER): _tensor(b) for name, b in states.items() if name.startswith(_TRACKER)}
    get_cuda_rng_tracker().set_states(tracked)


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
