"""Key maps found by running both models. Names do not matter, and no wrong row is ever proven."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting
import van_tf
from porting.errors import KeyMapError
from porting.models.traverse import named_variables
from porting.proposing.proposal import LIKELY, OPEN, PROVEN, Proposal, propose_map
from porting.references.van import build_van

IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 6)).astype(np.int32)


class Residual(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, x: Any) -> Any:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.bn3(self.down(x)))


class ResNet(nn.Module):
    """A model whose shortcut looks like the branch beside it, with a Flatten before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 3, 2, 1), nn.Sequential(Residual(6, 6), Residual(6, 8))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8 * 16, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def keras_resnet(
    name: Callable[[str], str], *, norm_epsilon: float = 1e-5, same: bool = False, swapped: bool = False
) -> Any:
    def conv(out: int, label: str, **options: Any) -> Any:
        return layers.Conv2D(out, 3, padding="same", use_bias=False, name=name(label), **options)

    def norm(label: str) -> Any:
        return layers.BatchNormalization(epsilon=norm_epsilon, momentum=0.9, name=name(label))

    inputs = keras.Input((16, 16, 3))
    if same:
        x = layers.Conv2D(6, 3, 2, padding="same", name=name("stem"))(inputs)
    else:
        x = layers.Conv2D(6, 3, 2, name=name("stem"))(layers.ZeroPadding2D(1)(inputs))
    for index, out in enumerate((6, 8)):
        if swapped:  # the shortcut is written before the branch
            shortcut = norm(f"block{index}_bn3")(conv(out, f"block{index}_down")(x))
        y = layers.ReLU()(norm(f"block{index}_bn1")(conv(out, f"block{index}_conv1")(x)))
        y = norm(f"block{index}_bn2")(conv(out, f"block{index}_conv2")(y))
        if not swapped:
            shortcut = norm(f"block{index}_bn3")(conv(out, f"block{index}_down")(x))
        x = layers.ReLU()(layers.Add()([y, shortcut]))
    return keras.Model(inputs, layers.Dense(5, name=name("head"))(layers.Flatten()(layers.MaxPooling2D(2)(x))))


