"""Weights and inputs on which hidden mistakes become loud.

On ordinary weights a wrong epsilon drowns in the variance beside it, a small layer scale damps a whole branch, and
symmetric kernels forgive a flip. So the two models are compared again on other weights, and on other shapes.
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


@dataclass(frozen=True)
class StressCase:
    """A run to make: its name, the reference to run, whether its weights are not the ported ones, and the images."""

    name: str
    reference: nn.Module
    has_new_weights: bool
    images: Array


def stress_cases(
    reference: nn.Module, images: Array, shrinkable: Callable[[str], bool], *, seed: int = 0
) -> Iterator[StressCase]:
    """The stress runs for a model and its images `(N, H, W, 3)`; the model itself stays as it is.

    small variances  the parameters that `shrinkable` names times `SMALL` and the BatchNorm statistics measured again:
                     later variances come down to where an epsilon counts
    loud weights     random ones from `seed`: no layer scale near 0, large biases, no symmetric kernel
    other shapes     one sample larger than in training and three of an odd, non-square, small size
    """
    if any(shrinkable(name) for name, _ in reference.named_parameters()):
        yield StressCase("small variances", with_small_variances(reference, images, shrinkable), True, images)
    yield StressCase(f"loud weights, seed {seed}", with_loud_weights(reference, seed), True, images)
    height, width = images.shape[1:3]
    sizes = ((1, height + height // 4 + 1, width + 2), (3, _odd(height // 2), _odd(width // 3)))
    for count, rows, columns in sizes:
        resized = _resized(images, count, rows, columns)
        yield StressCase(f"{count} of {rows}x{columns}", reference, False, resized)


def with_small_variances(reference: nn.Module, images: Array, shrinkable: Callable[[str], bool]) -> nn.Module:
    """A copy of the reference whose normalised tensors have variances near the epsilons."""
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


def with_loud_weights(reference: nn.Module, seed: int) -> nn.Module:
    """A copy of the reference with synthetic weights."""
    from porting.models.synthetic import fill_with_synthetic_weights

    model = copy.deepcopy(reference)
    fill_with_synthetic_weights(model, seed)
    return model.eval()


def _odd(side: int) -> int:
    return max(side | 1, _SMALLEST_SIDE)


def _resized(images: Array, count: int, height: int, width: int) -> Array:
    """`count` images of another size, cut and mirrored out of those there are."""
    chosen = images[np.arange(count) % len(images)]
    rows, columns = (max(wanted - had, 0) for wanted, had in zip((height, width), chosen.shape[1:3], strict=True))
    padded = np.pad(chosen, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="reflect")
    return np.ascontiguousarray(padded[:, :height, :width])
