from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import van_tf
from porting.families.van import VanFamily
from porting.files.weights_file import variable_shapes
from porting.mapping.convert import convert
from porting.references.van import VAN
from van_tf.layers import Block, gelu, module_name

# tests/van_tf/test_backends.py runs this on every Keras backend.
numpy_of = keras.ops.convert_to_numpy
# Parameters with BatchNorm statistics, and variables, as computed from the official code.
SIZES = {
    "b0": (4_113_224, 372),
    "b1": (13_874_600, 294),
    "b2": (26_604_328, 580),
    "b3": (44_811_688, 1022),
    "b4": (60_346_408, 1386),
    "b5": (90_029_512, 892),
    "b6": (199_995_880, 2842),
}


@pytest.fixture(scope="module")
def model(family: VanFamily, state_dict: dict[str, np.ndarray]) -> keras.Model:
    """A Keras nano with the weights of the synthetic reference. Tests must not change them."""
    model = van_tf.van_nano()
    weights = convert(state_dict, family.key_map(family.spec("nano")), variable_shapes(model)).weights
    for variable in model.weights:
        variable.assign(weights[variable.path])
    return model


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def torch_logits(reference: VAN, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


LARGE = [pytest.param(variant, marks=pytest.mark.slow) for variant in ("b4", "b5", "b6")]


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3", *LARGE])
def test_parameters_and_variables(variant: str) -> None:
    model = getattr(van_tf, f"van_{variant}")()
    assert (model.count_params(), len(model.weights)) == SIZES[variant]
    assert model.output_shape == (None, 1000)
    assert model.name == f"van_{variant}"


def test_nano_is_small() -> None:
    assert van_tf.van_nano().count_params() < 500_000


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (32, 32), (33, 47), (45, 100), (224, 160)], ids=lambda side: str(side)
)
def test_pytorchs_logits_at_any_size(model: keras.Model, reference: VAN, height: int, width: int) -> None:
    images = random_images(2, height, width, 3)
    expected = torch_logits(reference, images)
    assert expected.std() > 0.1
    # A few units in the last place after some hundred roundings. The parity check itself uses float64.
    np.testing.assert_allclose(numpy_of(model(images)), expected, atol=2e-5, rtol=0)
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=2e-5, rtol=0)


def test_names_are_pytorchs(model: keras.Model, state_dict: dict[str, np.ndarray]) -> None:
    leaves = {
        "kernel": "weight",
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    }
    names = set()
    for variable in model.weights:
        top, _, inside = variable.path.partition("/")
        layer, _, leaf = f"{module_name(top)}.{inside}".replace("/", ".").rpartition(".")
        names.add(f"{layer}.{leaves.get(leaf, leaf)}")
    assert names == {name for name in state_dict if not name.endswith("num_batches_tracked")}


def test_settings_that_no_output_shows() -> None:
    model = van_tf.van_b0(drop_rate=0.1, drop_path_rate=0.2)
    layers = list(model._flatten_layers())
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert {(norm.epsilon, norm.momentum) for norm in norms} == {(1e-5, 0.9)}
    layer_norms = [layer for layer in layers if isinstance(layer, keras.layers.LayerNormalization)]
    assert [norm.epsilon for norm in layer_norms] == [1e-6] * 4
    blocks = [layer for layer in layers if isinstance(layer, Block)]
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0.2 * i / 12 for i in range(13)])
    assert {block.mlp.drop.rate for block in blocks} == {0.1}


def test_initial_values_have_the_official_spread() -> None:
    keras.utils.set_random_seed(0)
    weights = {variable.path: np.asarray(variable) for variable in van_tf.van_b1().weights}
    # sqrt(2 / (kernel area * output channels / groups))
    assert weights["block3_0/mlp/fc1/kernel"].std() == pytest.approx((2 / 1280) ** 0.5, rel=0.02)
    assert weights["block3_0/mlp/dwconv/dwconv/kernel"].std() == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    assert weights["patch_embed1/proj/kernel"].std() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)
    assert weights["head/kernel"].std() == pytest.approx(0.02, rel=0.02)
    assert np.abs(weights["head/kernel"]).max() > 0.05, "cut at two standard deviations, as PyTorch does not"
    assert np.all(weights["block3_0/layer_scale_1"] == np.float32(1e-2))
    assert all(not value.any() for path, value in weights.items() if path.endswith("/bias"))


