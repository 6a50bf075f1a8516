"""The check must pass what is right and fail what is wrong; each fault below is one that a real port had."""

from __future__ import annotations

import json
from collections.abc import Callable

import keras
import numpy as np
import pytest
from torch import nn

import van_tf
from porting.convert import convert
from porting.families.van import VanFamily
from porting.parity import Distance, LogitsComparison, ParityReport, TensorComparison, check_parity
from porting.references.van import VAN
from porting.weights_file import variable_shapes


@pytest.fixture
def candidate(family: VanFamily, state_dict: dict[str, np.ndarray]) -> keras.Model:
    model = van_tf.van_nano()
    weights = convert(state_dict, family.key_map("nano"), variable_shapes(model)).weights
    for variable in model.weights:
        variable.assign(weights[variable.path])
    return model


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype(np.float32)


def layer_at(model: keras.Model, path: str) -> keras.layers.Layer:
    return next(layer for layer in model._flatten_layers() if layer.path == path)


def test_a_faithful_port_is_at_parity(reference: VAN, candidate: keras.Model, images: np.ndarray) -> None:
    report = check_parity(reference, candidate, images, batch_size=2)
    assert report.passed
    assert report.first_divergence is None
    assert report.worst.ratio < 3
    assert report.logits.top1_agreement == report.logits.samples == 4
    assert report.unpaired_source == ()
    assert set(report.unpaired_target) == {f"patch_embed{stage}/pad" for stage in (1, 2, 3, 4)} | {"pool"}
    names = [comparison.source for comparison in report.comparisons]
    assert names[0] == "patch_embed1.proj"
    assert names[-2:] == ["head", "output"]
    assert all(comparison.shape[0] == 4 for comparison in report.comparisons)


def test_batches_add_up(reference: VAN, candidate: keras.Model, images: np.ndarray) -> None:
    whole = check_parity(reference, candidate, images, batch_size=4)
    parts = check_parity(reference, candidate, images, batch_size=3)
    for one, other in zip(whole.comparisons, parts.comparisons, strict=True):
        assert one.scale.rms == pytest.approx(other.scale.rms)
        assert one.scale.max == pytest.approx(other.scale.max)


def change_value(path: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[keras.Model], None]:
    def apply(model: keras.Model) -> None:
        variable = next(variable for variable in model.weights if variable.path == path)
        variable.assign(change(variable.numpy()))

    return apply


def change_setting(path: str, name: str, value: object) -> Callable[[keras.Model], None]:
    return lambda model: setattr(layer_at(model, path), name, value)


