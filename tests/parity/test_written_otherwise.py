"""Correct ports pass and wrong ones are found, in whatever way they are written.

Each model here is small and of another kind. Users of converters reported these situations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from porting import check_parity
from porting.parity.report import FLOAT32, ParityReport

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(torch.nn.utils.weight_norm|spectral_norm).*:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)

Array = np.ndarray


class Port(NamedTuple):
    """Two models, the inputs for both, and further arguments."""

    reference: nn.Module
    candidate: keras.Model
    inputs: Any
    arguments: dict[str, Any] = {}  # noqa: RUF012


def run(port: Port) -> ParityReport:
    return check_parity(port.reference, port.candidate, port.inputs, **port.arguments)


def numbers(*shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def array(tensor: torch.Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().numpy()


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                assert module.running_mean is not None
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.3, 0.3)
    return model


def named(**modules: nn.Module) -> nn.Module:
    model = nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def conv_weights(module: Any) -> list[Array]:
    kernel = np.moveaxis(array(module.weight), (0, 1), (-1, -2))
    return [kernel] if module.bias is None else [kernel, array(module.bias)]


def dense_weights(module: Any) -> list[Array]:
    return [array(module.weight).T, array(module.bias)]


def norm_weights(module: Any) -> list[Array]:
    affine = [array(module.weight), array(module.bias)] if module.affine else []
    return [*affine, array(module.running_mean), array(module.running_var)]


NORM: dict[str, Any] = {"epsilon": 1e-5, "momentum": 0.9}
HEALTHY: dict[str, Callable[[], Port]] = {}
WRONG: dict[str, tuple[Callable[[], Port], str | None]] = {}


def healthy(make: Callable[[], Port]) -> Callable[[], Port]:
    HEALTHY[make.__name__] = make
    return make


def wrong(cause: str | None = None) -> Callable[[Callable[[], Port]], Callable[[], Port]]:
    """A wrong port: `cause` is a part of the text that the report must contain."""

    def register(make: Callable[[], Port]) -> Callable[[], Port]:
        WRONG[make.__name__] = make, cause
        return make

    return register


# Activations and norms inside another layer.


def conv_net(fused: bool, activation: nn.Module, keras_activation: Any, scale: float = 1.0) -> Port:
    reference = seeded(lambda: named(conv=nn.Conv2d(3, 6, 3), act=activation, last=nn.Conv2d(6, 4, 1)))
    inputs = keras.Input((9, 9, 3))
    conv = layers.Conv2D(6, 3, activation=keras_activation if fused else None, name="conv")
    x = conv(inputs)
    x = x if fused else layers.Activation(keras_activation, name="act")(x)
    last = layers.Conv2D(4, 1, name="last")
    model = keras.Model(inputs, last(x))
    conv.set_weights(conv_weights(reference.get_submodule("conv")))
    last.set_weights(conv_weights(reference.get_submodule("last")))
    return Port(reference, model, numbers(2, 9, 9, 3, scale=scale))


@healthy
def activation_inside_a_convolution() -> Port:
    return conv_net(True, nn.ReLU(), "relu")


@healthy
def activation_paired_with_its_convolution() -> Port:
    return conv_net(True, nn.ReLU(), "relu")._replace(arguments={"pairs": {"act": "conv", "conv": "-"}})


@wrong("ReLU6")
def relu6_as_relu_inside_a_convolution_on_quiet_inputs() -> Port:
    return conv_net(True, nn.ReLU6(), "relu", 0.1)


@wrong("ReLU6")
def relu6_as_relu_on_quiet_inputs() -> Port:
    return conv_net(False, nn.ReLU6(), "relu", 0.1)


@wrong("tanh")
def gelu_by_tanh_inside_a_convolution() -> Port:
    return conv_net(True, nn.GELU(), lambda x: keras.activations.gelu(x, approximate=True))


def folded(scale: float = 1.0) -> Port:
    reference = seeded(lambda: named(conv=nn.Conv2d(3, 6, 3, bias=False), bn=nn.BatchNorm2d(6), act=nn.ReLU()))
    bn: Any = reference.get_submodule("bn")
    factor = array(bn.weight) / np.sqrt(array(bn.running_var) + 1e-5) * scale
    inputs = keras.Input((9, 9, 3))
    conv = layers.Conv2D(6, 3, name="conv", activation="relu")
    model = keras.Model(inputs, conv(inputs))
    kernel = conv_weights(reference.get_submodule("conv"))[0]
    conv.set_weights([kernel * factor, array(bn.bias) - array(bn.running_mean) * factor])
    return Port(reference, model, numbers(2, 9, 9, 3))


@healthy
def batch_norm_folded_into_a_convolution() -> Port:
    return folded()


@wrong()
def batch_norm_folded_wrongly() -> Port:
    return folded(1 + 1e-4)


# Rows behind a Flatten.


def flattening(permute_rows: bool, as_module: bool = True) -> Port:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 6, 3), nn.Linear(96, 12), nn.Linear(12, 5)
            self.flatten = nn.Flatten() if as_module else None

        def forward(self, x: torch.Tensor) -> Any:
            x = torch.relu(self.conv(x))
            x = self.flatten(x) if self.flatten is not None else x.view(len(x), -1)
            return self.fc2(torch.relu(self.fc1(x)))

    reference = seeded(Net)
    inputs = keras.Input((6, 6, 3))
    conv, fc1, fc2 = layers.Conv2D(6, 3, name="conv"), layers.Dense(12, name="fc1"), layers.Dense(5, name="fc2")
    model = keras.Model(inputs, fc2(ops.relu(fc1(layers.Flatten(name="flatten")(ops.relu(conv(inputs)))))))
    conv.set_weights(conv_weights(reference.get_submodule("conv")))
    kernel, bias = dense_weights(reference.get_submodule("fc1"))
    if permute_rows:
        kernel = kernel.reshape(6, 4, 4, 12).transpose(1, 2, 0, 3).reshape(96, 12)
    fc1.set_weights([kernel, bias])
    fc2.set_weights(dense_weights(reference.get_submodule("fc2")))
    return Port(reference, model, numbers(3, 6, 6, 3))


@healthy
def rows_permuted_behind_a_flatten() -> Port:
    return flattening(True)


@healthy
def rows_permuted_behind_a_view() -> Port:
    return flattening(True, as_module=False)


@wrong("the rows of fc1 are in PyTorch's order (channels, height, width)")
def rows_not_permuted_behind_a_flatten() -> Port:
    return flattening(False)


@wrong("the rows of fc1 are in PyTorch's order (channels, height, width)")
def rows_not_permuted_behind_a_view() -> Port:
    return flattening(False, as_module=False)


# Recurrent layers.


def recurrent(kind: Any, layer: Any, make: Callable[[Any], list[Array]], moved: bool = False, **settings: Any) -> Port:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(7, 5, batch_first=not moved, **settings)
            self.fc = nn.Linear(10 if settings.get("bidirectional") else 5, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.fc(self.rnn(x)[0])

    reference = seeded(Net)
    inputs, fc = keras.Input((9, 7)), layers.Dense(4, name="fc")
    model = keras.Model(inputs, fc(layer(inputs)))
    layer.set_weights(make(reference.get_submodule("rnn")))
    fc.set_weights(dense_weights(reference.get_submodule("fc")))
    x = numbers(3, 9, 7)
    return Port(reference, model, x, {"reference_inputs": [x.transpose(1, 0, 2).copy()]} if moved else {})


def lstm_weights(rnn: Any, suffix: str = "", order: tuple[int, ...] = (0, 1, 2, 3), both: bool = True) -> list[Array]:
    def gates(name: str) -> Array:
        parts = np.split(array(getattr(rnn, f"{name}_l0{suffix}")), 4)
        return np.concatenate([parts[index] for index in order])

    bias = gates("bias_ih") + (gates("bias_hh") if both else 0)
    return [gates("weight_ih").T, gates("weight_hh").T, bias]


def gru_weights(rnn: Any, order: tuple[int, ...] = (1, 0, 2)) -> list[Array]:
    def gates(name: str) -> Array:
        parts = np.split(array(getattr(rnn, f"{name}_l0")), 3)
        return np.concatenate([parts[index] for index in order])

    return [gates("weight_ih").T, gates("weight_hh").T, np.stack([gates("bias_ih"), gates("bias_hh")])]


@healthy
def lstm() -> Port:
    return recurrent(nn.LSTM, layers.LSTM(5, return_sequences=True, name="lstm"), lstm_weights)


@healthy
def lstm_of_the_same_name() -> Port:
    return recurrent(nn.LSTM, layers.LSTM(5, return_sequences=True, name="rnn"), lstm_weights)


@healthy
def lstm_with_time_first() -> Port:
    return recurrent(nn.LSTM, layers.LSTM(5, return_sequences=True, name="rnn"), lstm_weights, moved=True)


@wrong()
def lstm_with_one_bias_alone() -> Port:
    layer = layers.LSTM(5, return_sequences=True, name="lstm")
    return recurrent(nn.LSTM, layer, lambda rnn: lstm_weights(rnn, both=False))


@wrong()
def lstm_with_gates_exchanged() -> Port:
    layer = layers.LSTM(5, return_sequences=True, name="lstm")
    return recurrent(nn.LSTM, layer, lambda rnn: lstm_weights(rnn, order=(0, 1, 3, 2)))


@healthy
def gru() -> Port:
    return recurrent(nn.GRU, layers.GRU(5, return_sequences=True, name="gru"), gru_weights)


@wrong()
def gru_with_gates_in_pytorchs_order() -> Port:
    layer = layers.GRU(5, return_sequences=True, name="gru")
    return recurrent(nn.GRU, layer, lambda rnn: gru_weights(rnn, (0, 1, 2)))


@healthy
def bidirectional_lstm() -> Port:
    layer = layers.Bidirectional(layers.LSTM(5, return_sequences=True), name="both")
    return recurrent(nn.LSTM, layer, lambda rnn: lstm_weights(rnn) + lstm_weights(rnn, "_reverse"), bidirectional=True)


@wrong()
def bidirectional_lstm_with_directions_exchanged() -> Port:
    layer = layers.Bidirectional(layers.LSTM(5, return_sequences=True), name="both")
    return recurrent(nn.LSTM, layer, lambda rnn: lstm_weights(rnn, "_reverse") + lstm_weights(rnn), bidirectional=True)


@wrong()
def an_embedding_off_below_float32s_rounding() -> Port:
    port = tokens()
    table = port.candidate.layers[1] if hasattr(port.candidate.layers[1], "embeddings") else port.candidate.layers[2]
    table.set_weights([np.asarray(table.embeddings) * np.float32(1 + 2e-7)])
    return port


# Attention.


class FusedAttention(nn.Module):
    """Attention with one projection for q, k and v, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> Any:
        count, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(count, tokens, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, tokens, width))


