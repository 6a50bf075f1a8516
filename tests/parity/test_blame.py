"""Who is blamed, and for what, where PyTorch's code computes between its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch import nn
from torch.nn import functional as F

from porting import check_parity, port_weights
from porting.parity.report import ParityReport
from tests.parity.test_written_otherwise import Array, dense_weights, numbers, seeded

Build = Callable[[str], keras.Model]


def reports(reference: nn.Module, build: Build, inputs: Any, mistake: str) -> tuple[ParityReport, ParityReport]:
    """The report of a healthy port, and of one with a mistake in its code and the same weights."""
    healthy = build("")
    report = port_weights(reference, healthy, inputs=inputs).report
    assert report is not None
    wrong = build(mistake)
    for one, other in zip(_by_shape(healthy), _by_shape(wrong), strict=True):
        other.set_weights(one.get_weights())
    return report, check_parity(reference, wrong, inputs)


def _by_shape(model: keras.Model) -> list[Any]:
    """The layers with weights, in an order that does not depend on how branches are joined."""
    return sorted((each for each in model.layers if each.weights), key=lambda each: each.get_weights()[0].shape)


def culprits(report: ParityReport) -> list[str]:
    return [culprit.layer for culprit in report.culprits]


def functional(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: layers.Lambda(make)(*given)


class Joined(nn.Module):
    """Two branches, joined by code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.l, self.o = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.o(F.relu(self.l(torch.cat([self.a(x), self.b(y)], 1))))


def joined(mistake: str) -> keras.Model:
    x, y = keras.Input((4,)), keras.Input((5,))
    branches = [layers.Dense(3, name="a")(x), layers.Dense(3, name="b")(y)]
    joint = layers.Concatenate()(branches[::-1] if mistake else branches)
    return keras.Model([x, y], layers.Dense(2)(layers.Dense(4, activation="relu")(joint)))


def test_a_concatenation_in_another_order_is_no_flatten() -> None:
    healthy, wrong = reports(seeded(Joined), joined, [numbers(5, 4), numbers(5, 5, seed=1)], "swapped")
    assert healthy.passed
    assert culprits(wrong) == ["l"]
    assert wrong.culprits[0].is_input
    assert "its channels are permuted" in str(wrong)


class Flattened(nn.Module):
    """A convolution, an activation in code, and a Linear behind a Flatten in code."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.l, self.m = nn.Conv2d(3, 4, 3), nn.Linear(64, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.m(F.relu(self.l(F.silu(self.c(x)).flatten(1))))


def flattened(mistake: str) -> keras.Model:
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3)(inputs)
    x = layers.Activation("gelu" if mistake == "activation" else "silu")(x)
    if mistake == "factor":
        x = functional(lambda y: y * 1.01)(x)
    return keras.Model(inputs, layers.Dense(2)(layers.Dense(5, activation="relu")(layers.Flatten()(x))))


@pytest.mark.parametrize("mistake", ["activation", "factor"])
def test_only_the_input_of_a_dense_behind_a_flatten_is_blamed(mistake: str) -> None:
    healthy, wrong = reports(seeded(Flattened), flattened, numbers(3, 6, 6, 3), mistake)
    assert healthy.passed
    assert culprits(wrong) == ["l"], str(wrong)
    assert wrong.culprits[0].is_input
    assert mistake == "activation" or "a constant factor" in str(wrong)


class Skipping(nn.Module):
    """A convolution with an activation in code, plus a pooled input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.tanh(self.a(x)) + F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)


def skipping(mistake: str) -> keras.Model:
    x = keras.Input((8, 8, 3))
    pooled = layers.AveragePooling2D(3, 1)(layers.ZeroPadding2D(1)(x))
    if mistake:
        pooled = layers.AveragePooling2D(3, 1, padding="same")(x)
    return keras.Model(x, layers.Add()([layers.Conv2D(3, 3, padding="same", activation="tanh")(x), pooled]))


def test_a_layer_without_weights_stands_for_none_that_has_some() -> None:
    healthy, wrong = reports(seeded(Skipping), skipping, numbers(2, 8, 8, 3), "same")
    assert healthy.passed
    assert culprits(wrong) == ["output"]
    assert "only the border differs" in str(wrong)


