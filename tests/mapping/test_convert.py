from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from porting.errors import CheckpointError, KeyMapError
from porting.mapping.convert import convert, diff_keys
from porting.mapping.key_map import KeyMap
from porting.mapping.rules import KeyRule

NAMES = ["conv.weight", "conv.bias", "head.weight", "head.bias"]
NAMES += [f"bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
KEY_MAP = KeyMap.match(
    [KeyRule("conv", "conv", "conv"), KeyRule("bn", "bn", "batch_norm"), KeyRule("head", "head", "dense")], NAMES
)
SHAPES = {
    "conv/kernel": (3, 3, 2, 4),
    "conv/bias": (4,),
    "bn/gamma": (4,),
    "bn/beta": (4,),
    "bn/moving_mean": (4,),
    "bn/moving_variance": (4,),
    "head/kernel": (4, 5),
    "head/bias": (5,),
}


def make_state_dict(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        entry.sources[0]: entry.transform.source_shape(SHAPES[entry.targets[0]])  # type: ignore[attr-defined]
        for entry in KEY_MAP.entries
    }
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return {**tensors, "bn.num_batches_tracked": np.array(7)}


def test_every_variable_is_written_once_and_the_counter_is_dropped_by_name() -> None:
    state_dict = make_state_dict()
    conversion = convert(state_dict, KEY_MAP, SHAPES)
    assert {name: array.shape for name, array in conversion.weights.items()} == SHAPES
    assert conversion.dropped == ("bn.num_batches_tracked",)
    np.testing.assert_array_equal(conversion.weights["head/kernel"], state_dict["head.weight"].T)
    np.testing.assert_array_equal(conversion.weights["bn/moving_variance"], state_dict["bn.running_var"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_becomes_float32_exactly(dtype: type) -> None:
    state_dict = make_state_dict(dtype)
    conversion = convert(state_dict, KEY_MAP, SHAPES)
    bias = conversion.weights["conv/bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias.astype(np.float64), state_dict["conv.bias"].astype(np.float64))


def test_all_differences_are_in_one_error() -> None:
    state_dict = make_state_dict()
    state_dict["conv.wieght"] = state_dict.pop("conv.weight")
    state_dict["extra.scale"] = np.zeros(3, np.float32)
    state_dict["head.bias"] = np.zeros(6, np.float32)
    state_dict["bn.weight"] = np.zeros(4, np.int64)
    with pytest.raises(KeyMapError) as caught:
        convert(state_dict, KEY_MAP, SHAPES, hint=lambda: "Try another variant.")
    assert caught.value.message == (
        "the checkpoint: its tensors are not those of the model\n"
        "1 missing from the checkpoint:\n"
        "  conv.weight (nearest: conv.wieght)\n"
        "2 in the checkpoint, but not part of the model:\n"
        "  conv.wieght (nearest: conv.weight)\n"
        "  extra.scale\n"
        "2 of another shape or type:\n"
        "  bn.weight: expected a floating-point type, found int64\n"
        "  head.bias: expected (5,), found (6,)"
    )
    assert caught.value.hint == "Try another variant."


def test_a_key_map_that_does_not_cover_the_keras_model_is_an_error() -> None:
    shapes = {**SHAPES, "new/scale": (3,)}
    del shapes["conv/bias"]
    diff = diff_keys(make_state_dict(), KEY_MAP, shapes)
    assert diff.unwritten == ("new/scale",)
    assert diff.unknown == ("conv/bias",)
    assert "Keras variables that no row of the key map writes:\n  new/scale" in diff.describe()


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    state_dict = make_state_dict()
    state_dict["head.bias"][1] = np.nan
    state_dict["conv.weight"][0, 0, 0, :2] = np.inf
    with pytest.raises(CheckpointError) as caught:
        convert(state_dict, KEY_MAP, SHAPES)
    assert "head.bias: 1 NaN, 0 infinite of 5" in caught.value.message
    assert "conv.weight: 0 NaN, 2 infinite of 72" in caught.value.message


def test_float64_beyond_float32_is_refused_and_not_wrapped() -> None:
    state_dict = make_state_dict(np.float64)
    state_dict["head.bias"][0] = 1e300
    with pytest.raises(CheckpointError, match="head.bias: 0 NaN, 1 infinite of 5"):
        convert(state_dict, KEY_MAP, SHAPES)
