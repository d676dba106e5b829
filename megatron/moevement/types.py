"""The frozen values that cross the boundaries between the folders.

A *step* `t` is always the state before iteration `t` (DESIGN words): nothing else is called a step here, apart from
Adam's own step counter, which is spelled `adam_step`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MASTER_BYTES_PER_ELEMENT = 4
FULL_COMPONENTS = ("master", "exp_avg", "exp_avg_sq")
WEIGHT_COMPONENT = "weight"
BYTES_PER_FULL_ELEMENT = MASTER_BYTES_PER_ELEMENT * len(FULL_COMPONENTS)


class OperatorKind(StrEnum):
    """What an operator is; the paper's E, G and NE, with the two ends of the model apart."""

    EXPERT = "expert"
    ROUTER = "router"
    NON_EXPERT = "non_expert"
    EMBEDDING = "embedding"
    OUTPUT = "output"


class Presence(StrEnum):
    """How an operator is present in a slot (absent operators are not listed)."""

    FULL = "full"
    WEIGHTS_ONLY = "weights_only"


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """The part of one parameter that belongs to one operator and is owned by this rank.

    Attributes:
        parameter: name of the model parameter, unique on the rank, with its model chunk.
        start, end: element range in the flattened local parameter; empty if this rank owns nothing of it.
        elements: elements of the whole parameter slice of the operator, owned or not.
        weight_bytes: bytes of one element of the compute weight (2 for bf16 and fp16, 4 for fp32).
    """

    parameter: str
    start: int
    end: int
    elements: int
    weight_bytes: int

    @property
    def owned(self) -> int:
        """Number of elements that this rank owns."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Operator:
    """The unit of a snapshot: an expert, a router, a layer's non-expert part, the embedding or the output layer."""

    name: str
    kind: OperatorKind
    layer: int | None
    expert: int | None
    slices: tuple[ParameterSlice, ...]

    @property
    def full_bytes(self) -> int:
        """Bytes of a full snapshot of the part that this rank owns: master weights and both Adam moments."""
        return BYTES_PER_FULL_ELEMENT * sum(s.owned for s in self.slices)

    @property
    def weights_bytes(self) -> int:
        """Bytes of a weights-only snapshot of the part that this rank owns."""
        return sum(s.owned * s.weight_bytes for s in self.slices)

    @property
    def nominal_full_bytes(self) -> int:
        """Bytes of a full snapshot of the whole operator; equal on every data-parallel rank."""
        return BYTES_PER_FULL_ELEMENT * sum(s.elements for s in self.slices)

    @property
    def nominal_weights_bytes(self) -> int:
        """Bytes of a weights-only snapshot of the whole operator; equal on every data-parallel rank."""
        return sum(s.elements * s.weight_bytes for s in self.slices)


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """What one iteration snapshots on this rank. Operators in neither tuple are absent.

    `index` is the place in the window, 0 to W-1. Names are in capture order. `group_lengths` has the number of
    operators of each of the window's W groups, so that a recovery can go on with the same schedule.
    """

    step: int
    index: int
    full: tuple[str, ...]
    weights_only: tuple[str, ...]
    group_lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BufferInfo:
    """A module buffer (router expert bias and its like) as it is stored in every slot: element type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class StartState:
    """Everything besides operators that Step t consists of.

    Attributes:
        step: t.
        consumed_samples: samples drawn from the data set before iteration t.
        scheduler_samples: the learning-rate scheduler's own position (it stands still in skipped iterations).
        scalers: state of each optimizer's gradient scaler, empty without one.
        blobs: RNG states by name, opaque bytes.
        buffers: descriptions of the module buffers, whose bytes lie in the slot's data.
    """

    step: int
    consumed_samples: int
    scheduler_samples: int
    scalers: tuple[Mapping[str, float], ...] = ()
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    buffers: tuple[BufferInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """The decisions of iteration `iteration` that a replay must not make again (DESIGN section 2).

    `grad_norm` is None in a skipped iteration. `learning_rates` and `weight_decays` have one entry per parameter
    group, in the optimizer's order. `loss` is None where the rank doesn't know it.
    """

    iteration: int
    loss: float | None
    grad_norm: float | None
    skipped: bool
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    loss_scale: float
    consumed_samples: int


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A committed slot as the recovery planner sees it."""

    step: int
    sequence: int
    full: frozenset[str]
    weights_only: frozenset[str]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive slots, steps `first` to `last`, from which a dense state of Step `last` can be made."""

    first: int
    last: int

    @property
    def replays(self) -> int:
        """Iterations that the conversion replays: one less than the slots."""
        return self.last - self.first

    @property
    def steps(self) -> range:
        """The steps of the slots, in the order in which they are loaded."""
        return range(self.first, self.last + 1)