class SplitAttention(layers.Layer):  # type: ignore[misc]
    """Attention with one dense layer each for q, k and v."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.q, self.k, self.v, self.proj = (layers.Dense(12, name=name) for name in ("q", "k", "v", "proj"))

    def call(self, x: Any) -> Any:
        def heads(y: Any) -> Any:
            return ops.transpose(ops.reshape(y, (-1, x.shape[1], 3, 4)), (0, 2, 1, 3))

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        weights = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) * 0.5)
        return self.proj(ops.reshape(ops.transpose(ops.matmul(weights, v), (0, 2, 1, 3)), (-1, x.shape[1], 12)))


def attention(tokens: int, order: tuple[int, ...] = (0, 1, 2)) -> Port:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.head = FusedAttention(), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.attn(x).mean(1))

    reference = seeded(Net)
    inputs = keras.Input((tokens, 12))
    own, head = SplitAttention(name="attn"), layers.Dense(4, name="head")
    model = keras.Model(inputs, head(ops.mean(own(inputs), 1)))
    kernel, bias = dense_weights(reference.get_submodule("attn.qkv"))
    for layer, index in zip((own.q, own.k, own.v), order, strict=True):
        layer.set_weights([np.split(kernel, 3, 1)[index], np.split(bias, 3)[index]])
    own.proj.set_weights(dense_weights(reference.get_submodule("attn.proj")))
    head.set_weights(dense_weights(reference.get_submodule("head")))
    return Port(reference, model, numbers(2, tokens, 12))


@healthy
def one_projection_split_into_three() -> Port:
    return attention(10)


@healthy
def one_projection_split_into_three_where_all_sides_are_equal() -> Port:
    return attention(12)


@wrong("k and v are exchanged")
def keys_and_values_exchanged() -> Port:
    return attention(10, (0, 2, 1))


@healthy
def pytorchs_own_attention_with_its_weights() -> Port:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.mha(x, x, x)[0]

    reference = seeded(Net)
    mha: Any = reference.get_submodule("mha")
    with torch.no_grad():
        mha.in_proj_bias.uniform_(-0.5, 0.5)
    inputs, layer = keras.Input((7, 12)), layers.MultiHeadAttention(3, 4, name="mha")
    model = keras.Model(inputs, layer(inputs, inputs))
    weights = []
    for kernel, bias in zip(np.split(array(mha.in_proj_weight), 3), np.split(array(mha.in_proj_bias), 3), strict=True):
        weights += [kernel.T.reshape(12, 3, 4), bias.reshape(3, 4)]
    layer.set_weights([*weights, array(mha.out_proj.weight).T.reshape(3, 4, 12), array(mha.out_proj.bias)])
    return Port(reference, model, numbers(2, 7, 12))


# Other kinds of convolutions.


def transposed(same: bool, crop: bool, kernel: Callable[[Array], Array], settings: tuple[int, ...]) -> Port:
    size, stride, padding, more = settings
    reference = seeded(
        lambda: named(first=nn.Conv2d(8, 8, 1), up=nn.ConvTranspose2d(8, 8, size, stride, padding, more))
    )
    inputs = keras.Input((6, 6, 8))
    first, up = layers.Conv2D(8, 1, name="first"), layers.Conv2DTranspose(8, size, 2, "same" if same else "valid")
    x = up(first(inputs))
    x = layers.Cropping2D(((1, 0), (1, 0)), name="crop")(x) if crop else x
    model = keras.Model(inputs, x)
    first.set_weights(conv_weights(reference.get_submodule("first")))
    module: Any = reference.get_submodule("up")
    up.set_weights([kernel(array(module.weight)), array(module.bias)])
    return Port(reference, model, numbers(2, 6, 6, 8))


def right(kernel: Array) -> Array:
    return kernel.transpose(2, 3, 1, 0)


@healthy
def transposed_convolution() -> Port:
    return transposed(True, False, right, (4, 2, 1, 0))


@healthy
def transposed_convolution_cropped_behind() -> Port:
    return transposed(False, True, right, (3, 2, 1, 1))


@wrong()
def transposed_convolution_with_channels_not_swapped() -> Port:
    return transposed(True, False, lambda kernel: kernel.transpose(2, 3, 0, 1), (4, 2, 1, 0))


@wrong()
def transposed_convolution_padded_as_same() -> Port:
    return transposed(True, False, right, (3, 2, 1, 1))


@wrong("the groups of the kernel are interleaved")
def grouped_convolution_with_groups_interleaved() -> Port:
    reference = seeded(lambda: named(conv=nn.Conv2d(16, 16, 3, padding=1, groups=4)))
    inputs, layer = keras.Input((8, 8, 16)), layers.Conv2D(16, 3, padding="same", groups=4, name="conv")
    model = keras.Model(inputs, layer(inputs))
    kernel, bias = conv_weights(reference.get_submodule("conv"))
    layer.set_weights([kernel.reshape(3, 3, 4, 4, 4).swapaxes(3, 4).reshape(3, 3, 4, 16), bias])
    return Port(reference, model, numbers(2, 8, 8, 16))


def one_dimensional(axis: int) -> Port:
    reference = seeded(lambda: named(c=nn.Conv1d(6, 8, 5, 2, 2), bn=nn.BatchNorm1d(8)))
    inputs = keras.Input((20, 6))
    conv, norm = layers.Conv1D(8, 5, 2, name="c"), layers.BatchNormalization(axis=axis, name="bn", **NORM)
    model = keras.Model(inputs, norm(conv(layers.ZeroPadding1D(2)(inputs))))
    conv.set_weights(conv_weights(reference.get_submodule("c")))
    norm.set_weights(norm_weights(reference.get_submodule("bn")))
    return Port(reference, model, numbers(4, 20, 6))


@healthy
def one_dimensional_convolution() -> Port:
    return one_dimensional(-1)


@healthy
def batch_norm_over_axis_two_of_three() -> Port:
    return one_dimensional(2)


@wrong("the kernel's depth and width are swapped")
def three_dimensional_kernel_reversed() -> Port:
    reference = seeded(lambda: named(c=nn.Conv3d(3, 8, 3)))
    inputs, conv = keras.Input((6, 7, 8, 3)), layers.Conv3D(8, 3, name="c")
    model = keras.Model(inputs, conv(inputs))
    module: Any = reference.get_submodule("c")
    conv.set_weights([array(module.weight).transpose(4, 3, 2, 1, 0), array(module.bias)])
    return Port(reference, model, numbers(2, 6, 7, 8, 3))


@healthy
def three_dimensional_convolution_and_norm_over_axis_four() -> Port:
    reference = seeded(lambda: named(c=nn.Conv3d(3, 8, 3), bn=nn.BatchNorm3d(8)))
    inputs = keras.Input((6, 7, 8, 3))
    conv, norm = layers.Conv3D(8, 3, name="c"), layers.BatchNormalization(axis=4, name="bn", **NORM)
    model = keras.Model(inputs, norm(conv(inputs)))
    conv.set_weights(conv_weights(reference.get_submodule("c")))
    norm.set_weights(norm_weights(reference.get_submodule("bn")))
    return Port(reference, model, numbers(2, 6, 7, 8, 3))


@wrong("padded by zeros, not by reflect")
def reflection_as_zeros() -> Port:
    reference = seeded(lambda: named(conv=nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")))
    inputs, conv = keras.Input((6, 6, 4)), layers.Conv2D(8, 3, padding="same", name="conv")
    model = keras.Model(inputs, conv(inputs))
    conv.set_weights(conv_weights(reference.get_submodule("conv")))
    return Port(reference, model, numbers(2, 6, 6, 4))


@wrong('zero padding as in TensorFlow\'s "same"')
def strided_same_where_all_sides_are_equal() -> Port:
    reference = seeded(lambda: named(stem=nn.Conv2d(3, 16, 3, 2, 1), last=nn.Conv2d(16, 5, 1)))
    inputs = keras.Input((32, 32, 3))
    stem, last = layers.Conv2D(16, 3, 2, padding="same", name="stem"), layers.Conv2D(5, 1, name="last")
    model = keras.Model(inputs, last(stem(inputs)))
    stem.set_weights(conv_weights(reference.get_submodule("stem")))
    last.set_weights(conv_weights(reference.get_submodule("last")))
    return Port(reference, model, numbers(2, 32, 32, 3))


# Weights that are computed from others.


def normed(wrap: Callable[[nn.Module], Any], raw: str = "") -> Port:
    def build() -> nn.Module:
        return named(conv=wrap(nn.Conv1d(6, 8, 3)), act=nn.LeakyReLU(0.2))

    reference = seeded(build)
    with torch.no_grad():
        reference(torch.zeros(1, 6, 20))
        for name, parameter in reference.named_parameters():
            if name.endswith(("weight_g", "original0")):
                parameter.mul_(1.7)
        reference(torch.zeros(1, 6, 20))
    module: Any = reference.get_submodule("conv")
    weight = module.weight if not raw else dict(module.named_parameters())[raw]
    inputs, conv = keras.Input((20, 6)), layers.Conv1D(8, 3, name="conv")
    model = keras.Model(inputs, layers.LeakyReLU(0.2, name="act")(conv(inputs)))
    conv.set_weights([array(weight).transpose(2, 1, 0), array(module.bias)])
    return Port(reference, model, numbers(2, 20, 6))


@healthy
def weight_norm_folded() -> Port:
    return normed(parametrizations.weight_norm)


@healthy
def old_weight_norm_folded() -> Port:
    return normed(weight_norm)


@healthy
def spectral_norm_folded() -> Port:
    return normed(parametrizations.spectral_norm)


@healthy
def old_spectral_norm_folded() -> Port:
    return normed(spectral_norm)


@wrong()
def weight_norm_forgotten() -> Port:
    return normed(parametrizations.weight_norm, "parametrizations.weight.original1")


@wrong()
def old_weight_norm_forgotten() -> Port:
    return normed(weight_norm, "weight_v")


# Axes.


def transposed_result(sides: int) -> Port:
    reference = seeded(lambda: named(a=nn.Linear(6, 6)))
    inputs, dense = keras.Input((sides, 6)), layers.Dense(6, name="a")
    model = keras.Model(inputs, layers.Permute((2, 1))(dense(inputs)))
    dense.set_weights(dense_weights(reference.get_submodule("a")))
    return Port(reference, model, numbers(3, sides, 6))


@wrong("its axes are in the order (0, 2, 1)")
def result_transposed_where_sides_are_equal() -> Port:
    return transposed_result(6)


@wrong()
def result_transposed() -> Port:
    return transposed_result(5)


@healthy
def result_transposed_and_said_to_be() -> Port:
    return transposed_result(6)._replace(arguments={"output_axes": (0, 2, 1)})


@wrong("its axes are in the order (0, 1, 2, 3)")
def map_channels_first_where_all_sides_are_equal() -> Port:
    reference = seeded(lambda: named(c=nn.Conv2d(3, 6, 1)))
    inputs, conv = keras.Input((6, 6, 3)), layers.Conv2D(6, 1, name="c")
    model = keras.Model(inputs, layers.Permute((3, 1, 2))(conv(inputs)))
    conv.set_weights(conv_weights(reference.get_submodule("c")))
    return Port(reference, model, numbers(2, 6, 6, 3))


# Other forms of inputs and results.


class Two(nn.Module):
    """A model that takes an image and a row of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

    def forward(self, image: torch.Tensor, row: torch.Tensor) -> Any:
        return self.a(image).mean((2, 3)) * self.b(row)


