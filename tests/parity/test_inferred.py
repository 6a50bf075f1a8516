"""Weights that have no effect on the given inputs are verified all the same, without a key map."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch import nn

import porting


class Net(nn.Module):
    """Two convolutions with a norm; the second channel between them never fires on small inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.fc = nn.Conv2d(4, 5, 3), nn.Linear(5, 3)
        self.bn.running_mean = torch.tensor([0.1, 1e6, -0.2, 0.3])
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.act(self.bn(self.conv1(x)))).mean((2, 3)))


def candidate_of(reference: Net, *, named: bool, folded: bool = False, epsilon: float = 1e-5) -> keras.Model:
    def name(own: str) -> str | None:
        return own if named else None

    state = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    norm = [state[f"bn.{key}"] for key in ("weight", "bias", "running_mean", "running_var")]
    norm[3] = norm[3] + np.float32(1e-5 - epsilon)
    inputs = keras.Input((9, 9, 3))
    conv1 = layers.Conv2D(4, 3, name=name("conv1"), activation="relu" if folded else None)
    x = conv1(inputs)
    if not folded:
        bn = layers.BatchNormalization(momentum=0.9, epsilon=epsilon, name=name("bn"))
        x = layers.ReLU(name=name("act"))(bn(x))
        bn.set_weights(norm)
    conv2, fc = layers.Conv2D(5, 3, name=name("conv2")), layers.Dense(3, name=name("fc"))
    model = keras.Model(inputs, fc(layers.GlobalAveragePooling2D()(conv2(x))))
    for layer, module in ((conv1, "conv1"), (conv2, "conv2")):
        layer.set_weights([state[f"{module}.weight"].transpose(2, 3, 1, 0), state[f"{module}.bias"]])
    if folded:
        factor = norm[0] / np.sqrt(norm[3].astype(np.float64) + 1e-5)
        kernel, bias = conv1.get_weights()
        conv1.set_weights([kernel * factor, (bias - norm[2]) * factor + norm[1]])
    fc.set_weights([state["fc.weight"].T, state["fc.bias"]])
    return model


def change(variable: Any, place: tuple[int, ...]) -> None:
    values = np.asarray(variable).copy()
    values[place] *= 1.5
    variable.assign(values)


IMAGES = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype(np.float32)


@pytest.mark.parametrize("named", [True, False])
def test_a_weight_behind_a_dead_channel(named: bool) -> None:
    reference = Net()
    candidate = candidate_of(reference, named=named)
    healthy = porting.check_parity(reference, candidate, IMAGES)
    assert healthy.passed, str(healthy)
    assert healthy.verified is not None
    assert healthy.verified.compared_bits == 10
    layer = [each for each in candidate.layers if isinstance(each, layers.Conv2D)][1]
    change(layer.kernel, (1, 2, 1, 3))
    report = porting.check_parity(reference, candidate, IMAGES)
    assert all(each.views["exact"].relative_error < 1e-14 for each in report.layers if each.is_output)
    assert not report.passed
    assert report.verified is not None
    assert report.verified.differing == (f"{layer.name}/kernel",)
    wrong = float(np.asarray(layer.kernel)[1, 2, 1, 3])
    assert f"{layer.name}/kernel[1, 2, 1, 3] is {wrong:.9g} and should be {wrong / 1.5:.9g}" in str(report)


def test_a_weight_that_meets_only_zeros() -> None:
    reference, images = Net(), np.zeros_like(IMAGES)
    for folded in (False, True):
        candidate = candidate_of(reference, named=False, folded=folded)
        assert porting.check_parity(reference, candidate, images).passed
        change(candidate.layers[1].kernel, (0, 1, 2, 2))
        assert not porting.check_parity(reference, candidate, images).passed


@pytest.mark.parametrize("named", [True, False])
def test_weights_that_rightly_differ(named: bool) -> None:
    reference = Net()
    both: tuple[dict[str, Any], ...] = ({"folded": True}, {"epsilon": 1e-3})
    for options in both:
        candidate = candidate_of(reference, named=named, **options)
        report = porting.check_parity(reference, candidate, IMAGES, waive=["bn:eps"])
        assert report.passed, str(report)
        assert report.verified is not None
        assert report.verified.compared_bits == 0


def test_half_precision_weights_round_the_port() -> None:
    reference = Net()
    candidate = candidate_of(reference, named=True)
    assert porting.check_parity(reference.half(), candidate, IMAGES).passed


