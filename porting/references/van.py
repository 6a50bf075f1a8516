"""The Visual Attention Network in PyTorch: the reference that every port is measured against.

Attribute names are those of the official code (Visual-Attention-Network/VAN-Classification,
`models/van.py`), so an official state_dict loads with `strict=True`. The network is the one of the paper
"Visual Attention Network", arXiv 2202.09741, sections 3.1 and 3.2. This module needs only torch;
`porting.references.van_timm` registers the same models with timm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class VanShape(NamedTuple):
    """One variant: settings with one number per stage, and the number of image channels."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    in_chans: int = 3


# Repeats the table of van_tf.config on purpose: the reference must not take its numbers from the model that it
# judges. tests/references/test_van.py checks that the two tables agree.
VARIANTS: dict[str, VanShape] = {
    "nano": VanShape((32, 48, 64, 96), (2, 2, 2, 1), (4, 4, 4, 4)),
    "b0": VanShape((32, 64, 160, 256), (3, 3, 5, 2)),
    "b1": VanShape((64, 128, 320, 512), (2, 2, 4, 2)),
    "b2": VanShape((64, 128, 320, 512), (3, 3, 12, 3)),
    "b3": VanShape((64, 128, 320, 512), (3, 5, 27, 3)),
    "b4": VanShape((64, 128, 320, 512), (3, 6, 40, 3)),
    "b5": VanShape((96, 192, 480, 768), (3, 3, 24, 3)),
    "b6": VanShape((96, 192, 384, 768), (6, 6, 90, 6)),
}


class DropPath(nn.Module):
    """Stochastic depth: drops a whole residual branch, sample by sample, and rescales the kept ones."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty([x.shape[0]] + [1] * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class DWConv(nn.Module):
    """3x3 depthwise convolution inside the MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class Mlp(nn.Module):
    """Convolutional feed-forward part of a block: 1x1, depthwise 3x3, GELU, 1x1."""

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.dwconv = DWConv(hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dwconv(self.fc1(x)))
        return self.drop(self.fc2(self.drop(x)))


class LKA(nn.Module):
    """Large kernel attention (paper, section 3.1): a 21x21 kernel as depthwise, dilated and 1x1 parts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class Attention(nn.Module):
    """1x1, GELU, LKA, 1x1, with a shortcut around all four."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LKA(dim)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial_gating_unit(self.activation(self.proj_1(x)))
        return self.proj_2(y) + x


class Block(nn.Module):
    """Attention and MLP, each after a BatchNorm and scaled per channel before it is added."""

    def __init__(self, dim: int, mlp_ratio: float, drop_rate: float = 0.0, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class OverlapPatchEmbed(nn.Module):
    """Strided convolution with overlapping windows, then BatchNorm."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class VAN(nn.Module):
    """Visual Attention Network.

    Input `(N, in_chans, H, W)` with H and W of at least 32; output `(N, num_classes)` logits, or
    `(N, embed_dims[-1])` pooled features when `num_classes` is 0. `layer_norm_eps` is 1e-6 in the official
    classifier and 1e-5 in some other published code.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.depths = tuple(depths)
        self.feature_info: list[dict[str, object]] = []
        # The rate grows linearly over all blocks of all stages, from 0 to drop_path_rate.
        blocks_in_all = sum(depths)
        rates = [drop_path_rate * index / max(blocks_in_all - 1, 1) for index in range(blocks_in_all)]
        previous = in_chans
        for stage, (dim, depth, ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True), start=1):
            kernel_size, stride = (7, 4) if stage == 1 else (3, 2)
            self.add_module(f"patch_embed{stage}", OverlapPatchEmbed(previous, dim, kernel_size, stride))
            blocks = [Block(dim, ratio, drop_rate, rates.pop(0)) for _ in range(depth)]
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage}", nn.LayerNorm(dim, eps=layer_norm_eps))
            self.feature_info.append({"num_chs": dim, "reduction": 2 ** (stage + 1), "module": f"norm{stage}"})
            previous = dim
        self.head: nn.Module = nn.Linear(previous, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(initialise)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The four stage outputs, each `(N, dim, H / stride, W / stride)` for strides 4, 8, 16 and 32."""
        outputs = []
        for stage in range(1, len(self.depths) + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            for block in self.get_submodule(f"block{stage}").children():
                x = block(x)
            # LayerNorm runs over the last axis, so channels go there and come back.
            x = self.get_submodule(f"norm{stage}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes`. With 0 the model returns pooled features."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        initialise(self.head)


def initialise(module: nn.Module) -> None:
    """Initialise a module as the official code does: fan-out normal for convolutions, a narrow normal for the head."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class VANBackbone(VAN):
    """The network without its head: `(N, 3, H, W)` to the last stage's `(N, dim, H / 32, W / 32)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)


def build_van(variant: str | VanShape, num_classes: int = 1000, **settings: Any) -> VAN:
    """Build the reference model of a variant or of another shape, with fresh weights.

    With 0 classes it is a `VANBackbone`. `settings` are those of `VAN`: layer_norm_eps, drop_rate, drop_path_rate.

    Raises KeyError for a name that is not in `VARIANTS`.
    """
    made = VAN if num_classes > 0 else VANBackbone
    shape = VARIANTS[variant] if isinstance(variant, str) else variant
    return made(**shape._asdict(), num_classes=num_classes, **settings)
