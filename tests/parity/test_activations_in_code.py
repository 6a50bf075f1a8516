"""Mistakes are named alike whether an activation is a layer, part of a layer, a module, or a function in the code."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting

IMAGES = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


class Net(nn.Module):
    """A convolution, a Flatten and two dense layers. With `functional`, only layers with weights are modules."""

    def __init__(self, functional: bool, dropout: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 20), nn.Linear(20, 5)
        self.act = None if functional else nn.ReLU()
        self.drop = nn.Dropout(0.3) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        relu = torch.relu if self.act is None else self.act
        x = torch.flatten(torch.max_pool2d(relu(self.conv(x)), 4), 1)
        return self.fc2(self.drop(relu(self.fc1(x))))


def candidate_of(fused: bool, dropout: bool) -> keras.Model:
    def activated(layer: layers.Layer, x: keras.KerasTensor) -> keras.KerasTensor:
        layer.activation = keras.activations.relu if fused else layer.activation
        return layer(x) if fused else layers.ReLU()(layer(x))

    inputs = keras.Input((16, 16, 3))
    x = activated(layers.Conv2D(8, 3, padding="same"), inputs)
    x = layers.Flatten()(layers.MaxPooling2D(4)(x))
    x = activated(layers.Dense(20), x)
    x = layers.Dropout(0.3)(x) if dropout else x
    return keras.Model(inputs, layers.Dense(5)(x))


def bias_lost(layer: layers.Layer) -> None:
    layer.bias.assign(np.zeros(layer.bias.shape))


def rows_as_in_pytorch(layer: layers.Layer) -> None:
    kernel = np.array(layer.kernel)
    layer.kernel.assign(kernel.reshape(4, 4, 8, -1).transpose(2, 0, 1, 3).reshape(kernel.shape))


def channels_exchanged(layer: layers.Layer) -> None:
    for variable in layer.weights:
        values = np.array(variable)
        values[..., [2, 6]] = values[..., [6, 2]]
        variable.assign(values)


def number_changed(layer: layers.Layer) -> None:
    values = np.array(layer.kernel)
    values[(0,) * (values.ndim - 1) + (3,)] += 0.1
    layer.kernel.assign(values)


MISTAKES = {
    "bias lost": (1, bias_lost, "the bias is lost"),
    "rows of a Flatten": (1, rows_as_in_pytorch, "are in PyTorch's order (channels, height, width)"),
    "channels exchanged": (0, channels_exchanged, "its output channels 2 and 6 are exchanged"),
    "a number": (1, number_changed, "fc1.weight[3, 0] is "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_one_mistake_is_one_culprit(functional: bool, fused: bool, dropout: bool, mistake: str) -> None:
    reference, candidate = Net(functional, dropout).eval(), candidate_of(fused, dropout)
    porting.port_weights(reference, candidate, inputs=IMAGES).require_parity()
    index, plant, cause = MISTAKES[mistake]
    plant([layer for layer in candidate.layers if layer.weights][index])
    report = porting.check_parity(reference, candidate, IMAGES)
    assert [culprit.layer for culprit in report.culprits] == ["conv" if index == 0 else "fc1"], str(report)
    assert cause in str(report.diagnosis)
    assert report.diagnosis is not None
    assert report.diagnosis.confidence == "certain"


def tanh_gelu(x: object) -> object:
    return keras.activations.gelu(x, approximate=True)


class Functions(nn.Module):
    """Two dense layers with a function behind the first, as a module or in the code, maybe with a dropout."""

    def __init__(self, function: nn.Module, functional: bool, dropout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 20), nn.Linear(20, 5)
        self.act = (lambda x: function(x)) if functional else function  # a lambda is no module
        self.before, self.after = (
            nn.Dropout(0.3) if dropout == place else nn.Identity() for place in ("before", "after")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.after(self.act(self.before(self.fc1(x)))))


FUNCTIONS = {
    "gelu for tanh gelu": (nn.GELU("tanh"), "gelu", "GELU"),
    "tanh gelu for gelu": (nn.GELU(), tanh_gelu, "tanh"),
    "gelu for relu": (nn.ReLU(), "gelu", "GELU"),
    "relu for nothing": (nn.Identity(), "relu", "ReLU"),
    "relu for relu6": (nn.ReLU6(), "relu", "ReLU"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
@pytest.mark.parametrize("dropout", ["", "before", "after"])
@pytest.mark.parametrize("functional", [False, True])
def test_another_activation_inside_a_layer(functional: bool, dropout: str, case: str) -> None:
    function, wrong, cause = FUNCTIONS[case]
    reference = Functions(function, functional, dropout).eval()
    inputs = keras.Input((6,))
    x = layers.Dense(20, activation=wrong, name="fc1")(inputs)
    candidate = keras.Model(inputs, layers.Dense(5, name="fc2")(layers.Dropout(0.3)(x)))
    for name in ("fc1", "fc2"):
        module = getattr(reference, name)
        candidate.get_layer(name).set_weights([4 * module.weight.detach().T, module.bias.detach()])
        module.weight.data *= 4
    numbers = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    report = porting.check_parity(reference, candidate, numbers)
    assert len(report.culprits) == 1, str(report)
    assert cause in str(report.diagnosis)
    assert report.diagnosis is not None
    assert report.diagnosis.confidence == "certain"


@pytest.mark.parametrize("activation", ["softmax", "log_softmax", "sigmoid"])
def test_probabilities_for_logits(activation: str) -> None:
    reference = Functions(nn.ReLU(), True, "after").eval()
    inputs = keras.Input((6,))
    x = layers.Dense(20, activation="relu", name="fc1")(inputs)
    candidate = keras.Model(inputs, layers.Dense(5, activation=activation, name="fc2")(x))
    for name in ("fc1", "fc2"):
        module = getattr(reference, name)
        candidate.get_layer(name).set_weights([module.weight.detach().T, module.bias.detach()])
    report = porting.check_parity(reference, candidate, np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    (culprit,) = report.culprits
    assert culprit.layer == "fc2"
    assert report.diagnosis is not None
    assert report.diagnosis.confidence == "certain"
    assert report.diagnosis.cause.startswith(f"its activation is {activation.replace('_', ' ')} in Keras")


class SiluMul(nn.Module):
    """Begins with an activation of what it takes."""

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate) * up


class Gate(nn.Module):
    """The product of a dense layer behind SiLU and another one, in the code or in a module of its own."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 3)
        self.product = SiluMul() if module else lambda gate, up: nn.functional.silu(gate) * up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.product(self.gate(x), self.up(x)))


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("fault", [False, True])
def test_an_activation_that_pytorch_shows_to_no_module(fault: bool, module: bool) -> None:
    reference = Gate(module).eval()
    inputs = keras.Input((6,))
    x = layers.Dense(20, activation="silu", name="gate")(inputs) * layers.Dense(20, name="up")(inputs)
    candidate = keras.Model(inputs, layers.Dense(3, name="down")(x))
    for name in ("gate", "up", "down"):
        own = getattr(reference, name)
        candidate.get_layer(name).set_weights([own.weight.detach().T, own.bias.detach()])
    if fault:
        candidate.get_layer("up").bias.assign(np.zeros(20))
    report = porting.check_parity(reference, candidate, np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    assert report.passed is not fault
    assert [culprit.layer for culprit in report.culprits] == (["up"] if fault else [])
    assert not fault or "bias is lost" in str(report.diagnosis)


@pytest.mark.parametrize(("side", "name"), [("PyTorch", "ReLU"), ("PyTorch", "SiLU"), ("Keras", "tanh")])
def test_an_activation_that_one_side_lacks(side: str, name: str) -> None:
    function = {"ReLU": nn.ReLU(), "SiLU": nn.SiLU(), "tanh": nn.Identity()}[name]
    reference = Functions(function, True, "").eval()
    inputs = keras.Input((6,))
    x = layers.Dense(20, name="fc1")(inputs)
    x = layers.Activation("tanh")(x) if side == "Keras" else x
    candidate = keras.Model(inputs, layers.Dense(5, name="fc2")(x))
    for layer in ("fc1", "fc2"):
        module = getattr(reference, layer)
        candidate.get_layer(layer).set_weights([module.weight.detach().T, module.bias.detach()])
    report = porting.check_parity(reference, candidate, np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    assert report.diagnosis is not None
    said = "ReLU or ReLU6" if name == "ReLU" else name  # no number is above six
    assert report.diagnosis.cause == f"{said} comes before fc2 in {side} alone"


def test_a_mistake_before_an_activation_of_its_own_module() -> None:
    """The Conv1D of GPT-2 is of a kind of its own, and becomes a Dense."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Feedforward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc, self.act, self.c_proj = conv1d(20, 6), nn.GELU("tanh"), conv1d(3, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c_proj(self.act(self.c_fc(x)))

    torch.manual_seed(0)
    reference = Feedforward().eval()
    for parameter in reference.parameters():
        parameter.data.normal_(0, 0.3)
    inputs = keras.Input((6,))
    x = layers.Dense(20, activation=tanh_gelu, name="up")(inputs)
    candidate = keras.Model(inputs, layers.Dense(3, name="down")(x))
    for name, module in (("up", reference.c_fc), ("down", reference.c_proj)):
        candidate.get_layer(name).set_weights([module.weight.detach(), module.bias.detach()])
    kernel = candidate.get_layer("up").kernel
    kernel.assign(kernel * 1.0001)
    report = porting.check_parity(reference, candidate, np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    (culprit,) = report.culprits
    assert culprit.layer == "c_fc"
    assert culprit.diagnosis is not None
    assert culprit.diagnosis.cause == "c_fc.weight is 1.0001 times what it should be"


def test_a_port_without_a_map_says_what_differs() -> None:
    reference = Functions(nn.ReLU(), True, "").eval()
    inputs = keras.Input((6,))
    x = layers.Dense(20, activation="relu")(inputs)
    candidate = keras.Model(inputs, layers.Dense(5, activation="softmax")(x))
    with pytest.raises(porting.PortingError, match="fc2: .*: its activation is softmax in Keras"):
        porting.port_weights(reference, candidate, inputs=np.random.default_rng(0).normal(size=(8, 6)))


@pytest.mark.parametrize("last", ["tanh", "softmax"])
def test_an_unknown_function_behind_the_last_layer_ends_the_search(last: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * self.fc(x) if last == "tanh" else (self.fc(x) / 2).softmax(-1)

    torch.manual_seed(0)
    reference = Scaled().eval()
    inputs = keras.Input((6,))
    candidate = keras.Model(inputs, layers.Dense(5, activation=last, name="fc")(inputs))
    candidate.get_layer("fc").set_weights([reference.fc.weight.detach().T, reference.fc.bias.detach()])
    numbers = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    report = porting.check_parity(reference, candidate, numbers)
    assert [culprit.layer for culprit in report.culprits] == ["output"]
    with pytest.raises(porting.PortingError):
        porting.port_weights(reference, candidate, inputs=numbers)


@pytest.mark.parametrize(("axis", "fault"), [(1, "bias"), (-1, "axis")])
def test_a_softmax_over_an_axis_of_a_map(axis: int, fault: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(self.c(x).softmax(axis))

    torch.manual_seed(0)
    reference = Net().eval()
    inputs = keras.Input((6, 7, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="softmax", name="c")(inputs)
    candidate = keras.Model(inputs, layers.Conv2D(2, 1, name="d")(x))
    for name in ("c", "d"):
        module = getattr(reference, name)
        candidate.get_layer(name).set_weights([module.weight.detach().permute(2, 3, 1, 0), module.bias.detach()])
    if fault == "bias":
        candidate.get_layer("c").bias.assign(np.zeros(4))
    images = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)
    report = porting.check_parity(reference, candidate, images)
    assert [culprit.layer for culprit in report.culprits] == ["c"]
    assert report.diagnosis is not None
    cause = "its activation is softmax in Keras, and PyTorch applies softmax over axis 2 to its result"
    assert report.diagnosis.cause == ("the bias is lost" if fault == "bias" else cause)


class InCode(nn.Module):
    """An activation in the code between two dense layers: alone, added to its input, or as a gate."""

    def __init__(self, function: Any, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.gate, self.fc2 = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 5)
        self.function, self.how = function, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc1(x)
        return self.fc2(combined(self.how, h, self.function(h), self.gate(x)))


def combined(how: str, h: Any, activated: Any, gate: Any) -> Any:
    return {"alone": activated, "added": h + activated, "gate": activated * gate}[how] + 0 * gate


def in_code(function: Any, how: str, layer: bool) -> keras.Model:
    inputs = keras.Input((6,))
    h, gate = layers.Dense(20, name="fc1")(inputs), layers.Dense(20, name="gate")(inputs)
    activated = layers.Activation(function)(h) if layer else function(h)
    return keras.Model(inputs, layers.Dense(5, name="fc2")(combined(how, h, activated, gate)))


IN_CODE = {
    "gelu": (torch.nn.functional.gelu, keras.ops.gelu, "GELU (tanh)"),
    "silu": (torch.nn.functional.silu, keras.ops.silu, "GELU (erf)"),
    "relu": (torch.relu, keras.ops.relu, "ReLU6"),
    "tanh": (torch.tanh, keras.ops.tanh, "no activation"),
}
WRONG: dict[str, Any] = {
    "GELU (tanh)": keras.ops.gelu,
    "GELU (erf)": lambda x: keras.ops.gelu(x, approximate=False),
    "ReLU6": keras.ops.relu6,
    "no activation": lambda x: 1 * x,
}


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("how", ["alone", "added", "gate"])
@pytest.mark.parametrize("name", IN_CODE)
def test_an_activation_that_no_module_shows_is_named(name: str, how: str, layer: bool) -> None:
    theirs, right, wrong = IN_CODE[name]
    reference = InCode(theirs, how).eval()
    reference.fc1.weight.data *= 8  # some numbers are above six
    ours = (lambda x: keras.ops.gelu(x, approximate=False)) if name == "gelu" else right
    given = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    healthy = in_code(ours, how, layer)
    porting.port_weights(reference, healthy, inputs=given).require_parity()
    candidate = in_code(WRONG[wrong], how, layer)
    candidate.set_weights(healthy.get_weights())
    report = porting.check_parity(reference, candidate, given)
    assert len(report.culprits) == 1, str(report)
    assert report.diagnosis is not None, str(report)
    assert report.diagnosis.confidence == "certain"
    said = report.diagnosis.cause
    lone = f"{name} comes before fc2 in PyTorch alone" if wrong == "no activation" and how == "alone" else ""
    assert said == lone if lone else f"to the result of fc1, and Keras {wrong}" in said, said


ALIKE = {
    # PyTorch's function, Keras's, and what may be said where all numbers are positive.
    "selu": (torch.selu, keras.ops.elu, "PyTorch applies SELU to the result of fc1, and Keras another activation"),
    "elu": (torch.nn.functional.elu, keras.ops.selu, "and Keras SELU"),
    "hardswish": (torch.nn.functional.hardswish, keras.ops.silu, "and Keras SiLU"),
    "softplus": (torch.nn.functional.softplus, keras.ops.relu, "PyTorch applies softplus"),
    "tanh": (torch.tanh, keras.ops.hard_tanh, "PyTorch applies tanh to the result of fc1, and Keras hard tanh"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_functions_that_give_the_same_numbers_are_not_told_apart(name: str) -> None:
    theirs, ours, said = ALIKE[name]
    reference = InCode(theirs, "alone").eval()
    with torch.no_grad():
        reference.fc1.bias.add_(0.0 if name == "tanh" else 12.0 if name == "hardswish" else 4.0)
        reference.fc1.weight.mul_(0.1 if name == "tanh" else 1.0)
    given = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32) * 0.1
    candidate = in_code(ours, "alone", False)
    for layer in candidate.layers:
        if layer.weights:
            module = getattr(reference, layer.name)
            layer.set_weights([module.weight.detach().T, module.bias.detach()])
    report = porting.check_parity(reference, candidate, given)
    assert report.diagnosis is not None, str(report)
    cause = report.diagnosis.cause
    assert said in cause, cause
    wrong = {
        "selu": "ReLU",
        "elu": "ReLU",
        "hardswish": "PyTorch applies ReLU to",
        "softplus": "alone",
        "tanh": "alone",
    }
    assert wrong[name] not in cause, cause
