"""Models with several inputs, integer inputs or several results, in every format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
import torch
from torch import nn

from porting.exporting import open_runtime, write
from porting.exporting.base import Exportable
from porting.exporting.usage import usage_of
from porting.models.inputs import Inputs, make_inputs
from porting.parity.exported import compare_outputs

FORMS = [("litert", "x.tflite"), ("onnx", "x.onnx"), pytest.param("saved_model", "x", marks=pytest.mark.slow)]
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)


class Net(nn.Module):
    """Takes tokens and a mask, and returns features and their masked mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.dense = nn.Embedding(10, 8), nn.Linear(8, 5)

    def forward(self, token_ids: torch.Tensor, padding_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = padding_mask[..., None].to(self.dense.weight.dtype)
        features = nn.functional.gelu(self.dense(self.table(token_ids))) * mask
        return {"pooled": features.sum(1) / mask.sum(1), "features": features}


def pair(*, listed: bool = False) -> tuple[Net, keras.Model]:
    """Make the same model on both sides. With `listed`, it returns its results as a list."""
    torch.manual_seed(0)
    reference = Net().eval()
    tokens, mask = (keras.Input((None,), name=name, dtype="int32") for name in ("token_ids", "padding_mask"))
    table, dense = keras.layers.Embedding(10, 8), keras.layers.Dense(5)
    weight = keras.ops.cast(mask, "float32")[..., None]
    features = keras.layers.Lambda(lambda x: keras.ops.gelu(x, approximate=False))(dense(table(tokens))) * weight
    pooled = keras.ops.sum(features, 1) / keras.ops.sum(weight, 1)
    results = [pooled, features] if listed else {"pooled": pooled, "features": features}
    candidate = keras.Model({"token_ids": tokens, "padding_mask": mask}, results)
    table.embeddings.assign(reference.table.weight.detach())
    dense.kernel.assign(reference.dense.weight.detach().T)
    dense.bias.assign(reference.dense.bias.detach())
    return reference, candidate


def given_to(reference: nn.Module, candidate: keras.Model) -> Inputs:
    # In a different order from the model's own.
    return make_inputs(reference, candidate, {"padding_mask": MASK, "token_ids": TOKENS})


@pytest.mark.parametrize("listed", [False, True], ids=["by_key", "by_place"])
@pytest.mark.parametrize(("form", "name"), FORMS)
def test_every_format_has_the_names(form: str, name: str, listed: bool, tmp_path: Path) -> None:
    reference, candidate = pair(listed=listed)
    exportable = Exportable(candidate, given_to(reference, candidate))
    write(form, exportable, tmp_path / name, "float32")
    names = ("output_0", "output_1") if listed else ("pooled", "features")
    expected = keras.tree.flatten(candidate({"token_ids": TOKENS, "padding_mask": MASK}))
    by_name = dict(zip(names if listed else sorted(names), expected, strict=True))
    with open_runtime(form, tmp_path / name, []) as runtime:
        for index, sample in enumerate(exportable.samples()):
            results, _ = runtime.run(sample)
            assert set(results) == set(names)
            for each in names:
                np.testing.assert_allclose(results[each][0], np.asarray(by_name[each])[index], atol=1e-6)
        if form != "litert":  # it has one sample of one length
            longer = {"token_ids": np.tile(TOKENS, 2), "padding_mask": np.tile(MASK, 2)}
            assert runtime.run(longer)[0][names[1]].shape == (2, 12, 5)


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize(("form", "name"), FORMS)
def test_what_is_exported_is_judged(form: str, name: str, fault: bool, tmp_path: Path) -> None:
    reference, candidate = pair()
    inputs = given_to(reference, candidate)
    if fault:
        kernel = next(weight for weight in candidate.weights if weight.name == "kernel")
        kernel.assign(np.asarray(kernel) * (1 + 1e-4 * (np.arange(40).reshape(8, 5) == 7)))
    exportable = Exportable(candidate, inputs)
    write(form, exportable, tmp_path / name, "float32")
    with open_runtime(form, tmp_path / name, []) as runtime:

        def run(sample: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
            results, _ = runtime.run(dict(zip(exportable.names, sample.candidate, strict=True)))
            return {key: results[own] for key, own in exportable.result_names().items()}, {}

        report = compare_outputs(reference, run, inputs)
    assert report.passed is not fault
    assert {layer.source for layer in report.layers} == {"output[pooled]", "output[features]"}
    assert [layer.shape for layer in report.layers if layer.source == "output[features]"] == [(2, 6, 5)]


@pytest.mark.parametrize("key", ["", "[0]", "logits"])
def test_the_only_result_may_have_a_key(key: str) -> None:
    reference = nn.Linear(6, 6)
    values = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)

    def run(sample: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
        with torch.no_grad():
            return {key: reference(torch.from_numpy(sample.candidate[0].copy())).numpy()}, {}

    report = compare_outputs(reference, run, Inputs((values,), (values,), ((0, 1),)))
    assert report.passed
    assert report.logits is not None


def test_a_result_in_another_order_of_axes_is_refused() -> None:
    """Equal sides must not decide the order of axes: features (N, S, D) are not (N, D, S)."""
    torch.manual_seed(0)
    reference = nn.Linear(6, 6)
    values = np.random.default_rng(0).normal(size=(2, 6, 6)).astype(np.float32)
    inputs = Inputs((values,), (values,), ((0, 1, 2),))

    def run(sample: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
        with torch.no_grad():
            return {"": reference(torch.from_numpy(sample.candidate[0].copy())).numpy()}, {}

    assert compare_outputs(reference, run, inputs).passed
    assert not compare_outputs(reference, lambda x: ({"": run(x)[0][""].transpose(0, 2, 1)}, {}), inputs).passed


def test_numbered_results_sort_as_they_stand() -> None:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, [inputs * place for place in range(11)])
    exportable = Exportable(model, Inputs((np.zeros((1, 3), np.float32),), (np.zeros((1, 3), np.float32),), (None,)))
    names = list(exportable.result_names().values())
    assert names == sorted(names)
    assert names[10] == "output_10"


def test_keras_own_gelu_is_back_behind_an_export(tmp_path: Path) -> None:
    reference, candidate = pair()
    from keras.src import backend

    own = backend.nn.gelu
    write("onnx", Exportable(candidate, given_to(reference, candidate)), tmp_path / "x.onnx", "float32")
    assert backend.nn.gelu is own
    assert tf.reduce_all(keras.ops.gelu(tf.constant([-1.0, 1.0])) > -1.0)


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_grouped_convolutions(tmp_path: Path, form: str, name: str) -> None:
    inputs = keras.Input((9, 9, 8))
    x = keras.layers.Conv2D(12, 3, 2, padding="same", groups=4)(inputs)
    x = keras.layers.Conv2D(12, 3, padding="same", dilation_rate=2, groups=12)(x)
    model = keras.Model(inputs, keras.layers.Conv2D(3, 1)(x))
    images = np.random.default_rng(0).normal(size=(1, 9, 9, 8)).astype(np.float32)
    write(form, Exportable(model, Inputs((images,), (images,), ((0, 1, 2, 3),))), tmp_path / name, "float32")
    with open_runtime(form, tmp_path / name, []) as runtime:
        found, _ = runtime.run({"images": images})
    np.testing.assert_allclose(found["output_0"], np.asarray(model(images)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_onnx_of_large_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    monkeypatch.setattr("porting.exporting.onnx._LARGE", 0 if large else 2**40)
    inputs = keras.Input((9, 9, 8))
    x = keras.layers.Conv2D(40, 3, 2, padding="same")(inputs)
    x = keras.layers.DepthwiseConv2D(3, padding="same")(keras.layers.BatchNormalization()(x))
    x = keras.layers.Conv2D(40, 3, padding="same", groups=4)(keras.layers.Activation("gelu")(x))
    model = keras.Model(inputs, keras.layers.Dense(50)(keras.layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 0.5, weight.shape) for weight in model.get_weights()])
    images = rng.normal(size=(1, 9, 9, 8)).astype(np.float32)
    write("onnx", Exportable(model, Inputs((images,), (images,), ((0, 1, 2, 3),))), tmp_path / "x.onnx", "float32")
    with open_runtime("onnx", tmp_path / "x.onnx", []) as runtime:
        found, _ = runtime.run({"images": images})
    np.testing.assert_allclose(found["output_0"], np.asarray(model(images)), rtol=1e-5, atol=1e-4)
    graph = onnx.load(tmp_path / "x.onnx").graph
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


@pytest.mark.parametrize(
    "activation", ["gelu", pytest.param("silu", marks=pytest.mark.slow), pytest.param("mish", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("form", "name"), FORMS)
def test_activations(tmp_path: Path, form: str, name: str, activation: str) -> None:
    inputs = keras.Input((5,), name="numbers")
    model = keras.Model(inputs, keras.layers.Dense(4, activation=activation)(inputs))
    numbers = np.random.default_rng(0).normal(size=(1, 5)).astype(np.float32)
    given = Exportable(model, Inputs((numbers,), (numbers,), ((0, 1),)))
    usage = usage_of(given, fixed=form == "litert", preprocessing=None, facts={})
    write(form, given, tmp_path / name, "float32", usage=usage)
    with open_runtime(form, tmp_path / name, []) as runtime:
        found, _ = runtime.run({"numbers": numbers})
    np.testing.assert_allclose(found["output_0"], np.asarray(model(numbers)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_a_layer_that_joins_the_sides_of_a_map(scale: float) -> None:
    """keras-hub's Swin normalises `(N, H * W, C)` where timm's normalises `(N, H, W, C)`."""
    torch.manual_seed(0)
    body, head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
    reference = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    images = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)

    def run(given: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        with torch.no_grad():
            found = body(torch.from_numpy(given.transpose(0, 3, 1, 2).copy()))
            result = head(found.mean((2, 3)))
        return {"": result.numpy()}, {"0": scale * found.permute(0, 2, 3, 1).reshape(1, 16, 8).numpy()}

    report = compare_outputs(reference, run, images)
    assert report.passed == (scale == 1.0), str(report)
    assert {layer.source for layer in report.layers} == {"0", "output"}


@pytest.mark.parametrize("wrong", [False, True])
def test_a_tensor_that_has_only_the_name_in_common(wrong: bool) -> None:
    """keras-hub's RoBERTa calls "embeddings" what PyTorch normalises inside its `embeddings`."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).eval()
    values = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    inputs = Inputs((values,), (values,), ((0, 1),))

    def run(sample: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
        with torch.no_grad():
            inner = reference[0](torch.from_numpy(sample.candidate[0].copy()))
            result = reference[1](inner) * (1.001 if wrong else 1.0)
            return {"": result.numpy()}, {"0": (inner + 3).numpy()}

    report = compare_outputs(reference, run, inputs)
    assert report.passed is not wrong
    if not wrong:
        assert [layer.source for layer in report.layers] == ["output"]
        assert report.notes == ("0 of the file is not PyTorch's 0",)


def test_onnx_holds_the_kernels_of_attention_once(tmp_path: Path) -> None:
    inputs = keras.Input((None, 64), name="x")
    x = keras.layers.MultiHeadAttention(4, 16)(inputs, inputs)
    x = keras.layers.MultiHeadAttention(4, 16)(x, x)
    model = keras.Model(inputs, x)
    for number, weight in enumerate(model.weights):
        weight.assign(np.random.default_rng(number).normal(size=weight.shape))
    values = np.random.default_rng(0).normal(size=(1, 8, 64)).astype(np.float32)
    write("onnx", Exportable(model, Inputs((values,), (values,), ((0, 1, 2),), ("x",))), tmp_path / "x.onnx", "float32")
    held = sum(math.prod(each.dims) for each in onnx.load(tmp_path / "x.onnx").graph.initializer)
    assert model.count_params() <= held < 1.01 * model.count_params()
