"""The layers beside a mistake are not blamed for it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting


class NormAct(nn.BatchNorm2d):
    """A norm with an activation and submodules inside, as in timm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(3, 8, 3, 2, 1), NormAct(8)
        self.conv1 = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(self.norm0(self.conv0(x)))


def test_a_norm_whose_activation_is_apart_is_right() -> None:
    torch.manual_seed(0)
    reference = Stem().eval()
    reference.norm0.running_mean = torch.randn(8)
    inputs = keras.Input((16, 16, 3))
    # TensorFlow's "same" pads an even map on one side only.
    x = layers.Conv2D(8, 3, 2, "same", name="conv0")(inputs)
    x = keras.ops.relu(layers.BatchNormalization(epsilon=1e-5, name="norm0")(x))
    candidate = keras.Model(inputs, layers.Conv2D(4, 1, name="conv1")(x))
    for name, module in {"conv0": reference.conv0, "conv1": reference.conv1}.items():
        assert module.bias is not None
        candidate.get_layer(name).set_weights([module.weight.detach().permute(2, 3, 1, 0), module.bias.detach()])
    norm = reference.norm0.state_dict()
    candidate.get_layer("norm0").set_weights(
        [norm[name].numpy() for name in ("weight", "bias", "running_mean", "running_var")]
    )
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    report = porting.check_parity(reference, candidate, images)
    assert not report.passed
    assert [culprit.layer for culprit in report.culprits] == ["conv0"]
    assert "padding" in str(report.diagnosis)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(6, eps=1e-5), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x + self.dense(self.norm(x)) * bias


class Encoder(nn.Module):
    """The mask is passed on in a different form from the model's input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.block = nn.Embedding(9, 6), Block()

    def forward(self, token_ids: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        return self.block(self.table(token_ids), 1.0 + 2.0 * padding_mask[..., None].to(self.table.weight.dtype))


class KerasBlock(layers.Layer):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="block")
        self.norm, self.dense = layers.LayerNormalization(epsilon=1e-3, name="norm"), layers.Dense(6, name="dense")

    def build(self, x_shape: tuple[int | None, ...], mask_shape: object = None) -> None:
        self.norm.build(x_shape)
        self.dense.build(x_shape)

    def call(self, x: keras.KerasTensor, mask: keras.KerasTensor) -> keras.KerasTensor:
        return x + self.dense(self.norm(x)) * (1.0 + 2.0 * keras.ops.cast(mask, x.dtype)[..., None])


def test_a_mask_is_not_blamed_for_an_epsilon() -> None:
    torch.manual_seed(0)
    reference = Encoder().eval()
    tokens, mask = (keras.Input((5,), name=name, dtype="int32") for name in ("token_ids", "padding_mask"))
    table, block = layers.Embedding(9, 6, name="table"), KerasBlock()
    candidate = keras.Model({"token_ids": tokens, "padding_mask": mask}, block(table(tokens), mask))
    table.set_weights([reference.table.weight.detach()])
    block.dense.set_weights([reference.block.dense.weight.detach().T, reference.block.dense.bias.detach()])
    ids = np.random.default_rng(0).integers(0, 9, (2, 5)).astype(np.int32)
    given = {"token_ids": ids, "padding_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)}
    report = porting.check_parity(reference, candidate, given)
    assert not report.passed
    assert [culprit.layer for culprit in report.culprits] == ["block.norm"]
    assert "epsilon" in str(report.diagnosis)


class Attending(nn.Module):
    """Attention, then a dense layer with as large a result as the attention's own projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x + self.attn(x, x, x, need_weights=False)[0])


def test_parts_of_an_attention_stand_for_no_later_layer() -> None:
    torch.manual_seed(0)
    reference = Attending().eval()
    for parameter in reference.parameters():
        parameter.data.normal_()
    inputs = keras.Input((7, 12))
    attn = layers.MultiHeadAttention(3, 4, name="of_keras")
    candidate = keras.Model(inputs, layers.Dense(12, name="last")(inputs + attn(inputs, inputs)))
    rows = [porting.KeyRule("attn", "of_keras", "attention"), porting.KeyRule("fc", "last", "dense")]
    porting.port_weights(reference, candidate, rows)
    query, key = (np.asarray(part.kernel) for part in (attn.query_dense, attn.key_dense))
    attn.query_dense.kernel.assign(key)
    attn.key_dense.kernel.assign(query)
    sequences = np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)
    report = porting.check_parity(reference, candidate, sequences)
    assert [culprit.layer for culprit in report.culprits] == ["attn"]
    assert "query and key are exchanged" in str(report.diagnosis)


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        # So large that the difference of two epsilons is lost in rounding.
        self.bn.running_var = 1e4 * (torch.rand(8) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.bn(self.conv1(x)))


