"""RNG states: every generator draws the same numbers again after a restore, from bytes alone."""

import json
import random

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron.moevement.integration import rng_state

TRACKED = "model-parallel-rng"


def draw() -> dict[str, object]:
    """The next number of every generator."""
    with get_cuda_rng_tracker().fork(TRACKED):
        tracked = torch.rand(3).tolist()
    return {
        "python": random.random(),
        "gauss": random.gauss(0, 1),
        "numpy": float(np.random.rand()),
        "numpy gauss": float(np.random.randn()),
        "torch": torch.rand(3).tolist(),
        "tracker." + TRACKED: tracked,
    }


def test_every_generator_goes_on_where_it_was(topology: object) -> None:
    draw()  # an odd number of Gauss draws: the second of a pair is kept inside the generator
    states = rng_state.capture()
    wanted = draw()
    assert all(value != wanted[name] for name, value in draw().items()), "the control: without a restore they differ"
    rng_state.restore(states)
    assert draw() == wanted


def test_states_are_bytes_that_survive_a_process(topology: object) -> None:
    states = rng_state.capture()
    assert all(isinstance(state, bytes) for state in states.values())
    copied = {
        name: bytes.fromhex(text)
        for name, text in json.loads(json.dumps({n: s.hex() for n, s in states.items()})).items()
    }
    wanted = draw()
    rng_state.restore(copied)
    assert rng_state.capture() == states and draw() == wanted


@pytest.mark.parametrize("name", ["torch", "numpy", "tracker." + TRACKED])
def test_one_wrong_state_makes_a_difference_there_only(topology: object, name: str) -> None:
    draw()
    old = rng_state.capture()
    draw()
    states = rng_state.capture()
    wanted = draw()
    rng_state.restore({**states, name: old[name]})
    found = draw()
    assert {key for key in wanted if wanted[key] != found[key] and not key.startswith(name)} == set()
    assert found[name] != wanted[name]


def test_a_state_without_its_generator_is_an_error(topology: object) -> None:
    states = rng_state.capture()
    del states["numpy"]
    with pytest.raises(KeyError):
        rng_state.restore(states)
