"""Calls the registered models in the ways that timm and its users call models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from timm.models._manipulate import group_with_matcher

import porting.references.van_timm  # noqa: F401
from porting.models.synthetic import fill_with_synthetic_weights
from porting.references.van import build_van

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CHANNELS = [32, 48, 64, 96]


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("van_nano", **options)
    fill_with_synthetic_weights(
        model, seed=0, run=lambda each: each(torch.randn(2, options.get("in_chans", 3), 64, 64))
    )
    return model.eval()


def test_it_is_the_reference_under_the_same_names() -> None:
    model, plain = made(), build_van("nano", 10)
    plain.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), plain.eval()(IMAGES))


@pytest.mark.parametrize("kind", ["getter", "hook", "fx"])
def test_maps_of_the_stages_in_every_way(kind: str) -> None:
    model = timm.create_model("van_nano", features_only=True, feature_cls=kind).eval()
    maps = model(IMAGES)
    assert [each.shape[1] for each in maps] == CHANNELS == model.feature_info.channels()
    assert [64 // each.shape[2] for each in maps] == [4, 8, 16, 32] == model.feature_info.reduction()
    some = timm.create_model("van_nano", features_only=True, feature_cls=kind, out_indices=(1, 2))(IMAGES)
    assert [each.shape[1] for each in some] == [48, 64]


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fast"])
def test_pooling(pool: str) -> None:
    model = made(global_pool=pool)
    assert model(IMAGES).shape == (2, 10)
    assert model.forward_head(model.forward_features(IMAGES), pre_logits=True).shape[1] in {96, 192}
    assert made(global_pool=pool, num_classes=0)(IMAGES).shape[1] in {96, 192}


def test_no_pooling_gives_maps_and_takes_no_head() -> None:
    assert made(global_pool="", num_classes=0)(IMAGES).shape == (2, 96, 2, 2)
    with pytest.raises(ValueError, match="a head needs pooled features"):
        made(global_pool="")


def test_another_head() -> None:
    model = made()
    model.reset_classifier(0, "")
    assert model(IMAGES).shape == (2, 96, 2, 2)
    model.reset_classifier(7, "catavgmax")
    assert model(IMAGES).shape == (2, 7)
    assert model.get_classifier().in_features == 192
    model.reset_classifier(0, "avg")
    assert model(IMAGES).shape == (2, 96)
    assert model.default_cfg["classifier"] == "head"
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript() -> None:
    model = made()
    with torch.no_grad():
        assert torch.allclose(torch.jit.script(model)(IMAGES), model(IMAGES), atol=1e-5)


def test_fx() -> None:
    model = made()
    with torch.no_grad():
        assert torch.allclose(create_feature_extractor(model, ["head"])(IMAGES)["head"], model(IMAGES), atol=1e-5)


def test_maps_on_the_way() -> None:
    model = made()
    with torch.no_grad():
        last, maps = model.forward_intermediates(IMAGES)
        assert torch.equal(last, model.forward_features(IMAGES))
        assert [each.shape[1] for each in maps] == CHANNELS
        only = model.forward_intermediates(IMAGES, indices=[0, 2], intermediates_only=True, stop_early=True)
        assert all(torch.equal(one, other) for one, other in zip(only, (maps[0], maps[2]), strict=True))
        assert model.prune_intermediate_layers([0, 1], prune_head=True) == [0, 1]
        assert torch.equal(model.forward_intermediates(IMAGES, indices=[1], intermediates_only=True)[0], maps[1])
    with pytest.raises(ValueError, match="output_fmt is NCHW"):
        model.forward_intermediates(IMAGES, output_fmt="NLC")


def test_gradient_checkpoints_change_no_gradient() -> None:
    model = made()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(IMAGES).square().sum().backward()
        gradients.append({name: tensor.grad.clone() for name, tensor in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-12)


@pytest.mark.parametrize("coarse", [True, False])
def test_groups_of_parameters_follow_the_depth(coarse: bool) -> None:
    model = made()
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=coarse), return_values=False)
    place = {name: number for number, names in groups.items() for name in names}
    assert place.keys() == dict(model.named_parameters()).keys()

    def stage(name: str) -> int:
        found = re.match(r"[a-z_]+(\d)", name)
        return int(found[1]) if found else 9

    for one, here in place.items():
        for other, there in place.items():
            if stage(one) < stage(other):
                assert here <= there, (one, other)
    if not coarse:
        assert place["block1.0.attn.proj_1.weight"] < place["block1.1.attn.proj_1.weight"]


def test_scales_do_not_decay() -> None:
    assert {name.rpartition(".")[2] for name in made().no_weight_decay()} == {"layer_scale_1", "layer_scale_2"}


@pytest.mark.parametrize("options", [{"in_chans": 1}, {"in_chans": 5}, {"drop_rate": 0.1, "drop_path_rate": 0.1}])
def test_arguments_that_timm_passes_on(options: dict[str, Any]) -> None:
    model = made(**options)
    assert model(IMAGES[:, :1].expand(-1, options.get("in_chans", 3), -1, -1)).shape == (2, 10)
    model.train()(IMAGES[:, :1].expand(-1, options.get("in_chans", 3), -1, -1)).sum().backward()
    assert all(each.grad is not None for each in model.parameters())
