"""Exported files are checked in their own runtimes, and wrong ones are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
import torch
from click.testing import Result

import van_tf
from porting.errors import ExportError, FailedParityError, OptionError, OutputError, ParityError, WeightsFileError
from porting.exporting import open_runtime, write
from porting.exporting.base import Exportable
from porting.exporting.litert import kernels_in_parts
from porting.exporting.saved_model import stored
from porting.families.van import VanFamily
from porting.models.inputs import image_inputs
from porting.models.precision import in_precision
from porting.parity.exported import compare_outputs
from porting.parity.report import OUTPUT
from porting.references.van import VAN
from porting.tasks.evaluate import evaluate
from porting.tasks.export import export
from porting.tasks.options import CheckOptions
from porting.tasks.port import port

TWO = CheckOptions(samples=2)
ZEROS = image_inputs(np.zeros((1, 8, 8, 3), np.float32))
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def ported(family: VanFamily, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return port(family, "nano", tmp_path_factory.mktemp("x") / "x.h5", checkpoint=checkpoint, check=False).path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("form", "name", "precision", "layers"),
    [
        ("litert", "x.tflite", "float32", 70),
        pytest.param("litert", "x.tflite", "float16", 70, marks=slow),
        pytest.param("litert", "x.tflite", "int8", 70, marks=slow),
        ("onnx", "x.onnx", "float32", 72),
        pytest.param("onnx", "x.onnx", "float16", 72, marks=slow),
        pytest.param("onnx", "x.onnx", "int8", 72, marks=slow),
        pytest.param("saved_model", "x", "float32", 37, marks=slow),
        pytest.param("saved_model", "x", "float16", 37, marks=slow),
        pytest.param("saved_model", "x", "int8", 37, marks=slow),
    ],
)
def test_every_format_and_precision(
    family: VanFamily, checkpoint: Path, ported: Path, tmp_path: Path, form: str, name: str, precision: str, layers: int
) -> None:
    out = tmp_path / name
    result = export(family, "nano", ported, out, form=form, precision=precision, checkpoint=checkpoint, options=TWO)
    assert result.report is not None
    assert result.report.passed
    assert len(result.report.layers) >= layers
    assert result.report.layers[-1].source == OUTPUT
    assert names_in(tmp_path) == [name, f"{name}.parity.json"]
    # 418,266 weights, and the graph.
    width = {"float32": 4, "float16": 2, "int8": 1}[precision]
    assert 418_266 * width < result.size < 418_266 * width + 450_000
    if form == "litert":
        # Dilated convolutions are LiteRT's own operations, and no operation needs TensorFlow's kernels.
        split = 0 if precision == "int8" else 2 * 2  # a 7x7 kernel becomes a sum of three if the map is large enough
        assert result.operators["DEPTHWISE_CONV_2D"] == 21 + split + 4  # one factor per stage
        assert result.operators["GELU"] == 14
        assert not any("SPACE_TO_BATCH" in operator or "Flex" in operator for operator in result.operators)
    if form == "onnx":
        assert result.operators["Gelu"] == 14
        assert not result.operators["Erf"]
    if precision == "float32":
        with open_runtime(form, out, []) as runtime:
            image = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
            expected = van_tf.van_nano(weights=ported)(image)
            np.testing.assert_allclose(runtime.run({"images": image})[0]["output_0"], expected, atol=1e-5)


@slow
def test_int8_can_be_split_too(family: VanFamily, checkpoint: Path, ported: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"form": "litert", "precision": "int8", "checkpoint": checkpoint, "options": TWO}
    result = export(family, "nano", ported, tmp_path / "x.tflite", **how, split_kernels=True)
    assert result.report is not None
    assert result.report.passed
    assert result.report.context["export"]["split_kernels"] is True
    assert result.operators["DEPTHWISE_CONV_2D"] == 21 + 4 + 4


@slow
def test_whole_kernels_are_one_operation_each(family: VanFamily, ported: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.tflite"
    result = export(family, "nano", ported, out, form="litert", check=False, split_kernels=False)
    assert result.operators["DEPTHWISE_CONV_2D"] == 21 + 4
    assert not any("SPACE_TO_BATCH" in operator or "Flex" in operator for operator in result.operators)


@pytest.mark.parametrize(
    ("kernel", "dilation", "parts"),
    [
        ((7, 7), (3, 3), 3),
        ((7, 7), 1, 3),
        ((9, 9), (2, 1), 5),
        ((31, 3), (1, 2), 13),
        ((5, 5), 2, 1),
        ((3, 31), 1, 1),
        ((7, 7), 7, 1),
    ],
    ids=str,
)
def test_parts_of_a_kernel_add_up_to_it(kernel: tuple[int, int], dilation: Any, parts: int) -> None:
    layer = keras.layers.DepthwiseConv2D(
        kernel, padding="same", dilation_rate=dilation, data_format="channels_last", activation="relu"
    )
    model = keras.Sequential([keras.Input((20, 24, 3)), layer])
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=weight.shape) for weight in layer.get_weights()])
    images = rng.normal(size=(1, 20, 24, 3)).astype(np.float32)
    expected = model(images).numpy()
    with kernels_in_parts(model):
        run = tf.function(lambda x: model(x)).get_concrete_function(tf.TensorSpec((1, 20, 24, 3)))
        np.testing.assert_allclose(model(images), expected, rtol=1e-4, atol=1e-4)
    assert sum(each.type == "DepthwiseConv2dNative" for each in run.graph.get_operations()) == parts
    np.testing.assert_array_equal(model(images), expected)


def test_keras_own_gelu_is_onnx_own(tmp_path: Path) -> None:
    """Other families may use it; TensorFlow's version has an operation that ONNX lacks."""
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Conv2D(4, 3, activation="gelu", name="conv")(inputs))
    write("onnx", Exportable(model, ZEROS), tmp_path / "x.onnx", "float32")
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    with open_runtime("onnx", tmp_path / "x.onnx", []) as runtime:
        assert runtime.operators()["Gelu"] == 1
        np.testing.assert_allclose(runtime.run({"images": image})[0]["output_0"], model(image), atol=1e-6)
    assert model.get_layer("conv").activation is keras.activations.gelu