class Encoder(nn.Module):
    """A model with similar queries, keys and values, single parameters, tokens and positions."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.blocks = nn.ModuleList(EncoderBlock() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        x = self.tokens(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class EncoderBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

    def forward(self, x: Any) -> Any:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(2, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.gamma1 * self.out(y)
        return x + self.gamma2 * self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Positions(layers.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x: Any) -> Any:
        return x + self.table


class Scaled(layers.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale


def keras_encoder(name: Callable[[str], str], depth: int = 2) -> Any:
    inputs = keras.Input((6,), dtype="int32")
    x = Positions(name=name("positions"))(layers.Embedding(20, 8, name=name("tokens"))(inputs))
    for index in range(depth):
        own = f"layer_{index}_"
        y = layers.LayerNormalization(epsilon=1e-5, name=name(f"{own}norm1"))(x)
        y = layers.MultiHeadAttention(2, 4, name=name(f"{own}attention"))(y, y)
        x = layers.Add()([x, Scaled(name=name(f"{own}gamma1"))(y)])
        y = layers.LayerNormalization(epsilon=1e-5, name=name(f"{own}norm2"))(x)
        y = layers.Dense(8, name=name(f"{own}fc2"))(layers.Dense(16, "gelu", name=name(f"{own}fc1"))(y))
        x = layers.Add()([x, Scaled(name=name(f"{own}gamma2"))(y)])
    x = layers.LayerNormalization(epsilon=1e-5, name=name("norm"))(x)
    return keras.Model(inputs, layers.Dense(4, name=name("head"))(layers.GlobalAveragePooling1D()(x)))


def shuffled(seed: int) -> Callable[[str], str]:
    """Return a function that replaces names by meaningless ones, always the same for the same name."""
    rng = random.Random(seed)
    known: dict[str, str] = {}
    return lambda label: known.setdefault(label, "".join(rng.choices(string.ascii_lowercase, k=9)))


def plain(label: str) -> str:
    return label


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Callable[[str], str]], Any], Any]] = {
    "resnet": (ResNet, keras_resnet, IMAGES),
    "resnet written in another order": (ResNet, lambda name: keras_resnet(name, swapped=True), IMAGES),
    "encoder": (Encoder, keras_encoder, TOKENS),
}


def made(case: str, names: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    build, build_keras, inputs = MODELS[case]
    return build().eval(), build_keras(plain if names == "named" else shuffled(1)), inputs


@pytest.mark.parametrize("names", ["named", "renamed"])
@pytest.mark.parametrize("case", MODELS)
def test_every_row_is_found_and_right(case: str, names: str) -> None:
    reference, model, inputs = made(case, names)
    before = [np.array(variable) for variable in model.weights]
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    proposal = propose_map(reference, model, inputs, check=False)
    assert proposal.complete, str(proposal)
    assert all(row.confidence == PROVEN for row in proposal.rows), str(proposal)
    assert all(np.array_equal(one, np.array(other)) for one, other in zip(before, model.weights, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())
    ported = porting.port_weights(reference, model, proposal.key_map, inputs=inputs)
    assert ported.require_parity()
    # The rows agree with the key map.
    again = porting.port_weights(reference, model, proposal.rules, inputs=inputs)
    assert again.require_parity()


def test_van_is_mapped_in_one_go() -> None:
    reference, model = build_van("nano", 10).eval(), van_tf.van_nano()
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    proposal = propose_map(reference, model, images, check=False)
    assert proposal.complete, str(proposal)
    for row in proposal.rows:
        assert row.source == re.sub(r"^(block\d)_", r"\1.", row.target).replace("/", "."), row
    assert proposal.summary.startswith("97 rows proven, 0 likely, 0 open")


def test_weights_are_ported_without_any_map() -> None:
    reference, model, inputs = made("encoder", "renamed")
    assert porting.port_weights(reference, model, inputs=inputs).require_parity()
    with pytest.raises(KeyMapError, match="port_weights needs inputs"):
        porting.port_weights(reference, model)


def wrong(proposal: Proposal, right: dict[str, str]) -> list[str]:
    """The rows that are marked as proven and are wrong."""
    return [
        f"{r.source} -> {r.target}" for r in proposal.rows if r.confidence == PROVEN and right[r.target] != r.source
    ]


PARTS = ("conv1", "conv2", "bn1", "bn2", "bn3", "down")
RESNET_ROWS = {
    "stem": "stem",
    "head": "head",
    **{
        f"block{i}_{part}": f"blocks.{i}.{part}"
        for i in range(2)
        for part in ("conv1", "conv2", "bn1", "bn2", "bn3", "down")
    },
}


@pytest.mark.parametrize(
    ("options", "said"),
    [({"norm_epsilon": 1e-3}, "eps is 0.001 in Keras, 1e-05 in PyTorch"), ({"same": True}, "padding is asymmetric")],
    ids=["epsilon", "padding"],
)
def test_where_the_two_are_not_the_same_network_is_said_and_nothing_wrong_is_proven(
    options: dict[str, Any], said: str
) -> None:
    torch.manual_seed(0)
    reference, model = ResNet().eval(), keras_resnet(plain, **options)
    proposal = propose_map(reference, model, IMAGES, check=False)
    assert not proposal.complete
    assert said in str(proposal)
    assert wrong(proposal, RESNET_ROWS) == []
    assert {row.target: row.source for row in proposal.rows} == RESNET_ROWS
    with pytest.raises(KeyMapError, match="could not be mapped completely"):
        porting.port_weights(reference, model, inputs=IMAGES)


def test_what_one_side_lacks_is_named() -> None:
    reference, model, inputs = made("encoder", "named")
    reference.spare = nn.Linear(3, 3)
    extra = keras.Model(model.input, [model.output, layers.Dense(7, name="extra")(model.output)])
    proposal = propose_map(reference, extra, inputs, check=False)
    assert proposal.unused_sources == ("spare.bias", "spare.weight")
    assert proposal.unfilled_targets == ("extra/bias", "extra/kernel")
    assert [row.confidence for row in proposal.rows if row.target == "extra"] == [OPEN]


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return self.a(x) + self.b(x)


def test_a_tie_that_no_input_can_settle_is_called_one() -> None:
    inputs = keras.Input((6,))
    model = keras.Model(
        inputs, layers.Add()([layers.Dense(6, name="one")(inputs), layers.Dense(6, name="two")(inputs)])
    )
    proposal = propose_map(Twins().eval(), model, np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32))
    assert [row.confidence for row in proposal.rows] == [LIKELY, LIKELY]
    assert all("interchangeable with" in row.why for row in proposal.rows)
    assert proposal.agrees


def test_a_person_can_fix_rows() -> None:
    inputs = keras.Input((6,))
    model = keras.Model(
        inputs, layers.Add()([layers.Dense(6, name="one")(inputs), layers.Dense(6, name="two")(inputs)])
    )
    given = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    proposal = propose_map(Twins().eval(), model, given, pairs={"b": "one"}, check=False)
    assert {row.target: row.source for row in proposal.rows} == {"one": "b", "two": "a"}
    with pytest.raises(KeyMapError, match="'c' is no module"):
        propose_map(Twins().eval(), model, given, pairs={"c": "one"})
    with pytest.raises(KeyMapError, match="'three' is no layer"):
        propose_map(Twins().eval(), model, given, pairs={"a": "three"})


def test_stacks_of_recurrent_layers() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Any) -> Any:
            return self.out(self.rnn(x)[0])

    inputs = keras.Input((7, 5))
    x = layers.LSTM(6, return_sequences=True, name="upper")(layers.LSTM(6, return_sequences=True, name="lower")(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="out")(x))
    given = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    proposal = propose_map(Stack().eval(), model, given, check=False)
    assert proposal.complete, str(proposal)
    assert [(row.target, row.kind) for row in proposal.rows] == [
        ("lower", "recurrent"),
        ("upper", "recurrent:l1"),
        ("out", "dense"),
    ]
    assert len(named_variables(model)) == 8


def test_another_epsilon_goes_into_the_variance_where_that_is_wanted() -> None:
    torch.manual_seed(0)
    reference, model = ResNet().eval(), keras_resnet(plain, norm_epsilon=1e-3)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.uniform_(0.5, 2.0)
    with pytest.raises(
        KeyMapError, match="--absorb-epsilon, or absorb_epsilon=True, puts the difference into the variance"
    ):
        porting.port_weights(reference, model, inputs=IMAGES)
    ported = porting.port_weights(reference, model, inputs=IMAGES, absorb_epsilon=True)
    assert ported.require_parity()
    assert {pair.kind for pair in ported.key_map.layers} == {"conv", "batch_norm:-0.00099", "dense:8x4x4"}
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    porting.revert_weights(model, reference, ported.key_map)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=0)
    with torch.no_grad():
        dict(reference.named_buffers())["blocks.0.bn1.running_var"].fill_(1e-4)
    with pytest.raises(KeyMapError, match="is too small for an epsilon that is 0.00099 greater"):
        porting.port_weights(reference, model, ported.key_map)


class Fused(nn.Module):
    """A model that computes queries, keys and values with one dense layer, as timm and many others do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_joined_projections_are_attention() -> None:
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4, name="mha")(inputs, inputs))
    given = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    reference = Fused().eval()
    proposal = propose_map(reference, model, given, check=False)
    assert proposal.complete, str(proposal)
    assert {(row.source, row.target, row.kind) for row in proposal.rows} == {
        ("qkv", "mha", "qkv"),
        ("proj", "mha/attention_output", "dense"),
    }
    ported = porting.port_weights(reference, model, proposal.rules, inputs=given)
    assert ported.require_parity()
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    porting.revert_weights(model, reference, ported.key_map)
    assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())


