from __future__ import annotations

import pytest
import torch

from porting.parity.content import Library, Truth, is_in_float32


@pytest.fixture
def truth() -> Truth:
    torch.manual_seed(0)
    return Truth(torch.randn(2, 3, 4, 5, dtype=torch.float64), [("conv", True, 0)])


def library(*truths: Truth) -> Library:
    return Library(list(truths), {4: (0, 2, 3, 1)})


def test_a_tensor_finds_its_partner_among_others_in_the_order_of_the_inputs(truth: Truth) -> None:
    others = [Truth(torch.randn_like(truth.tensor)) for _ in range(5)]
    (match,) = library(*others, truth).find(truth.tensor.permute(0, 2, 3, 1))
    assert match.truth is truth
    assert match.axes == (0, 2, 3, 1)
    assert not match.reshaped
    assert not match.reordered
    assert match.distance.total().rms == 0.0


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 2, 1), (0, 3, 1, 2)])
def test_another_order_of_axes_is_found_too(truth: Truth, axes: tuple[int, ...]) -> None:
    (match,) = library(truth).find(truth.tensor.permute(axes).contiguous())
    assert match.axes == axes


def test_equal_sides_do_not_confuse_it() -> None:
    cube = Truth(torch.randn(4, 4, 4, 4, dtype=torch.float64))
    (match,) = library(cube).find(cube.tensor.permute(0, 3, 1, 2))
    assert match.axes == (0, 3, 1, 2)


def test_joined_axes_and_reordered_numbers_are_said(truth: Truth) -> None:
    (match,) = library(truth).find(truth.tensor.permute(0, 2, 3, 1).reshape(2, 20, 3))
    assert match.reshaped
    (match,) = library(truth).find(truth.tensor.reshape(2, -1)[:, torch.randperm(60)])
    assert match.reordered
    assert library(truth).find(truth.tensor[[1, 0]].reshape(2, -1)[:, torch.randperm(60)]) == []


@pytest.mark.parametrize("size", [1e-6, 1e-8, 1e-10])
def test_a_small_difference_is_none_of_it(truth: Truth, size: float) -> None:
    other = truth.tensor.permute(0, 2, 3, 1).clone()
    other[0, 0, 0, 0] += size * truth.rms * other.numel() ** 0.5
    assert library(truth).find(other) == []
    assert library(truth).find(truth.tensor.permute(0, 2, 3, 1) * (1 + 1e-15)) != []


def test_the_same_moments_are_not_enough(truth: Truth) -> None:
    assert library(truth).find(-truth.tensor) == []


def test_a_part_is_found_and_which(truth: Truth) -> None:
    whole = Truth(torch.randn(2, 7, 12, dtype=torch.float64))
    for index, part in enumerate(whole.tensor.chunk(3, -1)):
        assert library(whole).find_part(part) == (whole, index, 3)
    assert library(whole).find_part(torch.randn(2, 7, 4, dtype=torch.float64)) is None


def test_zeros_are_zeros() -> None:
    zeros = Truth(torch.zeros(2, 6, dtype=torch.float64))
    assert library(zeros).find(torch.zeros(2, 6, dtype=torch.float64)) != []
    assert library(zeros).find(torch.full((2, 6), 1e-3, dtype=torch.float64)) == []


def test_float32_inside_shows() -> None:
    values = torch.randn(1000, dtype=torch.float64)
    assert not is_in_float32(values)
    assert is_in_float32(values.float().double())
    values[:999] = values[:999].float().double()
    assert not is_in_float32(values)
