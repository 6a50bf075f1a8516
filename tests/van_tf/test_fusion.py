"""The fused model computes the same function, compared with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import van_tf
from porting.families.van import VanFamily
from porting.files.weights_file import assign_weights, variable_shapes
from porting.mapping.convert import convert
from porting.models.synthetic import fill_with_synthetic_weights
from porting.parity.exported import compare_outputs
from porting.parity.report import ParityReport
from porting.references.van import VAN, build_van

IMAGES = np.random.default_rng(0).normal(size=(2, 65, 80, 3)).astype(np.float32)


def keras_model(family: VanFamily, reference: VAN, variant: str = "nano", **arguments: Any) -> keras.Model:
    model = van_tf.van(van_tf.VARIANTS[variant], **arguments)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    key_map = family.key_map(family.spec(variant))
    assign_weights(model, convert(tensors, key_map, variable_shapes(family.build(variant, 10))).weights)
    return model


def fused_parity(reference: VAN, fused: keras.Model) -> ParityReport:
    """Compare a fused model like an export, in float32 by layer names, since folded weights are rounded again."""
    shown = keras.Model(fused.input, {layer.name: layer.output for layer in fused.layers if layer.name != "images"})
    last = fused.outputs[0]._keras_history.operation.name

    def run(images: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        found = {name: np.asarray(result) for name, result in shown(images).items()}
        return {"": found[last]}, found

    return compare_outputs(reference, run, IMAGES)


def test_the_fused_model_is_at_parity_with_pytorch(family: VanFamily, reference: VAN) -> None:
    model = keras_model(family, reference)
    fused = van_tf.fuse(model, fold_gelu=False)
    report = fused_parity(reference, fused)
    assert report.passed, report.first_divergence
    names = {layer.source for layer in report.layers}
    assert {"patch_embed3", "block1.1.attn.proj_1", "block2.0.attn.spatial_gating_unit", "block4.0.mlp.act"} <= names
    assert {"norm4", "head", "output"} <= names
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in fused.layers)
    # Only one factor per stage is left of the shortcuts' scales.
    scaled = [layer.name for layer in fused.layers if layer.name.endswith("factor")]
    assert scaled == ["norm1.factor", "norm2.factor", "norm3.factor", "norm4.factor"]
    assert fused.name == "van_nano_fused"


def test_gelu_can_leave_its_factors_to_the_convolutions(family: VanFamily, reference: VAN) -> None:
    fused = van_tf.fuse(keras_model(family, reference))
    report = fused_parity(reference, fused)
    assert report.passed, report.first_divergence
    names = {layer.source for layer in report.layers}
    assert {"patch_embed3", "block2.0.attn.spatial_gating_unit.conv0", "block4.0.mlp.fc1", "norm4", "output"} <= names
    # A tensor that differs from PyTorch's must not have PyTorch's name.
    assert not {"block1.1.attn.proj_1", "block2.0.attn.spatial_gating_unit", "block4.0.mlp.act"} & names
    assert sum(layer.name.endswith(".folded") for layer in fused.layers) == 7 * 5


@pytest.mark.parametrize("scale", [-0.999, 1e-3, 30.0], ids=str)
def test_factors_that_would_cost_digits_are_multiplied_at_once(family: VanFamily, scale: float) -> None:
    reference = build_van("nano", 10)
    fill_with_synthetic_weights(reference, seed=4)
    with torch.no_grad():
        for name, module in reference.named_modules():
            if name.startswith("block") and name.count(".") == 1:
                # 1 + layer_scale_1 * gamma / sqrt(variance) is about `scale` + 1.
                module.layer_scale_1.copy_(scale * (module.norm1.running_var + 1e-5).sqrt() / module.norm1.weight)
    reference.eval()
    fused = van_tf.fuse(keras_model(family, reference))
    report = fused_parity(reference, fused)
    assert report.passed, report.first_divergence
    at_once = [layer.name for layer in fused.layers if layer.name.endswith("scaled.factor")]
    assert bool(at_once) == (scale != 1e-3)


def test_without_a_head_and_saved(family: VanFamily, reference: VAN, tmp_path: Path) -> None:
    whole = keras_model(family, reference)
    backbone = van_tf.van_nano(include_top=False, pooling="avg")
    for layer in backbone.layers:
        layer.set_weights(whole.get_layer(layer.name).get_weights() if layer.weights else [])
    fused = van_tf.fuse(backbone)
    np.testing.assert_allclose(fused(IMAGES), backbone(IMAGES), atol=1e-5)
    fused.save(tmp_path / "x.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "x.keras")(IMAGES), fused(IMAGES))


@pytest.mark.parametrize(
    "model",
    [
        lambda: van_tf.van_nano(data_format="channels_first"),
        lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="other"),
        lambda: van_tf.fuse(van_tf.van_nano()),
        lambda: van_tf.features(van_tf.van_nano()),
        lambda: van_tf.van_nano(dtype="mixed_float16"),
    ],
)
def test_other_models_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="is not a VAN built by van_tf with channels last and in float32"):
        van_tf.fuse(model())


def test_layers_around_it_keep_their_weights() -> None:
    stem = keras.layers.Conv2D(3, 1)(keras.Input((64, 64, 1)))
    body = van_tf.van_nano(input_tensor=stem)
    model = keras.Model(body.input, keras.layers.Dense(5)(body.output))
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 1)).astype(np.float32)
    np.testing.assert_allclose(van_tf.fuse(model)(images), model(images), atol=1e-5)