class Separated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dw, self.pw = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.dw2, self.pw2 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.Conv2d(6, 6, 1)

    def forward(self, x: Any) -> Any:
        return self.pw2(self.dw2(torch.relu(self.bn(self.pw(self.dw(x))))))


def test_a_separable_convolution_takes_two_modules() -> None:
    inputs = keras.Input((8, 8, 4))
    x = layers.SeparableConv2D(6, 3, padding="same", use_bias=False, name="one")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name="norm")(x))
    model = keras.Model(inputs, layers.SeparableConv2D(6, 3, padding="same", name="two")(x))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    reference = Separated().eval()
    proposal = propose_map(reference, model, images, check=False)
    assert proposal.complete, str(proposal)
    assert [(row.source, row.target, row.kind) for row in proposal.rows] == [
        ("dw", "one", "separable_depthwise"),
        ("pw", "one", "separable_pointwise"),
        ("bn", "norm", "batch_norm"),
        ("dw2", "two", "separable_depthwise"),
        ("pw2", "two", "separable_pointwise"),
    ]
    assert porting.port_weights(reference, model, proposal.short_rules, inputs=images).require_parity()


class Embedded(nn.Module):
    """RoBERTa's beginning: positions with rows for padding, and a table of types that is added to every token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.types = nn.Embedding(20, 8), nn.Embedding(8, 8), nn.Embedding(1, 8)
        self.norm, self.fc, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        places = torch.arange(x.shape[1]) + 2
        y = self.words(x) + self.positions(places) + self.types(torch.zeros_like(x))
        return self.out(torch.relu(self.fc(self.norm(y))))


def embedded(factor: float = 1.0) -> Any:
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, name="words")(inputs)
    x = layers.Rescaling(factor, name="factor")(Positions(name="positions")(x))
    x = layers.Dense(8, "relu", name="fc")(layers.LayerNormalization(epsilon=1e-5, name="norm")(x))
    return keras.Model(inputs, layers.Dense(3, name="out")(x))


def test_rows_for_padding_and_a_table_that_must_be_zero_are_found() -> None:
    reference, model = Embedded().eval(), embedded()
    proposal = propose_map(reference, model, TOKENS, check=False)
    assert proposal.agrees, str(proposal)
    assert not proposal.complete  # only where that table is zero
    assert proposal.zeros == ("types.weight",)
    assert "types.weight, which must hold zeros" in str(proposal)
    kinds = {row.source: row.kind for row in proposal.rows}
    assert kinds["positions.weight"] == "parameter:+2"
    assert all(row.confidence == PROVEN for row in proposal.rows)
    # The map refuses weights that have something there.
    with pytest.raises(KeyMapError, match=r"types\.weight"):
        porting.port_weights(reference, model, proposal.key_map)
    with pytest.raises(KeyMapError, match=r"types\.weight: no row takes it, and it must hold zeros"):
        porting.port_weights(reference, model, inputs=TOKENS)
    reference.types.weight.data.zero_()
    assert porting.port_weights(reference, model, inputs=TOKENS).require_parity()


def test_the_walk_goes_on_where_the_trail_is_lost() -> None:
    reference = Embedded().eval()
    proposal = propose_map(reference, embedded(factor=0.5), TOKENS)
    assert not proposal.agrees
    assert proposal.unused_sources == ("types.weight",)
    assert {row.target: (row.source, row.confidence) for row in proposal.rows} == {
        "words": ("words", LIKELY),  # nothing that follows is PyTorch's
        "positions/table": ("positions.weight", LIKELY),
        "norm": ("norm", LIKELY),  # its input is not PyTorch's
        "fc": ("fc", LIKELY),
        "out": ("out", LIKELY),
    }
    assert proposal.report is not None
    assert not proposal.report.passed


class Stages(nn.Module):
    """Blocks of equal shapes, one after another."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(depth))
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.norm(x).mean((2, 3)))


