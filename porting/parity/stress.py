"""Weights and inputs on which hidden mistakes show.

On ordinary weights the variance hides a wrong epsilon, a small layer scale damps a whole branch, and a symmetric kernel
hides a flip. A stress test therefore compares the two models again on other weights and on other shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from porting.kinds.transforms import Array

if TYPE_CHECKING:
    from torch import nn

SMALL = 2e-3
_SMALLEST_SIDE = 33
_CALIBRATING = 4  # images, for the statistics of BatchNorms


@dataclass(frozen=True)
class StressCase:
    """A run to do: its name, the reference model, whether its weights differ from the ported ones, and the images."""

    name: str
    reference: nn.Module
    has_new_weights: bool
    images: Array


def stress_cases(
    reference: nn.Module, images: Array, shrinkable: Callable[[str], bool], *, seed: int = 0
) -> Iterator[StressCase]:
    """Yield the stress runs for a model and its images `(N, H, W, 3)`. The model itself does not change.

    small variances  multiplies the parameters that `shrinkable` selects by `SMALL` and measures the BatchNorm
                     statistics again, so that variances become small enough for an epsilon to matter
    loud weights     random weights from `seed`: no layer scale near 0, large biases, no symmetric kernel
    other shapes     one sample larger than the given ones, and three of an odd, non-square, small size
    """
    if any(shrinkable(name) for name, _ in reference.named_parameters()):
        yield StressCase("small variances", with_small_variances(reference, images, shrinkable), True, images)
    yield StressCase(f"loud weights, seed {seed}", with_loud_weights(reference, images, seed), True, images)
    height, width = images.shape[1:3]
    sizes = ((1, height + height // 4 + 1, width + 2), (3, _odd(height // 2), _odd(width // 3)))
    for count, rows, columns in sizes:
        resized = _resized(images, count, rows, columns)
        yield StressCase(f"{count} of {rows}x{columns}", reference, False, resized)


def with_small_variances(reference: nn.Module, images: Array, shrinkable: Callable[[str], bool]) -> nn.Module:
    """Copy the reference with weights that give normalised tensors variances near the epsilons."""
    import torch

    from porting.models.synthetic import measure_batch_norms

    model = copy.deepcopy(reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if shrinkable(name):
                parameter.mul_(SMALL)
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    measure_batch_norms(model, lambda own: own(tensor))
    return model.eval()


def with_loud_weights(reference: nn.Module, images: Array, seed: int) -> nn.Module:
    """Copy the reference with synthetic weights, and BatchNorm statistics of random images of the given size."""
    import torch

    from porting.models.synthetic import fill_with_synthetic_weights

    model, (_, height, width, channels) = copy.deepcopy(reference), images.shape
    noise = torch.randn(_CALIBRATING, channels, height, width, generator=torch.Generator().manual_seed(seed))
    fill_with_synthetic_weights(model, seed, lambda own: own(noise))
    return model.eval()


def _odd(side: int) -> int:
    return max(side | 1, _SMALLEST_SIDE)


def _resized(images: Array, count: int, height: int, width: int) -> Array:
    """Make `count` images of another size by cropping and mirroring the given ones."""
    chosen = images[np.arange(count) % len(images)]
    rows, columns = (max(wanted - had, 0) for wanted, had in zip((height, width), chosen.shape[1:3], strict=True))
    padded = np.pad(chosen, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="reflect")
    return np.ascontiguousarray(padded[:, :height, :width])
