"""Diagnoses a divergence: tries known mistakes, then patterns of the difference.

The strongest evidence is a counterfactual. A known mistake is made on purpose in PyTorch, on the layer's own input. If
the result equals Keras's numbers, that mistake is the cause. If no known mistake fits, the pattern of the difference
itself is described. If nothing fits, there is no diagnosis.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from porting.kinds import kind_of_module
from porting.kinds.base import Kind, with_change
from porting.parity.measure import rms
from porting.parity.report import REPRODUCED, WIRING, Diagnosis

if TYPE_CHECKING:
    from torch import Tensor, nn

    from porting.kinds.base import Made

# A cause must leave at most this share of the difference unexplained.
EXPLAINED = 0.05
# A factor and an offset always fit two points of a channel, so only a fit to many points is evidence.
_POINTS_A_CHANNEL = 16


# Pairs of tensors are tried only up to this many tensors: a deep model has hundreds of one shape.
_MOST_PAIRED = 20

Hypothesis = tuple[str, Callable[[], "Made"]]


def diagnose(
    layer: str,
    module: nn.Module | None,
    inputs: list[Tensor],
    expected: Tensor,
    actual: Tensor,
    others: Mapping[str, Tensor],
    behind: Callable[[Tensor], Tensor] | None = None,
) -> Diagnosis | None:
    """Look for the cause of the difference between two tensors in PyTorch's order of axes.

    `module` is the module that made `expected` from `inputs`; None for tensors that no module made, such as the input
    of a layer. `others` are tensors of the same run, by name, that a port might use by mistake. `behind` computes what
    comes between the module's result and the tensors. Returns None if the tensors are equal or nothing fits.
    """
    import torch

    if expected.shape != actual.shape:
        return None
    with torch.no_grad():
        return _diagnose(layer, module, inputs, expected.double(), actual.double(), others, behind)


def _diagnose(
    layer: str,
    module: nn.Module | None,
    inputs: list[Tensor],
    exact: Tensor,
    found: Tensor,
    others: Mapping[str, Tensor],
    behind: Callable[[Tensor], Tensor] | None,
) -> Diagnosis | None:
    total = rms(found - exact)
    if not math.isfinite(total) or total == 0.0:
        return None
    hypotheses: list[Hypothesis] = []
    if module is not None:
        kind = kind_of_module(module)
        hypotheses += _mistakes_of(kind, module, inputs) if kind is not None else []
    if behind is not None:
        hypotheses = [(cause, partial(_with_behind, make, behind)) for cause, make in hypotheses]
    hypotheses += _precision_hypotheses(module if behind is None else None, inputs, exact)
    checked: list[str] = []
    best: tuple[float, str] = (math.inf, "")
    best_basis = ""
    tried = itertools.chain(
        ((*each, "") for each in hypotheses),
        ((*each, WIRING) for each in _wiring_hypotheses(exact, others)),
        ((*each, _PATTERN) for each in _pattern_hypotheses(exact, found)),
    )
    for cause, make, basis in tried:
        checked.append(cause)
        try:
            made = make()
        except _IMPOSSIBLE:
            continue  # the mistake cannot be made on these inputs
        fitting = [rms(found - guess.double()) for guess in as_tensors(made) if guess.shape == found.shape]
        if not fitting:
            continue
        left = min(fitting) / total
        # Earlier hypotheses are more specific, so a later one must be clearly better.
        if left < best[0] * 0.1 or (left < best[0] and best[0] > EXPLAINED):
            best, best_basis = (left, cause), basis
        if left <= REPRODUCED:
            break
    if best[0] > EXPLAINED:
        return None
    pattern = best_basis == _PATTERN
    return Diagnosis(layer, best[1], best[0], tuple(checked), pattern, "" if pattern else best_basis)


_PATTERN = "pattern"
# What PyTorch raises where a module is given what it does not take.
_IMPOSSIBLE = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError)


def _mistakes_of(kind: Kind, module: nn.Module, inputs: list[Tensor]) -> list[Hypothesis]:
    found: list[Hypothesis] = []
    with contextlib.suppress(*_IMPOSSIBLE):  # such as inputs without an axis for samples
        for mistake in kind.mistakes(module, inputs):
            found.append((mistake.cause, mistake.make))
    return found


def _with_behind(make: Callable[[], Made], behind: Callable[[Tensor], Tensor]) -> Made:
    import torch

    guess = make()
    return behind(guess) if isinstance(guess, torch.Tensor) else None


def as_tensors(made: Made) -> tuple[Tensor, ...]:
    if made is None:
        return ()
    return made if isinstance(made, tuple) else (made,)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Round values to the nearest with `bits` bits of mantissa after the point."""
    import torch

    mantissa, exponent = torch.frexp(values.double())
    scale = 2.0 ** (bits + 1)
    return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)


_PRECISIONS = {"bfloat16": 7, "float16 or TF32": 10}