def stages(depth: int) -> Any:
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    for index in range(depth):
        x = layers.Conv2D(6, 3, padding="same", activation="tanh", name=f"block{index}")(x)
    x = layers.GlobalAveragePooling2D()(layers.BatchNormalization(epsilon=1e-5, name="norm")(x))
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


@pytest.mark.parametrize(("theirs", "ours"), [(4, 3), (3, 4)])
def test_nothing_wrong_is_proven_where_a_block_is_missing(theirs: int, ours: int) -> None:
    torch.manual_seed(0)
    proposal = propose_map(Stages(theirs).eval(), stages(ours), IMAGES, check=False)
    assert not proposal.complete
    right = {"stem": "stem", "norm": "norm", "head": "head"} | {f"block{i}": f"blocks.{i}" for i in range(4)}
    assert wrong(proposal, right) == []
    assert not any(row.confidence == PROVEN for row in proposal.rows)
    found = {row.target: row.source for row in proposal.rows}
    assert found.items() >= {("stem", "stem"), ("block0", "blocks.0"), ("block1", "blocks.1")}


def test_rows_of_a_half_finished_map_are_kept() -> None:
    inputs = keras.Input((6,))
    model = keras.Model(
        inputs, layers.Add()([layers.Dense(6, name="one")(inputs), layers.Dense(6, name="two")(inputs)])
    )
    given = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    rows = [porting.KeyRule("b", "one", "dense")]
    proposal = propose_map(Twins().eval(), model, given, rows=rows, check=False)
    assert {row.target: row.source for row in proposal.rows} == {"one": "b", "two": "a"}
    with pytest.raises(KeyMapError, match="'three' is no layer"):
        propose_map(Twins().eval(), model, given, rows=[porting.KeyRule("b", "three", "dense")])
    with pytest.raises(KeyMapError, match="matches"):
        propose_map(Twins().eval(), model, given, rows=[porting.KeyRule("c", "one", "dense")])


