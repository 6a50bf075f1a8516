"""Published layouts of VAN: each is recognised and ported, and compared with its own code if available."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import Tensor

import van_tf
from porting.errors import KeyMapError
from porting.families.base import by_path
from porting.families.van import NAMINGS, VanFamily
from porting.files.weights_file import variable_shapes, weight_shapes
from porting.models.synthetic import fill_with_synthetic_weights
from porting.references.van import VARIANTS, build_van
from porting.tasks.case import open_case
from porting.tasks.check import check
from porting.tasks.options import CheckOptions
from porting.tasks.port import port

Tensors = dict[str, Tensor]
# Rows of the table of published layouts, with how to make a checkpoint of the layout from an official one.
MMPRETRAIN = (
    (".proj.", ".projection."),
    ("block", "blocks"),
    (".conv0.", ".DW_conv."),
    (".conv_spatial.", ".DW_D_conv."),
    (".dwconv.dwconv.", ".dwconv."),
)


def body(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def mmpretrain(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in MMPRETRAIN:
            name = name.replace(old, new)
        renamed[name.replace("head.", "head.fc.") if name.startswith("head.") else f"backbone.{name}"] = tensor
    return renamed


def segmentor(tensors: Tensors) -> Tensors:
    parts = {f"backbone.{name}": tensor for name, tensor in body(tensors).items()}
    return {
        **parts,
        "decode_head.conv_seg.weight": torch.ones(3, 4, 1, 1),
        "auxiliary_head.conv_seg.bias": torch.ones(3),
    }


def transformers_model(variant: str, classes: int, **settings: Any) -> Any:
    from transformers import VanConfig
    from transformers.models.deprecated.van.modeling_van import VanForImageClassification

    shape = VARIANTS[variant]
    config = VanConfig(
        hidden_sizes=list(shape.embed_dims),
        depths=list(shape.depths),
        mlp_ratios=list(shape.mlp_ratios),
        num_labels=classes,
        drop_path_rate=0.0,
        **settings,
    )
    model = VanForImageClassification(config)
    fill_with_synthetic_weights(model, seed=3)
    return model.eval()


CASES: dict[str, tuple[Callable[[Tensors], Tensors], str, int, float]] = {
    "official": (dict, "official", 10, 1e-6),
    "official, DataParallel": (lambda t: {f"module.{name}": x for name, x in t.items()}, "official", 10, 1e-6),
    "mmpretrain": (mmpretrain, "mmpretrain", 10, 1e-5),
    "mmpretrain, backbone": (lambda t: mmpretrain(body(t)), "mmpretrain", 0, 1e-5),
    "segmentation backbone": (lambda t: {f"backbone.{n}": x for n, x in body(t).items()}, "segmentation", 0, 1e-5),
    "segmentor": (segmentor, "segmentation", 0, 1e-5),
}


@pytest.mark.parametrize(
    "case",
    # Each of them takes seconds, and the others differ little.
    [case if case in {"mmpretrain", "segmentor"} else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_layout_is_recognised_and_ported(family: VanFamily, tmp_path: Path, case: str) -> None:
    renamed, layout, classes, epsilon = CASES[case]
    model = build_van("nano", 10, layer_norm_eps=epsilon)
    fill_with_synthetic_weights(model, seed=2)
    tensors = model.eval().state_dict()
    checkpoint, out = tmp_path / "x.pth", tmp_path / "x.h5"
    torch.save({"state_dict": renamed(tensors)}, checkpoint)
    result = port(family, "nano", out, checkpoint=checkpoint, options=CheckOptions(samples=1))
    assert (result.case.naming.name, result.case.num_classes) == (layout, classes)
    assert result.provenance["layout"] == layout
    assert result.provenance["settings"] == {"layer_norm_eps": epsilon}
    built = eval(result.provenance["build"], {"van_tf": van_tf})
    built.load_weights(out)
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = model(batch) if classes else model.forward_features(batch).permute(0, 2, 3, 1)
    np.testing.assert_allclose(built(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # Check the file against the same checkpoint with the same settings.
    assert check(family, "nano", out, checkpoint=checkpoint, options=CheckOptions(samples=1)).passed


@pytest.mark.parametrize("with_head", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["classifier", "body"])
def test_the_class_of_transformers_is_ported_and_agrees(family: VanFamily, tmp_path: Path, with_head: bool) -> None:
    model = transformers_model("nano", 7)
    path, out = tmp_path / "pytorch_model.bin", tmp_path / "x.h5"
    torch.save((model if with_head else model.van).state_dict(), path)
    result = port(family, "nano", out, checkpoint=path, options=CheckOptions(samples=1))
    assert (result.case.naming.name, result.case.num_classes) == ("transformers", 7 if with_head else 0)
    assert [name for name in result.conversion.dropped if "num_batches" not in name] == [
        f"{'van.' if with_head else ''}layernorm.{leaf}" for leaf in ("bias", "weight")
    ]
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if with_head:
            expected = model(batch).logits
            built: keras.Model = van_tf.van_nano(classes=7)
        else:
            expected = model.van(batch).last_hidden_state.permute(0, 2, 3, 1)
            built = van_tf.van_nano(include_top=False)
    built.load_weights(out)
    np.testing.assert_allclose(built(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_names_of_two_publishers_whose_settings_differ_are_never_taken_for_one(
    family: VanFamily, tmp_path: Path
) -> None:
    """The official code and VAN-Segmentation use the same names for a body, with different epsilons."""
    torch.save(body(build_van("nano", 10).state_dict()), tmp_path / "x.pth")
    with pytest.raises(KeyMapError, match="names fit official .* and segmentation .* nothing") as caught:
        open_case(family, "nano", tmp_path / "x.pth")
    assert caught.value.hint == "Choose one: --layout official or --layout segmentation."


def test_a_forced_layout_settles_what_names_cannot(family: VanFamily, tmp_path: Path) -> None:
    tensors = body(build_van("nano", 10).state_dict())
    torch.save(tensors, tmp_path / "x.pth")
    case = open_case(family, "nano", tmp_path / "x.pth", layout="official")
    assert case.naming.settings == {"layer_norm_eps": 1e-6}
    assert case.num_classes == 0
    assumed = "layer_norm_eps 1e-06 (assumed: the file does not state it)"
    assert case.spec.described() == f"official names, {assumed}, without a head"
    with pytest.raises(KeyMapError, match="there is no layout 'caffe'"):
        open_case(family, "nano", tmp_path / "x.pth", layout="caffe")


def test_differences_are_told_in_the_names_of_the_file(family: VanFamily, tmp_path: Path) -> None:
    tensors = mmpretrain(build_van("nano", 10).state_dict())
    del tensors["backbone.blocks2.0.attn.spatial_gating_unit.DW_conv.weight"]
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(
        KeyMapError, match=r"  backbone\.blocks2\.0\.attn\.spatial_gating_unit\.DW_conv\.weight"
    ) as caught:
        port(family, "nano", tmp_path / "x.h5", checkpoint=tmp_path / "x.pth")
    assert "mmpretrain names" in caught.value.hint


def test_names_of_nobody_are_compared_with_the_official_ones(family: VanFamily) -> None:
    names = {f"features.{index}.weight" for index in range(50)}
    found = family.recognise("nano", dict.fromkeys(names, np.zeros(1)))
    assert found.naming is NAMINGS[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_layouts_write_the_same_variables_in_the_same_order(family: VanFamily, variant: str) -> None:
    targets = [entry.targets for entry in family.key_map(family.spec(variant)).entries]
    assert {name for names in targets for name in names} == by_path(family.weight_shapes(family.spec(variant))).keys()
    for naming in NAMINGS:
        table = family.key_map(family.spec(variant, naming=naming) if naming.head else family.spec(variant, 0, naming))
        assert [entry.targets for entry in table.entries] == (targets if naming.head else targets[:-2])


@pytest.mark.parametrize("classes", [10, 0], ids=["classifier", "body"])
@pytest.mark.parametrize("variant", ["nano", "b0"])
def test_the_family_knows_what_keras_builds(family: VanFamily, variant: str, classes: int) -> None:
    model = family.build(variant, classes)
    expected = weight_shapes(model)
    shapes = family.weight_shapes(family.spec(variant, classes))
    assert shapes == expected
    assert [list(layer) for layer in shapes.values()] == [list(layer) for layer in expected.values()]
    assert list(shapes) == list(expected)
    assert by_path(shapes) == variable_shapes(model)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["b1", "b2", "b3", "b4", "b5", "b6"])
def test_the_family_knows_what_keras_builds_when_it_is_large(family: VanFamily, variant: str) -> None:
    expected = weight_shapes(family.build(variant, 1000))
    shapes = family.weight_shapes(family.spec(variant, 1000))
    assert {layer: list(names.items()) for layer, names in shapes.items()} == {
        layer: list(names.items()) for layer, names in expected.items()
    }
    keras.backend.clear_session()
