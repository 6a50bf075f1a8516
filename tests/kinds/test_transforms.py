from __future__ import annotations

import numpy as np
import pytest

from porting.kinds.transforms import Layout

SOURCES = {
    Layout.IDENTITY: (5,),
    Layout.OIHW_TO_HWIO: (8, 4, 3, 5),
    Layout.DEPTHWISE_OIHW_TO_HWIO: (8, 1, 3, 5),
    Layout.OI_TO_IO: (10, 7),
}
TARGETS = {
    Layout.IDENTITY: (5,),
    Layout.OIHW_TO_HWIO: (3, 5, 4, 8),
    Layout.DEPTHWISE_OIHW_TO_HWIO: (3, 5, 8, 1),
    Layout.OI_TO_IO: (7, 10),
}


@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.name)
def test_apply_moves_axes_and_invert_brings_them_back(layout: Layout) -> None:
    source = np.arange(np.prod(SOURCES[layout]), dtype=np.float32).reshape(SOURCES[layout])
    target = layout.apply(source)
    assert target.shape == TARGETS[layout]
    assert np.shares_memory(target, source)
    assert layout.source_shape(target.shape) == source.shape
    np.testing.assert_array_equal(layout.invert(target), source)


def test_depthwise_keeps_height_and_width_of_a_square_kernel() -> None:
    source = np.random.default_rng(0).normal(size=(6, 1, 3, 3))
    target = Layout.DEPTHWISE_OIHW_TO_HWIO.apply(source)
    for channel in range(6):
        for row in range(3):
            for column in range(3):
                assert target[row, column, channel, 0] == source[channel, 0, row, column]


def test_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OIHW to HWIO needs 4 axes, the array has shape \(3, 4\)"):
        Layout.OIHW_TO_HWIO.apply(np.zeros((3, 4)))
