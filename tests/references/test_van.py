"""Compares the PyTorch reference with an independent implementation, the VAN of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import van_tf
from porting.models.synthetic import fill_with_synthetic_weights
from porting.references.van import VARIANTS, DropPath, build_van

# Numbers of parameters, computed from the official code.
PARAMETERS = {
    "b0": 4_105_800,
    "b1": 13_861_800,
    "b2": 26_578_472,
    "b3": 44_765_608,
    "b4": 60_283_176,
    "b5": 89_967_688,
    "b6": 199_829_416,
}
STATE_DICT_KEYS = {"b0": 402, "b1": 318, "b2": 626, "b3": 1102, "b4": 1494, "b5": 962, "b6": 3062}

# Official name, transformers' name; s is the stage from 1, t from 0, j the block.
STAGE_NAMES = {
    "patch_embed{s}.proj": "van.encoder.stages.{t}.embeddings.convolution",
    "patch_embed{s}.norm": "van.encoder.stages.{t}.embeddings.normalization",
    "norm{s}": "van.encoder.stages.{t}.normalization",
}
BLOCK_NAMES = {
    "norm1": "pre_normomalization",
    "attn.proj_1": "attention.pre_projection.conv",
    "attn.spatial_gating_unit.conv0": "attention.attention_layer.attention.depth_wise",
    "attn.spatial_gating_unit.conv_spatial": "attention.attention_layer.attention.depth_wise_dilated",
    "attn.spatial_gating_unit.conv1": "attention.attention_layer.attention.point_wise",
    "attn.proj_2": "attention.post_projection",
    "layer_scale_1": "attention_scaling.weight",
    "norm2": "post_normalization",
    "mlp.fc1": "mlp.in_dense",
    "mlp.dwconv.dwconv": "mlp.depth_wise",
    "mlp.fc2": "mlp.out_dense",
    "layer_scale_2": "mlp_scaling.weight",
}


def transformers_names(depths: tuple[int, ...]) -> dict[str, str]:
    names = {"head": "classifier"}
    for t, depth in enumerate(depths):
        names |= {ours.format(s=t + 1): theirs.format(t=t) for ours, theirs in STAGE_NAMES.items()}
        for j in range(depth):
            block, layer = f"block{t + 1}.{j}.", f"van.encoder.stages.{t}.layers.{j}."
            names |= {block + ours: layer + theirs for ours, theirs in BLOCK_NAMES.items()}
    return names


def as_transformers(state_dict: dict[str, torch.Tensor], depths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    names = transformers_names(depths)
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, leaf = key.rpartition(".")
        renamed[names[key] if key in names else f"{names[module]}.{leaf}"] = tensor
    return renamed


@pytest.mark.filterwarnings("ignore")  # transformers' own, at import
@pytest.mark.parametrize("variant", ["nano", "b0", "b1", "b2", "b3"])
def test_same_logits_as_transformers_in_float64(variant: str) -> None:
    from transformers import VanConfig, VanForImageClassification

    shape = VARIANTS[variant]
    ours = build_van(variant, num_classes=17)
    fill_with_synthetic_weights(ours, seed=3)
    theirs = VanForImageClassification(
        VanConfig(
            hidden_sizes=list(shape.embed_dims),
            depths=list(shape.depths),
            mlp_ratios=list(shape.mlp_ratios),
            num_labels=17,
        )
    )
    loaded = theirs.load_state_dict(as_transformers(ours.state_dict(), shape.depths), strict=False)
    # Only transformers has one more LayerNorm, which its forward never calls.
    assert set(loaded.missing_keys) == {"van.layernorm.weight", "van.layernorm.bias"}
    assert loaded.unexpected_keys == []

    images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.double().eval()(images).logits
        actual = ours.double().eval()(images)
    assert expected.std() > 0.1, "logits that hardly move would prove nothing"
    # Hundreds of layers with errors of 1e-16 each; measured below 3e-14 for b3.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameters_and_keys_of_the_official_code(variant: str) -> None:
    with torch.device("meta"):
        model = build_van(variant)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[variant]
    assert len(model.state_dict()) == STATE_DICT_KEYS[variant]


def test_both_tables_of_variants_agree() -> None:
    ours = {name: tuple(shape) for name, shape in VARIANTS.items()}
    keras = {c.name: (c.embed_dims, c.depths, c.mlp_ratios, c.in_chans) for c in van_tf.VARIANTS.values()}
    assert ours == keras


def test_drop_path_drops_whole_samples_and_rescales_the_others() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25).train()
    x = torch.ones(4000, 3, 2, 2)
    y = layer(x).flatten(1)
    assert torch.equal(y.min(1).values, y.max(1).values)
    assert y[:, 0].unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(layer.eval()(x), x)


def test_drop_path_rate_grows_linearly_over_all_blocks() -> None:
    model = build_van("nano")
    model = type(model)(**VARIANTS["nano"]._asdict(), drop_path_rate=0.3)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.3 * i / 6 for i in range(7)])


def test_initial_values_have_the_official_spread() -> None:
    torch.manual_seed(0)
    model = build_van("b1")
    # sqrt(2 / (kernel area * output channels / groups))
    assert model.get_parameter("block3.0.mlp.fc1.weight").std().item() == pytest.approx((2 / 1280) ** 0.5, rel=0.02)
    assert model.get_parameter("block3.0.mlp.dwconv.dwconv.weight").std().item() == pytest.approx(
        (2 / 9) ** 0.5, rel=0.02
    )
    assert model.get_parameter("head.weight").std().item() == pytest.approx(0.02, rel=0.02)
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    assert torch.all(model.get_parameter("block3.0.layer_scale_1") == 1e-2)


@pytest.mark.filterwarnings("ignore")  # timm's own, at import
@pytest.mark.parametrize("variant", ["nano", "b1"])
def test_timm_builds_the_same_model(variant: str) -> None:
    timm = pytest.importorskip("timm", reason="the timm extra is not installed", exc_type=ImportError)
    import porting.references.van_timm  # noqa: F401

    model = timm.create_model(f"van_{variant}", num_classes=7, drop_path_rate=0.1)
    reference = build_van(variant, 7)
    reference.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images), reference.eval()(images))
    assert {f"van_{name}" for name in VARIANTS} <= set(timm.list_models("van_*"))
    model.reset_classifier(0)
    assert model(images).shape == (1, VARIANTS[variant].embed_dims[-1])