class Residual(nn.Module):
    """Positions that code adds, and two blocks with a norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.denses = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.position
        for norm, dense in zip(self.norms, self.denses, strict=True):
            x = x + dense(norm(x))
        return self.head(x)


class Position(layers.Layer):  # type: ignore[misc]
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned

    def build(self, shape: Any) -> None:
        self.position = self.add_weight(shape=(1, *shape[1:]))

    def call(self, x: Any) -> Any:
        return x + (ops.flip(self.position, 1) if self.turned else self.position)


def residual(mistake: str) -> keras.Model:
    inputs = keras.Input((5, 6))
    x = Position(bool(mistake))(inputs)
    for _ in range(2):
        x = layers.Add()([x, layers.Dense(6)(layers.LayerNormalization(epsilon=1e-5)(x))])
    return keras.Model(inputs, layers.Dense(3)(x))


def test_what_a_residual_sum_carries_on_is_one_mistake() -> None:
    healthy, wrong = reports(seeded(Residual), residual, numbers(2, 5, 6), "turned")
    assert healthy.passed
    assert len(wrong.culprits) == 1, str(wrong)


class Attending(nn.Module):
    """Queries of its own, a norm on them, and an attention to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.n = nn.Linear(4, 6), nn.LayerNorm(6)
        self.a, self.h = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.i(x)
        return self.h(self.a(self.n(x) * 0.5, x, x, need_weights=False)[0])


def attending(mistake: str) -> keras.Model:
    inputs = keras.Input((5, 4))
    x = layers.Dense(6)(inputs)
    query = layers.LayerNormalization(epsilon=1e-5)(x)
    query = functional(lambda y: y * (0.6 if mistake else 0.5))(query)
    return keras.Model(inputs, layers.Dense(2)(layers.MultiHeadAttention(2, 3)(query, x)))


def test_an_attention_is_not_blamed_for_its_query() -> None:
    healthy, wrong = reports(seeded(Attending), attending, numbers(2, 5, 4), "scaled")
    assert healthy.passed
    assert culprits(wrong) == ["a"]
    assert wrong.culprits[0].is_input