def test_drop_path_drops_whole_samples_and_rescales_the_others() -> None:
    keras.utils.set_random_seed(0)
    block = Block(mlp_ratio=2, drop_path_rate=0.25)
    block.build((None, 4, 4, 8))
    branch = np.ones((4000, 4, 4, 8), np.float32)
    dropped = numpy_of(block.drop_path(branch, training=True)).reshape(4000, -1)
    np.testing.assert_array_equal(dropped.min(1), dropped.max(1))
    assert sorted(set(dropped[:, 0].tolist())) == pytest.approx([0.0, 4 / 3])
    assert (dropped[:, 0] == 0).mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(numpy_of(block.drop_path(branch, training=False)), branch)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gelu_is_pytorchs_in_every_precision(dtype: str) -> None:
    """For negative x, the sum inside it cancels."""
    x = torch.linspace(-6, 6, 4001).to(getattr(torch, dtype))
    expected = torch.nn.functional.gelu(x.double()).numpy()
    result = gelu(keras.ops.convert_to_tensor(x.float().numpy(), dtype))
    actual = numpy_of(keras.ops.cast(result, "float32")).astype(np.float64)
    assert (np.abs(actual - expected) <= torch.finfo(x.dtype).eps * np.abs(expected) + 1e-6).all()


def test_training_moves_weights_and_statistics() -> None:
    config = van_tf.VanConfig("tiny", (8, 8, 8, 8), (1, 1, 1, 2), (2, 2, 2, 2))
    model = van_tf.van(config, classes=10, drop_path_rate=0.1, drop_rate=0.1)
    # Eager, since tracing takes longer than two steps; tests/scripts/test_finetune.py trains in a graph.
    model.compile("adamw", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    before = {variable.path: np.array(variable) for variable in model.weights}
    model.fit(random_images(8, 32, 32, 3), np.arange(8), batch_size=4, epochs=1, verbose=0)
    still = [variable.path for variable in model.weights if np.array_equal(before[variable.path], np.array(variable))]
    assert still == []


def test_config_round_trip(model: keras.Model) -> None:
    again = keras.Model.from_config(model.get_config())
    assert [variable.path for variable in again.weights] == [variable.path for variable in model.weights]
    again.set_weights(model.get_weights())
    images = random_images(1, 64, 64, 3)
    np.testing.assert_array_equal(numpy_of(again(images)), numpy_of(model(images)))


def test_config_keeps_rates() -> None:
    model = van_tf.van_nano(drop_rate=0.1, drop_path_rate=0.3)
    again = keras.Model.from_config(model.get_config())
    assert again.get_layer("block4_0").get_config() == model.get_layer("block4_0").get_config()
    assert again.get_layer("block4_0").drop_path_rate == pytest.approx(0.3)


def test_keras_file_round_trip(model: keras.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "nano.keras")
    again = keras.models.load_model(tmp_path / "nano.keras")
    images = random_images(1, 64, 64, 3)
    np.testing.assert_array_equal(numpy_of(again(images)), numpy_of(model(images)))


def test_summary_and_graph(model: keras.Model, tmp_path: Path) -> None:
    lines: list[str] = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert "block3_1 (Block)" in "\n".join(lines)
    if shutil.which("dot") is None:
        pytest.skip("drawing needs graphviz's program dot")
    keras.utils.plot_model(model, tmp_path / "nano.png", show_shapes=True)
    assert (tmp_path / "nano.png").stat().st_size > 10_000


@pytest.mark.parametrize(("policy", "tolerance"), [("mixed_bfloat16", 0.1), ("mixed_float16", 0.02)])
def test_mixed_precision(model: keras.Model, policy: str, tolerance: float) -> None:
    mixed = van_tf.van_nano(dtype=policy)
    mixed.set_weights(model.get_weights())
    assert {variable.dtype for variable in mixed.weights} == {"float32"}
    images = random_images(2, 64, 64, 3)
    output = mixed(images)
    assert keras.backend.standardize_dtype(output.dtype) == policy.removeprefix("mixed_")
    expected = numpy_of(model(images))
    np.testing.assert_allclose(numpy_of(keras.ops.cast(output, "float32")), expected, atol=tolerance)


def test_global_mixed_precision_policy() -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = van_tf.van_nano()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert {layer.compute_dtype for layer in model._flatten_layers(include_self=False)} == {"bfloat16"}


def test_jit_compile(model: keras.Model, reference: VAN) -> None:
    compiled = keras.models.clone_model(model)
    compiled.set_weights(model.get_weights())
    compiled.compile(jit_compile=True)
    images = random_images(2, 64, 64, 3)
    np.testing.assert_allclose(compiled.predict(images, verbose=0), torch_logits(reference, images), atol=2e-5, rtol=0)


def test_without_top_gives_the_last_stage() -> None:
    model = van_tf.van_nano(include_top=False)
    assert model(random_images(1, 100, 64, 3)).shape == (1, 4, 2, 96)
    assert model.layers[-1].name == "norm4"


def test_fixed_input_shape_and_other_channels() -> None:
    model = van_tf.van_nano(input_shape=(48, 64, 1), classes=3)
    assert model.input_shape == (None, 48, 64, 1)
    assert model(random_images(1, 48, 64, 1)).shape == (1, 3)
    assert model.get_layer("block1_0").output.shape == (None, 12, 16, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (31, 64, 3)}, "at least 32 pixels"),
        ({"input_shape": (64, 64)}, r"\(height, width, channels\)"),
        ({"classes": 0}, "use include_top=False"),
        ({"drop_rate": 1.0}, "drop_rate must be at least 0 and below 1"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be at least 0 and below 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        van_tf.van_nano(**arguments)


def test_preprocess_input_maps_pixels_to_minus_one_to_one() -> None:
    pixels = np.array([0, 127, 255], np.uint8)
    np.testing.assert_allclose(np.asarray(van_tf.preprocess_input(pixels)), [-1.0, -1 / 255, 1.0], atol=1e-7)


@pytest.mark.parametrize("axis", [1, -1, 2])
def test_batch_norm_counts_the_values_of_any_axis(axis: int) -> None:
    from van_tf.layers import BatchNorm

    values = np.random.default_rng(0).normal(2.0, 3.0, (4, 5, 6, 7)).astype(np.float32)
    layer = BatchNorm(axis=axis, momentum=0.9, epsilon=1e-5)
    layer(values, training=True)
    channels_second = np.moveaxis(values, axis, 1)
    theirs = torch.nn.BatchNorm2d(channels_second.shape[1])
    theirs(torch.from_numpy(channels_second.copy()))
    np.testing.assert_allclose(numpy_of(layer.moving_mean), theirs.get_buffer("running_mean"), rtol=1e-5)
    np.testing.assert_allclose(numpy_of(layer.moving_variance), theirs.get_buffer("running_var"), rtol=1e-5)


def test_batch_norm_counts_what_a_mask_leaves() -> None:
    from van_tf.layers import BatchNorm

    values = np.random.default_rng(0).normal(2.0, 3.0, (3, 5, 7)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
    layer = BatchNorm(momentum=0.9, epsilon=1e-5)
    layer(values, training=True, mask=mask)
    theirs = torch.nn.BatchNorm1d(7)
    theirs(torch.from_numpy(values[mask]))
    np.testing.assert_allclose(numpy_of(layer.moving_mean), theirs.get_buffer("running_mean"), rtol=1e-5)
    np.testing.assert_allclose(numpy_of(layer.moving_variance), theirs.get_buffer("running_var"), rtol=1e-5)
