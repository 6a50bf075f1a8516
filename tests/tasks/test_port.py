"""Tests the port from a checkpoint file to a finished Keras file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import van_tf
from porting.errors import CheckpointError, FailedParityError, KeyMapError, OutputError, ParityError, SourceError
from porting.families.base import Spec
from porting.families.registry import get_family
from porting.families.van import VanFamily
from porting.files import weights_file
from porting.files.atomic import report_path_of
from porting.files.checkpoint import read_checkpoint
from porting.files.survey import survey_file
from porting.models.synthetic import fill_with_synthetic_weights
from porting.references.van import VAN, build_van
from porting.reports import write_report
from porting.reports.document import file_beside, read_report
from porting.tasks.options import CheckOptions
from porting.tasks.port import port
from porting.tasks.revert import revert

FAST = CheckOptions(samples=1)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class FaultyFamily(VanFamily):
    """A family whose Keras model has the wrong epsilon in one layer: its ports must fail."""

    def build_candidate(self, spec: Spec) -> keras.Model:
        model = super().build_candidate(spec)
        model.get_layer("norm3").epsilon = 1e-3
        return model


@pytest.mark.parametrize("name", ["nano.h5", "nano.weights.h5", "nano.keras"])
def test_a_port_is_checked_named_and_documented(family: VanFamily, checkpoint: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    result = port(family, "nano", out, checkpoint=checkpoint, options=CheckOptions(samples=3))
    assert names_in(tmp_path) == [name, f"{name}.parity.json"]
    assert result.path == out
    assert result.report is not None
    assert result.report.passed
    assert result.report.input_shapes == ((3, 64, 64, 3),)

    provenance = survey_file(out).provenance
    assert provenance is not None
    assert provenance["variant"] == "nano"
    assert provenance["source"]["name"] == checkpoint.name
    assert provenance["source"]["sha256"] == sha256_of(checkpoint)
    assert provenance["source"]["license"] == "unknown: the checkpoint was given by path"
    assert provenance["source"]["dropped"] == 18
    assert provenance["parity"]["status"] == "passed"
    assert provenance["parity"]["top1_agreement"] == 3
    assert {"van-port", "torch", "tensorflow", "keras", "numpy", "h5py"} <= provenance["versions"].keys()

    report = json.loads(report_path_of(out).read_text())
    assert report["passed"] is True
    assert report["context"]["variant"] == "nano"
    assert read_report(report_path_of(out)) == result.report


def test_the_file_gives_pytorchs_logits(family: VanFamily, checkpoint: Path, reference: VAN, tmp_path: Path) -> None:
    port(family, "nano", tmp_path / "nano.h5", checkpoint=checkpoint, options=FAST)
    model = van_tf.van_nano()
    model.load_weights(tmp_path / "nano.h5")
    images = np.random.default_rng(5).normal(size=(2, 80, 64, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=2e-5, rtol=0)


def test_another_number_of_classes_is_read_from_the_checkpoint(family: VanFamily, tmp_path: Path) -> None:
    model = build_van("nano", 7)
    fill_with_synthetic_weights(model)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    result = port(family, "nano", tmp_path / "x.h5", checkpoint=tmp_path / "x.pth", options=FAST)
    assert result.provenance["num_classes"] == 7
    assert result.report is not None
    assert result.report.layers[-1].shape == (1, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_types(family: VanFamily, reference: VAN, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in reference.state_dict().items()
    }
    torch.save(tensors, tmp_path / "x.pth")
    result = port(family, "nano", tmp_path / "x.h5", checkpoint=tmp_path / "x.pth", options=FAST)
    assert result.report is not None
    assert result.report.passed
    bias = result.conversion.weights["head/bias"]
    np.testing.assert_array_equal(bias, tensors["head.bias"].float().numpy())


def test_a_failed_check_leaves_nothing_and_keeps_the_old_file(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "nano.h5"
    out.write_text("old")
    with pytest.raises(FailedParityError) as caught:
        port(FaultyFamily(), "nano", out, checkpoint=checkpoint, options=FAST)
    assert "nano.h5 was not written: not at parity; first divergence: norm3: " in caught.value.message
    assert "of its size in float64" in caught.value.message
    assert caught.value.report.diagnosis is not None
    assert caught.value.report.diagnosis.cause == "an epsilon of 0.001 instead of 1e-06"
    assert not caught.value.report.passed
    assert names_in(tmp_path) == ["nano.h5"]
    assert out.read_text() == "old"


def test_a_failed_file_can_be_kept_under_another_name(checkpoint: Path, tmp_path: Path) -> None:
    kept = tmp_path / "failed.h5"
    with pytest.raises(FailedParityError, match="The failed file is .*failed.h5"):
        port(FaultyFamily(), "nano", tmp_path / "x.h5", checkpoint=checkpoint, options=FAST, keep_failed=kept)
    assert names_in(tmp_path) == ["failed.h5"]
    provenance = survey_file(kept).provenance
    assert provenance is not None
    assert provenance["parity"]["status"] == "failed"


def test_without_a_check_the_provenance_says_so(checkpoint: Path, family: VanFamily, tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    port(family, "nano", out, checkpoint=checkpoint, options=FAST)
    result = port(family, "nano", out, checkpoint=checkpoint, check=False)
    assert result.report is None
    # The report of the first port must not stay beside the second file.
    assert names_in(tmp_path) == ["x.h5"]
    provenance = survey_file(out).provenance
    assert provenance is not None
    assert provenance["parity"] == {"status": "not checked"}


def test_what_keras_reads_must_be_what_was_written(
    family: VanFamily, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = weights_file.write_h5

    def write_wrongly(path: Path, layers: Any, weights: dict[str, np.ndarray]) -> None:
        write(path, layers, {**weights, "head/bias": weights["head/bias"] + np.float32(1e-6)})

    monkeypatch.setattr(weights_file, "write_h5", write_wrongly)
    with pytest.raises(ParityError, match="read back from the file, 1 weight not as written; the first is head/b"):
        port(family, "nano", tmp_path / "x.h5", checkpoint=checkpoint)
    assert names_in(tmp_path) == []


def test_a_checkpoint_of_another_variant_is_recognised(family: VanFamily, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyMapError) as caught:
        port(family, "b0", tmp_path / "x.h5", checkpoint=checkpoint)
    assert caught.value.hint == "These tensors belong to van nano: use --variant nano."
    assert "missing from the checkpoint:" in caught.value.message
    assert "of another shape or type:" in caught.value.message
    assert "block1.0.mlp.dwconv.dwconv.weight: expected (256, 1, 3, 3), found (128, 1, 3, 3)" in caught.value.message
    assert len(caught.value.message.splitlines()) < 40  # what to do about it stays in view
    assert caught.value.message.startswith(f"{checkpoint}: its tensors are not those of the model")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_checkpoint_of_another_family_is_recognised(family: VanFamily, prefix: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet18", num_classes=3).state_dict()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "resnet.pth")
    with pytest.raises(KeyMapError) as caught:
        port(family, "nano", tmp_path / "x.h5", checkpoint=tmp_path / "resnet.pth")
    assert caught.value.hint == "These tensors belong to resnet resnet18: use --family resnet --variant resnet18."


def test_one_tensor_missing_and_one_too_many(family: VanFamily, reference: VAN, tmp_path: Path) -> None:
    tensors = dict(reference.state_dict())
    tensors["block1.0.mlp.fc1.wieght"] = tensors.pop("block1.0.mlp.fc1.weight")
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(KeyMapError) as caught:
        port(family, "nano", tmp_path / "x.h5", checkpoint=tmp_path / "x.pth")
    assert caught.value.message.splitlines()[1:] == [
        "1 missing from the checkpoint:",
        "  block1.0.mlp.fc1.weight (nearest: block1.0.mlp.fc1.wieght)",
        "1 in the checkpoint, but not part of the model:",
        "  block1.0.mlp.fc1.wieght (nearest: block1.0.mlp.fc1.weight)",
    ]


@pytest.mark.parametrize(
    ("out", "error"),
    [("missing/x.h5", OutputError), ("x.pth", OutputError), (".", OutputError)],
    ids=["no folder", "no format", "a folder"],
)
def test_an_output_that_cannot_be_is_found_before_the_work(
    family: VanFamily, tmp_path: Path, out: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        port(family, "nano", tmp_path / out, checkpoint=tmp_path / "is never opened")


def test_a_checkpoint_that_is_not_there(family: VanFamily, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        port(family, "nano", tmp_path / "x.h5", checkpoint=tmp_path / "missing.pth")


def test_a_checkpoint_with_nan(family: VanFamily, reference: VAN, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    tensors["head.bias"][3] = float("nan")
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"head\.bias: 1 NaN"):
        port(family, "nano", tmp_path / "x.h5", checkpoint=tmp_path / "x.pth")


def test_images_of_the_users_own(family: VanFamily, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no images"):
        port(family, "nano", tmp_path / "x.h5", checkpoint=checkpoint, options=CheckOptions(images=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3"])
def test_large_variants(family: VanFamily, tmp_path: Path, variant: str) -> None:
    model = build_van(variant)
    fill_with_synthetic_weights(model, seed=2)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth.tar")
    result = port(family, variant, tmp_path / "x.h5", checkpoint=tmp_path / "x.pth.tar", options=FAST)
    assert result.report is not None
    # Measured: 2.4 with two PyTorch threads, 4.5 with one, which rounds the longest sums less than half as much.
    assert result.report.worst.ratio < 6
    keras_model = getattr(van_tf, f"van_{variant}")()
    keras_model.load_weights(tmp_path / "x.h5")
    images = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(keras_model.predict(images, verbose=0), expected, atol=1e-4, rtol=0)


def test_names_that_are_no_text(family: VanFamily, checkpoint: Path, tmp_path: Path) -> None:
    """A file name may be any bytes, but C++ libraries and the text of a report cannot represent all of them."""
    folder = os.fsencode(tmp_path)
    own = Path(os.fsdecode(folder + b"/\xff\xfe.pth"))
    own.write_bytes(checkpoint.read_bytes())
    out = Path(os.fsdecode(folder + b"/\xfe.h5"))
    result = port(family, "nano", out, checkpoint=own, options=CheckOptions(samples=1))
    assert result.report is not None
    assert file_beside(read_report(report_path_of(out)), report_path_of(out)) == ""
    for suffix in (b".safetensors", b".pth"):
        back = Path(os.fsdecode(folder + b"/\xfb" + suffix))
        revert(family, "nano", out, back, check=False)
        assert read_checkpoint(back).state_dict.keys() == read_checkpoint(own).state_dict.keys()
    for form in ("html", "markdown", "junit"):
        write_report(result.report, tmp_path / f"r.{form}", form)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_the_user_gave_is_no_advice(prefix: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = {**timm.create_model("resnet18", num_classes=3).state_dict(), "extra.scale": torch.ones(3)}
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "resnet.pth")
    with pytest.raises(KeyMapError) as caught:
        port(get_family("resnet"), "resnet18", tmp_path / "x.h5", checkpoint=tmp_path / "resnet.pth")
    assert "extra.scale" in caught.value.message
    assert "--variant resnet18" not in caught.value.hint
