"""The float64 model must compute what PyTorch computes, only faster."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from porting.models.float64 import in_float64, staying_in_float64


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5},
        {"kernel_size": 7, "padding": 9, "dilation": 3},
        {"kernel_size": (3, 5), "padding": (4, 0), "dilation": (2, 1), "bias": False},
        {"kernel_size": (1, 2), "padding": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(5, 5), (11, 8)], ids=str)
def test_a_depthwise_convolution_is_pytorchs(settings: dict[str, Any], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(6, 6, groups=6, **settings)
    images = torch.randn(2, 6, *size, dtype=torch.float64)
    truth = in_float64(module)
    assert "forward" in vars(truth)
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(images)
        torch.testing.assert_close(truth(images), expected, rtol=1e-12, atol=1e-14)
        # Also with channels last in memory, and one image without a batch axis.
        torch.testing.assert_close(
            truth(images.to(memory_format=torch.channels_last)), expected, rtol=1e-12, atol=1e-14
        )
        torch.testing.assert_close(truth(images[0]), expected[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(6, 6, 3),
        nn.Conv2d(6, 12, 3, groups=6),
        nn.Conv2d(6, 6, 3, stride=2, groups=6),
        nn.Conv2d(6, 6, 3, padding="same", groups=6),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect"),
        type("Own", (nn.Conv2d,), {})(6, 6, 3, groups=6),
    ],
    ids=lambda module: f"{type(module).__name__}: {module.extra_repr()}",
)
def test_every_other_convolution_is_left_alone(module: nn.Conv2d) -> None:
    assert "forward" not in vars(in_float64(module))


def test_an_image_smaller_than_the_kernel_is_pytorchs_own_error() -> None:
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        in_float64(nn.Conv2d(3, 3, 5, groups=3))(torch.zeros(1, 3, 4, 4, dtype=torch.float64))


class CarefulSoftmax(nn.Module):
    """Casts to float32 whatever the precision of the model, as transformers does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)
        return scores + x.float().mean().to(torch.float32) + x.to(torch.float32).sum(dtype=torch.float32)


def test_a_models_own_casts_to_float32_do_not_round_the_truth() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    with staying_in_float64():
        found = CarefulSoftmax()(x)
    assert torch.equal(found, x.softmax(-1) + x.mean() + x.sum())
    assert found.dtype == torch.float64
    assert CarefulSoftmax()(x).sub(found).abs().max() > 1e-9
    in_float32 = x.float()
    assert in_float32.dtype == torch.float32
    with staying_in_float64():
        assert CarefulSoftmax()(in_float32).dtype == torch.float32


class Rotary(nn.Module):
    """Makes positions and a scale in float32 in its forward, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.tensor([0.1, 0.7]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[0])[None, :].float()
        angles = self.frequencies[:, None].float() @ positions
        mask = (positions > 1).to(torch.float32) + torch.ones(x.shape[0], dtype=torch.float32)
        return x + angles.sum() + mask @ x


def test_positions_become_float64_as_well() -> None:
    model, x = Rotary(), torch.randn(4, dtype=torch.float64)
    with staying_in_float64():
        found = in_float64(model)(x)
    angles = torch.tensor([0.1, 0.7]).double()[:, None] @ torch.arange(4, dtype=torch.float64)[None]
    expected = x + angles.sum() + torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64) @ x
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-15, atol=1e-15)
    with pytest.raises(RuntimeError):
        in_float64(model)(x)