def two(as_dict: bool = False, convert: Callable[[Array], Any] = lambda given: given) -> Port:
    reference = seeded(Two)
    image, row = keras.Input((8, 8, 3), name="image"), keras.Input((5,), name="row")
    a, b = layers.Conv2D(4, 1, name="a"), layers.Dense(4, name="b")
    result = ops.mean(a(image), (1, 2)) * b(row)
    model = keras.Model({"image": image, "row": row} if as_dict else [image, row], result)
    a.set_weights(conv_weights(reference.get_submodule("a")))
    b.set_weights(dense_weights(reference.get_submodule("b")))
    return Port(reference, model, [convert(numbers(2, 8, 8, 3, scale=9.0)), convert(numbers(2, 5))])


@healthy
def several_inputs() -> Port:
    return two()


@healthy
def several_inputs_that_keras_takes_as_a_dict() -> Port:
    return two(as_dict=True)


@healthy
def several_inputs_given_as_a_dict() -> Port:
    port = two(as_dict=True)
    return port._replace(inputs={"image": port.inputs[0], "row": port.inputs[1]})


@healthy
def float64_inputs() -> Port:
    return two(convert=lambda given: given.astype(np.float64))


@healthy
def torch_tensors_as_inputs() -> Port:
    return two(convert=torch.from_numpy)


