"""MobileNetV3, from timm's `tf_` models, which pad like TensorFlow, to keras.applications."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porting.families.base import Spec
from porting.families.builders import application, timm_model
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn

# Keras numbers the blocks consecutively across stages, and the first has no number.
_ROW, _BLOCK = "blocks.{s}.{j}", "expanded_conv_{s.j}"


class MobileNetV3Family(LibraryFamily):
    """MobileNetV3 (arXiv 1905.02244): large and small, each with width 1, width 0.75, and minimalistic."""

    name = "mobilenetv3"
    models = {
        f"tf_mobilenetv3_{size}_{more}": (f"MobileNetV3{size.title()}", options)
        for size in ("large", "small")
        for more, options in (("100", {}), ("075", {"alpha": 0.75}), ("minimal_100", {"minimalistic": True}))
    }
    head = "classifier"

    def rows_of(self, spec: Spec) -> tuple[KeyRule, ...]:
        last = 6 if "large" in spec.variant else 5
        squeezes = "minimal" not in spec.variant
        return (
            KeyRule("conv_stem", "conv", "conv"),
            KeyRule("bn1", "conv_bn", "batch_norm"),
            KeyRule("blocks.0.0.conv_dw", "expanded_conv_depthwise", "depthwise"),
            KeyRule("blocks.0.0.bn1", "expanded_conv_depthwise_bn", "batch_norm"),
            KeyRule("blocks.0.0.conv_pw", "expanded_conv_project", "conv"),
            KeyRule("blocks.0.0.bn2", "expanded_conv_project_bn", "batch_norm"),
            *(_squeeze("blocks.0.0", "expanded_conv") if squeezes and "small" in spec.variant else ()),
            KeyRule(f"{_ROW}.conv_pw", f"{_BLOCK}_expand", "conv"),
            KeyRule(f"{_ROW}.bn1", f"{_BLOCK}_expand_bn", "batch_norm"),
            KeyRule(f"{_ROW}.conv_dw", f"{_BLOCK}_depthwise", "depthwise"),
            KeyRule(f"{_ROW}.bn2", f"{_BLOCK}_depthwise_bn", "batch_norm"),
            *(_squeeze(_ROW, _BLOCK) if squeezes else ()),
            KeyRule(f"{_ROW}.conv_pwl", f"{_BLOCK}_project", "conv"),
            KeyRule(f"{_ROW}.bn3", f"{_BLOCK}_project_bn", "batch_norm"),
            KeyRule(f"blocks.{last}.0.conv", "conv_1", "conv"),
            KeyRule(f"blocks.{last}.0.bn1", "conv_1_bn", "batch_norm"),
            *((KeyRule("conv_head", "conv_2", "conv"),) if spec.num_classes else ()),
            KeyRule("classifier", "logits", "dense"),
        )

    def build_reference(self, spec: Spec) -> nn.Module:
        from torch import nn

        model: Any = timm_model(spec)
        if not spec.num_classes:
            # The Keras model ends after the pooling.
            model.conv_head, model.act2 = nn.Identity(), nn.Identity()
        return model  # type: ignore[no-any-return]

    def make_candidate(self, spec: Spec) -> keras.Model:
        name, options = self.models[spec.variant]
        return application(name, spec, input_shape=(224, 224, 3), include_preprocessing=False, **options)


def _squeeze(source: str, target: str) -> list[KeyRule]:
    """The rows of a block's squeeze and excitation."""
    return [
        KeyRule(f"{source}.se.conv_reduce", f"{target}_squeeze_excite_conv", "conv"),
        KeyRule(f"{source}.se.conv_expand", f"{target}_squeeze_excite_conv_1", "conv"),
    ]