def test_onnx_names_are_not_given_twice(tmp_path: Path) -> None:
    """tf2onnx merges two equal biases, but the bias gives a convolution its name."""
    inputs = x = keras.Input((8, 8, 3))
    for name in ("one", "two"):
        x = keras.layers.Conv2D(3, 3, padding="same", name=name)(keras.layers.ReLU()(x))
    model = keras.Model(inputs, keras.layers.ReLU()(x))
    write("onnx", Exportable(model, ZEROS), tmp_path / "x.onnx", "float32")
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    with open_runtime("onnx", tmp_path / "x.onnx", ["one", "two"]) as runtime:
        np.testing.assert_allclose(runtime.run({"images": image})[0]["output_0"], model(image), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "depthwise", "scales"), [((3, 3, 8, 2), True, (1, 1, 8, 2)), ((1, 1, 8, 5), False, (1, 1, 1, 5))]
)
def test_int8_steps_are_those_of_a_channel(shape: tuple[int, ...], depthwise: bool, scales: tuple[int, ...]) -> None:
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32) * np.arange(1, shape[-1] + 1)
    steps, scale = stored(kernel, "int8", depthwise=depthwise)
    assert scale is not None
    assert scale.shape == scales
    assert steps.dtype == np.int8
    assert (np.abs(steps * scale - kernel) <= scale * 0.50001).all()


def test_a_depthwise_layer_of_ones_own_is_left_alone() -> None:
    class Own(keras.layers.DepthwiseConv2D):  # type: ignore[misc]
        def call(self, inputs: Any) -> Any:
            return super().call(inputs) + 1.0

    model = keras.Sequential([keras.Input((16, 16, 2)), Own(7, padding="same")])
    images = np.ones((1, 16, 16, 2), np.float32)
    expected = model(images).numpy()
    with kernels_in_parts(model):
        np.testing.assert_array_equal(model(images), expected)