@healthy
def pixels_as_whole_numbers() -> Port:
    port = two()
    return port._replace(inputs=[(np.abs(port.inputs[0]) * 9).astype(np.uint8), port.inputs[1]])


@healthy
def a_single_image_channels_first() -> Port:
    port = conv_net(False, nn.ReLU(), "relu")
    return port._replace(inputs=port.inputs[0])


@healthy
def results_as_a_dict_in_another_order() -> Port:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return {"out": self.a(x), "aux": self.a(x) * 2}

    reference = seeded(Net)
    inputs, conv = keras.Input((8, 8, 3)), layers.Conv2D(4, 1, name="a")
    result = conv(inputs)
    model = keras.Model(inputs, {"out": result, "aux": result * 2})
    conv.set_weights(conv_weights(reference.get_submodule("a")))
    return Port(reference, model, numbers(2, 8, 8, 3))


def shared_head(exchanged: bool) -> Port:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return [self.head(self.fine(x)), self.head(self.coarse(x))]

    reference = seeded(Net)
    inputs = keras.Input((8, 8, 3))
    fine, coarse, head = (layers.Conv2D(n, 1, name=name) for n, name in ((4, "fine"), (4, "coarse"), (5, "head")))
    second, first = head(coarse(inputs)), head(fine(inputs))
    model = keras.Model(inputs, [second, first] if exchanged else [first, second])
    for name, layer in (("fine", fine), ("coarse", coarse), ("head", head)):
        layer.set_weights(conv_weights(reference.get_submodule(name)))
    return Port(reference, model, numbers(2, 8, 8, 3))


