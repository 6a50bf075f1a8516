"""Pairs the results of the two models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from porting.parity.content import MOST_AXES, SAME, Truth
from porting.parity.measure import rms
from porting.wording import counted

if TYPE_CHECKING:
    from torch import Tensor


def other_shape(actual: Tensor, expected: Tensor, truth: Truth) -> str:
    """Describe a result of another shape, with the order of axes in which PyTorch's has the same numbers, if any."""
    text = f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    orders = itertools.permutations(range(truth.tensor.ndim)) if actual.ndim == truth.tensor.ndim <= MOST_AXES else ()
    for axes in orders:
        moved = truth.tensor.permute(axes)
        if moved.shape == actual.shape and rms(actual - moved) <= SAME * truth.rms:
            return f"{text}: its numbers are right, in PyTorch's axes {axes}, as output_axes={axes} would state"
    return text


def same_results(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], partners: Mapping[str, str], agree: Callable[[Any, Any], bool]
) -> dict[str, str]:
    """For each of PyTorch's results that its partner does not agree with, the result of Keras that does.

    `agree` takes one of Keras's and one of PyTorch's.
    """
    found = {}
    for key, own in partners.items():
        if not agree(ours[own], theirs[key]):
            other = next((each for each in ours if each != own and agree(ours[each], theirs[key])), None)
            if other is not None:
                found[key] = other
    return found


def in_another_order(found: Mapping[str, str]) -> str:
    """Say which results of Keras are those of PyTorch, from what `same_results` returns."""
    said = ", ".join(f"{key or 'the result'} is {own or 'the result'} in Keras" for key, own in found.items())
    return f"the results come in another order: {said}"


def _without_numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    tensors = ((key, getattr(each, "tensor", each)) for key, each in results.items())
    return {key: results[key] for key, tensor in tensors if tensor.ndim}


def pair_results(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Pair PyTorch's results with Keras's: by key if keys agree, otherwise by place. Also returns notes on the rest."""
    if set(theirs) == set(ours):
        return {key: key for key in theirs}, []
    common = [key for key in theirs if key in ours]
    if common and "" not in common and not all(key.startswith("[") for key in common):
        left = [key for key in (*theirs, *ours) if key not in common]
        return {key: key for key in common}, [f"results that only one side has: {', '.join(left)}"]
    if len(theirs) != len(ours):
        # Numbers of Python among the results of one side alone are no partners of tensors.
        rest, own = _without_numbers(theirs), _without_numbers(ours)
        if rest and len(rest) == len(own):
            alone = [key for key in (*theirs, *ours) if key not in rest and key not in own]
            pairs, notes = pair_results(rest, own)
            return pairs, [*notes, f"results that only one side has: {', '.join(alone)}"]
    pairs = dict(zip(theirs, ours, strict=False))
    notes = []
    if len(pairs) > 1:
        said = ", ".join(f"{key or 'the result'} with {own or 'the result'}" for key, own in pairs.items())
        notes = [f"the results of the two models have other names and are paired by place: {said}"]
    if len(theirs) != len(ours):
        count = min(len(theirs), len(ours))
        said = "the first is compared" if count == 1 else f"the first {count} are compared"
        notes += [f"PyTorch gives {counted(len(theirs), 'result')} and Keras {len(ours)}; {said}"]
    return pairs, notes