@slow
def test_a_saved_model_replaces_an_older_one(family: VanFamily, checkpoint: Path, ported: Path, tmp_path: Path) -> None:
    for _ in range(2):
        export(family, "nano", ported, tmp_path / "x", form="saved_model", checkpoint=checkpoint, check=False)
    assert names_in(tmp_path) == ["x"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(OutputError, match="mine exists and is not a SavedModel"):
        export(family, "nano", ported, tmp_path / "mine", form="saved_model", checkpoint=checkpoint)


def test_without_a_check_no_checkpoint_is_read(family: VanFamily, tmp_path: Path) -> None:
    weights, nowhere, out = tmp_path / "x.weights.h5", tmp_path / "none.pth", tmp_path / "x.onnx"
    van_tf.van_nano(classes=5).save_weights(weights)
    result = export(family, "nano", weights, out, form="onnx", checkpoint=nowhere, layout="mmpretrain", check=False)
    assert result.report is None
    written = onnx.load(out)
    assert [axis.dim_value for axis in written.graph.output[0].type.tensor_type.shape.dim][1:] == [5]
    epsilons = [np.float32(1e-5), np.float32(1e-6)]
    numbers = [onnx.numpy_helper.to_array(each) for each in written.graph.initializer]
    assert [sum(array.size == 1 and array.item() == epsilon for array in numbers) for epsilon in epsilons] == [1, 0]


def test_a_wrong_export_gets_no_name(
    family: VanFamily, checkpoint: Path, ported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tampered(self: VanFamily, candidate: keras.Model, form: str) -> keras.Model:
        fused = van_tf.fuse(candidate, fold_gelu=False)
        layer = fused.get_layer("block2.1.mlp.fc1")
        layer.bias.assign(layer.bias * 1.001)
        return fused

    monkeypatch.setattr(VanFamily, "fuse", tampered)
    (tmp_path / "x.tflite").write_text("old")
    with pytest.raises(
        FailedParityError, match="x.tflite was not written: not at parity; first divergence: block2.1.mlp.fc1"
    ):
        export(family, "nano", ported, tmp_path / "x.tflite", form="litert", checkpoint=checkpoint, options=TWO)
    assert names_in(tmp_path) == ["x.tflite"]
    assert (tmp_path / "x.tflite").read_text() == "old"


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_weights_that_are_not_the_checkpoints_are_not_exported(
    family: VanFamily, checkpoint: Path, ported: Path, tmp_path: Path, precision: str
) -> None:
    """One wrong number is below the rounding of every runtime."""
    wrong, out = tmp_path / "wrong.h5", tmp_path / "x.tflite"
    model = van_tf.van_nano(weights=ported)
    kernel = next(each for each in model.weights if "kernel" in each.path)
    values = np.array(kernel)
    values.flat[5] += 1e-4
    kernel.assign(values)
    model.save_weights(wrong.with_suffix(".weights.h5"))
    how: dict[str, Any] = {"form": "litert", "precision": precision, "checkpoint": checkpoint, "options": TWO}
    with pytest.raises(ParityError, match="1 weight not the checkpoint's: .*and should be"):
        export(family, "nano", wrong.with_suffix(".weights.h5"), out, **how)
    assert not out.exists()


def test_eight_bits_are_not_a_licence(reference: VAN) -> None:
    """A file that is twenty times worse than int8 must be fails."""
    images = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    rounded = in_precision(reference, "int8", images)
    scale = 0.0

    def run(image: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        with torch.no_grad():
            output = rounded(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()
        return {"": output + scale * np.abs(output).max() * np.array([1, -1] * 5, np.float32)}, {}

    assert compare_outputs(reference, run, images, rounded=rounded).passed
    scale = 3.0
    assert not compare_outputs(reference, run, images, rounded=rounded).passed


@pytest.mark.parametrize(
    ("precision", "low", "high"), [("float32", 0.0, 0.0), ("float16", 1e-4, 1e-2), ("int8", 1e-3, 0.5)]
)
def test_a_precision_costs_what_it_costs(reference: VAN, precision: str, low: float, high: float) -> None:
    images = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        expected, actual = reference(tensor), in_precision(reference, precision, images)(tensor)
    error = float((actual - expected).norm() / expected.norm())
    assert low <= error <= high


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"form": "coreml", "out": "x.mlmodel"}, ExportError, "unknown format 'coreml'"),
        ({"form": "onnx", "out": "x.onnx", "precision": "int4"}, ExportError, "unknown precision 'int4'"),
        ({"form": "onnx", "out": "x.tflite"}, OutputError, "the suffix does not match the format"),
        ({"form": "litert", "out": "no/x.tflite"}, OutputError, "does not exist"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(
    family: VanFamily,
    ported: Path,
    tmp_path: Path,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    out = tmp_path / arguments.pop("out")
    with pytest.raises(error, match=message):
        export(family, "nano", ported, out, **arguments)


def test_a_runtime_that_is_not_installed(
    family: VanFamily, ported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else sys)
    with pytest.raises(ExportError, match="exporting to onnx needs tf2onnx") as caught:
        export(family, "nano", ported, tmp_path / "x.onnx", form="onnx")
    assert "pip install 'van-port[export]'" in caught.value.hint


@pytest.mark.parametrize(("form", "name"), [("litert", "x.tflite"), ("onnx", "x.onnx"), ("saved_model", "x")])
def test_a_damaged_artifact_is_an_error(tmp_path: Path, form: str, name: str) -> None:
    path = tmp_path / name
    if form == "saved_model":
        path.mkdir()
        path = path / "saved_model.pb"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ExportError), open_runtime(form, tmp_path / name, []) as runtime:
        runtime.run({"images": np.zeros((1, 64, 64, 3), np.float32)})


@slow
def test_onnx_of_a_model_that_is_not_fused(family: VanFamily, checkpoint: Path, ported: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    result = export(family, "nano", ported, out, form="onnx", fused=False, checkpoint=checkpoint, options=TWO)
    assert result.report is not None
    assert result.report.passed


def test_a_model_of_another_kind_is_an_error(family: VanFamily, checkpoint: Path, tmp_path: Path) -> None:
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "x.keras")
    with pytest.raises(
        WeightsFileError, match="its variables do not match those of van_tf.van_nano.*2 not in the model"
    ):
        export(family, "nano", tmp_path / "x.keras", tmp_path / "x.tflite", form="litert", checkpoint=checkpoint)
    assert names_in(tmp_path) == ["x.keras"]


def test_the_command(run_cli: Callable[..., Result], checkpoint: Path, ported: Path, tmp_path: Path) -> None:
    arguments = ["export", "--variant", "nano", "--weights", ported, "--checkpoint", checkpoint, "--samples", 1]
    result = run_cli(*arguments, "--out", tmp_path / "x.tflite", "--no-fused", "--no-split-kernels")
    assert result.exit_code == 0, result.output
    assert "litert in float32, " in result.output
    assert "AT PARITY" in result.output
    # An evaluation reads from the file which model it is.
    evaluated = run_cli("evaluate", "--weights", tmp_path / "x.tflite", "--data", tmp_path / "none")
    assert "was ported from another checkpoint" in evaluated.output
    evaluated = run_cli(
        "evaluate", "--weights", tmp_path / "x.tflite", "--checkpoint", checkpoint, "--data", tmp_path / "none"
    )
    assert "no such folder" in evaluated.output
    assert run_cli(*arguments, "--out", tmp_path / "x.bin").exit_code == 6
    assert run_cli(*arguments, "--out", tmp_path / "x.onnx", "--train").exit_code == 2
    assert run_cli(*arguments, "--out", tmp_path / "x.onnx", "--format", "litert").exit_code == 6
    assert run_cli(*arguments, "--out", tmp_path / "y.tflite", "--labels", tmp_path / "none.txt").exit_code == 5


def test_what_is_added_at_both_ends_is_proven(
    family: VanFamily, checkpoint: Path, ported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.onnx"
    ends: dict[str, Any] = {"with_preprocessing": True, "with_softmax": True}
    result = export(family, "nano", ported, out, form="onnx", checkpoint=checkpoint, options=TWO, **ends)
    assert result.report is not None
    assert result.report.passed, str(result.report)
    assert result.report.context["export"] | ends == result.report.context["export"]
    assert result.usage.gives == "probabilities"
    assert result.usage.labels == (), "nobody has said what the ten classes of this checkpoint are"
    assert result.usage.lines()[-1] == "labels not known: --labels FILE names the classes"
    # An evaluation feeds normalised images and judges logits.
    with pytest.raises(OptionError, match="was exported with --with-preprocessing, --with-softmax"):
        evaluate(family, "nano", out, str(tmp_path), checkpoint={"location": checkpoint})


def test_labels_are_those_of_a_published_checkpoint(family: VanFamily, tmp_path: Path) -> None:
    port(family, "nano", tmp_path / "x.h5", check=False)
    result = export(family, "nano", tmp_path / "x.h5", tmp_path / "x.onnx", form="onnx", check=False)
    assert result.usage.labels == van_tf.CIFAR10_CLASSES
    names = tmp_path / "labels.txt"
    names.write_text("\n".join("abcdefghij"))
    other: dict[str, Any] = {"form": "onnx", "check": False, "labels": names}
    assert export(family, "nano", tmp_path / "x.h5", tmp_path / "y.onnx", **other).usage.labels == tuple("abcdefghij")


def test_ends_that_a_model_does_not_have(family: VanFamily, tmp_path: Path) -> None:
    weights = tmp_path / "x.weights.h5"
    van_tf.van_nano(include_top=False).save_weights(weights)
    arguments: dict[str, Any] = {"form": "onnx", "layout": "official", "check": False}
    for option in ({"with_softmax": True}, {"labels": tmp_path / "labels.txt"}):
        with pytest.raises(ExportError, match="is for classifiers"):
            export(family, "nano", weights, tmp_path / "x.onnx", **arguments, **option)
    assert names_in(tmp_path) == ["x.weights.h5"]
