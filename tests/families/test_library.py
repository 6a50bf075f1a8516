"""Families of models from other Python packages: their tables, and a small model of each ported both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from porting.errors import FailedParityError, KeyMapError, SourceError
from porting.families.builders import library
from porting.families.library import LibraryFamily, renamed
from porting.families.registry import family_names, get_family
from porting.mapping.rules import KeyRule, bind
from porting.tasks.export import export
from porting.tasks.options import CheckOptions
from porting.tasks.port import port
from porting.tasks.revert import revert

FAMILIES = [name for name in family_names() if isinstance(get_family(name), LibraryFamily)]
# By family, the variant that is fastest to build, and its number of classes.
SMALL = [
    ("deit", "facebook/deit-tiny-distilled-patch16-224", 10),
    ("densenet", "densenet121", 0),
    ("efficientnet", "tf_efficientnet_b0", 10),
    ("efficientnetv2", "tf_efficientnetv2_b0", 0),
    ("mobilenetv3", "tf_mobilenetv3_small_100", 0),
    ("mobilenetv3", "tf_mobilenetv3_large_minimal_100", 7),
    ("resnet", "resnet18", 10),
    ("vit", "vit_tiny_patch16_224", 0),
]


def write_checkpoint(family: LibraryFamily, variant: str, classes: int, path: Path) -> dict[str, Any]:
    """Make synthetic weights of a variant, in a file and as a state_dict."""
    state = family.synthetic_reference(family.spec(variant, classes)).state_dict()
    torch.save(state, path)
    return state


def test_there_are_fifteen_families() -> None:
    assert len(FAMILIES) >= 15


@pytest.mark.parametrize("name", FAMILIES)
def test_every_variant_has_names_that_every_row_matches(name: str) -> None:
    """Works without Keras, and without memory for weights."""
    family = get_family(name)
    assert isinstance(family, LibraryFamily)
    for variant in family.variants:
        spec = family.spec(variant)
        names = family.reference_names(spec)
        bound, _ = bind(family.rows_of(spec), names)
        assert all(bound)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant", "classes"), SMALL)
def test_there_and_back(name: str, variant: str, classes: int, tmp_path: Path) -> None:
    family = get_family(name)
    assert isinstance(family, LibraryFamily)
    checkpoint, out, back = tmp_path / "own.pth", tmp_path / "own.h5", tmp_path / "back.pth"
    state = write_checkpoint(family, variant, classes, checkpoint)
    result = port(family, variant, out, checkpoint=checkpoint)
    assert result.report is not None
    assert result.report.passed
    assert result.case.num_classes == classes
    # A file without provenance, as Keras writes it after fine-tuning.
    tuned = tmp_path / "tuned.weights.h5"
    result.case.load_candidate(out).save_weights(tuned)
    reverted = revert(family, variant, tuned, back)
    assert reverted.report is not None
    assert reverted.report.passed
    found = torch.load(back, weights_only=True)
    assert found.keys() == state.keys()
    absorbed = {f"{source}.running_var" for source in result.case.key_map.absorbed}
    for key, tensor in state.items():
        if key in absorbed:  # the difference of the epsilons was added and removed again
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)
        elif not key.endswith("num_batches_tracked"):
            assert torch.equal(found[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 3])
def test_names_of_another_version_of_the_package(classes: int, tmp_path: Path) -> None:
    """transformers 5 renamed DeiT's modules: checkpoints of either version are read and written."""
    family, variant = get_family("deit"), "facebook/deit-tiny-distilled-patch16-224"
    assert isinstance(family, LibraryFamily)
    (layout, names), checkpoint = next(iter(family.other_names.items())), tmp_path / "own.pth"
    state = write_checkpoint(family, variant, classes, checkpoint)
    other = {renamed(name, names): tensor for name, tensor in state.items()}
    assert len(other.keys() & state.keys()) < len(state) / 2
    torch.save(other, checkpoint)
    result = port(family, variant, tmp_path / "own.h5", checkpoint=checkpoint)
    assert result.report is not None
    assert result.case.naming.name == layout
    for written, expected in ((layout, other), ("transformers", state)):
        back = tmp_path / f"{written}.pth"
        revert(family, variant, tmp_path / "own.h5", back, layout=written)
        found = torch.load(back, weights_only=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_an_epsilon_that_went_into_the_variances_is_said(tmp_path: Path) -> None:
    family = get_family("densenet")
    assert isinstance(family, LibraryFamily)
    write_checkpoint(family, "densenet121", 5, tmp_path / "own.pth")
    result = port(family, "densenet121", tmp_path / "own.h5", checkpoint=tmp_path / "own.pth")
    assert "features.norm5" in result.provenance["absorbed_epsilon"]
    assert result.report_path is not None
    assert json.loads(result.report_path.read_text())["context"]["absorbed_epsilon"]


@pytest.mark.slow
def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    """Exchanged rows of two norms, and weights of another variant."""
    family = get_family("resnet")
    assert isinstance(family, LibraryFamily)
    write_checkpoint(family, "resnet18", 5, tmp_path / "own.pth")

    class Exchanged(type(family)):  # type: ignore[misc]
        def rows_of(self, spec: Any) -> Any:
            norm = "backbone/stack{s-1}_block{j}"
            return [
                *(row for row in super().rows_of(spec) if row.source != "layer{s}.{j}.bn{n}"),
                KeyRule("layer{s}.{j}.bn1", f"{norm}_2_bn", "batch_norm"),
                KeyRule("layer{s}.{j}.bn2", f"{norm}_1_bn", "batch_norm"),
            ]

    with pytest.raises(FailedParityError):
        port(Exchanged(), "resnet18", tmp_path / "own.h5", checkpoint=tmp_path / "own.pth")
    with pytest.raises(KeyMapError, match="not those of the model") as raised:
        port(family, "resnet34", tmp_path / "own.h5", checkpoint=tmp_path / "own.pth")
    assert "resnet18" in raised.value.hint


def test_published_weights_that_cannot_be_had_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = library("timm")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no way to the hub")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(SourceError, match="timm cannot load the published weights of resnet18: no way") as raised:
        get_family("resnet").published("resnet18")
    assert "--checkpoint" in raised.value.hint


def test_published_weights_come_by_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, asked = library("timm"), []
    build = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append((name, pretrained))
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    loaded = get_family("resnet").published("resnet18")
    assert loaded is not None
    assert asked == [("resnet18", True)]
    assert loaded.state_dict["conv1.weight"].shape == (64, 3, 7, 7)
    assert len(loaded.sha256) == 64


@pytest.mark.slow
def test_exports_are_proven(tmp_path: Path) -> None:
    family, variant = get_family("vit"), "vit_tiny_patch16_224"
    assert isinstance(family, LibraryFamily)
    checkpoint, weights = tmp_path / "own.pth", tmp_path / "own.h5"
    write_checkpoint(family, variant, 5, checkpoint)
    port(family, variant, weights, checkpoint=checkpoint, check=False)
    options = CheckOptions(samples=1)
    result = export(family, variant, weights, tmp_path / "x.onnx", form="onnx", checkpoint=checkpoint, options=options)
    assert result.report is not None
    assert result.report.passed


def test_layers_that_keras_numbers_have_the_same_names_in_every_model() -> None:
    """keras.applications gives ConvNeXt's last norm no name if there is no head."""
    family = get_family("convnext")
    spec = family.spec("convnext_tiny", 0)
    names = [[layer.name for layer in family.build_candidate(spec).layers] for _ in range(2)]
    assert names[0] == names[1]
    assert "layer_normalization" in names[0]


@pytest.mark.slow
def test_stress_leaves_out_sizes_that_a_model_does_not_take(tmp_path: Path) -> None:
    family = get_family("vit")
    assert isinstance(family, LibraryFamily)
    write_checkpoint(family, "vit_tiny_patch16_224", 3, tmp_path / "own.pth")
    how = {"checkpoint": tmp_path / "own.pth", "options": CheckOptions(stress=True)}
    report = port(family, "vit_tiny_patch16_224", tmp_path / "own.h5", **how).report  # type: ignore[arg-type]
    assert report is not None
    assert [run.name for run in report.stress] == ["loud weights, seed 0"]
    assert "--stress did not try 1 of 281x226: the models take only images of 224x224" in report.caveats