def test_models_that_are_swapped() -> None:
    reference = Net()
    candidate = candidate_of(reference, named=True)
    with pytest.raises(TypeError, match=r"reference must be a torch.nn.Module, but is a Functional.*swapped"):
        porting.check_parity(candidate, reference, IMAGES)
    with pytest.raises(TypeError, match=r"candidate must be a keras.Model, but is a Net"):
        porting.port_weights(reference, reference, [])


class Positions(nn.Module):
    """A table of positions that is a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc = nn.Parameter(torch.randn(16, 6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(x + self.table[: x.shape[1]]))


class KerasPositions(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.fc = layers.Dense(3)
        self.table = self.add_weight(shape=(16, 6), name="table")

    def call(self, x: Any) -> Any:
        return self.fc(keras.ops.tanh(x + self.table[: x.shape[1]]))


@pytest.mark.parametrize("wrong", [False, True])
def test_rows_of_a_table_that_these_inputs_do_not_reach(wrong: bool) -> None:
    reference, candidate = Positions().eval(), KerasPositions()
    given = np.random.default_rng(0).normal(size=(4, 7, 6)).astype(np.float32)
    candidate(given)
    table, kernel, bias = (each.detach().numpy() for each in reference.parameters())
    table = table + 0.5 * wrong * (np.arange(16) >= 12)[:, None]
    candidate.fc.set_weights([kernel.T, bias])
    candidate.table.assign(table)
    report = porting.check_parity(reference, candidate, given)
    assert report.passed is not wrong, str(report)
    assert not wrong or "table[12, 0] is" in str(report)


class Mixing(nn.Module):
    """Two tables of its own, which no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.mix, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x)) @ self.mix + self.shift


class OursMixing(layers.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.mix = self.add_weight(name="mix", shape=(4, 4))
        self.shift = self.add_weight(name="shift", shape=(4,))

    def call(self, x: Any) -> Any:
        return ops.tanh(x) @ self.mix + self.shift


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("scales_all", [False, True])
def test_a_bare_weight_that_is_wrong_is_named(place: int, scales_all: bool) -> None:
    torch.manual_seed(0)
    values_in = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    reference, inputs = Mixing().eval(), keras.Input((5,))
    dense, mixing = layers.Dense(4), OursMixing()
    candidate = keras.Model(inputs, mixing(dense(inputs)))
    dense.set_weights([reference.fc.weight.detach().numpy().T, reference.fc.bias.detach().numpy()])
    values = [reference.mix.detach().numpy().copy(), reference.shift.detach().numpy().copy()]
    mixing.set_weights(values)
    assert porting.check_parity(reference, candidate, values_in).passed
    values[place][slice(None) if scales_all else 1] *= 1.001
    mixing.set_weights(values)
    report = porting.check_parity(reference, candidate, values_in)
    assert not report.passed
    assert report.verified is not None
    assert report.verified.differing == (f"{mixing.name}/{('mix', 'shift')[place]}",), str(report)
    assert "and should be" in report.verified.details[0]


def dead_channel(epsilon: float = 1e-5, *, change: float = 0.0) -> porting.ParityReport:
    """A port whose layer of other names has a wrong weight of a channel that the ReLU behind it always cuts off."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval()
    linear = reference[0]
    assert isinstance(linear, nn.Linear)
    linear.bias.data[3] = -100.0
    candidate = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, name="alpha"),
            keras.layers.ReLU(),
            keras.layers.Dense(6, name="beta"),
            keras.layers.BatchNormalization(epsilon=epsilon, momentum=0.9, name="gamma"),
            keras.layers.Dense(2, name="delta"),
        ]
    )
    arrays = [each.numpy().T.copy() for each in reference.state_dict().values() if each.is_floating_point()]
    arrays[0][1, 3] += change  # before the dead channel
    arrays[2][3, 5] += change  # behind it
    candidate.set_weights(arrays)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    return porting.check_parity(reference, candidate, x)


def test_a_layer_that_no_result_pairs_is_compared_bit_by_bit() -> None:
    assert dead_channel().passed
    report = dead_channel(change=1e-3)
    assert not report.passed
    assert report.verified is not None
    assert [each.partition(" is ")[0] for each in report.verified.details] == [
        "alpha/kernel[1, 3]",
        "beta/kernel[3, 5]",
    ]


def test_weights_without_effect_are_named_beside_another_mistake() -> None:
    report = dead_channel(1e-3, change=1e-3)
    assert [culprit.layer for culprit in report.culprits] == ["3"]
    assert "epsilon" in str(report)
    assert report.verified is not None
    assert len(report.verified.details) == 2
    assert "Weights that differ from the checkpoint (2)" in str(report)