class Causal(nn.Module):
    """Convolutions that code pads in front, with activations in code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 4, 3)
        self.steps = (1, 2, 2, 4)
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, dilation=step) for step in self.steps)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.first(F.pad(x, (2, 0))))
        for step, conv in zip(self.steps, self.convs, strict=True):
            x = F.relu(conv(F.pad(x, (2 * step, 0)))) + x
        return self.head(x.mean(2))


def causal(mistake: str) -> keras.Model:
    inputs = keras.Input((16, 3))
    x = layers.Conv1D(4, 3, padding="causal", activation="relu")(inputs)
    for index, step in enumerate((1, 2, 2, 4)):
        rate = int(mistake) if mistake and index == 2 else step
        x = layers.Add()([layers.Conv1D(4, 3, padding="causal", dilation_rate=rate, activation="relu")(x), x])
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))


@pytest.mark.parametrize(("rate", "cause"), [("1", "the dilation is lost"), ("3", "its dilation is 3 in Keras, 2 in")])
def test_causal_convolutions_are_mapped_and_their_dilation_is_checked(rate: str, cause: str) -> None:
    healthy, wrong = reports(seeded(Causal), causal, numbers(2, 16, 3), rate)
    assert healthy.passed
    assert culprits(wrong) == ["convs.2"], str(wrong)
    assert cause in str(wrong)


@pytest.mark.parametrize("pads", [(0, 1, 0, 1), (1, 1, 1, 1)])
def test_padding_in_code(pads: tuple[int, ...]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(F.pad(F.silu(self.a(x)), pads))

    def build(_: str) -> keras.Model:
        inputs = keras.Input((12, 12, 3))
        x = layers.Conv2D(4, 3, padding="same", activation="silu")(inputs)
        if sum(pads) == 2:
            return keras.Model(inputs, layers.Conv2D(4, 3, 2, padding="same")(x))
        return keras.Model(inputs, layers.Conv2D(4, 3, 2)(layers.ZeroPadding2D(1)(x)))

    report = port_weights(seeded(Net), build(""), inputs=numbers(2, 12, 12, 3)).report
    assert report is not None
    assert report.passed, str(report)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.o = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> Any:
        later = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        return self.o(self.l(x, src_mask=later, src_key_padding_mask=padding == 0))


def encoder(mistake: str) -> keras.Model:
    x, padding = keras.Input((6, 8)), keras.Input((6,), dtype="int32")

    def mask(y: Any) -> Any:
        earlier = ops.tril(ops.ones((6, 6), "bool"))[None]
        kept = ops.cast(y, "bool")[:, None, :]
        kept = ops.logical_not(kept) if mistake == "inverted" else kept
        either = {"attention": kept & ops.ones_like(earlier), "padding": earlier & ops.ones_like(kept)}
        return either.get(mistake, earlier & kept)

    masks = None if mistake == "both" else functional(mask)(padding)
    y = layers.MultiHeadAttention(2, 4)(x, x, attention_mask=masks)
    y = layers.LayerNormalization(epsilon=1e-5)(layers.Add()([x, y]))
    z = layers.Dense(8)(layers.Dense(16, activation="relu")(y))
    y = layers.LayerNormalization(epsilon=1e-5)(layers.Add()([y, z]))
    return keras.Model([x, padding], layers.Dense(2)(y))


@pytest.mark.parametrize(
    ("mistake", "cause"),
    [
        ("attention", "its attention mask (attn_mask) is not applied"),
        ("padding", "its padding mask (key_padding_mask) is not applied"),
        ("both", "none of its masks is applied"),
    ],
)
def test_masks_that_are_not_applied(mistake: str, cause: str) -> None:
    padding = np.ones((3, 6), np.int32)
    padding[0, 4:] = padding[1, 5:] = 0
    healthy, wrong = reports(seeded(Encoder), encoder, [numbers(3, 6, 8), padding], mistake)
    assert healthy.passed
    assert culprits(wrong) == ["l.self_attn"]
    assert cause in str(wrong), str(wrong)


def test_a_mask_that_is_inverted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> Any:
            return self.m(x, x, x, key_padding_mask=padding == 0, need_weights=False)[0]

    def build(mistake: str) -> keras.Model:
        x, padding = keras.Input((6, 8)), keras.Input((6,), dtype="int32")
        kept = functional(lambda y: (ops.equal(y, 0) if mistake else ops.not_equal(y, 0))[:, None, :])(padding)
        return keras.Model([x, padding], layers.MultiHeadAttention(2, 4)(x, x, attention_mask=kept))

    padding = np.ones((3, 6), np.int32)
    padding[:, 3:] = 0
    healthy, wrong = reports(seeded(Net), build, [numbers(3, 6, 8), padding], "inverted")
    assert healthy.passed
    assert "its padding mask (key_padding_mask) is inverted" in str(wrong)


_AROUND = ((0, 0), (1, 1), (1, 1), (0, 0))
POOLS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "mean for greatest": (
        lambda: nn.MaxPool2d(2),
        layers.MaxPooling2D(2),
        layers.AveragePooling2D(2),
        "it takes the mean, not the greatest",
    ),
    "greatest for mean": (
        lambda: nn.AdaptiveAvgPool2d(1),
        layers.GlobalAveragePooling2D(keepdims=True),
        layers.GlobalMaxPooling2D(keepdims=True),
        "it takes the greatest, not the mean",
    ),
    "zeros around": (
        lambda: nn.MaxPool2d(3, 2, 1),
        lambda x: layers.MaxPooling2D(3, 2)(layers.Lambda(lambda y: ops.pad(y, _AROUND, constant_values=-1e9))(x)),
        lambda x: layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x)),
        "the border is padded by zeros",
    ),
    "same": (
        lambda: nn.MaxPool2d(3, 2, 1),
        lambda x: layers.MaxPooling2D(3, 2)(layers.Lambda(lambda y: ops.pad(y, _AROUND, constant_values=-1e9))(x)),
        layers.MaxPooling2D(3, 2, padding="same"),
        "its border is that of TensorFlow's",
    ),
    "padding left out": (
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda x: layers.AveragePooling2D(3, 1)(layers.ZeroPadding2D(1)(x)),
        layers.AveragePooling2D(3, 1, padding="same"),
        "leaves the padding out",
    ),
}


@pytest.mark.parametrize("case", POOLS)
def test_pooling(case: str) -> None:
    module, right, wrong, cause = POOLS[case]
    reference = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), module(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        reference.get_submodule("0").bias.fill_(-1.0)  # type: ignore[operator]

    def build(mistake: str) -> keras.Model:
        x = keras.Input((10, 10, 3))
        return keras.Model(x, layers.Conv2D(2, 1)((wrong if mistake else right)(layers.Conv2D(4, 3)(x))))

    healthy, report = reports(reference, build, numbers(2, 10, 10, 3), case)
    assert healthy.passed, str(healthy)
    assert culprits(report) == ["1"], str(report)
    assert cause in str(report), str(report)


@pytest.mark.parametrize(
    ("module", "layer", "setting"),
    [
        (
            nn.LSTM,
            lambda: layers.LSTM(5, recurrent_activation="hard_sigmoid"),
            "its recurrent_activation is hard sigmoid",
        ),
        (nn.GRU, lambda: layers.GRU(5, activation="relu"), "activation is ReLU in Keras, tanh in PyTorch"),
        (nn.RNN, lambda: layers.SimpleRNN(5, activation="relu"), "activation is ReLU in Keras, tanh in PyTorch"),
    ],
)
def test_activations_inside_recurrent_layers(module: Any, layer: Callable[[], Any], setting: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.o = module(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.o(self.r(x)[0][:, -1])

    def build(mistake: str) -> keras.Model:
        x = keras.Input((6, 4))
        plain = {nn.LSTM: layers.LSTM, nn.GRU: layers.GRU, nn.RNN: layers.SimpleRNN}[module](5)
        return keras.Model(x, layers.Dense(2)((layer() if mistake else plain)(x)))

    healthy, report = reports(seeded(Net), build, numbers(2, 6, 4, scale=2.0), "other")
    assert healthy.passed
    assert culprits(report)[0] == "r"
    assert setting in str(report)


@pytest.mark.parametrize("how", ["exchanged", "added up"])
def test_the_two_biases_of_a_gru(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.GRU(4, 5, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.g(x)[0]

    x = keras.Input((6, 4))
    model, reference, given = keras.Model(x, layers.GRU(5, return_sequences=True)(x)), seeded(Net), numbers(2, 6, 4)
    port_weights(reference, model, inputs=given).require_parity()
    kernel, recurrent, bias = model.get_weights()
    wrong: Array = bias[::-1] if how == "exchanged" else np.stack([bias.sum(0), np.zeros_like(bias[0])])
    model.set_weights([kernel, recurrent, wrong])
    assert f"its two biases are {how}" in str(check_parity(reference, model, given))


class TwoResults(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.a, self.b, self.turned = nn.Linear(4, 3), nn.Linear(4, 3), turned

    def forward(self, x: torch.Tensor) -> Any:
        second = self.b(x)
        return {"mean": self.a(x), "spread": second.transpose(1, 2) if self.turned else second}


def test_a_result_of_another_order_of_axes_or_of_results_is_said_so() -> None:
    reference, x = seeded(lambda: TwoResults(turned=True)), keras.Input((5, 4))
    model = keras.Model(x, [layers.Dense(3, name="a")(x), layers.Dense(3, name="b")(x)])
    for name in "ab":
        model.get_layer(name).set_weights(dense_weights(reference.get_submodule(name)))
    said = str(check_parity(reference, model, numbers(2, 5, 4)))
    assert "its numbers are right, in PyTorch's axes (0, 2, 1), as output_axes=(0, 2, 1) would state" in said
    assert check_parity(reference, model, numbers(2, 5, 4), output_axes=[(0, 1, 2), (0, 2, 1)]).passed


def test_results_in_another_order_are_named() -> None:
    reference, x = seeded(lambda: TwoResults(turned=False)), keras.Input((4,))
    first, second = layers.Dense(3, name="a")(x), layers.Dense(3, name="b")(x)
    given = numbers(3, 4)
    right = keras.Model(x, [first, second])
    port_weights(reference, right, inputs=given).require_parity()
    said = str(check_parity(reference, keras.Model(x, [second, first]), given))
    assert "it is what PyTorch returns as output[spread]: the results come in another order" in said


def test_a_cause_that_cannot_be_tried_breaks_nothing() -> None:
    """PyTorch pools maps without an axis for samples too, which the causes do not know."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.MaxPool2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return torch.stack([self.pool(each) for each in x])

    reference, x = seeded(Net), keras.Input((8, 8, 3))
    report = check_parity(reference, keras.Model(x, layers.AveragePooling2D(3, 2, "same")(x)), numbers(2, 8, 8, 3))
    assert not report.passed


