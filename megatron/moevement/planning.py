"""The plan that is made and printed before training: window, slots, host memory, expected replay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.moevement.config import GIB, MIB, SparseCheckpointConfig
from megatron.moevement.errors import ConfigError
from megatron.moevement.operators.state import TrainingState
from megatron.moevement.operators.table import OperatorTable
from megatron.moevement.schedule.agreement import Agreement
from megatron.moevement.schedule.ordering import capture_order
from megatron.moevement.schedule.slots import SlotSchedule, longest_run, ring_slots
from megatron.moevement.schedule.window import divide, slot_bytes, smallest_window
from megatron.moevement.snapshot.bandwidth import Chunks
from megatron.moevement.snapshot.layout import ALIGNMENT_BYTES
from megatron.moevement.store.memory_plan import MemoryPlan, manifest_room

# Beside training, which uses the same memory; 0.8 was seen on 16 cores, and the measurement may fit into a cache.
DIGEST_RATE_UNDER_LOAD = 0.6
# Of the time before the optimizer step. That is a median, and the link gives now less, now more: on an H200 a copy that
# took 0.9 of the time when it was planned held up every optimizer step.
SHARE_WITHOUT_STALL = 0.8
_SHARE_STEP = 0.1


@dataclass(frozen=True, slots=True)
class Measured:
    """What `auto` plans with: device-to-host bytes per second beside training, and seconds of an iteration.

    `copy_seconds` are those of an iteration in which a slot can be copied: all but the optimizer step. `chunks` is what
    the engine copies in. Digests are made at `digest_bytes_per_second`, measured without training beside them, by the
    device or by threads.
    """

    bytes_per_second: float
    iteration_seconds: float
    copy_seconds: float
    chunks: Chunks
    digest_bytes_per_second: float
    digests_on_device: bool = False

    def budget_bytes(self, copy_share: float) -> float:
        """The largest slot that is copied in this share of the time before the optimizer step, and digested before
        the next slot is there."""
        digested = DIGEST_RATE_UNDER_LOAD * self.digest_bytes_per_second * self.iteration_seconds
        return min(self.bytes_per_second * copy_share * self.copy_seconds, digested)


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """The schedule of this rank, and the memory that every rank reserves.

    `spare_bytes` is how much larger a later order's worst slot may be than that of the first order.
    """

    schedule: SlotSchedule
    memory: MemoryPlan
    slot_bytes: tuple[int, ...]
    dense_bytes: int
    spare_bytes: int
    measured: Measured | None
    longest_run: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the manager is told of the job: how it was built and where it runs.

    `identity` holds, by flag, every value that slots must have been written with. `ranks_on_node` share the slots'
    directory. `deterministic` makes a difference between a replay and what was recorded an error. The copy engine works
    with the best of `chunks`; the model waits for `awaited_copies` small copies to the host in an iteration.
    """

    identity: Mapping[str, Any]
    ranks_on_node: int
    deterministic: bool
    chunks: tuple[Chunks, ...] = (Chunks(4 << 20, 2),)
    awaited_copies: int = 0


