from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

from porting.kinds import KINDS, kind_of_layer, kind_of_module

# A kind, a module and a layer of that kind, and an input of the module.
CASES: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Any], tuple[int, ...]]] = {
    "convolution": ("conv", lambda: nn.Conv2d(3, 6, 3, 2, 1), lambda: layers.Conv2D(6, 3, 2), (2, 3, 8, 8)),
    "grouped": ("conv", lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: layers.Conv2D(6, 3, groups=2), (2, 4, 8, 8)),
    "1-D": ("conv", lambda: nn.Conv1d(3, 6, 3), lambda: layers.Conv1D(6, 3), (2, 3, 8)),
    "3-D": ("conv", lambda: nn.Conv3d(3, 4, 3), lambda: layers.Conv3D(4, 3), (2, 3, 5, 5, 5)),
    "depthwise": ("depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: layers.DepthwiseConv2D(3), (2, 4, 8, 8)),
    "dense": ("dense", lambda: nn.Linear(5, 5), lambda: layers.Dense(5), (2, 5)),
    "batch norm": ("batch_norm", lambda: nn.BatchNorm2d(4), layers.BatchNormalization, (2, 4, 6, 6)),
    "batch norm without scale": (
        "batch_norm",
        lambda: nn.BatchNorm1d(4, affine=False),
        lambda: layers.BatchNormalization(scale=False, center=False),
        (2, 4, 6),
    ),
    "layer norm": ("layer_norm", lambda: nn.LayerNorm(5), layers.LayerNormalization, (2, 5)),
    "group norm": ("group_norm", lambda: nn.GroupNorm(2, 4), lambda: layers.GroupNormalization(2), (2, 4, 6, 6)),
    "attention": (
        "attention",
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda: layers.MultiHeadAttention(2, 3),
        (2, 4, 6),
    ),
    "LSTM": ("recurrent", lambda: nn.LSTM(3, 4, batch_first=True), lambda: layers.LSTM(4), (2, 5, 3)),
    "GRU": ("recurrent", lambda: nn.GRU(3, 4, batch_first=True), lambda: layers.GRU(4), (2, 5, 3)),
    "GRU both ways": (
        "recurrent",
        lambda: nn.GRU(3, 4, bidirectional=True),
        lambda: layers.Bidirectional(layers.GRU(4)),
        (5, 2, 3),
    ),
    "LSTM cell": ("recurrent_cell", lambda: nn.LSTMCell(3, 4), lambda: layers.LSTMCell(4), (2, 3)),
    "GRU cell": ("recurrent_cell", lambda: nn.GRUCell(3, 4), lambda: layers.GRUCell(4), (2, 3)),
    "RNN cell": ("recurrent_cell", lambda: nn.RNNCell(3, 4), lambda: layers.SimpleRNNCell(4), (2, 3)),
    "transposed convolution": (
        "conv_transpose",
        lambda: nn.ConvTranspose2d(3, 3, 3, 2, 1),
        lambda: layers.Conv2DTranspose(3, 3, 2),
        (2, 3, 6, 6),
    ),
    "RMS norm": ("rms_norm", lambda: nn.RMSNorm(5, eps=1e-6), layers.RMSNormalization, (2, 5)),
    "PReLU": ("prelu", lambda: nn.PReLU(4), lambda: layers.PReLU(shared_axes=[1, 2]), (2, 4, 6, 6)),
    "pooling": ("pooling", lambda: nn.MaxPool2d(3, 2, 1), lambda: layers.MaxPooling2D(3, 2, "same"), (2, 3, 6, 6)),
    "pooling of means": (
        "pooling",
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        lambda: layers.AveragePooling2D(3, 2, "same"),
        (2, 3, 8, 8),
    ),
    "global pooling": ("pooling", lambda: nn.AdaptiveAvgPool2d(1), layers.GlobalAveragePooling2D, (2, 3, 6, 6)),
    "resizing": (
        "resampling",
        lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        lambda: layers.UpSampling2D(2, interpolation="bilinear"),
        (2, 3, 5, 5),
    ),
    "activation": ("activation", nn.GELU, lambda: layers.Activation("gelu"), (2, 5)),
    "ReLU": ("activation", nn.ReLU, layers.ReLU, (2, 5)),
    "dropout": ("dropout", lambda: nn.Dropout(0.1), lambda: layers.Dropout(0.1), (2, 5)),
    "dropout of channels": ("dropout", lambda: nn.Dropout2d(0.1), lambda: layers.SpatialDropout2D(0.1), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_both_sides_are_of_the_kind(case: str) -> None:
    name, module, layer, _ = CASES[case]
    assert kind_of_module(module()) is KINDS[name]
    assert kind_of_layer(layer()) is KINDS[name]


@pytest.mark.parametrize("case", CASES)
def test_every_mistake_gives_other_numbers_of_the_same_shape_or_none(case: str) -> None:
    name, build, _, shape = CASES[case]
    torch.manual_seed(0)
    module = build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.2, 0.9)
        for name, buffer in module.named_buffers():
            if name != "num_batches_tracked":
                buffer.uniform_(0.3, 0.8)
    given = torch.randn(shape)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        taken = [given] * 3 if name == "attention" else [given]
        right = module.double()(*[each.double() for each in taken])
        right = right[0] if isinstance(right, tuple) else right
        module.float()
    kind = kind_of_module(module)
    assert kind is not None
    mistakes = list(kind.mistakes(module, taken))
    assert len({mistake.cause for mistake in mistakes}) == len(mistakes)
    made = 0
    for mistake in mistakes:
        result = mistake.make()
        tensor = result[0] if isinstance(result, tuple) else result
        if tensor is not None and tensor.shape == right.shape:
            made += not torch.equal(tensor.double(), right)
    if kind.name != "dropout":
        assert made >= len(mistakes) / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_settings_agree_where_the_two_are_set_alike(case: str) -> None:
    name, module, layer, shape = CASES[case]
    kind, built = KINDS[name], layer()
    given = np.zeros((shape[0], *shape[2:], shape[1]) if len(shape) > 2 else shape, np.float32)
    if name == "recurrent_cell":
        built.build(given.shape)
    else:
        built(given, given) if name == "attention" else built(given)
    expected, actual = kind.module_settings(module()), kind.layer_settings(built)
    common = [key for key in expected if key in actual and key not in {"eps", "momentum", "padding"}]
    assert common or name in {"dense", "layer_norm", "prelu", "pooling", "resampling"}
    for key in common:
        assert (
            np.allclose(expected[key], actual[key])
            if isinstance(actual[key], np.ndarray)
            else expected[key] == actual[key]
        ), key


def test_an_activation_inside_another_layer_has_its_function() -> None:
    kind = KINDS["activation"]
    fused = kind.fused_settings(layers.Conv2D(3, 3, activation="relu"))["activation"]
    assert np.allclose(fused, kind.module_settings(nn.ReLU())["activation"])
    assert kind.fused_settings(layers.LSTM(3)) == {}


def test_functions_of_several_numbers_have_no_values() -> None:
    kind = KINDS["activation"]
    for module in (nn.Softmax(dim=2), nn.Softmax2d(), nn.GLU(1), nn.LogSoftmax(3)):
        assert kind.module_settings(module) == {}
    assert kind.layer_settings(layers.Activation(keras.activations.softmax)) == {}


@pytest.mark.parametrize(("axis", "rank", "said"), [(-1, 4, "channels"), (2, 3, "channels"), (4, 5, "channels")])
def test_the_axis_of_a_norm_is_told_by_its_rank(axis: int, rank: int, said: str) -> None:
    layer = layers.BatchNormalization(axis=axis)
    layer.build((None, *[4] * (rank - 1)))
    assert KINDS["batch_norm"].layer_settings(layer)["axis"] == said
    odd = layers.BatchNormalization(axis=2)
    odd.build((None, 4, 4, 4))
    assert KINDS["batch_norm"].layer_settings(odd)["axis"] == "axis 2"


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.PixelShuffle(2), (2, 8, 3, 3)),
        (nn.PixelUnshuffle(2), (2, 2, 6, 6)),
        (nn.InstanceNorm2d(3, affine=True), (2, 3, 6, 6)),
    ],
    ids=["pixel shuffle", "pixel unshuffle", "instance norm"],
)
def test_kinds_without_a_layer_of_their_own_have_their_mistakes(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = torch.randn(shape)
    kind = kind_of_module(module)
    assert kind is not None
    right = module.double()(given.double())
    made = [mistake.make() for mistake in kind.mistakes(module.float(), [given])]
    assert made
    for result in made:
        assert isinstance(result, torch.Tensor)
        assert result.shape == right.shape
    assert any(not torch.allclose(result, right) for result in made if isinstance(result, torch.Tensor))


def test_tensorflows_order_of_a_pixel_shuffle_is_what_tensorflow_computes() -> None:
    import tensorflow as tf

    given = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    kind = kind_of_module(nn.PixelShuffle(2))
    assert kind is not None
    made = next(iter(kind.mistakes(nn.PixelShuffle(2), [given]))).make()
    theirs = tf.nn.depth_to_space(given.numpy().transpose(0, 2, 3, 1), 2).numpy()
    assert isinstance(made, torch.Tensor)
    np.testing.assert_array_equal(made.numpy(), theirs.transpose(0, 3, 1, 2))
    back = next(iter(kind.mistakes(nn.PixelUnshuffle(2), [made]))).make()
    assert isinstance(back, torch.Tensor)
    np.testing.assert_array_equal(back.numpy(), given.numpy())


def test_an_embedding_that_is_off_by_one() -> None:
    module, tokens = nn.Embedding(7, 3), torch.tensor([[0, 3, 6]])
    kind = kind_of_module(module)
    assert kind is not None
    causes = {mistake.cause: mistake.make() for mistake in kind.mistakes(module, [tokens])}
    expected = module(tokens + 1 - torch.tensor([[0, 0, 7]])).double()
    made = causes["it takes the row 1 after the one that PyTorch takes"]
    assert isinstance(made, torch.Tensor)
    assert torch.equal(made, expected)


def test_activations_and_norms_of_other_packages_are_of_the_same_kinds() -> None:
    from transformers.activations import GELUActivation, NewGELUActivation
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(2, 5, dtype=torch.float64)
    kind = KINDS["activation"]
    assert kind.is_module(GELUActivation())
    causes = [each.cause for each in kind.mistakes(GELUActivation(), [x])]
    assert causes[0] == "the tanh approximation of GELU"
    assert next(iter(kind.mistakes(NewGELUActivation(), [x]))).cause.startswith("GELU by erf")
    norm = LlamaRMSNorm(5, eps=1e-5).double()
    assert kind_of_module(norm) is KINDS["rms_norm"]
    assert KINDS["rms_norm"].module_settings(norm) == {"axes": 1, "eps": 1e-5}
    made = {each.cause: each.make for each in KINDS["rms_norm"].mistakes(norm, [x])}
    with torch.no_grad():
        expected = torch.nn.functional.rms_norm(x, (5,), eps=1e-6)
        torch.testing.assert_close(made["an epsilon of 1e-06 instead of 1e-05"](), expected, rtol=1e-6, atol=1e-6)
    assert kind_of_module(GemmaRMSNorm(5)) is None  # it adds 1 to its scale