class Pointwise(nn.Module):
    """A convolution with one tap, which is a dense layer in Keras, between two linear layers of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.b = nn.Linear(6, 6), nn.Conv1d(6, 6, 1), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(F.silu(self.p(torch.tanh(self.a(x)).transpose(1, 2)).transpose(1, 2)))


def test_a_dense_layer_stands_for_a_convolution_with_one_tap() -> None:
    def build(mistake: str) -> keras.Model:
        inputs = keras.Input((5, 6))
        x = layers.Dense(6, name="second")(ops.tanh(layers.Dense(6, name="first")(inputs)))
        x = ops.gelu(x) if mistake == "activation" else ops.silu(x)
        return keras.Model(inputs, layers.Dense(6, name="third")(x))

    reference = seeded(Pointwise)
    given = numbers(3, 5, 6)
    healthy, wrong = build(""), build("activation")
    port_weights(reference, healthy, inputs=given).require_parity()
    wrong.set_weights(healthy.get_weights())
    report = check_parity(reference, wrong, given)
    assert "PyTorch applies SiLU to the result of p, and Keras GELU (tanh)" in str(report.diagnosis), str(report)
    kernel = np.array(healthy.get_layer("second").kernel)
    kernel[2, 3] *= 1.00001
    healthy.get_layer("second").kernel.assign(kernel)
    report = check_parity(reference, healthy, given)
    assert culprits(report) == ["p"], str(report)
    assert "p.weight[3, 2, 0] is" in str(report.diagnosis)


class Shared(nn.Module):
    """One layer on the means and on the maxima of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.conv(x)
        return self.head(torch.sigmoid(self.shared(x.mean((2, 3))) + self.shared(x.amax((2, 3)))))


