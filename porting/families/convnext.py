"""ConvNeXt, from timm to keras.applications."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porting.families.base import Spec
from porting.families.builders import application
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras

_SIZES = ("tiny", "small", "base", "large", "xlarge")
_BLOCK = "stages.{s}.blocks.{j}"


class ConvNeXtFamily(LibraryFamily):
    """ConvNeXt (arXiv 2201.03545). Keras includes the model's name in the names of its layers."""

    name = "convnext"
    models = {f"convnext_{size}": f"ConvNeXt{'XLarge' if size == 'xlarge' else size.title()}" for size in _SIZES}
    head = "head.fc"

    def rows_of(self, spec: Spec) -> tuple[KeyRule, ...]:
        own, down = spec.variant, f"{spec.variant}_downsampling"
        return (
            KeyRule("stem.0", f"{own}_stem/{own}_stem_conv", "conv"),
            KeyRule("stem.1", f"{own}_stem/{own}_stem_layernorm", "layer_norm"),
            KeyRule(f"{_BLOCK}.conv_dw", f"{own}_stage_{{s}}_block_{{j}}_depthwise_conv", "depthwise"),
            KeyRule(f"{_BLOCK}.norm", f"{own}_stage_{{s}}_block_{{j}}_layernorm", "layer_norm"),
            KeyRule(f"{_BLOCK}.mlp.fc{{k}}", f"{own}_stage_{{s}}_block_{{j}}_pointwise_conv_{{k}}", "dense"),
            KeyRule(f"{_BLOCK}.gamma", f"{own}_stage_{{s}}_block_{{j}}_layer_scale/variable", "parameter"),
            KeyRule("stages.{s}.downsample.0", f"{down}_block_{{s-1}}/{down}_layernorm_{{s-1}}", "layer_norm"),
            KeyRule("stages.{s}.downsample.1", f"{down}_block_{{s-1}}/{down}_conv_{{s-1}}", "conv"),
            KeyRule("head.norm", f"{own}_head_layernorm" if spec.num_classes else "layer_normalization", "layer_norm"),
            KeyRule("head.fc", f"{own}_head_dense", "dense"),
        )

    def make_candidate(self, spec: Spec) -> keras.Model:
        return application(
            self.models[spec.variant], spec, input_shape=(224, 224, 3), include_preprocessing=False, name=spec.variant
        )
