"""Registers the reference VAN with timm.

    import timm
    import porting.references.van_timm

    model = timm.create_model("van_b1", num_classes=10)

timm and torchvision are needed here and nowhere else in the package: install `van-port[timm]`. No pretrained
weights are registered; `porting.files.checkpoint` reads the published files.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from porting.references.van import VAN, VARIANTS

# The official evaluation of the weights trained on ImageNet-1K: crop fraction 0.9, mean and std 0.5.
_CFG: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "num_classes": 1000,
    "pool_size": (7, 7),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "fixed_input_size": False,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "patch_embed1.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
_NANO_CFG = {**_CFG, "input_size": (3, 64, 64), "pool_size": (2, 2), "crop_pct": 1.0, "num_classes": 10}

default_cfgs = generate_default_cfgs(
    {f"van_{variant}.untrained": _NANO_CFG if variant == "nano" else _CFG for variant in VARIANTS}
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VAN:
    model: VAN = build_model_with_cfg(VAN, f"van_{variant}", pretrained, **{**VARIANTS[variant]._asdict(), **kwargs})
    return model


@register_model
def van_nano(pretrained: bool = False, **kwargs: Any) -> VAN:
    """This project's own small variant, 64x64 images and ten classes."""
    return _create("nano", pretrained, kwargs)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B0 (Tiny)."""
    return _create("b0", pretrained, kwargs)


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B1 (Small)."""
    return _create("b1", pretrained, kwargs)


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B2 (Base)."""
    return _create("b2", pretrained, kwargs)


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B3 (Large)."""
    return _create("b3", pretrained, kwargs)


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B4."""
    return _create("b4", pretrained, kwargs)


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B5."""
    return _create("b5", pretrained, kwargs)


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B6 (Huge)."""
    return _create("b6", pretrained, kwargs)