@healthy
def one_head_called_on_several_maps_in_another_order() -> Port:
    return shared_head(False)


@wrong()
def two_results_exchanged() -> Port:
    return shared_head(True)


@healthy
def tokens() -> Port:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.dense = nn.Embedding(50, 8), nn.Linear(8, 3)

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.dense(self.embedding(tokens)) * mask[..., None]

    reference = seeded(Net)
    ids, mask = keras.Input((6,), dtype="int32"), keras.Input((6,))
    embedding, dense = layers.Embedding(50, 8), layers.Dense(3)
    model = keras.Model([ids, mask], dense(embedding(ids)) * mask[..., None])
    module: Any = reference.get_submodule("embedding")
    embedding.set_weights([array(module.weight)])
    dense.set_weights(dense_weights(reference.get_submodule("dense")))
    rng = np.random.default_rng(0)
    return Port(reference, model, [rng.integers(0, 50, (3, 6)), rng.integers(0, 2, (3, 6)).astype(np.float32)])


@healthy
def a_dense_layer_as_einsum() -> Port:
    reference = seeded(lambda: named(a=nn.Linear(6, 5), b=nn.Linear(5, 3)))
    inputs = keras.Input((6,))
    a, b = layers.EinsumDense("bi,ij->bj", 5, bias_axes="j"), layers.Dense(3)
    model = keras.Model(inputs, b(a(inputs)))
    a.set_weights(dense_weights(reference.get_submodule("a")))
    b.set_weights(dense_weights(reference.get_submodule("b")))
    return Port(reference, model, numbers(4, 6))