def _precision_hypotheses(module: nn.Module | None, inputs: list[Tensor], exact: Tensor) -> Iterator[Hypothesis]:
    for name, bits in _PRECISIONS.items():
        yield f"its result is rounded to {name}", partial(_rounded, exact, bits)
        if module is not None and list(module.parameters()):

            def weights_rounded(changed: nn.Module, bits: int = bits) -> None:
                for parameter in changed.parameters():
                    parameter.data = _rounded(parameter.data, bits)

            def kernel_rounded(changed: nn.Module, bits: int = bits) -> None:
                for parameter in changed.parameters():
                    if parameter.ndim > 1:
                        parameter.data = _rounded(parameter.data, bits)

            yield f"its kernel is rounded to {name}", with_change(module, inputs, kernel_rounded)
            yield f"its weights are rounded to {name}", with_change(module, inputs, weights_rounded)
            rounded = [_rounded(x, bits) if x.is_floating_point() else x for x in inputs]
            yield f"it computes in {name}", with_change(module, rounded, weights_rounded)


def _wiring_hypotheses(exact: Tensor, others: Mapping[str, Tensor]) -> Iterator[Hypothesis]:
    """Yield mistakes that use another tensor instead of the right one, or instead of one of its summands."""
    same = {name: tensor for name, tensor in others.items() if tensor.shape == exact.shape}
    for name, tensor in same.items():
        yield f"it is {name} instead", partial(_combined, tensor)
    for name, tensor in same.items():
        yield f"{name} is not added", partial(_combined, exact, minus=tensor)
        yield f"{name} is added once too often", partial(_combined, exact, plus=tensor)
    if len(same) > _MOST_PAIRED:
        return
    for (right, one), (wrong, other) in itertools.permutations(same.items(), 2):
        yield f"{wrong} is added where {right} belongs", partial(_combined, exact, minus=one, plus=other)


def _combined(base: Tensor, *, plus: Tensor | None = None, minus: Tensor | None = None) -> Tensor:
    result = base.double()
    if plus is not None:
        result = result + plus.double()
    return result if minus is None else result - minus.double()


def _pattern_hypotheses(exact: Tensor, found: Tensor) -> Iterator[Hypothesis]:
    """Yield patterns of the difference itself, for when no known mistake reproduces it."""
    channels = 1 if exact.ndim > 2 else -1
    axes = [axis for axis in range(exact.ndim) if axis != channels % exact.ndim]

    yield "a constant factor", lambda: exact * ((exact * found).sum() / exact.square().sum())
    yield "a constant offset", lambda: exact + (found - exact).mean()
    if exact.ndim > 1:
        yield "its channels are permuted", lambda: _permuted(exact, found, channels)
        if exact.numel() // exact.shape[channels] >= _POINTS_A_CHANNEL:
            yield (
                "a constant factor per channel",
                lambda: exact * ((exact * found).sum(axes, True) / exact.square().sum(axes, True).clamp_min(1e-300)),
            )
            yield "a constant offset per channel", lambda: exact + (found - exact).mean(axes, keepdim=True)
            yield "a factor and an offset per channel", lambda: _affine_fit(exact, found, axes)
        yield "only a few channels differ", lambda: _few_channels_replaced(exact, found, axes)
    if exact.ndim == 4:
        yield "height and width are swapped", lambda: exact.transpose(2, 3)
        yield "it is flipped in height", lambda: exact.flip(2)
        yield "it is flipped in width", lambda: exact.flip(3)
        yield "only the border differs, as with another padding", lambda: _border_replaced(exact, found)
    yield "only a few elements differ", lambda: _few_replaced(exact, found)


def _few_channels_replaced(exact: Tensor, found: Tensor, axes: list[int]) -> Tensor | None:
    """Use Keras's values in the tenth of the channels that differ most, and the truth in all others."""
    import torch

    size = (found - exact).square().sum(axes, keepdim=True)
    count = size.numel() // 10
    if not count:
        return None
    threshold = size.flatten().topk(count).values[-1]
    return torch.where(size >= threshold, found, exact)


def _affine_fit(exact: Tensor, found: Tensor, axes: list[int]) -> Tensor:
    centred = exact - exact.mean(axes, keepdim=True)
    slope = (centred * found).sum(axes, True) / centred.square().sum(axes, True).clamp_min(1e-300)
    return found.mean(axes, keepdim=True) + slope * centred


def _permuted(exact: Tensor, found: Tensor, channels: int) -> Tensor | None:
    """Permute the expected channels so that each is the nearest to the actual one; None if not one to one."""
    one, other = (tensor.movedim(channels, 0).flatten(1) for tensor in (exact, found))
    if one.shape[1] < 2:
        return None
    distance = (one.square().sum(1)[None] + other.square().sum(1)[:, None] - 2 * other @ one.T).clamp_min(0)
    order = distance.argmin(1)
    if len(set(order.tolist())) != len(order):
        return None
    return exact.index_select(channels % exact.ndim, order)


def _border_replaced(exact: Tensor, found: Tensor) -> Tensor | None:
    """Use Keras's values in a frame of at most a quarter of the map's side, and the truth inside."""
    height, width = exact.shape[2:]
    frame = max(1, min(height, width) // 4)
    if min(height, width) < 5:
        return None
    guess = found.clone()
    guess[:, :, frame:-frame, frame:-frame] = exact[:, :, frame:-frame, frame:-frame]
    return guess


def _few_replaced(exact: Tensor, found: Tensor) -> Tensor | None:
    count = max(1, exact.numel() // 1000)
    if exact.numel() < 100:
        return None
    guess = exact.clone().flatten()
    worst = (found - exact).abs().flatten().topk(count).indices
    guess[worst] = found.flatten()[worst]
    return guess.reshape(exact.shape)
