"""Builds the models of other packages, and lists the rows of their usual layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import FamilyError
from porting.families.base import Spec
from porting.kinds.transforms import Array
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn


def library(name: str) -> Any:
    """Import a package that only some families need; raises FamilyError, with what to install, if it is missing."""
    from porting.models.frameworks import import_library

    try:
        return import_library(name)
    except ImportError as error:
        raise FamilyError(
            f"this family needs {name.partition('.')[0]}, which cannot be imported: {error}",
            hint="Install it: pip install 'van-port[hub]'.",
        ) from None


def timm_model(spec: Spec, **options: Any) -> nn.Module:
    """Build a timm model without weights."""
    return library("timm").create_model(spec.variant, num_classes=spec.num_classes, **options)  # type: ignore[no-any-return]


def torchvision_model(spec: Spec, headless: Callable[[Any], nn.Module]) -> nn.Module:
    """Build a torchvision model without weights. `headless` removes its head if the spec has none."""
    classes = {"num_classes": spec.num_classes} if spec.num_classes else {}
    model = library("torchvision.models").get_model(spec.variant, weights=None, **classes)
    return model if spec.num_classes else headless(model)


def application(name: str, spec: Spec, /, **options: Any) -> keras.Model:
    """Build a keras.applications model that returns logits or, without a head, the mean of its features."""
    import keras

    from porting.models.frameworks import numbered_afresh

    head = {"classes": spec.num_classes, "classifier_activation": None}
    top = head if spec.num_classes else {"include_top": False, "pooling": "avg"}
    with numbered_afresh():
        return getattr(keras.applications, name)(weights=None, **top, **options)


def classifier(name: str, backbone: Any, spec: Spec, *, pooled: bool = True) -> keras.Model:
    """Build a keras-hub classifier on a backbone; without a head, return the mean of its features, or all of them."""
    import keras

    if spec.num_classes:
        return getattr(library("keras_hub.models"), name)(backbone=backbone, num_classes=spec.num_classes)
    if not pooled:
        return backbone
    rank = len(backbone.output.shape) - 2
    pooled = getattr(keras.layers, f"GlobalAveragePooling{rank}D")(name="pooler")(backbone.output)
    return keras.Model(backbone.input, pooled)


def transformer_backbone(name: str, layers: int, heads: int, width: int, /, **options: Any) -> keras.Model:
    """Build a keras-hub backbone whose feedforward layers are four times as wide as the rest."""
    owner = getattr(library("keras_hub.models"), name)
    sizes = {"num_layers": layers, "num_heads": heads, "hidden_dim": width, "intermediate_dim": 4 * width}
    return owner(**sizes, **options)


def encoder_config(layers: int, heads: int, width: int, **others: Any) -> dict[str, Any]:
    """The configuration of a transformers encoder whose feedforward layers are four times as wide as the rest."""
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        **others,
    }


def attention_rows(source: str, target: str, *names: str) -> list[KeyRule]:
    """The rows of an attention with four projections. `names` are PyTorch's for query, key, value and output."""
    projections = ("query", "key", "value", "attention_output")
    return [
        KeyRule(f"{source}.{theirs}", f"{target}/{ours}", "dense")
        for theirs, ours in zip(names, projections, strict=True)
    ]


def transformer_rows(
    source: str, target: str, *names: str, attention: str = "self_attention_layer"
) -> tuple[KeyRule, ...]:
    """The rows of keras-hub's transformer layer, whose attention it calls `attention`.

    `names` are PyTorch's, in this order: query, key, value and output of the attention, its norm, the two dense layers
    of the feedforward part, and their norm.
    """
    norm, first, second, last_norm = (f"{source}.{name}" for name in names[4:])
    return (
        *attention_rows(source, f"{target}/{attention}", *names[:4]),
        KeyRule(norm, f"{target}/self_attention_layer_norm", "layer_norm"),
        KeyRule(first, f"{target}/feedforward_intermediate_dense", "dense"),
        KeyRule(second, f"{target}/feedforward_output_dense", "dense"),
        KeyRule(last_norm, f"{target}/feedforward_layer_norm", "layer_norm"),
    )


def text_inputs(vocabulary: int, length: int = 16) -> dict[str, Array]:
    """Two sequences of random int32 tokens under keras-hub's names. The second ends in padding."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, length)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[1, length - length // 4 :] = 0
    return {"token_ids": tokens, "padding_mask": mask}


def transformers_model(
    name: str,
    config: Mapping[str, Any],
    outputs: str | Mapping[str, str] = "last_hidden_state",
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    **options: Any,
) -> nn.Module:
    """Build a transformers model without weights that returns only some attributes of its output.

    `outputs` names one attribute, or maps Keras's name of each output to one. `prepare` converts the keyword arguments
    of each call. The model's class derives from the package's own, so its tensors have the names that checkpoints use.
    """
    transformers = library("transformers")
    owner = getattr(transformers, name)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = owner.forward(self, *args, **prepare(kwargs))
        if isinstance(outputs, str):
            return getattr(output, outputs)
        return {name: getattr(output, attribute) for name, attribute in outputs.items()}

    # Callers read the model's inputs from this signature.
    forward.__signature__ = inspect.signature(owner.forward)  # type: ignore[attr-defined]
    model = type(name, (owner,), {"forward": forward})
    # Other attention implementations use fused kernels that do not support float64 and hooks.
    return model(owner.config_class(**config, attn_implementation="eager"), **options)  # type: ignore[no-any-return]


@contextlib.contextmanager
def transformers_without_filling(publisher: str) -> Iterator[None]:
    """Leave out the initialisation of transformers' models, by the package's own switch."""
    from porting.models.frameworks import import_library

    with contextlib.ExitStack() as stack:
        for module in ("modeling_utils", "initialization") if publisher == "transformers" else ():
            with contextlib.suppress(ImportError):  # each version has it in one of them
                if switch := getattr(import_library(f"transformers.{module}"), "no_init_weights", None):
                    stack.enter_context(switch())
                    break
        yield