@healthy
def a_pooling_module_as_another_layer() -> Port:
    reference = seeded(lambda: named(conv=nn.Conv2d(3, 6, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    inputs, conv = keras.Input((8, 8, 3)), layers.Conv2D(6, 3, name="conv")
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(conv(inputs)))
    conv.set_weights(conv_weights(reference.get_submodule("conv")))
    return Port(reference, model, numbers(2, 8, 8, 3))


# Activations over axes and with arguments.


def behind_a_convolution(module: nn.Module, layer: Any) -> Port:
    reference = seeded(lambda: named(conv=nn.Conv2d(4, 8, 1), act=module))
    inputs, conv = keras.Input((6, 6, 4)), layers.Conv2D(8, 1, name="conv")
    model = keras.Model(inputs, layer(conv(inputs)))
    conv.set_weights(conv_weights(reference.get_submodule("conv")))
    return Port(reference, model, numbers(2, 6, 6, 4))


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "softmax over height": (lambda: nn.Softmax(dim=2), lambda: layers.Softmax(axis=1, name="act")),
    "softmax over channels": (nn.Softmax2d, lambda: layers.Softmax(name="act")),
    "log softmax": (lambda: nn.LogSoftmax(dim=1), lambda: layers.Activation("log_softmax", name="act")),
    "gated": (lambda: nn.GLU(1), lambda: layers.Lambda(lambda x: x[..., :4] * ops.sigmoid(x[..., 4:]), name="act")),
    "ELU": (nn.ELU, lambda: layers.ELU(name="act")),
    "SiLU": (nn.SiLU, lambda: layers.Activation("silu", name="act")),
    "GELU": (nn.GELU, lambda: layers.Activation("gelu", name="act")),
    "GELU by tanh": (
        lambda: nn.GELU(approximate="tanh"),
        lambda: layers.Activation(lambda x: keras.activations.gelu(x, approximate=True), name="act"),
    ),
    "leaky ReLU": (lambda: nn.LeakyReLU(0.2), lambda: layers.LeakyReLU(0.2, name="act")),
    "ReLU6": (nn.ReLU6, lambda: layers.ReLU(max_value=6, name="act")),
    "hard swish": (nn.Hardswish, lambda: layers.Activation("hard_silu", name="act")),
    "softplus": (nn.Softplus, lambda: layers.Activation("softplus", name="act")),
    "Mish": (nn.Mish, lambda: layers.Activation("mish", name="act")),
    "spatial dropout": (lambda: nn.Dropout2d(0.3), lambda: layers.SpatialDropout2D(0.3, name="act")),
    "uneven padding": (
        lambda: nn.ZeroPad2d((1, 2, 3, 4)),
        lambda: layers.ZeroPadding2D(((3, 4), (1, 2)), name="act"),
    ),
}
WRONG_ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "softmax over another axis": (
        lambda: nn.Softmax(dim=-1),
        lambda: layers.Softmax(name="act"),
        "softmax over the channels",
    ),
    "leaky ReLU by Keras's default": (nn.LeakyReLU, lambda: layers.LeakyReLU(name="act"), "Keras's 0.3"),
    "hard swish as SiLU": (nn.Hardswish, lambda: layers.Activation("silu", name="act"), "SiLU instead of Hardswish"),
    "hard sigmoid of Keras 2": (
        nn.Hardsigmoid,
        lambda: layers.Activation(lambda x: ops.clip(0.2 * x + 0.5, 0, 1), name="act"),
        "Keras 2's hard sigmoid",
    ),
    "dropout of single numbers": (
        lambda: nn.Dropout2d(0.3),
        lambda: layers.Dropout(0.3, name="act"),
        "mask is number by number in Keras, a channel at once in PyTorch",
    ),
    "reflection as zeros": (lambda: nn.ReflectionPad2d(1), lambda: layers.ZeroPadding2D(1, name="act"), ""),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_with_arguments_pass(case: str) -> None:
    module, layer = ACTIVATIONS[case]
    report = run(behind_a_convolution(module(), layer()))
    assert report.passed, report.objections


@pytest.mark.parametrize("case", WRONG_ACTIVATIONS)
def test_wrong_activations_are_found(case: str) -> None:
    module, layer, cause = WRONG_ACTIVATIONS[case]
    report = run(behind_a_convolution(module(), layer()))
    assert not report.passed
    assert cause in said(report)


def said(report: ParityReport) -> str:
    from porting.reports.terminal import findings

    return "\n".join(findings(report))


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_port_passes(case: str) -> None:
    report = run(HEALTHY[case]())
    assert report.passed, said(report)
    assert report.worst_exact is not None
    assert report.worst_exact.relative_error < 1e-13


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_port_is_found(case: str) -> None:
    make, cause = WRONG[case]
    report = run(make())
    assert not report.passed
    if cause is not None:
        assert cause in said(report)


# Other states of live models.


@pytest.fixture
def plain() -> Port:
    def build() -> nn.Module:
        return named(conv=nn.Conv2d(3, 6, 3, bias=False), bn=nn.BatchNorm2d(6), last=nn.Conv2d(6, 4, 1))

    reference = seeded(build)
    return Port(reference, plain_keras(reference), numbers(2, 8, 8, 3))


def plain_keras(reference: nn.Module) -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    conv, norm = layers.Conv2D(6, 3, use_bias=False, name="conv"), layers.BatchNormalization(name="bn", **NORM)
    last = layers.Conv2D(4, 1, name="last")
    model = keras.Model(inputs, last(norm(conv(inputs))))
    conv.set_weights(conv_weights(reference.get_submodule("conv")))
    norm.set_weights(norm_weights(reference.get_submodule("bn")))
    last.set_weights(conv_weights(reference.get_submodule("last")))
    return model


@pytest.mark.parametrize(
    "turned",
    [
        lambda model: torch.jit.trace(model, torch.zeros(1, 3, 8, 8)),
        torch.jit.script,
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        lambda model: torch.export.export(model, (torch.zeros(2, 3, 8, 8),)).module(),
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.train(),
    ],
    ids=["traced", "scripted", "compiled", "data parallel", "exported", "half", "bfloat16", "double", "training"],
)
@pytest.mark.filterwarnings("ignore")
def test_the_pytorch_model_may_be_alive_in_many_ways(plain: Port, turned: Callable[[Any], Any]) -> None:
    report = run(plain._replace(reference=turned(plain.reference)))
    assert report.passed, said(report)


def test_a_model_that_cannot_run_is_a_problem_and_no_traceback(plain: Port) -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 1))
    report = run(plain._replace(reference=lazy))
    assert not report.passed
    assert report.problem
    narrow = keras.Model(inputs := keras.Input((8, 8, 2)), layers.Conv2D(4, 1)(inputs))
    report = run(plain._replace(candidate=narrow))
    assert not report.passed
    assert "the Keras model cannot run on these inputs" in report.problem


