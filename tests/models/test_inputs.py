from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

from porting.models.inputs import Inputs, leaves_by_key, make_inputs


def candidate(*shapes: tuple[int | None, ...], dtype: str = "float32") -> keras.Model:
    inputs = [keras.Input(shape, dtype=dtype) for shape in shapes]
    return keras.Model(inputs, [keras.ops.cast(each, "float32") for each in inputs])


def made(module: nn.Module, shape: tuple[int, ...], **arguments: Any) -> Inputs:
    return make_inputs(module, candidate(shape[1:]), np.ones(shape, np.float32), **arguments)


@pytest.mark.parametrize(
    ("module", "shape", "axes"),
    [
        (nn.Conv2d(3, 4, 1), (2, 6, 5, 3), (0, 2, 3, 1)),
        (nn.Conv1d(3, 4, 1), (2, 6, 3), (0, 2, 1)),
        (nn.Conv1d(6, 4, 1), (2, 6, 6), (0, 2, 1)),  # the model runs with both orders
        (nn.BatchNorm1d(3), (2, 6, 3), (0, 2, 1)),
        (nn.Linear(3, 4), (2, 6, 3), (0, 1, 2)),
        (nn.Linear(6, 4), (2, 6, 6), (0, 1, 2)),
        (nn.LSTM(3, 4, batch_first=True), (2, 6, 3), (0, 1, 2)),
        (nn.LayerNorm(6), (2, 6, 6), (0, 1, 2)),
        (nn.Conv3d(3, 4, 1), (2, 6, 5, 4, 3), (0, 2, 3, 4, 1)),
        (nn.Linear(3, 4), (2, 6, 5, 3), (0, 1, 2, 3)),
        (nn.Linear(3, 4), (2, 3), (0, 1)),
    ],
)
def test_axes_follow_from_the_module_that_takes_the_input(
    module: nn.Module, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    inputs = made(nn.Sequential(module), shape)
    assert inputs.axes == (axes,)
    assert inputs.output_axes(len(shape)) == axes
    assert inputs.output_axes(7) == (0, 1, 2, 3, 4, 5, 6)


def test_axes_can_be_stated_and_are_found_in_given_arrays() -> None:
    stated = made(nn.Sequential(nn.Linear(3, 4)), (2, 6, 3), input_axes=[(0, 2, 1)])
    assert stated.reference[0].shape == (2, 3, 6)
    given = np.random.default_rng(0).normal(size=(4, 5, 5)).astype(np.float32)
    moved = make_inputs(nn.Identity(), candidate((5, 5)), given, given.transpose(1, 0, 2))
    assert moved.axes == ((1, 0, 2),)
    other = make_inputs(nn.Identity(), candidate((5, 5)), given, given + 1)
    assert other.axes == (None,)
    assert other.described() == ("input 0: given for each side",)


def test_batches_are_cut_along_the_samples_of_each_side() -> None:
    given = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    inputs = make_inputs(nn.Identity(), candidate((5, 3)), given, given.transpose(1, 0, 2).copy())
    batch = inputs.batch(1, 3)
    assert (batch.candidate[0].shape, batch.reference[0].shape) == ((2, 5, 3), (5, 2, 3))
    np.testing.assert_array_equal(batch.reference[0].transpose(1, 0, 2), batch.candidate[0])


def test_a_whole_number_turns_nothing_off_for_the_others() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.embedding = nn.Conv2d(3, 4, 1), nn.Embedding(9, 4)

        def forward(self, image: torch.Tensor, ids: torch.Tensor) -> Any:
            return self.conv(image).mean((2, 3)) + self.embedding(ids).mean(1)

    model = candidate((6, 5, 3), (4,))
    inputs = make_inputs(Both(), model, [np.ones((2, 6, 5, 3), np.float32), np.ones((2, 4), np.int64)])
    assert inputs.axes == ((0, 2, 3, 1), (0, 1))
    assert [array.dtype.kind for array in inputs.reference] == ["f", "i"]


def test_single_samples_and_channels_first_arrays_are_taken_where_that_is_sure() -> None:
    model = candidate((6, 5, 3))
    for shape in ((6, 5, 3), (3, 6, 5)):
        given = np.ones(shape, np.float32)
        if shape == (3, 6, 5):
            given = given[None]
        assert make_inputs(nn.Conv2d(3, 4, 1), model, given).candidate[0].shape == (1, 6, 5, 3)


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ([], {}, "at least one input"),
        (np.zeros((0, 3), np.float32), {}, "at least one input"),
        ([np.ones((2, 3)), np.ones((3, 3))], {}, r"the same number of samples: got \[2, 3\]"),
        (np.ones((2, 3)), {"reference_inputs": [np.ones((2, 3))] * 2}, "2 reference_inputs for 1 inputs"),
        ({"a": np.ones((2, 3))}, {"reference_inputs": {"b": np.ones((2, 3))}}, r"the keys \['b'\], inputs \['a'\]"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_inputs(nn.Identity(), candidate((3,)), inputs, **arguments)


def test_results_of_any_form() -> None:
    from dataclasses import dataclass

    @dataclass
    class Output:
        logits: torch.Tensor
        hidden: tuple[torch.Tensor, ...] | None = None

    one = torch.ones(1)
    assert list(leaves_by_key(one)) == [""]
    assert list(leaves_by_key([one, {"a": one, "b": (one,)}])) == ["[0]", "[1].a", "[1].b[0]"]
    assert list(leaves_by_key(Output(one))) == ["logits"]
    assert list(leaves_by_key(Output(one, (one, one)))) == ["logits", "hidden[0]", "hidden[1]"]
