"""The layout of a slot: no overlap, nothing outside, sizes of the byte model."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megatron.moevement.schedule.window import slot_bytes
from megatron.moevement.snapshot.layout import ALIGNMENT_BYTES, BUFFERS_REGION, slot_layout
from megatron.moevement.types import BufferInfo
from tests.support.tables import small_table
from tests.unit.schedule.test_slots import schedule


@given(st.integers(1, 6), st.sampled_from(["fixed", "rolling"]), st.integers(0, 12), st.integers(0, 300))
def test_pieces_do_not_overlap_and_stay_inside(window: int, mode: str, step: int, buffer_bytes: int) -> None:
    table, plan = small_table(2, 4), schedule(window, mode)
    spec = plan.spec(step)
    layout = slot_layout(table, spec.full, spec.weights_only, [BufferInfo("b", "torch.uint8", (1,), buffer_bytes)])
    pieces = sorted((o, o + n) for region in layout for o, n in zip(region.offsets, region.sizes, strict=True))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(pieces))
    assert pieces[-1][1] <= layout.nbytes
    assert [r.name for r in layout] == [BUFFERS_REGION, *spec.full, *spec.weights_only]
    assert all(region.offset % ALIGNMENT_BYTES == 0 for region in layout)
    operators = sum(region.nbytes for region in layout if region.name != BUFFERS_REGION)
    assert operators == slot_bytes(table, plan.groups, mode)[spec.index]
