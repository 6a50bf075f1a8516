"""Mistakes in transposed convolutions, resizing, pixel shuffles and embeddings are named; correct ports pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

from porting.parity.compare import check_parity
from porting.parity.report import ParityReport

IMAGES = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)


def kernel(module: Any, flip: bool = False) -> list[Any]:
    array = module.weight.detach().numpy().transpose(2, 3, 1, 0)
    return [array[::-1, ::-1] if flip else array, module.bias.detach().numpy()]


def around(
    module: nn.Module, layer: Callable[[], Any], weights: Callable[[Any], list[Any]] | None = None
) -> ParityReport:
    """Put the module and the layer between two convolutions with the same weights."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(4, 8, 1), nn.LazyConv2d(2, 1)
    reference = nn.Sequential(first, module, last).eval()
    with torch.no_grad():
        reference(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
    inputs = keras.Input((6, 6, 4))
    own = layer()
    x = own(layers.Conv2D(8, 1, name="0")(inputs))
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="2")(x))
    for name in ("0", "2"):
        conv: Any = reference[int(name)]
        model.get_layer(name).set_weights(
            [conv.weight.detach().numpy().transpose(2, 3, 1, 0), conv.bias.detach().numpy()]
        )
    if weights is not None:
        own.set_weights(weights(module))
    return check_parity(reference, model, IMAGES)


class DepthToSpace(layers.Layer):  # type: ignore[misc]
    """A pixel shuffle as in TensorFlow, or with the channels reordered first, as in a correct port."""

    def __init__(self, right: bool) -> None:
        super().__init__(name="1")
        self.right = right

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        if self.right:
            height, width, channels = x.shape[1:]
            x = tf.reshape(x, (-1, height, width, channels // 4, 4))
            x = tf.reshape(tf.transpose(x, (0, 1, 2, 4, 3)), (-1, height, width, channels))
        return tf.nn.depth_to_space(x, 2)


class LayerNorm2d(nn.LayerNorm):
    """A normalisation of the channels of maps, as torchvision and timm write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Normalization(layers.Layer):  # type: ignore[misc]
    """A group normalisation of 8 channels in 4 groups, applied to another arrangement of the numbers."""

    def __init__(self, before: Callable[[Any], Any], behind: Callable[[Any], Any]) -> None:
        super().__init__(name="1")
        self.norm = layers.GroupNormalization(4, epsilon=1e-5)
        self.before, self.behind = before, behind

    def call(self, x: Any) -> Any:
        return self.behind(self.norm(self.before(x)))


def normalization(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def scale_and_shift(module: Any) -> list[Any]:
    return [module.weight.detach().numpy(), module.bias.detach().numpy()]


GROUPS = lambda: normalization(nn.GroupNorm(4, 8))  # noqa: E731
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any, str]] = {
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(8, 8, 3, 2),
        lambda: layers.Conv2DTranspose(8, 3, 2, name="1"),
        kernel,
        "",
    ),
    "transposed convolution, flipped": (
        lambda: nn.ConvTranspose2d(8, 8, 3, 2),
        lambda: layers.Conv2DTranspose(8, 3, 2, name="1"),
        lambda module: kernel(module, flip=True),
        "the kernel is flipped in height and width",
    ),
    "resizing": (
        lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        lambda: layers.UpSampling2D(2, interpolation="bilinear", name="1"),
        None,
        "",
    ),
    "resizing with aligned corners": (
        lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        lambda: layers.UpSampling2D(2, interpolation="bilinear", name="1"),
        None,
        "align_corners=False instead of True",
    ),
    "resizing by the nearest": (
        lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        lambda: layers.UpSampling2D(2, name="1"),
        None,
        "nearest interpolation instead of bilinear",
    ),
    "group norm": (GROUPS, lambda: layers.GroupNormalization(4, epsilon=1e-5, name="1"), scale_and_shift, ""),
    "group norm with other groups": (
        GROUPS,
        lambda: layers.GroupNormalization(2, epsilon=1e-5, name="1"),
        scale_and_shift,
        "2 groups instead of 4",
    ),
    "group norm of each position": (
        GROUPS,
        lambda: Normalization(
            lambda x: keras.ops.reshape(x, (-1, 1, 1, 8)), lambda x: keras.ops.reshape(x, (-1, 6, 6, 8))
        ),
        scale_and_shift,
        "it normalises each position by itself, not the whole map",
    ),
    "layer norm": (
        lambda: normalization(LayerNorm2d(8)),
        lambda: layers.LayerNormalization(epsilon=1e-5, name="1"),
        scale_and_shift,
        "",
    ),
    "layer norm over the whole sample": (
        lambda: normalization(LayerNorm2d(8)),
        lambda: layers.GroupNormalization(1, epsilon=1e-5, name="1"),
        scale_and_shift,
        "its statistics are those of the whole sample, not of the last axis",
    ),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), lambda: DepthToSpace(right=True), None, ""),
    "pixel shuffle in TensorFlow's order": (
        lambda: nn.PixelShuffle(2),
        lambda: DepthToSpace(right=False),
        None,
        "channels and pixels are in TensorFlow's order",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_named_and_its_healthy_neighbour_passes(case: str) -> None:
    build, layer, weights, cause = CASES[case]
    torch.manual_seed(1)
    report = around(build(), layer, weights)
    if not cause:
        assert report.passed, report.objections
        return
    assert not report.passed
    assert report.culprits[0].culprit == "1"
    assert report.diagnosis is not None
    assert cause in report.diagnosis.cause
    assert report.diagnosis.confidence == "certain"


def test_tokens_that_are_off_by_one() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).eval()
    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, layers.Dense(3, name="1")(layers.Embedding(9, 4, name="0")(inputs)))
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    table = state["0.weight"]
    model.get_layer("1").set_weights([state["1.weight"].T, state["1.bias"]])
    tokens = np.random.default_rng(0).integers(0, 9, (3, 5)).astype(np.int32)
    model.get_layer("0").set_weights([table])
    assert check_parity(reference, model, tokens).passed
    model.get_layer("0").set_weights([np.roll(table, -1, 0)])
    report = check_parity(reference, model, tokens)
    assert not report.passed
    assert report.diagnosis is not None
    assert "it takes the row 1 after the one that PyTorch takes" in report.diagnosis.cause


@pytest.mark.parametrize(
    ("pads", "cause"),
    [((2, 2), ""), ((3, 1), "it pads 1 more in front"), ((0, 4), "it pads 2 more behind"), ((4, 0), "2 more in front")],
)
def test_padding_that_is_uneven_is_named(pads: tuple[int, int], cause: str) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(4, 8, 5, stride=2, padding=2), nn.Flatten()).eval()
    inputs = keras.Input((6, 6, 4))
    conv = layers.Conv2D(8, 5, 2, name="0")
    x = conv(layers.ZeroPadding2D((pads, pads))(inputs))
    model = keras.Model(inputs, layers.Reshape((72,))(layers.Permute((3, 1, 2))(x)))
    conv.set_weights(kernel(reference[0]))
    report = check_parity(reference, model, IMAGES)
    assert report.passed is not bool(cause), str(report)
    if cause:
        assert report.culprits[0].diagnosis is not None
        assert cause in report.culprits[0].diagnosis.cause
