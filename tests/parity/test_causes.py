"""Causes in layers that hold several modules, or whose weights PyTorch stacks in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

from porting import check_parity
from porting.parity.report import ParityReport

Array = np.ndarray[Any, Any]


def gates(values: Array, order: tuple[int, ...]) -> Array:
    parts = np.split(values, len(order))
    return np.concatenate([parts[index] for index in order])


class LastStep(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.rnn(x)[0][:, -1])


def with_gru(reset_after: bool = True, order: tuple[int, ...] = (1, 0, 2)) -> ParityReport:
    torch.manual_seed(3)
    reference = LastStep(nn.GRU(4, 6, batch_first=True)).eval()
    rnn = reference.rnn
    assert isinstance(rnn, nn.GRU)
    inputs = keras.Input((5, 4))
    gru, head = layers.GRU(6, reset_after=reset_after), layers.Dense(3)
    candidate = keras.Model(inputs, head(gru(inputs)))
    kernel, recurrent, one, other = (gates(each.detach().numpy(), order) for each in rnn.parameters())
    gru.set_weights([kernel.T, recurrent.T, np.stack([one, other]) if reset_after else one + other])
    head.set_weights([reference.head.weight.detach().numpy().T, reference.head.bias.detach().numpy()])
    given = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    return check_parity(reference, candidate, given)


def test_a_gru_with_its_gates_in_order_passes() -> None:
    assert with_gru().passed


def test_gates_in_pytorchs_order_are_named() -> None:
    report = with_gru(order=(0, 1, 2))
    assert not report.passed
    assert report.culprits[0].culprit == "rnn"
    assert report.culprits[0].diagnosis is not None
    assert report.culprits[0].diagnosis.cause == "the reset gate and the update gate are exchanged"


def test_a_gru_that_resets_before_is_refused_and_says_so() -> None:
    report = with_gru(reset_after=False)
    assert not report.passed
    assert report.culprits[0].diagnosis is not None
    assert report.culprits[0].diagnosis.cause == "reset_after=False in Keras, where PyTorch resets after"


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


def with_folded_norm(change: Callable[[Array], Array], activation: str = "relu") -> ParityReport:
    torch.manual_seed(5)
    reference = Folded().eval()
    norm = reference.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.3, 1.5)
    inputs = keras.Input((9, 8, 3))
    conv, head = layers.Conv2D(6, 3, activation=activation), layers.Dense(3)
    candidate = keras.Model(inputs, head(layers.GlobalAveragePooling2D()(conv(inputs))))
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
    kernel = reference.conv.weight.detach().numpy().transpose(2, 3, 1, 0) * factor
    bias = norm.bias.detach().numpy() - norm.running_mean.numpy() * factor
    conv.set_weights([change(kernel), bias])
    head.set_weights([reference.head.weight.detach().numpy().T, reference.head.bias.detach().numpy()])
    given = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype(np.float32)
    return check_parity(reference, candidate, given)


def one_number(kernel: Array) -> Array:
    kernel = kernel.copy()
    kernel[1, 2, 0, 4] *= 1.25
    return kernel


def test_a_norm_folded_in_float32_and_an_activation_inside_pass() -> None:
    assert with_folded_norm(lambda kernel: kernel).passed


@pytest.mark.parametrize(
    ("change", "activation", "culprit", "cause"),
    [
        (one_number, "relu", "conv", "conv.weight[4, 0, 1, 2], with the norm behind it folded in, is"),
        (lambda kernel: kernel.swapaxes(0, 1), "relu", "conv", "the kernel's height and width are swapped"),
        (lambda kernel: kernel * 1.5, "relu", "conv", "conv.weight, with the norm behind it folded in, is 1.5 times"),
        (lambda kernel: kernel, "gelu", "act", "GELU (erf) instead of ReLU"),
    ],
    ids=["one number", "swapped", "scaled", "activation"],
)
def test_a_mistake_in_a_layer_with_several_modules_inside_is_theirs(
    change: Callable[[Array], Array], activation: str, culprit: str, cause: str
) -> None:
    report = with_folded_norm(change, activation)
    assert not report.passed
    assert [each.culprit for each in report.culprits] == [culprit]
    assert report.culprits[0].diagnosis is not None
    assert cause in report.culprits[0].diagnosis.cause
    assert report.culprits[0].diagnosis.confidence == "certain"


def with_attention(change: Callable[[list[Array]], None]) -> ParityReport:
    torch.manual_seed(7)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.head = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.attn(x, x, x, need_weights=False)[0])

    reference = Model().eval()
    torch.nn.init.normal_(reference.attn.in_proj_bias)
    torch.nn.init.normal_(reference.attn.out_proj.bias)
    inputs = keras.Input((5, 12))
    attention, head = layers.MultiHeadAttention(3, 4), layers.Dense(4)
    candidate = keras.Model(inputs, head(attention(inputs, inputs)))
    weights: list[Array] = []
    for kernel, bias in zip(
        reference.attn.in_proj_weight.detach().chunk(3), reference.attn.in_proj_bias.detach().chunk(3), strict=True
    ):
        weights += [kernel.numpy().T.reshape(12, 3, 4), bias.numpy().reshape(3, 4)]
    last = reference.attn.out_proj
    weights += [last.weight.detach().numpy().T.reshape(3, 4, 12), last.bias.detach().numpy()]
    change(weights)
    attention.set_weights(weights)
    head.set_weights([reference.head.weight.detach().numpy().T, reference.head.bias.detach().numpy()])
    given = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    return check_parity(reference, candidate, given)


def exchange(one: int, other: int) -> Callable[[list[Array]], None]:
    def change(weights: list[Array]) -> None:
        weights[one], weights[other] = weights[other], weights[one]

    return change


def split_otherwise(weights: list[Array]) -> None:
    weights[4] = weights[4].reshape(12, 4, 3).transpose(0, 2, 1)


def without_scale(weights: list[Array]) -> None:
    weights[0] = weights[0] * 2.0
    weights[1] = weights[1] * 2.0


def without_output_bias(weights: list[Array]) -> None:
    weights[7] = np.zeros_like(weights[7])


def test_attention_passes() -> None:
    assert with_attention(lambda weights: None).passed


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (exchange(2, 4), "its key and value are exchanged in the kernels, not in the biases"),
        (split_otherwise, "the heads of its value are split wrongly, as (size, heads) read as (heads, size)"),
        (without_scale, "its scores are not divided by the root of the head's size"),
        (without_output_bias, "its output's bias is lost"),
    ],
    ids=["exchanged", "heads", "scale", "bias"],
)
def test_what_is_wrong_in_attention_is_told(change: Callable[[list[Array]], None], cause: str) -> None:
    report = with_attention(change)
    assert not report.passed
    assert [each.culprit for each in report.culprits] == ["attn"]
    assert report.culprits[0].diagnosis is not None
    assert report.culprits[0].diagnosis.cause == cause


def test_one_number_of_two_is_named() -> None:
    """As many as half of a small bias are still few."""
    torch.manual_seed(0)
    reference, inputs = nn.Sequential(nn.Linear(4, 2), nn.Sigmoid()).eval(), keras.Input((4,))
    dense = keras.layers.Dense(2, "sigmoid")
    candidate = keras.Model(inputs, dense(inputs))
    linear: Any = reference[0]
    kernel, bias = linear.weight.detach().numpy().T.copy(), linear.bias.detach().numpy().copy()
    bias[1] *= 1.001
    dense.set_weights([kernel, bias])
    report = check_parity(reference, candidate, np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
    assert report.culprits[0].diagnosis is not None
    assert "0.bias[1] is" in report.culprits[0].diagnosis.cause, str(report)
