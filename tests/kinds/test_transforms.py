from __future__ import annotations

import numpy as np
import pytest

from porting.kinds.transforms import CONVOLUTION, DENSE, DEPTHWISE, IDENTITY, Permutation

# A transform, a shape in PyTorch, and the same tensor's shape in Keras.
SHAPES = [
    (IDENTITY, (5,), (5,)),
    (CONVOLUTION, (8, 4, 3), (3, 4, 8)),
    (CONVOLUTION, (8, 4, 3, 5), (3, 5, 4, 8)),
    (CONVOLUTION, (8, 4, 3, 5, 7), (3, 5, 7, 4, 8)),
    (DEPTHWISE, (8, 1, 3), (3, 8, 1)),
    (DEPTHWISE, (8, 1, 3, 5), (3, 5, 8, 1)),
    (DENSE, (10, 7), (7, 10)),
]


@pytest.mark.parametrize(
    ("transform", "before", "after"), SHAPES, ids=lambda value: value.name if isinstance(value, Permutation) else None
)
def test_apply_moves_axes_and_invert_brings_them_back(
    transform: Permutation, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    source = np.arange(np.prod(before), dtype=np.float32).reshape(before)
    target = transform.apply(source)
    assert target.shape == after
    assert np.shares_memory(target, source)
    assert transform.source_shape(target.shape) == source.shape
    np.testing.assert_array_equal(transform.invert(target), source)


def test_depthwise_keeps_height_and_width_of_a_square_kernel() -> None:
    source = np.random.default_rng(0).normal(size=(6, 1, 3, 3))
    target = DEPTHWISE.apply(source)
    for channel in range(6):
        for row in range(3):
            for column in range(3):
                assert target[row, column, channel, 0] == source[channel, 0, row, column]


def test_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dense kernel needs 2 axes, the array has shape \(3, 4, 5\)"):
        DENSE.apply(np.zeros((3, 4, 5)))
    with pytest.raises(ValueError, match="convolution kernel needs 3 or 4 or 5 axes"):
        CONVOLUTION.source_shape((3, 4))