def make_plan(
    config: SparseCheckpointConfig,
    state: TrainingState,
    agreement: Agreement,
    measured: Measured | None,
    window: int | None,
) -> SparsePlan:
    """Chooses the window (one for the world, the largest that any rank needs) and reserves memory. Collective.

    Args:
        config: the flags.
        state: for the operator table and the size of what every slot holds besides operators.
        agreement: the control group.
        measured: needed if `window` is None.
        window: forced or stored W; None chooses one.

    Raises:
        ConfigError: the forced W has slots that are empty on every rank.
    """
    table = state.table
    order = capture_order(table, {})
    if window is None:
        assert measured is not None
        window = int(agreement.maximum([_own_window(table, order, measured, config)])[0])
    elif window == config.window:
        most = int(agreement.maximum([len(table)])[0])
        if window > most:
            raise ConfigError(
                f"--sparse-ckpt-window {window}: no rank has more than {most} operators; give {most} or less"
            )
    schedule = SlotSchedule(divide(table, order, window, config.window_mode), config.window_mode)
    sizes = slot_bytes(table, schedule.groups, config.window_mode)
    # Orders that come later divide the operators differently, by up to one operator a slot.
    # Under the distributed optimizer a rank owns all of some operators and nothing of others, so that its share of
    # a slot varies more.
    spare = (max((o.full_bytes for o in table), default=0) + max(sizes) // 4) if config.reorder else 0
    start, buffers = state.start_state(0)
    blob_bytes = sum(len(blob) for blob in start.blobs.values())
    data = max(sizes) + spare + sum(b.nbytes for b in buffers) + (len(table) + 1) * ALIGNMENT_BYTES
    slices = sum(len(o.slices) for o in table)
    room = manifest_room(len(table), slices, blob_bytes)
    data_most, room_most = agreement.maximum([data, room])
    slots = ring_slots(window, config.window_mode, config.reorder)
    memory = MemoryPlan(slots, int(room_most), int(data_most))
    dense = sum(o.full_bytes for o in table)
    return SparsePlan(
        schedule, memory, tuple(sizes), dense, spare, measured, longest_run(window, config.window_mode, config.reorder)
    )


def _own_window(table: OperatorTable, order: Sequence[str], measured: Measured, config: SparseCheckpointConfig) -> int:
    """The smallest W within the share that the flag gives; where there is none, within the next larger one."""
    share = config.copy_share
    while True:
        budget = measured.budget_bytes(share)
        found = smallest_window(table, order, config.window_mode, budget, config.max_window)
        if found.worst_slot_bytes <= budget or share >= SHARE_WITHOUT_STALL:
            return found.window
        share = min(share + _SHARE_STEP, SHARE_WITHOUT_STALL)


def _fits(worst_slot_bytes: int, measured: Measured, copy_share: float) -> str:
    """How the worst slot goes into an iteration, for people."""
    if worst_slot_bytes <= measured.budget_bytes(copy_share):
        return "fits into one"
    if worst_slot_bytes <= measured.budget_bytes(SHARE_WITHOUT_STALL):
        return "fits into one, but takes more of it than --sparse-ckpt-copy-share"
    return "does not fit: expect a stall, see --sparse-ckpt-max-window"


def describe(plan: SparsePlan, state: TrainingState, config: SparseCheckpointConfig, ranks: int) -> list[str]:
    """The plan in lines for people; sizes are those of the printing rank, memory that of every rank."""
    kinds: dict[str, int] = {}
    for operator in state.table:
        kinds[operator.kind.value] = kinds.get(operator.kind.value, 0) + 1
    window = plan.schedule.window
    lines = [
        "operators        " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        f"window           W={window} {config.window_mode}" + (" (forced)" if config.window else " (auto)"),
        "slot data        " + ", ".join(f"{size / MIB:.2f}" for size in plan.slot_bytes) + " MiB",
        f"dense snapshot   {plan.dense_bytes / MIB:.2f} MiB a rank; a slot is at most "
        f"{100 * max(plan.slot_bytes) / max(plan.dense_bytes, 1):.0f}% of it",
        f"host memory      {plan.memory.total_bytes / GIB:.3f} GiB a rank: {plan.memory.slots} slots of "
        f"{plan.memory.slot_bytes / MIB:.2f} MiB; {ranks * plan.memory.total_bytes / GIB:.3f} GiB for {ranks} ranks",
        f"a recovery       replays {window - 1} to {plan.longest_run - 1} iterations in the conversion, and up to 3 "
        "more that were not committed everywhere",
    ]
    if plan.measured is not None:
        lines.append(
            f"measured         {plan.measured.bytes_per_second / GIB:.2f} GiB/s device to host beside training, "
            f"{plan.measured.iteration_seconds:.3f} s an iteration, {plan.measured.copy_seconds:.3f} s of it before "
            f"the optimizer step: the worst slot {_fits(max(plan.slot_bytes), plan.measured, config.copy_share)}"
        )
        if config.digest != "off":
            who = "the device" if plan.measured.digests_on_device else "threads"
            lines.append(f"digests          by {who}, at {plan.measured.digest_bytes_per_second / GIB:.2f} GiB/s")
        chunks = plan.measured.chunks
        how = "forced" if config.chunk_mib and config.chunks_in_flight else "the best for this link and this model"
        lines.append(f"copies           in chunks of {chunks.nbytes / MIB:g} MiB, {chunks.in_flight} in flight ({how})")
    return lines
