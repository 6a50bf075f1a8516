"""Settings in files beside the weights count: the same tensors with other settings are another model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import van_tf
from porting.errors import CheckpointError, KeyMapError
from porting.families.van import VanFamily
from porting.references.van import VARIANTS, build_van
from porting.tasks.case import open_case
from porting.tasks.check import check
from porting.tasks.options import CheckOptions
from porting.tasks.port import port
from porting.tasks.revert import revert
from tests.mapping.test_naming import body, mmpretrain, transformers_model

ONE = CheckOptions(samples=1)


def saved_by_transformers(folder: Path, **settings: Any) -> Any:
    """Save a VAN with unusual settings by `save_pretrained`, and return the model."""
    model = transformers_model("nano", 7, **settings)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strides": [2, 2, 2, 2]}, r"config.json states strides \[2, 2, 2, 2\], but van_nano has \[4, 2, 2, 2\]"),
        ({"hidden_act": "relu"}, r"config.json states hidden_act 'relu', but van_nano has 'gelu'"),
    ],
    ids=["strides", "activation"],
)
def test_a_configuration_that_cannot_be_built_is_refused(
    family: VanFamily, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    saved_by_transformers(tmp_path, **settings)
    with pytest.raises(KeyMapError, match=message):
        port(family, "nano", tmp_path / "x.h5", checkpoint=tmp_path)


def test_a_stated_epsilon_is_built_on_both_sides_and_goes_all_the_way(family: VanFamily, tmp_path: Path) -> None:
    folder, out = tmp_path / "theirs", tmp_path / "x.h5"
    model = saved_by_transformers(folder, layer_norm_eps=0.01)
    result = port(family, "nano", out, checkpoint=folder, options=ONE)
    assert result.provenance["settings"] == {"layer_norm_eps": 0.01}
    assert result.provenance["assumed"] == []
    assert "layer_norm_eps 0.01, with a head" in result.case.spec.described()
    built = eval(result.provenance["build"], {"van_tf": van_tf})
    built.load_weights(out)
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits
    np.testing.assert_allclose(built(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert check(family, "nano", out, checkpoint=folder, options=ONE).passed
    # The same names mean the same model. Under other names the code has another epsilon, and a note says so.
    back = revert(family, "nano", out, tmp_path / "back.pth", options=ONE)
    assert back.report is not None
    assert back.report.passed
    assert back.notes[0].startswith("These weights need layer_norm_eps 0.01, but code with transformers names uses")
    other = revert(family, "nano", out, tmp_path / "other.pth", layout="mmpretrain", check=False)
    assert other.notes == (
        "These weights need layer_norm_eps 0.01, but code with mmpretrain names uses 1e-05: set layer_norm_eps "
        "there, or its results will differ.",
        "Keras does not keep num_batches_tracked: 18 tensors of that name set to 0.",
    )


def test_a_configuration_that_is_no_json_is_not_passed_over(family: VanFamily, tmp_path: Path) -> None:
    saved_by_transformers(tmp_path)
    for text in ("{", "[1]", "[" * 100_000, " " * (2 << 20)):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="config.json: not a JSON object"):
            open_case(family, "nano", tmp_path)


def stated(family: VanFamily, path: Path, **beside: Any) -> dict[str, float]:
    torch.save({"state_dict": build_van("nano", 10).state_dict(), **beside}, path)
    return dict(open_case(family, "nano", path).spec.stated)


def test_hyperparameters_and_arguments_count(family: VanFamily, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    assert stated(family, path) == {}
    assert stated(family, path, hyper_parameters={"layer_norm_eps": 1e-4, "lr": 0.1}) == {"layer_norm_eps": 1e-4}
    assert stated(family, path, args=argparse.Namespace(bn_eps=1e-5, model="van_nano")) == {}
    assert stated(family, path, args=argparse.Namespace(bn_eps=None)) == {}
    for beside, message in (
        ({"args": argparse.Namespace(bn_eps=1e-3)}, "args states bn_eps 0.001"),
        ({"hyper_parameters": {"depths": [1, 1, 1, 1]}}, "hyper_parameters states depths"),
        ({"hyper_parameters": {"layer_norm_eps": "small"}}, "a number between 0 and 1"),
        ({"hyper_parameters": {"layer_norm_eps": True}}, "a number between 0 and 1"),
        ({"hyper_parameters": {"model_type": "swin"}}, "the model type 'swin', but this family is van"),
    ):
        with pytest.raises(KeyMapError, match=message):
            stated(family, path, **beside)


CONFIG = """
norm = dict(type='BN', eps={epsilon})
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VAN', arch='base', drop_path_rate=0.1, norm_cfg=dict(type='{norm}', eps={epsilon})),
    head=dict(type='LinearClsHead', num_classes=10))
"""


def test_an_mmengine_configuration_counts_and_is_never_run(family: VanFamily, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    tensors = mmpretrain(build_van("nano", 10).state_dict())

    def recognise(text: str) -> dict[str, float]:
        torch.save({"state_dict": tensors, "meta": {"cfg": text}}, path)
        return open_case(family, "nano", path).spec.settings

    assert recognise(CONFIG.format(norm="SyncBN", epsilon=1e-5)) == {"layer_norm_eps": 1e-5}
    assert recognise("not python (") == {"layer_norm_eps": 1e-5}
    with pytest.raises(KeyMapError, match=r"the configuration in meta states batch_norm_eps 0\.001"):
        recognise(CONFIG.format(norm="BN", epsilon=1e-3))
    with pytest.raises(KeyMapError, match="norm_cfg of type 'GN'"):
        recognise(CONFIG.format(norm="GN", epsilon=1e-5))
    marker = tmp_path / "ran"
    recognise(f"open({str(marker)!r}, 'w')\nmodel = dict(type='VAN', arch=open({str(marker)!r}, 'w'))")
    assert not marker.exists()


def test_a_stated_epsilon_settles_whose_names_they_are(family: VanFamily, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    tensors = body(build_van("nano", 10).state_dict())
    torch.save({"state_dict": tensors, "hyper_parameters": {"layer_norm_eps": 1e-5}}, path)
    assert open_case(family, "nano", path).spec.settings == {"layer_norm_eps": 1e-5}


def test_every_variant_agrees_with_itself(family: VanFamily) -> None:
    for variant, shape in VARIANTS.items():
        facts = {"config.json": {"model_type": "van", "hidden_sizes": list(shape.embed_dims), "depths": shape.depths}}
        if not isinstance(shape.depths, list):
            facts["config.json"]["depths"] = list(shape.depths)
        assert family.stated_settings(variant, facts) == {}