def test_the_calls_of_a_shared_layer_may_come_in_another_order() -> None:
    def build(factor: float) -> keras.Model:
        inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(6, 3, name="conv")(inputs)
        shared = layers.Dense(6, name="dense")
        greatest = shared(layers.GlobalMaxPooling2D()(x) * factor)  # first here, and second in PyTorch
        x = ops.sigmoid(shared(layers.GlobalAveragePooling2D()(x) * factor) + greatest)
        return keras.Model(inputs, layers.Dense(2, name="head")(x))

    reference = seeded(Shared)
    given = numbers(2, 8, 8, 3)
    healthy, wrong = build(1.0), build(1.0001)
    port_weights(reference, healthy, inputs=given).require_parity()
    wrong.set_weights(healthy.get_weights())
    report = check_parity(reference, wrong, given)
    assert culprits(report) == ["shared"], str(report)
    assert report.culprits[0].relative < 1e-3, str(report)
    # The truth that was put in is that of the same call: nothing behind it is wrong.


class Cropped(nn.Module):
    """A causal convolution, padded on both sides and cropped, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv, self.b, self.head = (
            nn.Linear(4, 6),
            nn.Conv1d(6, 6, 4, padding=3),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
        )

    def forward(self, x: torch.Tensor) -> Any:
        x = self.conv(self.a(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.head(F.silu(self.b(x)) + x)


class Padded(keras.Model):  # type: ignore[misc]
    """The same, padded in code on one side alone."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.conv, self.b, self.head = layers.Dense(6), layers.Conv1D(6, 4), layers.Dense(6), layers.Dense(4)
        self.function = function

    def call(self, x: Any) -> Any:
        x = self.conv(ops.pad(self.a(x), ((0, 0), (3, 0), (0, 0))))
        return self.head(self.function(self.b(x)) + x)


def test_a_convolution_that_only_code_crops_is_not_blamed_for_others() -> None:
    reference = seeded(Cropped)
    given = numbers(3, 6, 4)
    healthy, wrong = Padded(ops.silu), Padded(ops.gelu)
    wrong(given), healthy(given)
    port_weights(reference, healthy, inputs=given).require_parity()
    wrong.set_weights(healthy.get_weights())
    report = check_parity(reference, wrong, given)
    assert culprits(report) == ["head"], str(report)
    assert "PyTorch applies SiLU to the result of b, and Keras GELU (tanh)" in str(report.diagnosis), str(report)
