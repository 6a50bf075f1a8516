"""Visual Attention Network as functional Keras models, one constructor a variant.

Source: arXiv 2202.09741, section 3.2, and the official code, `models/van.py` in
Visual-Attention-Network/VAN-Classification. The top-level layers are `patch_embed{s}`, `block{s}.{j}`,
`norm{s}` for the stages s from 1, then `pool` and `head`.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from van_tf.config import VARIANTS, VanConfig
from van_tf.layers import Block, OverlapPatchEmbed

MIN_INPUT_SIZE = 32


def van(
    config: VanConfig,
    *,
    include_top: bool = True,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    classes: int = 1000,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    layer_norm_epsilon: float | None = None,
    dtype: Any = None,
    name: str | None = None,
) -> keras.Model:
    """Builds the network that `config` describes, with fresh weights.

    Input: `(N, H, W, C)` images, scaled as `preprocess_input` does; `input_shape` gives `(H, W, C)`, where H and
    W may be None and otherwise are at least 32. Output: `(N, classes)` logits, without softmax as in PyTorch,
    or with `include_top=False` the last stage's `(N, ceil(H / 32), ceil(W / 32), embed_dims[-1])`.

    `drop_rate` is the dropout rate in the MLPs. `drop_path_rate` is the last block's rate of stochastic depth;
    it grows linearly over all blocks, from 0. `layer_norm_epsilon` is by default the config's, 1e-6; weights from
    OpenMMLab and VAN-Segmentation were trained with 1e-5. `dtype` is a Keras dtype or policy, by default the global.

    Raises ValueError for an input size below 32, a number of classes below 1 or a rate outside [0, 1).
    """
    _check_arguments(input_shape, classes, drop_rate, drop_path_rate)
    norm_epsilon = config.layer_norm_epsilon if layer_norm_epsilon is None else layer_norm_epsilon
    inputs = keras.Input(input_shape, name="images")
    x = inputs
    blocks_in_all = sum(config.depths)
    block_index = 0
    for stage, (dim, depth, ratio) in enumerate(
        zip(config.embed_dims, config.depths, config.mlp_ratios, strict=True), start=1
    ):
        kernel_size, strides = (7, 4) if stage == 1 else (3, 2)
        x = OverlapPatchEmbed(dim, kernel_size, strides, dtype=dtype, name=f"patch_embed{stage}")(x)
        for j in range(depth):
            rate = drop_path_rate * block_index / max(blocks_in_all - 1, 1)
            x = Block(ratio, drop_rate, rate, dtype=dtype, name=f"block{stage}.{j}")(x)
            block_index += 1
        x = layers.LayerNormalization(epsilon=norm_epsilon, dtype=dtype, name=f"norm{stage}")(x)
    if include_top:
        x = layers.GlobalAveragePooling2D(data_format="channels_last", dtype=dtype, name="pool")(x)
        # The official code truncates this normal at a hundred standard deviations, which is not at all;
        # Keras's TruncatedNormal would cut at two.
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        x = layers.Dense(classes, kernel_initializer=initializer, dtype=dtype, name="head")(x)
    return keras.Model(inputs, x, name=name or f"van_{config.name}")


def _check_arguments(
    input_shape: tuple[int | None, int | None, int], classes: int, drop_rate: float, drop_path_rate: float
) -> None:
    if len(input_shape) != 3:
        raise ValueError(f"input_shape is (height, width, channels): got {input_shape}")
    if any(size is not None and size < MIN_INPUT_SIZE for size in input_shape[:2]):
        raise ValueError(f"height and width are at least {MIN_INPUT_SIZE} pixels, or None: got {input_shape}")
    if classes < 1:
        raise ValueError(f"classes is a positive number: got {classes}; for no head, use include_top=False")
    for label, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{label} is at least 0 and below 1: got {rate}")


def van_nano(*, classes: int = 10, **kwargs: Any) -> keras.Model:
    """This project's own small variant for 64x64 images, with CIFAR-10's ten classes; arguments as for `van`."""
    return van(VARIANTS["nano"], classes=classes, **kwargs)


def van_b0(**kwargs: Any) -> keras.Model:
    """VAN-B0 (Tiny), 4.1 M parameters; arguments as for `van`."""
    return van(VARIANTS["b0"], **kwargs)


def van_b1(**kwargs: Any) -> keras.Model:
    """VAN-B1 (Small), 13.9 M parameters; arguments as for `van`."""
    return van(VARIANTS["b1"], **kwargs)


def van_b2(**kwargs: Any) -> keras.Model:
    """VAN-B2 (Base), 26.6 M parameters; arguments as for `van`."""
    return van(VARIANTS["b2"], **kwargs)


def van_b3(**kwargs: Any) -> keras.Model:
    """VAN-B3 (Large), 44.8 M parameters; arguments as for `van`."""
    return van(VARIANTS["b3"], **kwargs)


def van_b4(**kwargs: Any) -> keras.Model:
    """VAN-B4, 60.3 M parameters; arguments as for `van`."""
    return van(VARIANTS["b4"], **kwargs)


def van_b5(**kwargs: Any) -> keras.Model:
    """VAN-B5, 90.0 M parameters; arguments as for `van`."""
    return van(VARIANTS["b5"], **kwargs)


def van_b6(**kwargs: Any) -> keras.Model:
    """VAN-B6 (Huge), 199.8 M parameters; arguments as for `van`."""
    return van(VARIANTS["b6"], **kwargs)


def preprocess_input(images: Any) -> Any:
    """Pixel values from 0 to 255 to the range [-1, 1], as the official B0 to B3 and nano were trained.

    That is mean = std = 0.5 on values from 0 to 1. Arrays and tensors of any shape and dtype; returns float32.
    """
    return keras.ops.cast(images, "float32") / 127.5 - 1.0
