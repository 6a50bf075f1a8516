"""Reading what an exported file says of itself, from intact and from damaged files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import Result

from porting.errors import OptionError, WeightsFileError
from porting.exporting import write
from porting.exporting.base import Exportable
from porting.exporting.usage import usage_of
from porting.files.exported_file import FORMATS, TITLES, exported_form, form_of
from porting.files.inspection import inspect_file
from porting.models.images import Preprocessing
from porting.models.inputs import image_inputs

FACTS = {"family": "toy", "variant": "one", "license": "MIT", "num_classes": 4, "checkpoint_sha256": "ab"}
LABELS = ("a", "b: c", "d", "e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in each format, and a SavedModel that says nothing of itself."""
    folder = tmp_path_factory.mktemp("exported")
    inputs = keras.Input((16, 16, 3))
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(32, 3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(4)(features))
    given = Exportable(model, image_inputs(np.zeros((1, 16, 16, 3), np.float32)))
    usage = usage_of(
        given, fixed=False, preprocessing=Preprocessing(16, 16), facts=FACTS, labels=LABELS, classifies=True
    )
    for form, suffix in FORMATS.items():
        write(form, given, folder / f"x{suffix}", "float32", usage=usage)
    write("saved_model", given, folder / "silent", "float32")
    return folder


@pytest.mark.parametrize("form", FORMATS)
def test_facts_and_weights(folder: Path, form: str) -> None:
    path = folder / f"x{FORMATS[form]}"
    found = inspect_file(path)
    assert found.facts["format"] == TITLES[form]
    assert len(found.facts["sha256"]) == 64
    assert found.provenance is not None
    assert {name: found.provenance[name] for name in ("family", "variant", "checkpoint_sha256", "num_classes")} == {
        "family": "toy",
        "variant": "one",
        "checkpoint_sha256": "ab",
        "num_classes": "4",
    }
    assert found.provenance["preprocessing"] == "x / 127.5 - 1"
    assert found.provenance["output"] == "logits"
    assert json.loads(found.provenance["labels"]) == list(LABELS)
    sizes = [math.prod(shape) for _, shape, dtype in found.tensors if dtype == "float32"]
    assert {3 * 3 * 3 * 32, 32 * 4} <= set(sizes)


@pytest.mark.slow
def test_a_saved_model_without_facts(folder: Path) -> None:
    found = inspect_file(folder / "silent")
    assert found.provenance is None
    assert found.tensors


@pytest.mark.slow
def test_variables_of_a_saved_model_are_listed(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(5)]).export(tmp_path / "x", verbose=False)
    assert (3, 5) in {shape for _, shape, _ in inspect_file(tmp_path / "x").tensors}


@pytest.mark.parametrize("name", ["x.tflite", "x.onnx"])
def test_damaged_files_end_in_one_message(folder: Path, tmp_path: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    rng = np.random.default_rng(0)
    spoilt = [b"", b"x", b"xxxxTFL3", content[: len(content) // 2], content[:-3000]]
    for _ in range(6):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 200):
            changed[place] = rng.integers(256)
        spoilt.append(bytes(changed))
    for each in spoilt:
        (tmp_path / name).write_bytes(each)
        # Many changed bytes are numbers of weights, which no reader can tell.
        with contextlib.suppress(WeightsFileError):
            inspect_file(tmp_path / name)
    for each in spoilt[:4]:
        (tmp_path / name).write_bytes(each)
        with pytest.raises(WeightsFileError, match="not a whole"):
            inspect_file(tmp_path / name)


@pytest.mark.slow
def test_a_damaged_saved_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "saved_model.pb").write_bytes((folder / "x" / "saved_model.pb").read_bytes()[:2000])
    with pytest.raises(WeightsFileError, match="not a whole SavedModel"):
        inspect_file(tmp_path / "x")
    (tmp_path / "x" / "assets.extra").mkdir()
    for text in ("[]", "{", '{"a": ' * 10_000):
        (tmp_path / "x" / "assets.extra" / "usage.json").write_text(text)
        with pytest.raises(WeightsFileError, match="not a whole SavedModel"):
            inspect_file(tmp_path / "x")


def test_options_of_checkpoints_are_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="an exported file has no --ema, --key or --prefix"):
        inspect_file(folder / "x.onnx", key="model")


def test_a_missing_package_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., Result]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run_cli("inspect", folder / "x.tflite")
    assert result.exit_code == 9
    assert "reading LiteRT needs ai_edge_litert and flatbuffers" in result.output
    assert "van-port[export]" in result.output


def test_forms_by_name(tmp_path: Path) -> None:
    assert form_of(Path("x.tflite")) == "litert"
    assert form_of(Path("x.h5")) is None
    assert exported_form(tmp_path) is None, "a folder is a SavedModel by what is in it"


def test_the_command_shortens_what_is_long(folder: Path, tmp_path: Path, run_cli: Callable[..., Result]) -> None:
    result = run_cli("inspect", folder / "x.onnx")
    assert result.exit_code == 0, result.output
    assert '"variant": "one"' in result.output
    assert "format: ONNX" in result.output
    import onnx

    model = onnx.load(folder / "x.onnx")
    onnx.helper.set_model_props(model, {"labels": json.dumps([f"class {number}" for number in range(1000)])})
    onnx.save(model, tmp_path / "many.onnx")
    result = run_cli("inspect", tmp_path / "many.onnx")
    assert "class 999" not in result.output
    assert "class 999" in run_cli("inspect", tmp_path / "many.onnx", "--json").output