class WithConstants(nn.Module):
    """Constants as buffers, which Keras has in its code: a mean to subtract, and a window."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.register_buffer("mean", torch.tensor([0.5, -1.0, 2.0]))
        self.register_buffer("window", torch.tensor([0.25, 0.75, 0.5]))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc((x - self.get_buffer("mean")) * self.get_buffer("window"))


@pytest.mark.parametrize("wrong", [False, True])
def test_buffers_that_keras_has_in_its_code_need_no_row(wrong: bool) -> None:
    inputs = keras.Input((3,))
    mean = np.array([0.5, -1.0, 2.5 if wrong else 2.0])
    x = layers.Dense(2)((inputs - mean) * np.array([0.25, 0.75, 0.5]))
    candidate, reference = keras.Model(inputs, x), WithConstants().eval()
    given = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    if wrong:
        with pytest.raises(KeyMapError, match="mean: no row takes it"):
            porting.port_weights(reference, candidate, inputs=given)
        return
    ported = porting.port_weights(reference, candidate, inputs=given)
    assert ported.require_parity().dropped == ("mean", "window")


def test_a_constant_that_no_result_depends_on_is_not_dropped() -> None:
    class Capped(WithConstants):
        def forward(self, x: torch.Tensor) -> Any:
            return self.fc(torch.minimum(x, 100 + self.get_buffer("window")))

    inputs = keras.Input((3,))
    candidate = keras.Model(inputs, layers.Dense(2)(inputs))
    given = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    with pytest.raises(KeyMapError, match="window: no row takes it"):
        porting.port_weights(Capped().eval(), candidate, inputs=given)


def test_a_map_that_fails_names_the_layer_and_the_cause() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.act, self.two, self.three = (
                nn.Linear(6, 8),
                nn.SiLU(inplace=True),
                nn.Linear(8, 7),
                nn.Linear(7, 3),
            )

        def forward(self, x: torch.Tensor) -> Any:
            return self.three(torch.tanh(self.two(self.act(self.one(x)))))

    inputs = keras.Input((6,))
    x = layers.Dense(7, activation="tanh", name="b")(
        layers.Activation("gelu", name="g")(layers.Dense(8, name="a")(inputs))
    )
    candidate = keras.Model(inputs, layers.Dense(3, name="c")(x))
    given = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    with pytest.raises(KeyMapError, match=r"act.*GELU \(erf\) instead of SiLU"):
        porting.port_weights(Two().eval(), candidate, inputs=given)
    assert "GELU (erf) instead of SiLU" in propose_map(Two().eval(), candidate, given).summary
