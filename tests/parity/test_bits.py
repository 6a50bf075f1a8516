"""The comparison of weights bit by bit, whatever types and layouts the numbers have."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

from porting.kinds.transforms import CONVOLUTION, IDENTITY, Transform
from porting.mapping.key_map import KeyMap, TensorEntry
from porting.parity.bits import Bits, compare_bits

SHAPE = (5, 4, 3, 2)


def compared(tensor: torch.Tensor, values: Any, transform: Transform = IDENTITY, dtype: str = "float32") -> Bits:
    module = nn.Module()
    module.weight = nn.Parameter(tensor, requires_grad=False)
    variable = keras.Variable(values, dtype=dtype)
    return compare_bits(
        module, {"kernel": variable}, KeyMap((), (TensorEntry.one("weight", "kernel", transform),), frozenset())
    )


@pytest.fixture
def numbers() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))


def test_a_transposed_kernel_is_a_copy(numbers: torch.Tensor) -> None:
    kernel = numbers.numpy().transpose(2, 3, 1, 0)
    bits = compared(numbers, kernel, CONVOLUTION)
    assert bits == Bits(frozenset({"kernel"}), {}, frozenset({"kernel"}))
    wrong = kernel.copy()
    wrong[1, 0, 3, 2] = np.nextafter(wrong[1, 0, 3, 2], np.inf)
    (text,) = compared(numbers, wrong, CONVOLUTION).differing.values()
    assert text.startswith("kernel[1, 0, 3, 2] is ")


def test_numbers_that_are_none_are_the_same_in_the_same_place(numbers: torch.Tensor) -> None:
    numbers[0, 1, 2, 0], numbers[4, 0, 0, 0] = math.nan, math.inf
    assert not compared(numbers, numbers.numpy()).differing
    other = numbers.numpy().copy()
    other[0, 1, 2, 0], other[0, 1, 2, 1] = 1.0, math.nan
    (text,) = compared(numbers, other).differing.values()
    assert text.startswith("kernel[0, 1, 2, 0] is 1 and should be nan")
    assert "2 of 120 numbers differ" in text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("of_torch", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_other_types_hold_the_same_numbers_or_not(numbers: torch.Tensor, dtype: str, of_torch: torch.dtype) -> None:
    few = (numbers * 8).round().to(of_torch)  # which every type holds
    assert not compared(few, few.float().numpy(), dtype=dtype).differing
    wrong = few.float().numpy().copy()
    wrong[0, 0, 0, 1] += 1
    assert compared(few, wrong, dtype=dtype).differing


@pytest.mark.parametrize("value", [3.0, -0.0])
def test_a_single_number(value: float) -> None:
    assert not compared(torch.tensor(value), value).differing
    assert compared(torch.tensor(value), 2.0).differing


def test_another_shape(numbers: torch.Tensor) -> None:
    (text,) = compared(numbers, np.zeros((5, 4, 6))).differing.values()
    assert text == "kernel has the shape (5, 4, 6) and should have (5, 4, 3, 2)"
