"""Registers the reference VAN with timm.

    import timm
    import porting.references.van_timm

    model = timm.create_model("van_b1", num_classes=10)

This module needs timm and torchvision: install `van-port[timm]`. It registers no pretrained weights;
`porting.files.checkpoint` reads the published files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from porting.references.van import VAN, VARIANTS, initialise

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


class TimmVAN(VAN):
    """The reference with the methods that timm expects of a model. Parameters and their names are the same.

    It has four stages, like all registered variants. `global_pool` is one of timm's pooling types, "" for none.
    """

    if TYPE_CHECKING:  # what the base class adds by name
        patch_embed1: nn.Module
        patch_embed2: nn.Module
        patch_embed3: nn.Module
        patch_embed4: nn.Module
        block1: nn.ModuleList
        block2: nn.ModuleList
        block3: nn.ModuleList
        block4: nn.ModuleList
        norm1: nn.Module
        norm2: nn.Module
        norm3: nn.Module
        norm4: nn.Module
        map1: nn.Module
        map2: nn.Module
        map3: nn.Module
        map4: nn.Module
        global_pool: SelectAdaptivePool2d

    def __init__(self, num_classes: int = 1000, global_pool: str = "avg", **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
        self.grad_checkpointing = False
        for stage, info in enumerate(self.feature_info, start=1):
            # Gives the map of a stage, channels first, a name for hooks and fx.
            self.add_module(f"map{stage}", nn.Identity())
            info["module"] = f"map{stage}"
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if global_pool != "avg":
            self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        # Unrolled by hand, since TorchScript accepts modules only by their names.
        x = self.patch_embed1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = checkpoint_seq(self.block1, x)
        else:
            for block in self.block1:
                x = block(x)
        x = self.map1(self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.patch_embed2(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = checkpoint_seq(self.block2, x)
        else:
            for block in self.block2:
                x = block(x)
        x = self.map2(self.norm2(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.patch_embed3(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = checkpoint_seq(self.block3, x)
        else:
            for block in self.block3:
                x = block(x)
        x = self.map3(self.norm3(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.patch_embed4(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = checkpoint_seq(self.block4, x)
        else:
            for block in self.block4:
                x = block(x)
        return self.map4(self.norm4(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last map and the maps of the stages in `indices`, or only the latter with `intermediates_only`.

        Every map is normalised, whatever `norm` says. Raises ValueError for an `output_fmt` other than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is NCHW: got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.depths), indices)
        found = []
        for stage in range(1, (last + 1 if stop_early else len(self.depths)) + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            blocks = self.get_submodule(f"block{stage}")
            if self.grad_checkpointing:
                x = checkpoint_seq(blocks, x)
            else:
                for block in blocks.children():
                    x = block(x)
            x = self.get_submodule(f"norm{stage}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if stage - 1 in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and the head unless told not to. Returns the stages taken."""
        taken, last = feature_take_indices(len(self.depths), indices)
        for stage in range(last + 2, len(self.depths) + 1):
            for name in (f"patch_embed{stage}", f"norm{stage}"):
                setattr(self, name, nn.Identity())
            setattr(self, f"block{stage}", nn.ModuleList())
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth, for layer-wise learning rates: by stage if `coarse`, otherwise by block."""
        blocks = r"^(?:patch_embed|block|norm)(\d+)"
        fine = [(r"^(?:patch_embed)(\d+)", None), (r"^block(\d+)\.(\d+)", None), (r"^norm(\d+)", (99999,))]
        return {"stem": r"^patch_embed1", "blocks": blocks if coarse else fine}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The names of the layer scales. timm itself exempts parameters with one axis."""
        return {name for name, _ in self.named_parameters() if "layer_scale" in name}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if num_classes > 0 and not self.global_pool.pool_type:
            raise ValueError("a head needs pooled features: global_pool '' goes with num_classes 0")
        width = self.num_features * self.global_pool.feat_mult()
        super().reset_classifier(num_classes)
        if num_classes > 0 and width != self.num_features:
            self.head = nn.Linear(width, num_classes)
            initialise(self.head)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> TimmVAN:
    settings = {**VARIANTS[variant]._asdict(), **kwargs}
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    model: TimmVAN = build_model_with_cfg(TimmVAN, f"van_{variant}", pretrained, feature_cfg=features, **settings)
    return model


@register_model
def van_nano(pretrained: bool = False, **kwargs: Any) -> TimmVAN:
    """The small variant of this project, for 64x64 images and ten classes."""
    return _create("nano", pretrained, kwargs)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> TimmVAN:
    """VAN-B0 (Tiny)."""
    return _create("b0", pretrained, kwargs)


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> TimmVAN:
    """VAN-B1 (Small)."""
    return _create("b1", pretrained, kwargs)


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> TimmVAN:
    """VAN-B2 (Base)."""
    return _create("b2", pretrained, kwargs)


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> TimmVAN:
    """VAN-B3 (Large)."""
    return _create("b3", pretrained, kwargs)


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> TimmVAN:
    """VAN-B4."""
    return _create("b4", pretrained, kwargs)


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> TimmVAN:
    """VAN-B5."""
    return _create("b5", pretrained, kwargs)


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> TimmVAN:
    """VAN-B6 (Huge)."""
    return _create("b6", pretrained, kwargs)
