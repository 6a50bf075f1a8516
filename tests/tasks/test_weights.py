"""Weights between live models: every kind there and back, and no assignment before all weights are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting
from porting.errors import KeyMapError, ParityError
from porting.kinds import KINDS
from porting.mapping.rules import KeyRule
from porting.models.synthetic import fill_with_synthetic_weights
from porting.models.traverse import named_variables

Array = np.ndarray[Any, Any]
Build = Callable[[], tuple[nn.Module, keras.Model]]


class Reference(nn.Module):
    """A model of one module, under the name of a row."""

    def __init__(self, a: nn.Module, run: Callable[[nn.Module, Any], Any] | None = None) -> None:
        super().__init__()
        self.a = a
        self.run = run or (lambda module, x: module(x))

    def forward(self, x: Any) -> Any:
        return self.run(self.a, x)


def candidate(shape: tuple[int | None, ...], *chain: Any, dtype: str = "float32") -> keras.Model:
    inputs = x = keras.Input(shape, dtype=dtype)
    for layer in chain:
        x = layer(x)
    return keras.Model(inputs, x)


def attend(module: nn.Module, x: Any) -> Any:
    return module(x, x, x)[0]


def self_attention(heads: int, size: int, **options: Any) -> keras.Model:
    inputs = keras.Input((5, 8))
    return keras.Model(inputs, layers.MultiHeadAttention(heads, size, name="a", **options)(inputs, inputs))


def spectral(module: nn.Module) -> nn.Module:
    wrapped = nn.utils.parametrizations.spectral_norm(module)
    wrapped.eval()
    return wrapped


def old_weight_norm(module: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


def padded(layer: Any, pad: int) -> tuple[Any, ...]:
    return layers.ZeroPadding2D(pad), layer


IMAGE, MAP = (8, 8, 3), (3, 8, 8)
# The kind of the row, both models, and the input of the Keras model.
CASES: dict[str, tuple[str, Build, tuple[int, ...]]] = {
    "conv": ("conv", lambda: (nn.Conv2d(3, 5, 3, 2), candidate(IMAGE, layers.Conv2D(5, 3, 2, name="a"))), IMAGE),
    "conv 1-D": ("conv", lambda: (nn.Conv1d(3, 5, 3), candidate((9, 3), layers.Conv1D(5, 3, name="a"))), (9, 3)),
    "conv 3-D": (
        "conv",
        lambda: (nn.Conv3d(2, 3, 3), candidate((5, 5, 5, 2), layers.Conv3D(3, 3, name="a"))),
        (5, 5, 5, 2),
    ),
    "grouped": (
        "conv",
        lambda: (nn.Conv2d(4, 6, 3, groups=2), candidate((8, 8, 4), layers.Conv2D(6, 3, groups=2, name="a"))),
        (8, 8, 4),
    ),
    "no bias, one in Keras": (
        "conv",
        lambda: (nn.Conv2d(3, 5, 3, bias=False), candidate(IMAGE, layers.Conv2D(5, 3, name="a"))),
        IMAGE,
    ),
    "depthwise": (
        "depthwise",
        lambda: (nn.Conv2d(3, 3, 3, groups=3), candidate(IMAGE, layers.DepthwiseConv2D(3, name="a"))),
        IMAGE,
    ),
    "depthwise with a multiplier": (
        "depthwise",
        lambda: (
            nn.Conv2d(3, 6, 3, groups=3),
            candidate(IMAGE, layers.DepthwiseConv2D(3, depth_multiplier=2, name="a")),
        ),
        IMAGE,
    ),
    "transposed": (
        "conv_transpose",
        lambda: (nn.ConvTranspose2d(3, 5, 3, 2), candidate(IMAGE, layers.Conv2DTranspose(5, 3, 2, name="a"))),
        IMAGE,
    ),
    "transposed with output padding": (
        "conv_transpose",
        lambda: (
            nn.ConvTranspose2d(3, 5, 3, 2, padding=1, output_padding=1),
            candidate(IMAGE, layers.Conv2DTranspose(5, 3, 2, output_padding=1, name="a"), layers.Cropping2D(1)),
        ),
        IMAGE,
    ),
    "transposed 1-D": (
        "conv_transpose",
        lambda: (nn.ConvTranspose1d(3, 5, 4, 2), candidate((6, 3), layers.Conv1DTranspose(5, 4, 2, name="a"))),
        (6, 3),
    ),
    "dense": ("dense", lambda: (nn.Linear(6, 6), candidate((6,), layers.Dense(6, name="a"))), (6,)),
    "dense of any rank": ("dense", lambda: (nn.Linear(6, 4), candidate((3, 6), layers.Dense(4, name="a"))), (3, 6)),
    "dense as einsum with heads": (
        "dense",
        lambda: (
            nn.Linear(6, 8),
            candidate(
                (3, 6),
                layers.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de", name="a"),
                layers.Reshape((3, 8)),
            ),
        ),
        (3, 6),
    ),
    "dense as a 1x1 convolution": (
        "dense",
        lambda: (
            Reference(nn.Linear(3, 5), lambda m, x: m(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            candidate(IMAGE, layers.Conv2D(5, 1, name="a")),
        ),
        IMAGE,
    ),
    "a 1x1 convolution as dense": (
        "conv",
        lambda: (nn.Conv2d(3, 5, 1), candidate(IMAGE, layers.Dense(5, name="a"))),
        IMAGE,
    ),
    "dense behind a Flatten": (
        "dense:3x8x8",
        lambda: (
            Reference(nn.Linear(192, 4), lambda m, x: m(x.flatten(1))),
            candidate(IMAGE, layers.Flatten(), layers.Dense(4, name="a")),
        ),
        IMAGE,
    ),
    "batch norm": (
        "batch_norm",
        lambda: (nn.BatchNorm2d(3), candidate(IMAGE, layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="a"))),
        IMAGE,
    ),
    "batch norm without gamma and beta": (
        "batch_norm",
        lambda: (
            nn.BatchNorm2d(3, affine=False),
            candidate(IMAGE, layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="a")),
        ),
        IMAGE,
    ),
    "layer norm": (
        "layer_norm",
        lambda: (nn.LayerNorm(6), candidate((3, 6), layers.LayerNormalization(epsilon=1e-5, name="a"))),
        (3, 6),
    ),
    "RMS norm": (
        "rms_norm",
        lambda: (nn.RMSNorm(6, eps=1e-6), candidate((3, 6), layers.RMSNormalization(epsilon=1e-6, name="a"))),
        (3, 6),
    ),
    "group norm": (
        "group_norm",
        lambda: (nn.GroupNorm(2, 4), candidate((8, 8, 4), layers.GroupNormalization(2, epsilon=1e-5, name="a"))),
        (8, 8, 4),
    ),
    "instance norm": (
        "instance_norm",
        lambda: (
            nn.InstanceNorm2d(3, affine=True),
            candidate(IMAGE, layers.GroupNormalization(-1, epsilon=1e-5, name="a")),
        ),
        IMAGE,
    ),
    "instance norm without weights": (
        "instance_norm",
        lambda: (nn.InstanceNorm2d(3), candidate(IMAGE, layers.GroupNormalization(-1, epsilon=1e-5, name="a"))),
        IMAGE,
    ),
    "LSTM": (
        "recurrent",
        lambda: (
            Reference(nn.LSTM(3, 4, batch_first=True), lambda m, x: m(x)[0]),
            candidate((5, 3), layers.LSTM(4, return_sequences=True, name="a")),
        ),
        (5, 3),
    ),
    "GRU": (
        "recurrent",
        lambda: (
            Reference(nn.GRU(3, 4, batch_first=True), lambda m, x: m(x)[0]),
            candidate((5, 3), layers.GRU(4, return_sequences=True, name="a")),
        ),
        (5, 3),
    ),
    "plain recurrence": (
        "recurrent",
        lambda: (
            Reference(nn.RNN(3, 4, batch_first=True), lambda m, x: m(x)[0]),
            candidate((5, 3), layers.SimpleRNN(4, return_sequences=True, name="a")),
        ),
        (5, 3),
    ),
    "LSTM without biases": (
        "recurrent",
        lambda: (
            Reference(nn.LSTM(3, 4, batch_first=True, bias=False), lambda m, x: m(x)[0]),
            candidate((5, 3), layers.LSTM(4, return_sequences=True, name="a")),
        ),
        (5, 3),
    ),
    "LSTM both ways": (
        "recurrent",
        lambda: (
            Reference(nn.LSTM(3, 4, batch_first=True, bidirectional=True), lambda m, x: m(x)[0]),
            candidate((5, 3), layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="a")),
        ),
        (5, 3),
    ),
    "GRU both ways": (
        "recurrent",
        lambda: (
            Reference(nn.GRU(3, 4, batch_first=True, bidirectional=True), lambda m, x: m(x)[0]),
            candidate((5, 3), layers.Bidirectional(layers.GRU(4, return_sequences=True), name="a")),
        ),
        (5, 3),
    ),
    "attention": (
        "attention",
        lambda: (Reference(nn.MultiheadAttention(8, 2, batch_first=True), attend), self_attention(2, 4)),
        (5, 8),
    ),
    "attention without biases": (
        "attention",
        lambda: (
            Reference(nn.MultiheadAttention(8, 2, batch_first=True, bias=False), attend),
            self_attention(2, 4, use_bias=False),
        ),
        (5, 8),
    ),
    "PReLU": (
        "prelu",
        lambda: (nn.PReLU(3), candidate(IMAGE, layers.PReLU(shared_axes=[1, 2], name="a"))),
        IMAGE,
    ),
    "PReLU with one slope": ("prelu", lambda: (nn.PReLU(), candidate((6,), layers.PReLU(name="a"))), (6,)),
    "weight norm": (
        "conv",
        lambda: (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3)),
            candidate(IMAGE, layers.Conv2D(5, 3, name="a")),
        ),
        IMAGE,
    ),
    "weight norm of the old kind": (
        "dense",
        lambda: (old_weight_norm(nn.Linear(6, 4)), candidate((6,), layers.Dense(4, name="a"))),
        (6,),
    ),
    "spectral norm": (
        "dense",
        lambda: (spectral(nn.Linear(6, 4)), candidate((6,), layers.Dense(4, name="a"))),
        (6,),
    ),
}
ONE_WAY = {"weight norm of the old kind", "spectral norm"}


def moved_axes(case: str, inputs: Array) -> dict[str, Any]:
    return {"input_axes": [(0, *range(2, inputs.ndim), 1)]} if inputs.ndim > 3 or "1-D" in case else {}


def fill(reference: nn.Module, inputs: Array, seed: int = 1) -> None:
    given = torch.from_numpy(np.ascontiguousarray(inputs))
    fill_with_synthetic_weights(reference, seed, run=lambda model: model(given))


def built(case: str) -> tuple[str, nn.Module, keras.Model, Array]:
    kind, build, shape = CASES[case]
    module, model = build()
    reference = module if isinstance(module, Reference) else Reference(module)
    inputs = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    fill(reference, inputs if len(inputs.shape) < 4 and "1-D" not in case else np.moveaxis(inputs, -1, 1), seed=3)
    return kind, reference.eval(), model, inputs


@pytest.mark.parametrize("case", CASES)
def test_a_kind_goes_there_is_proven_and_comes_back(case: str) -> None:
    kind, reference, model, inputs = built(case)
    axes = moved_axes(case, inputs)
    ported = porting.port_weights(reference, model, [KeyRule("a", "a", kind)], inputs=inputs, **axes)
    assert ported.report is not None
    assert ported.report.passed, ported.report.objections
    assert ported.report.loud is not None
    if case in ONE_WAY:
        with pytest.raises(KeyMapError, match="computed by the module"):
            porting.revert_weights(model, reference, ported.key_map)
        return
    back = copy.deepcopy(reference) if "weight norm" not in case else built(case)[1]
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.add_(1.0)
    porting.revert_weights(model, back, ported.key_map)
    given = np.ascontiguousarray(np.moveaxis(inputs, -1, 1)) if axes else inputs
    with torch.no_grad():
        expected, found = (each(torch.from_numpy(given.copy())) for each in (reference, back))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    again = {name: np.array(variable) for name, variable in named_variables(model).items()}
    porting.port_weights(back, model, ported.key_map)
    for name, variable in named_variables(model).items():
        if "weight norm" in case:  # weight_norm divides by a norm and multiplies by it again
            np.testing.assert_allclose(np.array(variable), again[name], rtol=1e-6)
        else:
            np.testing.assert_array_equal(np.array(variable), again[name])


@pytest.mark.parametrize("case", CASES)
def test_one_wrong_number_is_found(case: str) -> None:
    kind, reference, model, inputs = built(case)
    axes = moved_axes(case, inputs)
    ported = porting.port_weights(reference, model, [KeyRule("a", "a", kind)])
    variable = model.weights[0]
    values = np.array(variable)
    values.flat[values.size // 2] *= 1 + 1e-5
    variable.assign(values)
    report = porting.check_parity(reference, model, inputs, key_map=ported.key_map, **axes)
    assert not report.passed


def test_a_stack_of_recurrent_layers_is_several_in_keras() -> None:
    reference = Reference(nn.GRU(3, 4, num_layers=3, batch_first=True), lambda m, x: m(x)[0])
    inputs = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    fill(reference, inputs)
    chain = [layers.GRU(4, return_sequences=True, name=f"gru{index}") for index in range(3)]
    model = candidate((6, 3), *chain)
    rows = [KeyRule("a", f"gru{index}", f"recurrent:l{index}") for index in range(3)]
    assert porting.port_weights(reference.eval(), model, rows, inputs=inputs).require_parity()


def test_a_separable_convolution_is_two_modules() -> None:
    reference = nn.Sequential()
    reference.deep, reference.wide = nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.Conv2d(6, 5, 1)
    fill_with_synthetic_weights(reference, seed=1)
    model = candidate(IMAGE, layers.SeparableConv2D(5, 3, depth_multiplier=2, name="a"))
    rows = [KeyRule("deep", "a", "separable_depthwise"), KeyRule("wide", "a", "separable_pointwise")]
    inputs = np.random.default_rng(0).normal(size=(2, *IMAGE)).astype(np.float32)
    porting.port_weights(reference.eval(), model, rows, inputs=inputs).require_parity()


def test_tokens_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm, self.out = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 11)
            self.out.weight = self.tokens.weight

        def forward(self, x: Any) -> Any:
            return self.out(self.norm(self.tokens(x)))

    reference = Tied()
    inputs = np.random.default_rng(0).integers(0, 11, (3, 4)).astype(np.int32)
    fill(reference, inputs)
    tokens = layers.Embedding(11, 6, name="tokens")
    norm, out = layers.LayerNormalization(epsilon=1e-5, name="norm"), layers.Dense(11, name="out")
    model = candidate((4,), tokens, norm, out, dtype="int32")
    rows = [
        KeyRule("tokens", "tokens", "embedding"),
        KeyRule("norm", "norm", "layer_norm"),
        KeyRule("out", "out", "dense"),
    ]
    ported = porting.port_weights(reference.eval(), model, rows, inputs=inputs)
    assert ported.require_parity() is ported


def small() -> tuple[nn.Module, keras.Model]:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    fill(reference, np.random.default_rng(1).normal(size=(4, *MAP)).astype(np.float32), seed=2)
    norm = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="norm")
    model = candidate(
        IMAGE, layers.Conv2D(4, 3, name="conv"), norm, layers.ReLU(), layers.Flatten(), layers.Dense(5, name="fc")
    )
    return reference, model


ROWS = [KeyRule("0", "conv", "conv"), KeyRule("1", "norm", "batch_norm"), KeyRule("4", "fc", "dense:4x6x6")]
IMAGES = np.random.default_rng(0).normal(size=(2, *IMAGE)).astype(np.float32)


def test_a_model_of_ones_own_in_five_lines() -> None:
    reference, model = small()
    ported = porting.port_weights(reference, model, ROWS, inputs=IMAGES)
    assert ported.report is not None
    assert ported.report.passed, ported.report.objections
    assert ported.dropped == ("1.num_batches_tracked",)
    assert ported.report.verified is not None
    assert ported.report.verified.compared_bits == 8


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:2], "2 in the checkpoint, but not part of the model:\n  4.bias\n  4.weight"),
        ([*ROWS[:2], KeyRule("4", "fc", "dense"), KeyRule("0", "fc", "conv")], "claim the same"),
        ([KeyRule("0", "nowhere", "conv")], "has no layer 'nowhere'"),
        ([KeyRule("9", "conv", "conv")], "no tensor of the PyTorch model matches"),
        ([*ROWS[:2], KeyRule("4", "fc", "dense:6x6x6")], "of another shape or type:\n  4.weight"),
        ([("0", "conv", "conv")], "a list of KeyRule"),
    ],
)
def test_nothing_is_assigned_before_all_is_accounted_for(rows: list[Any], message: str) -> None:
    reference, model = small()
    before = [np.array(variable) for variable in model.weights]
    with pytest.raises(KeyMapError, match=message):
        porting.port_weights(reference, model, rows)
    assert all(np.array_equal(one, np.array(other)) for one, other in zip(before, model.weights, strict=True))


def test_what_has_no_partner_is_named() -> None:
    reference, model = small()
    reference.spare = nn.Parameter(torch.ones(3))
    with pytest.raises(KeyMapError, match="  spare"):
        porting.port_weights(reference, model, ROWS)
    ported = porting.port_weights(reference, model, ROWS, drop=["spare"])
    assert ported.dropped == ("1.num_batches_tracked", "spare")
    with pytest.raises(KeyMapError, match="drop: unknown name nothing"):
        porting.port_weights(reference, model, ROWS, drop=["nothing"])
    with pytest.raises(KeyMapError, match="2 Keras variables that no row"):
        porting.port_weights(reference, model, ROWS[:2], drop=["spare", "4.weight", "4.bias"])
    kept = porting.port_weights(
        reference, model, ROWS[:2], drop=["spare", "4.weight", "4.bias"], keep=["fc/kernel", "fc/bias"]
    )
    assert kept.untouched == ("fc/bias", "fc/kernel")


def test_numbers_that_keras_has_no_place_for_are_never_lost() -> None:
    reference = Reference(nn.Conv2d(3, 5, 3)).eval()
    model = candidate(IMAGE, layers.Conv2D(5, 3, use_bias=False, name="a"))
    rows = [KeyRule("a", "a", "conv")]
    with pytest.raises(KeyMapError, match="a.bias: it holds numbers other than 0"):
        porting.port_weights(reference, model, rows)
    with torch.no_grad():
        dict(reference.named_parameters())["a.bias"].zero_()
    ported = porting.port_weights(reference, model, rows, inputs=IMAGES)
    assert ported.require_parity()
    # The other way: a bias that PyTorch lacks must be zeros in Keras.
    reference = Reference(nn.Conv2d(3, 5, 3, bias=False)).eval()
    model = candidate(IMAGE, layers.Conv2D(5, 3, bias_initializer="ones", name="a"))
    ported = porting.port_weights(reference, model, rows, inputs=IMAGES)
    assert ported.require_parity()
    model.get_layer("a").bias.assign(np.ones(5, np.float32))
    with pytest.raises(KeyMapError, match="it holds numbers other than 0"):
        porting.revert_weights(model, reference, ported.key_map)


def test_both_models_stay_as_they_were_but_for_the_weights() -> None:
    reference, model = small()
    reference.train()
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    porting.port_weights(reference, model, ROWS, inputs=IMAGES)
    assert reference.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())


def test_a_port_that_is_wrong_says_so() -> None:
    reference, model = small()
    wrong = [*ROWS[:2], KeyRule("4", "fc", "dense")]
    ported = porting.port_weights(reference, model, wrong, inputs=IMAGES)
    with pytest.raises(ParityError):
        ported.require_parity()
    assert ported.report is not None
    assert "rows of 4 are in PyTorch's order" in str(ported.report.culprits[0].diagnosis)
    with pytest.raises(ParityError, match="was not checked"):
        porting.port_weights(reference, model, ROWS).require_parity()


def test_half_precision_on_pytorchs_side() -> None:
    reference, model = small()
    ported = porting.port_weights(reference.half(), model, ROWS)
    bias = reference.state_dict()["0.bias"]
    np.testing.assert_array_equal(np.array(model.get_layer("conv").bias), bias.float().numpy())
    porting.revert_weights(model, reference, ported.key_map)
    assert reference.state_dict()["0.weight"].dtype == torch.float16


def test_details_of_kinds_that_are_none() -> None:
    for kind, message in (("dense:axb", "the sides"), ("recurrent:2", "the layer"), ("conv:x", "takes no details")):
        with pytest.raises(KeyMapError, match=message):
            KeyRule("a", "a", kind)
    assert "conv_transpose" in KINDS
