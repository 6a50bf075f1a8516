"""What an exported file states about its use."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from porting.exporting import open_runtime, write
from porting.exporting.base import Exportable
from porting.exporting.ends import Ends
from porting.exporting.usage import Usage, usage_of
from porting.models.images import IMAGENET, Preprocessing
from porting.models.inputs import Inputs, image_inputs

FACTS = {"family": "toy", "variant": "one", "license": "MIT", "num_classes": 4}


def image_model() -> Exportable:
    inputs = keras.Input((None, None, 3))
    features = keras.layers.Conv2D(16, 3)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(features)))
    return Exportable(model, image_inputs(np.zeros((1, 16, 16, 3), np.float32)))


def usage(given: Exportable, *, fixed: bool, half: bool = True) -> Usage:
    preprocessing = Preprocessing(16, 16) if half else Preprocessing(16, 16, **IMAGENET)
    return usage_of(given, fixed=fixed, preprocessing=preprocessing, facts=FACTS)


def test_a_person_is_told() -> None:
    assert usage(image_model(), fixed=True).lines() == [
        "input images 1x16x16x3 float32, RGB from 0 to 255, x / 127.5 - 1",
        "output output_0 1x4 float32",
    ]
    line = usage(image_model(), fixed=False, half=False).lines()[0]
    assert line == (
        "input images Nx16x16x3 float32, RGB from 0 to 255, (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]"
    )


def test_tokens_have_no_preparation() -> None:
    tokens = keras.Input((None,), name="token_ids", dtype="int32")
    model = keras.Model({"token_ids": tokens}, {"features": keras.layers.Embedding(9, 4)(tokens)})
    values = np.zeros((2, 7), np.int32)
    given = Exportable(model, Inputs((values,), (values,), ((0, 1),), ("token_ids",)))
    assert usage_of(given, fixed=False, preprocessing=None, facts={}).lines() == [
        "input token_ids NxL int32",
        "output features NxLx4 float32",
    ]
    assert usage_of(given, fixed=True, preprocessing=None, facts={}).lines() == [
        "input token_ids 1x7 int32",
        "output features 1x7x4 float32",
    ]


def test_onnx_has_it_as_properties(tmp_path: Path) -> None:
    given = image_model()
    write("onnx", given, tmp_path / "x.onnx", "float32", usage=usage(given, fixed=False))
    found = {each.key: each.value for each in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert found["preprocessing"] == "x / 127.5 - 1"
    assert found["license"] == "MIT"
    assert found["num_classes"] == "4"
    assert found["inputs"] == "images Nx16x16x3 float32"


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter:UserWarning")  # the converter's own, in int8
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_litert_has_it_as_tflite_metadata(tmp_path: Path, precision: str) -> None:
    given, plain, said = image_model(), tmp_path / "plain.tflite", tmp_path / "said.tflite"
    write("litert", given, plain, precision)
    write("litert", given, said, precision, usage=usage(given, fixed=True, half=False))
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    results = []
    for path in (plain, said):
        interpreter = Interpreter(str(path))
        interpreter.allocate_tensors()
        results.append(interpreter.get_signature_runner()(images=image)["output_0"])
    np.testing.assert_array_equal(*results)
    content = said.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    entry = next(each for each in model.metadata if each.name == b"TFLITE_METADATA")
    block = bytes(model.buffers[entry.buffer].data)
    assert block[4:8] == b"M001"
    assert b"toy one" in block
    # Means and standard deviations are for values from 0 to 255.
    for numbers in (IMAGENET["mean"], IMAGENET["std"]):
        assert block.find(np.array([255 * number for number in numbers], np.float32).tobytes()) > 0
    # Weights are aligned as runtimes map them.
    for buffer in model.buffers:
        if buffer.data is not None and len(buffer.data) >= 16 and buffer.data is not model.buffers[entry.buffer].data:
            values = bytes(buffer.data)
            assert any(content.startswith(values, at) for at in range(0, len(content), 16)), len(values)


ENDS = Ends(Preprocessing(16, 16, **IMAGENET), softmax=True)
NAMES = ("cat", "dog", "über", "fish")


def with_ends() -> tuple[Exportable, Usage]:
    given = image_model()
    given = Exportable(given.model, given.inputs, ENDS)
    preprocessing = Preprocessing(16, 16, **IMAGENET)
    return given, usage_of(given, fixed=True, preprocessing=preprocessing, facts=FACTS, labels=NAMES, classifies=True)


def test_ends_are_said() -> None:
    assert with_ends()[1].lines() == [
        "input images 1x16x16x3 float32, RGB from 0 to 255, x as it is: the graph normalises it",
        "output output_0 1x4 float32, probabilities",
        "labels cat, dog, über, fish",
    ]


@pytest.mark.parametrize("form", ["litert", "onnx", "saved_model"])
def test_ends_are_in_the_graph(tmp_path: Path, form: str) -> None:
    given, said = with_ends()
    path = tmp_path / {"litert": "x.tflite", "onnx": "x.onnx", "saved_model": "x"}[form]
    write(form, given, path, "float32", usage=said)
    raw = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype(np.float32)
    normalized = (raw / 255 - np.array(IMAGENET["mean"])) / np.array(IMAGENET["std"])
    logits = np.asarray(given.model(normalized.astype(np.float32)))
    expected = np.exp(logits) / np.exp(logits).sum()
    with open_runtime(form, path, []) as runtime:
        found, _ = runtime.run({"images": raw})
    np.testing.assert_allclose(found["output_0"], expected, rtol=1e-5)
    if form == "litert":
        with zipfile.ZipFile(path) as archive:  # TFLite's readers find the labels there
            assert archive.read("labels.txt").decode() == "cat\ndog\nüber\nfish\n"
    elif form == "onnx":
        found_labels = {each.key: each.value for each in onnx.load(path).metadata_props}["labels"]
        assert tuple(json.loads(found_labels)) == NAMES
    else:
        assert (path / "assets.extra" / "labels.txt").read_text(encoding="utf-8").splitlines() == list(NAMES)
        assert json.loads((path / "assets.extra" / "usage.json").read_text())["output"] == "probabilities"


def test_the_reference_gets_the_same_ends() -> None:
    reference = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    names = [name for name, _ in reference.named_modules()]
    images = np.random.default_rng(0).normal(size=(2, 2, 2, 3)).astype(np.float32)
    normalized = image_inputs(images)
    with torch.no_grad():
        expected = reference(torch.from_numpy(normalized.reference[0])).softmax(-1)
        ENDS.add_to(reference)
        found = ENDS.unprepared(normalized).call_reference(reference, torch.float32)
    torch.testing.assert_close(found, expected)
    assert [name for name, _ in reference.named_modules()] == names
