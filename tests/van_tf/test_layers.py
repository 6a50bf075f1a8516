"""Runs Keras's own test of layers on every layer: building, masks, dtypes, saving, training, symbols."""

from __future__ import annotations

from typing import Any

import pytest
from keras.src import testing

from van_tf.layers import LKA, Attention, BatchNorm, Block, DWConv, Mlp, OverlapPatchEmbed

MAP = (2, 8, 8, 6)
# Class, arguments, output shape for MAP, numbers of trainable and other weights and of random generators.
CASES: list[tuple[type, dict[str, Any], tuple[int, ...], int, int, int]] = [
    (BatchNorm, {}, MAP, 2, 2, 0),
    (BatchNorm, {"axis": 1, "momentum": 0.5}, MAP, 2, 2, 0),
    (OverlapPatchEmbed, {"dim": 5, "kernel_size": 3, "strides": 2}, (2, 4, 4, 5), 4, 2, 0),
    (OverlapPatchEmbed, {"dim": 5, "kernel_size": 7, "strides": 4}, (2, 2, 2, 5), 4, 2, 0),
    (LKA, {}, MAP, 6, 0, 0),
    (Attention, {}, MAP, 10, 0, 0),
    (DWConv, {}, MAP, 2, 0, 0),
    (Mlp, {"hidden_dim": 9, "drop_rate": 0.2}, MAP, 6, 0, 1),
    (Block, {"mlp_ratio": 2}, MAP, 22, 4, 0),
    (Block, {"mlp_ratio": 0.5, "drop_rate": 0.1, "drop_path_rate": 0.3}, MAP, 22, 4, 2),
]


# A warning of Keras about the generator that its own test passes to fit.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{len(case[1])}")
def test_keras_own_test_of_a_layer(case: tuple[type, dict[str, Any], tuple[int, ...], int, int, int]) -> None:
    layer, arguments, shape, trained, others, seeds = case

    class Harness(testing.TestCase):  # type: ignore[misc]
        def runTest(self) -> None:  # noqa: N802
            pass

    harness = Harness()
    harness.setUp()
    harness.run_layer_test(
        layer,
        init_kwargs=arguments,
        input_shape=MAP,
        expected_output_shape=shape,
        expected_num_trainable_weights=trained,
        expected_num_non_trainable_weights=others,
        expected_num_seed_generators=seeds,
        expected_num_losses=0,
        supports_masking=layer is BatchNorm,
        assert_built_after_instantiation=False,
    )
    harness.tearDown()