def one_element(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flat[3] *= 1.01
    return values


# Name of the fault, what does it, the layer that must be named first.
FAULTS: dict[str, tuple[Callable[[keras.Model], None], str]] = {
    "tanh GELU": (
        change_setting("block2.0/mlp/act", "activation", lambda x: keras.activations.gelu(x, approximate=True)),
        "block2.0.mlp.act",
    ),
    "BatchNorm epsilon of Keras": (change_setting("block1.0/norm1", "epsilon", 1e-3), "block1.0.norm1"),
    "LayerNorm epsilon of Keras": (change_setting("norm2", "epsilon", 1e-3), "norm2"),
    "depthwise height and width swapped": (
        change_value("block1.1/mlp/dwconv/dwconv/kernel", lambda k: k.transpose(1, 0, 2, 3)),
        "block1.1.mlp.dwconv.dwconv",
    ),
    "kernel flipped": (
        change_value("block3.0/attn/spatial_gating_unit/conv0/kernel", lambda k: k[::-1, ::-1]),
        "block3.0.attn.spatial_gating_unit.conv0",
    ),
    "square projection not transposed": (
        change_value("block2.1/attn/proj_1/kernel", lambda k: k.transpose(0, 1, 3, 2)),
        "block2.1.attn.proj_1",
    ),
    "bias lost": (change_value("patch_embed3/proj/bias", np.zeros_like), "patch_embed3.proj"),
    "variance stored as standard deviation": (
        change_value("block4.0/norm2/moving_variance", np.sqrt),
        "block4.0.norm2",
    ),
    "layer scale at its initial value": (
        change_value("block1.0/layer_scale_1", lambda s: np.full_like(s, 1e-2)),
        # Seen where the scaled branch is used: no module of its own holds the sum.
        "block1.0.drop_path",
    ),
    "channels permuted": (change_value("head/kernel", lambda k: k[:, ::-1]), "head"),
    "one element changed by 1%": (change_value("block2.0/mlp/fc2/kernel", one_element), "block2.0.mlp.fc2"),
    "dilation lost": (
        change_setting("block1.0/attn/spatial_gating_unit/conv_spatial", "dilation_rate", (1, 1)),
        "block1.0.attn.spatial_gating_unit.conv_spatial",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_layer_named(
    reference: VAN, candidate: keras.Model, images: np.ndarray, fault: str
) -> None:
    plant, layer = FAULTS[fault]
    plant(candidate)
    report = check_parity(reference, candidate, images, batch_size=4)
    assert not report.passed
    assert report.first_divergence is not None
    assert report.first_divergence.source == layer


def test_nan_is_no_parity(reference: VAN, candidate: keras.Model, images: np.ndarray) -> None:
    change_value("head/bias", lambda bias: np.where(np.arange(len(bias)) == 0, np.nan, bias))(candidate)
    report = check_parity(reference, candidate, images)
    assert report.first_divergence is not None
    assert report.first_divergence.source == "head"
    assert report.first_divergence.problem == "values that are not finite"


def test_another_shape_is_no_parity(reference: VAN, images: np.ndarray) -> None:
    report = check_parity(reference, van_tf.van_nano(classes=11), images)
    last = report.comparisons[-1]
    assert last.source == "output"
    assert last.problem == "shape (1, 11) instead of (1, 10)"
    assert not last.passed


def test_a_softmax_after_the_last_layer_is_seen(reference: VAN, candidate: keras.Model, images: np.ndarray) -> None:
    softened = keras.Model(candidate.input, keras.ops.softmax(candidate.output))
    report = check_parity(reference, softened, images)
    assert report.first_divergence is not None
    assert report.first_divergence.source == "output"


def test_modules_without_a_layer_are_listed() -> None:
    linear = nn.Linear(12, 3)
    reference = nn.Sequential(nn.Flatten(), linear, nn.ReLU())
    inputs = keras.Input((2, 2, 3))
    # Keras flattens channels last, PyTorch channels first.
    flat = keras.layers.Flatten(name="0")(keras.layers.Permute((3, 1, 2), name="order")(inputs))
    candidate = keras.Model(inputs, keras.ops.relu(keras.layers.Dense(3, name="dense")(flat)))
    candidate.get_layer("dense").set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    images = np.random.default_rng(0).normal(size=(2, 2, 2, 3)).astype(np.float32)
    report = check_parity(reference, candidate, images)
    assert report.passed
    assert report.unpaired_source == ("1", "2")
    assert {"order", "dense"} <= set(report.unpaired_target)
    paired = check_parity(reference, candidate, images, pairs={"1": "dense"})
    assert paired.unpaired_source == ("2",)
    assert [(c.source, c.target) for c in paired.comparisons] == [("0", "0"), ("1", "dense"), ("output", "output")]


def test_no_images(reference: VAN, candidate: keras.Model) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        check_parity(reference, candidate, np.zeros((0, 64, 64, 3), np.float32))


def test_nothing_compared_is_no_parity() -> None:
    assert not ParityReport((), (), (), LogitsComparison(0, 0, 0.0), 8.0, (0,)).passed


def test_json_is_strict_even_where_numbers_are_not_finite() -> None:
    infinite = TensorComparison(
        "a", "b", (1,), Distance(1, 1), Distance(), Distance(float("nan"), 1), Distance(), float("inf"), False, "NaN"
    )
    report = ParityReport((infinite,), ("x",), (), LogitsComparison(1, 0, 0.5), 8.0, (1, 2, 2, 3), {"variant": "b1"})
    parsed = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed["schema_version"] == 1
    assert parsed["passed"] is False
    assert parsed["first_divergence"] == "a"
    assert parsed["variant"] == "b1"
    assert parsed["layers"][0]["ratio"] is None
    assert parsed["layers"][0]["scale"] == {"max": 1, "rms": 1}
