"""Visual Attention Network as functional Keras models, with one constructor per variant.

Source: arXiv 2202.09741, section 3.2, and the official code, `models/van.py` in
Visual-Attention-Network/VAN-Classification. The top-level layers are `patch_embed{s}`, `block{s}_{j}`,
`norm{s}` for the stages s from 1, then `pool` and `head`. Arguments follow keras.applications.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers

from van_tf.config import VARIANTS, VanConfig
from van_tf.layers import Block, OverlapPatchEmbed
from van_tf.weights import find_weights

MIN_INPUT_SIZE = 32


def van(
    config: VanConfig,
    *,
    include_top: bool = True,
    weights: str | os.PathLike[str] | None = None,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: Any = None,
    name: str | None = None,
    data_format: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    layer_norm_epsilon: float | None = None,
    dtype: Any = None,
) -> keras.Model:
    """Build the network that `config` describes, with the conventions of keras.applications.

    Two defaults differ from keras.applications. `weights` is None, because published weights are ported on first use,
    which needs PyTorch and a download. `classifier_activation` is None, because PyTorch's model returns logits and a
    port is compared with it.

    Input: `(N, H, W, C)` images, scaled by `preprocess_input`. `input_shape` is `(H, W, C)`, where H and W are None
    (the default) or at least 32. With `data_format` "channels_first", the input is `(N, C, H, W)`, and so is a feature
    map that the model returns; the default is Keras's global setting. `input_tensor` replaces the input.

    Output: `(N, classes)` logits, as in PyTorch; `classifier_activation="softmax"` returns probabilities. With
    `include_top=False`, the output is the last stage's feature map, `(N, ceil(H / 32), ceil(W / 32), embed_dims[-1])`,
    or with `pooling` "avg" or "max" its mean or maximum over all positions, `(N, embed_dims[-1])`. With a head,
    `pooling` has no effect.

    `weights` is None for random initialisation, the path of a file that van-port or Keras has written, or the name of
    the data set of the published weights: "imagenet", or "cifar10" for nano. Published weights are ported on first
    use, by van-port in a separate process, and stored in `VAN_PORT_CACHE` or the user's cache folder. A file with
    another number of classes loads everything except the head, with a warning.

    `classes` defaults to that of the config. `drop_rate` is the dropout rate in the MLPs. `drop_path_rate` is the rate
    of stochastic depth in the last block; it grows linearly from 0 over all blocks. `layer_norm_epsilon` defaults to
    the one in the weights file, if stated there, else to that of the config. `dtype` is a Keras dtype or policy; the
    default is the global one.

    Raises ValueError for arguments out of range and for a file that does not fit, FileNotFoundError for a missing file,
    and RuntimeError, with the command to run, if published weights cannot be obtained.
    """
    channels_first = _is_channels_first(data_format)
    shape = _input_shape(input_shape, input_tensor, channels_first, config.in_chans)
    classes = config.classes if classes is None else classes
    _check_arguments(shape, channels_first, pooling, classes, drop_rate, drop_path_rate)
    file = None if weights is None else find_weights(config, weights)
    if layer_norm_epsilon is None:
        layer_norm_epsilon = (file and file.layer_norm_epsilon) or config.layer_norm_epsilon
    inputs = keras.Input(shape, name="images") if input_tensor is None else input_tensor
    x = inputs
    if channels_first:
        x = layers.Permute((2, 3, 1), dtype=dtype, name="channels_last")(x)
    blocks_in_all = sum(config.depths)
    block_index = 0
    for stage, (dim, depth, ratio) in enumerate(
        zip(config.embed_dims, config.depths, config.mlp_ratios, strict=True), start=1
    ):
        kernel_size, strides = (7, 4) if stage == 1 else (3, 2)
        x = OverlapPatchEmbed(dim, kernel_size, strides, dtype=dtype, name=f"patch_embed{stage}")(x)
        for j in range(depth):
            rate = drop_path_rate * block_index / max(blocks_in_all - 1, 1)
            x = Block(ratio, drop_rate, rate, dtype=dtype, name=f"block{stage}_{j}")(x)
            block_index += 1
        x = layers.LayerNormalization(epsilon=layer_norm_epsilon, dtype=dtype, name=f"norm{stage}")(x)
    if include_top or pooling == "avg":
        x = layers.GlobalAveragePooling2D(data_format="channels_last", dtype=dtype, name="pool")(x)
    elif pooling == "max":
        x = layers.GlobalMaxPooling2D(data_format="channels_last", dtype=dtype, name="pool")(x)
    elif channels_first:
        x = _to_channels_first(x, "channels_first")
    if include_top:
        # The official code truncates this normal distribution at a hundred standard deviations, so in effect not at
        # all. Keras's TruncatedNormal would truncate at two.
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        x = layers.Dense(classes, classifier_activation, kernel_initializer=initializer, dtype=dtype, name="head")(x)
    sources = keras.utils.get_source_inputs(inputs)
    model = keras.Model(sources[0] if len(sources) == 1 else sources, x, name=name or f"van_{config.name}")
    if file is not None:
        file.load_into(model, config, van, whole=input_tensor is None)
    return model


def features(model: keras.Model, stages: Sequence[int] | None = None) -> keras.Model:
    """A model with the same input and weights that returns the feature maps of stages, for detection and segmentation.

    Stage s of a VAN returns `(N, ceil(H / r), ceil(W / r), embed_dims[s - 1])` with r = 4, 8, 16, 32, after its
    LayerNorm, as in VAN-Segmentation; channels come first if the model takes them first. The output is a list in the
    order of `stages`, by default of all stages. `model` is any model that `van` has built, with or without its head.

    Raises ValueError for a stage that the model does not have.
    """
    known = [stage for stage in range(1, 100) if any(layer.name == f"norm{stage}" for layer in model.layers)]
    stages = known if stages is None else stages
    if not stages or not set(stages) <= set(known):
        raise ValueError(f"stages must be among {known}: got {list(stages)}")
    maps = [model.get_layer(f"norm{stage}").output for stage in stages]
    if any(layer.name == "channels_last" for layer in model.layers):
        maps = [_to_channels_first(x, f"stage{stage}") for stage, x in zip(stages, maps, strict=True)]
    return keras.Model(model.input, maps, name=f"{model.name}_features")


def _to_channels_first(x: Any, name: str) -> Any:
    return layers.Permute((3, 1, 2), dtype=x.dtype, name=name)(x)


def _is_channels_first(data_format: str | None) -> bool:
    data_format = data_format or keras.config.image_data_format()
    if data_format not in {"channels_first", "channels_last"}:
        raise ValueError(f"data_format must be channels_first or channels_last: got {data_format!r}")
    return data_format == "channels_first"


def _input_shape(
    input_shape: tuple[int | None, ...] | None, input_tensor: Any, channels_first: bool, channels: int
) -> tuple[int | None, ...]:
    if input_tensor is not None:
        if not keras.backend.is_keras_tensor(input_tensor):
            raise ValueError("input_tensor must be the output of a Keras layer or of keras.Input")
        if input_shape is not None and tuple(input_tensor.shape[1:]) != tuple(input_shape):
            raise ValueError(
                f"input_shape {input_shape} differs from that of input_tensor, {tuple(input_tensor.shape[1:])}"
            )
        return tuple(input_tensor.shape[1:])
    if input_shape is None:
        return (channels, None, None) if channels_first else (None, None, channels)
    return tuple(input_shape)


def _check_arguments(
    shape: tuple[int | None, ...],
    channels_first: bool,
    pooling: str | None,
    classes: int,
    drop_rate: float,
    drop_path_rate: float,
) -> None:
    if len(shape) != 3:
        order = "(channels, height, width)" if channels_first else "(height, width, channels)"
        raise ValueError(f"input_shape must be {order}: got {shape}")
    if any(size is not None and size < MIN_INPUT_SIZE for size in (shape[1:] if channels_first else shape[:2])):
        raise ValueError(f"height and width must be at least {MIN_INPUT_SIZE} pixels, or None: got {shape}")
    if pooling not in {None, "avg", "max"}:
        raise ValueError(f"pooling must be None, 'avg' or 'max': got {pooling!r}")
    if classes < 1:
        raise ValueError(f"classes must be a positive number: got {classes}; for no head, use include_top=False")
    for label, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{label} must be at least 0 and below 1: got {rate}")


def _constructor(variant: str, about: str) -> Callable[..., keras.Model]:
    config = VARIANTS[variant]

    def build(
        include_top: bool = True,
        weights: str | os.PathLike[str] | None = None,
        input_tensor: Any = None,
        input_shape: tuple[int | None, ...] | None = None,
        pooling: str | None = None,
        classes: int = config.classes,
        classifier_activation: Any = None,
        name: str | None = None,
        **options: Any,
    ) -> keras.Model:
        return van(
            config,
            include_top=include_top,
            weights=weights,
            input_tensor=input_tensor,
            input_shape=input_shape,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            name=name,
            **options,
        )

    build.__name__ = build.__qualname__ = f"van_{variant}"
    build.__doc__ = f"Build {about}. The arguments are those of `van`."
    return build


van_nano = _constructor("nano", "this project's own small variant for 64x64 images, with CIFAR-10's ten classes")
van_b0 = _constructor("b0", "VAN-B0 (Tiny), 4.1 M parameters")
van_b1 = _constructor("b1", "VAN-B1 (Small), 13.9 M parameters")
van_b2 = _constructor("b2", "VAN-B2 (Base), 26.6 M parameters")
van_b3 = _constructor("b3", "VAN-B3 (Large), 44.8 M parameters")
van_b4 = _constructor("b4", "VAN-B4, 60.3 M parameters")
van_b5 = _constructor("b5", "VAN-B5, 90.0 M parameters")
van_b6 = _constructor("b6", "VAN-B6 (Huge), 199.8 M parameters")