def test_a_norm_that_absorbed_an_epsilon_is_not_blamed() -> None:
    torch.manual_seed(0)
    reference = TwoConvolutions().eval()
    inputs = keras.Input((12, 12, 3))
    x = layers.BatchNormalization(epsilon=1e-3, name="bn")(layers.Conv2D(8, 3, name="conv1")(inputs))
    candidate = keras.Model(inputs, layers.Conv2D(4, 3, name="conv2")(x))
    rows = [
        porting.KeyRule("conv{i}", "conv{i}", "conv"),
        porting.KeyRule("bn", "bn", f"batch_norm:{1e-5 - 1e-3:+.9g}"),
    ]
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    ported = porting.port_weights(reference, candidate, rows, inputs=images).require_parity()
    kernel = np.array(candidate.get_layer("conv2").kernel)
    kernel *= np.float32(1 + 1e-6)  # as small as what the rounding of a variance costs
    candidate.get_layer("conv2").kernel.assign(kernel)
    report = porting.check_parity(reference, candidate, images, key_map=ported.key_map, waive=["bn:eps"])
    assert [culprit.layer for culprit in report.culprits] == ["conv2"]


class Classifier(nn.Module):
    """An encoder, and a head over the first token behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 8)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.fc2(torch.relu(self.fc1(x)))[:, 0]))


def test_a_dropout_is_not_blamed_for_what_it_passes_on() -> None:
    torch.manual_seed(0)
    reference = Classifier().eval()
    inputs = keras.Input((5, 6))
    encoded = keras.Input((5, 6))
    x = layers.Dense(8, name="fc2")(layers.Dense(8, activation="relu", name="fc1")(encoded))
    body = keras.Model(encoded, x, name="body")
    x = layers.Dropout(0.1, name="drop")(body(inputs)[:, 0])
    candidate = keras.Model(inputs, layers.Dense(3, name="head")(x))
    sequences = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    porting.port_weights(reference, candidate, inputs=sequences).require_parity()
    kernel = np.array(body.get_layer("fc2").kernel) * np.float32(1.001)
    body.get_layer("fc2").kernel.assign(kernel)
    report = porting.check_parity(reference, candidate, sequences)
    assert [culprit.layer for culprit in report.culprits] == ["fc2"]


class Merging(nn.Module):
    """Joins each square of four tokens, as Swin does between its stages."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(24), nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.merging, self.two = nn.Linear(6, 6), Merging(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.merging(self.one(x).relu()))


class KerasMerging(layers.Layer):  # type: ignore[misc]
    columns_first = True

    def __init__(self) -> None:
        super().__init__(name="merging")
        self.norm = layers.LayerNormalization(epsilon=1e-5, name="norm")
        self.reduction = layers.Dense(8, use_bias=False, name="reduction")

    def call(self, x: object) -> object:
        places = [(row, column) for column in (0, 1) for row in (0, 1)]
        places = places if self.columns_first else [(row, column) for column, row in places]
        parts = [x[:, row::2, column::2] for row, column in places]  # type: ignore[index]
        return self.reduction(self.norm(keras.ops.concatenate(parts, -1)))


@pytest.mark.parametrize(
    ("fault", "said"), [("one", "one: "), ("order", "merging feeds merging.norm wrongly"), ("", "")]
)
def test_code_between_layers_is_blamed_only_for_its_own_mistakes(fault: str, said: str) -> None:
    torch.manual_seed(0)
    reference = Stages().eval()
    inputs = keras.Input((8, 8, 6))
    x = layers.Dense(6, activation="relu", name="one")(inputs)
    candidate = keras.Model(inputs, layers.Dense(3, name="two")(KerasMerging()(x)))
    given = np.random.default_rng(0).normal(size=(2, 8, 8, 6)).astype(np.float32)
    porting.port_weights(reference, candidate, inputs=given)
    candidate.get_layer("merging").columns_first = fault != "order"
    if fault == "one":
        kernel = candidate.get_layer("one").kernel
        kernel.assign(kernel * (1 + 1e-3 * (np.arange(36).reshape(6, 6) == 20)))
    report = porting.check_parity(reference, candidate, given, input_axes=[(0, 1, 2, 3)])
    assert report.passed == (not fault)
    assert len(report.culprits) == bool(fault)
    assert all(str(culprit).startswith(said) for culprit in report.culprits)


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))) + x


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.attn, self.h = nn.Linear(6, 6), Shortcut(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.i(x)
        return self.h(x * 0.5 + self.attn(x) * 0.3)


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_layer_that_returns_its_last_part_alone_is_named(shortcut: bool) -> None:
    class Ours(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="attn")
            self.a, self.b = keras.layers.Dense(6, "tanh", name="a"), keras.layers.Dense(6, name="b")

        def call(self, x: Any) -> Any:
            y = self.b(self.a(x))
            return y + x if shortcut else y

    torch.manual_seed(0)
    reference, inputs = Around().eval(), keras.Input((6,))
    i, attn, h = keras.layers.Dense(6, name="i"), Ours(), keras.layers.Dense(3, name="h")
    x = i(inputs)
    candidate = keras.Model(inputs, h(x * 0.5 + attn(x) * 0.3))
    candidate.set_weights([each.detach().numpy().T for each in reference.parameters()])
    report = porting.check_parity(reference, candidate, np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    assert report.passed is shortcut, str(report)
    if not shortcut:
        (culprit,) = report.culprits
        assert culprit.layer == "attn"
        assert culprit.diagnosis is not None
        assert "attn.b instead" in culprit.diagnosis.cause
