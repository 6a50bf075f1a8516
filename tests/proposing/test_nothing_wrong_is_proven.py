"""Pairs in which more than one map gives the same outputs, or in which a wrong one is easily taken for right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import porting
import porting.progress
from porting.models.traverse import named_variables
from porting.proposing.proposal import LIKELY, PROVEN, Proposal

X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


class Net(nn.Module):
    """Linear layers by name, and a function that puts them together."""

    def __init__(self, run: Callable[[Any, Any], Any], **sizes: tuple[int, int]) -> None:
        super().__init__()
        self.run = run
        for name, (given, made) in sizes.items():
            setattr(self, name, nn.Linear(given, made))

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def proposed(reference: nn.Module, outputs: Callable[[Any], Any], given: Any = X, **arguments: Any) -> Proposal:
    torch.manual_seed(0)
    inputs = keras.Input(given.shape[1:])
    # The proof is the search's; the parity check that ends a proposal is tested elsewhere.
    return porting.propose_map(reference.eval(), keras.Model(inputs, outputs(inputs)), given, check=False, **arguments)


def dense(name: str, size: int = 6, activation: str | None = None) -> Any:
    return layers.Dense(size, activation, name=name)


def proven(proposal: Proposal) -> set[tuple[str, str]]:
    return {(row.source, row.target) for row in proposal.rows if row.confidence == PROVEN}


def test_two_heads_whose_results_have_other_names_are_a_tie() -> None:
    reference = Net(lambda net, x: (net.scores(x), net.boxes(x)), scores=(6, 4), boxes=(6, 4))
    proposal = proposed(reference, lambda x: {"boxes": dense("boxes", 4)(x), "scores": dense("scores", 4)(x)})
    assert proven(proposal) == set()
    assert any("paired by place" in line for line in proposal.differences)


def test_the_one_result_of_two_that_keras_has_may_be_either() -> None:
    reference = Net(lambda net, x: (net.one(x), net.two(x)), one=(6, 4), two=(6, 4))
    assert proven(proposed(reference, lambda x: dense("two", 4)(x))) == set()


def test_no_row_is_proven_where_an_activation_differs() -> None:
    def run(net: Any, x: Any) -> Any:
        return net.d(net.a3(net.a2(net.a1(x))) * torch.sigmoid(net.b3(net.b2(net.b1(x)))))

    names = ("a1", "a2", "a3", "b1", "b2", "b3", "d")

    def outputs(x: Any) -> Any:
        a, b = x, x
        for index in (1, 2, 3):
            a, b = dense(f"a{index}")(a), dense(f"b{index}")(b)
        return dense("d")(layers.Multiply()([a, layers.Activation("hard_sigmoid")(b)]))

    proposal = proposed(Net(run, **dict.fromkeys(names, (6, 6))), outputs)
    assert not proposal.agrees
    assert proven(proposal) == set()
    # Names order the trials, and the first trial stands where no other leads further.
    assert {row.target: row.source for row in proposal.rows} == {name: name for name in names}


def test_a_tie_is_found_after_going_back() -> None:
    reference = Net(lambda net, x: torch.sigmoid(net.x(x)) * (net.a(x) + net.b(x)), x=(6, 6), a=(6, 6), b=(6, 6))

    def outputs(x: Any) -> Any:
        one, other, gate = dense("x")(x), dense("x_1")(x), dense("zzz", 6, "sigmoid")(x)
        return layers.Multiply()([layers.Add()([one, other]), gate])

    proposal = proposed(reference, outputs)
    assert proposal.agrees
    assert proven(proposal) == {("x", "zzz")}


class Maps(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.conv, self.relu, self.functional = nn.Conv2d(3, 4, 3), nn.ReLU(), functional
        self.a, self.b = nn.Linear(144, 5), nn.Linear(144, 5)

    def forward(self, x: Any) -> Any:
        y = torch.relu(self.conv(x)) if self.functional else self.relu(self.conv(x))
        y = y.flatten(1)
        return self.a(y) + self.b(y)


@pytest.mark.parametrize("functional", [True, False])
def test_a_tie_behind_a_flatten_is_found(functional: bool) -> None:
    def outputs(x: Any) -> Any:
        y = layers.Flatten()(layers.Conv2D(4, 3, activation="relu", name="conv")(x))
        return layers.Add()([dense("a", 5)(y), dense("b", 5)(y)])

    proposal = proposed(Maps(functional), outputs, IMAGES)
    assert proposal.complete, str(proposal)
    assert proven(proposal) == {("conv", "conv")}
    assert {row.kind for row in proposal.rows if row.target in "ab"} == {"dense:4x6x6"}


def test_one_pair_that_can_be_told_apart_does_not_prove_another() -> None:
    def run(net: Any, x: Any) -> Any:
        return net.d(net.a(x) * torch.sigmoid(net.b(x)) + net.t1(x) + net.t2(x))

    def outputs(x: Any) -> Any:
        product = layers.Multiply()([dense("a")(x), dense("b", 6, "sigmoid")(x)])
        return dense("d")(layers.Add()([product, dense("t1")(x), dense("t2")(x)]))

    proposal = proposed(Net(run, **dict.fromkeys(("a", "b", "t1", "t2", "d"), (6, 6))), outputs)
    assert proposal.agrees
    assert proven(proposal) == {("a", "a"), ("b", "b"), ("d", "d")}


def test_chains_that_could_be_exchanged_as_a_whole_are_ties() -> None:
    reference = Net(
        lambda net, x: net.a2(net.a1(x)) + net.b2(net.b1(x)), **dict.fromkeys(("a1", "a2", "b1", "b2"), (6, 6))
    )
    proposal = proposed(reference, lambda x: layers.Add()([dense("p2")(dense("p1")(x)), dense("q2")(dense("q1")(x))]))
    assert proposal.agrees
    assert proven(proposal) == set()


def test_a_head_that_no_compared_result_needs_is_not_proven_where_two_would_do() -> None:
    def run(net: Any, x: Any) -> Any:
        net.aux1(x), net.aux2(x)
        return net.out(x)

    reference = Net(run, aux1=(6, 4), aux2=(6, 4), out=(6, 2))
    proposal = proposed(reference, lambda x: [dense("out", 2)(x), dense("side", 4)(x)])
    assert ("aux1", "side") not in proven(proposal)
    assert ("aux2", "side") not in proven(proposal)


class Idle(layers.Layer):  # type: ignore[misc]
    """A layer with a parameter that it does not use."""

    def build(self, shape: Any) -> None:
        self.token = self.add_weight(shape=(7,), name="token")

    def call(self, x: Any) -> Any:
        return x


def test_a_parameter_that_nothing_uses_is_not_proven() -> None:
    reference = Net(lambda net, x: net.out(x), out=(6, 2))
    reference.mask = nn.Parameter(torch.ones(7))
    proposal = proposed(reference, lambda x: dense("out", 2)(Idle(name="idle")(x)))
    assert {row.target: row.confidence for row in proposal.rows} == {"idle/token": LIKELY, "out": PROVEN}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(6))

    def forward(self, x: Any) -> Any:
        return x * self.factor


class Scaled(layers.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.own = self.add_weight(shape=(shape[-1],), name="own")

    def call(self, x: Any) -> Any:
        return x * self.own


class TwoScales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = Scale(), Scale(), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.d(self.a(x) * torch.sigmoid(self.b(x)))


def test_parameters_of_two_modules_that_take_one_tensor_are_told_apart() -> None:
    def outputs(x: Any) -> Any:
        gate = layers.Activation("sigmoid")(Scaled(name="gate")(x))
        return dense("d", 3)(layers.Multiply()([gate, Scaled(name="plain")(x)]))

    proposal = proposed(TwoScales(), outputs)
    assert proposal.complete, str(proposal)
    assert proven(proposal) == {("b.factor", "gate/own"), ("a.factor", "plain/own"), ("d", "d")}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("steps", torch.arange(4))

    def forward(self, x: Any) -> Any:
        return self.head(torch.tanh(self.fc(self.words(x))))


TOKENS = np.random.default_rng(0).integers(0, 20, (2, 5))


def test_tied_weights_go_from_one_pytorch_model_to_another() -> None:
    torch.manual_seed(0)
    old, new = Tied().eval(), Tied().eval()
    proposal = porting.propose_map(old, new, TOKENS)
    assert proposal.complete, str(proposal)
    proposal.copy_weights(old, new)
    torch.testing.assert_close(old(torch.from_numpy(TOKENS)), new(torch.from_numpy(TOKENS)))


class Normed(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, width))
        self.act, self.b = nn.ReLU(inplace=True), nn.Linear(width, 1)

    def forward(self, x: Any) -> Any:
        return self.b(self.act(self.a(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_norm_and_half_precision_go_over(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    old, new = Normed().eval().to(dtype), Normed().eval()
    proposal = porting.propose_map(old, new, X)
    assert proposal.complete, str(proposal)
    proposal.copy_weights(old, new)
    given = torch.from_numpy(X)
    torch.testing.assert_close(old.float()(given), new(given), rtol=1e-2, atol=1e-2)


def test_a_head_of_one_number_is_judged_on_one_sample() -> None:
    given = np.random.default_rng(0).normal(size=(1, 2000)).astype(np.float32)
    reference = Net(lambda net, x: net.head(net.body(x)), body=(2000, 4), head=(4, 1))
    proposal = proposed(reference, lambda x: dense("h", 1)(dense("b", 4)(x)), given)
    assert proposal.complete, str(proposal)


def test_a_keras_model_that_was_never_called_is_built_in_its_own_type() -> None:
    reference = Net(lambda net, x: net.two(torch.relu(net.one(x))), one=(6, 4), two=(4, 3))
    model = keras.Sequential([layers.Dense(4, "relu", name="one"), layers.Dense(3, name="two")])
    proposal = porting.propose_map(reference.eval(), model, X, check=False)
    assert proposal.complete, str(proposal)
    assert {variable.dtype for variable in named_variables(model).values()} == {"float32"}


def test_a_long_chain_of_another_activation_ends_soon() -> None:
    names = [f"layer{index}" for index in range(24)]

    def run(net: Any, x: Any) -> Any:
        for name in names:
            x = torch.tanh(getattr(net, name)(x))
        return x

    def outputs(x: Any) -> Any:
        for name in names:
            x = dense(name, 6, "softsign")(x)
        return x

    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    class Counting(porting.progress.Progress):
        def __call__(self, description: str, done: int = 0, total: int = 0) -> None:
            count()

    proposal = proposed(Net(run, **dict.fromkeys(names, (6, 6))), outputs, progress=Counting())
    assert proven(proposal) == set()
    assert calls < 10 * len(names)


def test_inputs_of_different_lengths_are_refused() -> None:
    reference = Net(lambda net, x: net.a(x), a=(6, 6))
    with pytest.raises(ValueError, match="same number of samples"):
        porting.propose_map(reference, reference, [X, X[:2]])