def test_mixed_precision_is_said_and_judged_as_such(plain: Port) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = plain_keras(plain.reference)
    finally:
        keras.config.set_dtype_policy("float32")
    report = run(plain._replace(candidate=mixed))
    assert report.precision == "bfloat16"
    assert not any(divergence.view == "exact" for divergence in report.divergences)
    assert not report.passed
    assert report.diagnosis is not None
    assert "bfloat16" in report.diagnosis.cause
    stated = run(plain._replace(candidate=mixed, arguments={"precision": "bfloat16"}))
    assert stated.passed, said(stated)
    assert stated.worst.views[FLOAT32].ratio < 8


class Subclassed(keras.Model):  # type: ignore[misc]
    """A model with layers in a list, under names that a caller chooses."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.convs = [layers.Conv2D(4, 1, name=form.format(index)) for index in range(11)]
        self.head = layers.Dense(3, name="head")

    def call(self, x: Any) -> Any:
        for conv in self.convs:
            x = ops.relu(conv(x))
        return self.head(ops.mean(x, (1, 2)))


class ManyConvolutions(nn.Module):
    """Eleven layers in a list, so that their names do not sort by number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 if index == 0 else 4, 4, 1) for index in range(11)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("form", ["layers.{}", "other_{}"], ids=["same names", "other names"])
def test_subclassed_models(form: str) -> None:
    reference, x = seeded(ManyConvolutions), numbers(2, 8, 8, 3)
    assert not check_parity(reference, Subclassed(form), x).passed  # never built, with random weights
    model = Subclassed(form)
    model(x)
    order = sorted(range(11), key=str)
    for indices, expected in ((range(11), True), (order, False)):
        for layer, index in zip(model.convs, indices, strict=True):
            module = reference.get_submodule(f"layers.{index}")
            if array(module.weight).shape[1] == layer.kernel.shape[2]:  # type: ignore[arg-type]
                layer.set_weights(conv_weights(module))
        model.head.set_weights(dense_weights(reference.get_submodule("head")))
        assert check_parity(reference, model, x).passed is expected


def test_a_complex_result_inside() -> None:
    import tensorflow as tf

    class Transform(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.fft.fft(x.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fft, self.a = Transform(), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> Any:
            return self.a(self.fft(x).real)

    class KerasTransform(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return tf.signal.fft(tf.cast(x, tf.complex64))

    class Real(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return tf.math.real(x)

    reference = seeded(Net)
    inputs, dense = keras.Input((5, 6)), layers.Dense(6, name="a")
    model = keras.Model(inputs, dense(Real()(KerasTransform(name="fft")(inputs))))
    dense.set_weights(dense_weights(reference.get_submodule("a")))
    report = check_parity(reference, model, numbers(2, 5, 6))
    assert report.passed, said(report)
    assert not report.float32_inside, "a cast to complex64 stays in double precision, as one to float32 does"


def test_queries_with_their_heads_before_the_positions() -> None:
    """timm's attention normalises or passes on queries as (heads, positions); Keras has (positions, heads)."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.norm, self.out = nn.Linear(6, 12), nn.Identity(), nn.Linear(12, 3)

        def forward(self, x: Any) -> Any:
            q = self.norm(self.q(x).unflatten(2, (3, 4)).transpose(1, 2))
            return self.out(q.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    reference = Split().eval()
    inputs = keras.Input((5, 6))
    heads = layers.EinsumDense("abc,cde->abde", (None, 3, 4), bias_axes="de", name="q")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="out")(layers.Reshape((5, 12))(heads)))
    model.get_layer("q").set_weights(
        [reference.q.weight.detach().numpy().T.reshape(6, 3, 4), reference.q.bias.detach().numpy().reshape(3, 4)]
    )
    model.get_layer("out").set_weights([reference.out.weight.detach().numpy().T, reference.out.bias.detach().numpy()])
    report = check_parity(reference, model, np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32))
    assert report.passed, report.objections
