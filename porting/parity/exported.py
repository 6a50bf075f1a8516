"""Compares a program outside Keras, such as an exported file, with PyTorch, by the names of PyTorch's modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array
from porting.models.float64 import in_float64
from porting.models.inputs import Axes, Inputs, image_inputs, moved
from porting.models.modes import in_mode
from porting.parity.content import place_of_result
from porting.parity.derived import is_too_large_to_copy
from porting.parity.measure import DifferenceSum, DistanceSum, measure_distance, measure_size
from porting.parity.record import kinds_of, output_name, record
from porting.parity.report import (
    FLOAT32,
    FLOAT32_ROUNDOFF,
    LayerComparison,
    Limits,
    ParityReport,
    View,
)
from porting.parity.results import pair_results
from porting.parity.summary import compare_logits, with_usual_rounding
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn


# Tensors that differ by a larger share of their size have only the name in common.
_ALIKE = 0.2


class _Layer:
    """One tensor that the program exposes, over all inputs."""

    def __init__(self, kind: str, source: str, *, is_output: bool = False) -> None:
        self.kind, self.source, self.is_output = kind, source, is_output
        self.scale, self.expected_error, self.actual_error = DistanceSum(), DistanceSum(), DistanceSum()
        self.difference = DifferenceSum()
        self.problem, self.dtype = "", ""
        self.shape: tuple[int, ...] = ()

    def include(
        self, rounded: Tensor, truth: Tensor, actual: Tensor, axes: Axes | None, limit: float, index: int
    ) -> None:
        if axes is None or tuple(truth.shape[axis] for axis in axes) != tuple(actual.shape):
            last = [truth.shape[axis] for axis in axes or (moved(truth.ndim) if truth.ndim > 2 else range(truth.ndim))]
            self.problem = f"shape {tuple(actual.shape)} instead of {tuple(last)}"
            return
        self.scale.include(measure_size(truth))
        self.expected_error.include(measure_distance(rounded, truth))
        allowed = limit * max(self.expected_error.max, FLOAT32_ROUNDOFF * self.scale.max)
        difference = DifferenceSum(index)
        self.actual_error.include(difference.add(actual, truth.permute(axes).contiguous(), None, allowed))
        self.difference.include(difference)
        self.shape = (index + 1, *actual.shape[1:]) if actual.ndim else ()
        self.dtype = str(actual.dtype).removeprefix("torch.")

    def total(self) -> LayerComparison:
        view = View(self.scale.total(), self.expected_error.total(), self.actual_error.total(), self.problem)
        return LayerComparison(
            self.source,
            self.source,
            self.kind,
            self.shape,
            "float32",
            self.dtype,
            {FLOAT32: view},
            self.difference.total(),
            is_output=self.is_output,
        )


def compare_outputs(
    reference: nn.Module,
    run: Callable[[Any], tuple[Mapping[str, Array], Mapping[str, Array]]],
    inputs: Array | Inputs,
    *,
    rounded: nn.Module | None = None,
    limits: Limits | None = None,
    name: str = "as exported",
    progress: Progress = SILENT,
) -> ParityReport:
    """Compare a program outside Keras with PyTorch, by the names of PyTorch's modules.

    `inputs` are images `(N, H, W, C)`, of which `run` takes one at a time, `(1, H, W, C)`, or `Inputs`, of which it
    takes one sample. It returns the results by key ("" for the only one) in Keras's order of axes, and any inner
    tensors by the names of PyTorch's modules, in either order. `rounded` is the reference in the program's precision.
    Its distance to float64 is the unit of comparison; by default that is the distance of the reference itself.

    Raises ValueError when there are no inputs.
    """
    import torch

    given = inputs if isinstance(inputs, Inputs) else image_inputs(inputs)
    if not len(given):
        raise ValueError("at least one input is needed for a parity check")
    limits = limits or Limits()
    truth_model = reference if is_too_large_to_copy(reference) else in_float64(reference)
    noisy_model = reference if rounded is None else rounded
    layers: dict[str, _Layer] = {}
    logits: list[tuple[Array, Array]] = []
    kinds, caveats = kinds_of(reference), dict[str, None]()
    for index in range(len(given)):
        progress("comparing what was exported", index, len(given))
        batch = given.batch(index, index + 1)
        ours, inner = run(batch if isinstance(inputs, Inputs) else batch.candidate[0])
        exact = record(truth_model, partial(_call, batch, torch.float64))
        noisy = record(noisy_model, partial(_call, batch, torch.float32))
        for source, each in exact.calls.items():
            if source not in inner or len(each.outputs) != 1:
                continue
            layer = layers.setdefault(source, _Layer(kinds.get(source, "output"), source))
            truth, actual = each.outputs[0].tensor, torch.from_numpy(np.array(inner[source], np.float32))
            unit = noisy.calls[source].outputs[0].tensor
            if truth.ndim != actual.ndim and truth.numel() == actual.numel():
                # A layer may join the sides of a map that PyTorch keeps apart.
                order = _nearest(truth, actual, _orders(truth.ndim))
                truth, unit = (each.permute(order).reshape(actual.shape) for each in (truth, unit))
                axes: Axes | None = tuple(range(actual.ndim))
            else:
                axes = _axes(truth, actual)
            layer.include(unit, truth, actual, axes, limits.of(source), index)
        results, problems = pair_results(exact.outputs, ours)
        caveats.update(dict.fromkeys(problems))
        for theirs, key in results.items():
            place, truth = place_of_result(theirs), exact.outputs[theirs].tensor
            actual = torch.from_numpy(np.array(ours[key], np.float32))
            axes = given.output_axes(truth.ndim) if truth.ndim == actual.ndim else None
            layer = layers.setdefault(place[0], _Layer("output", output_name(theirs), is_output=True))
            layer.include(noisy.outputs[theirs].tensor, truth, actual, axes, limits.of(layer.source), index)
        if len(exact.outputs) == 1 and not problems:
            ((theirs, key),) = results.items()
            logits.append((exact.outputs[theirs].tensor.numpy(), np.asarray(ours[key])))
    progress("done", len(given), len(given))
    compared = list(with_usual_rounding([layer.total() for layer in layers.values()], reference))
    others = _of_the_same_name(compared, limits)
    notes = tuple(f"{layer.source} of the file is not PyTorch's {layer.source}" for layer in others)
    return ParityReport(
        layers=tuple(layer for layer in compared if layer not in others),
        unpaired_source=(),
        unpaired_target=(),
        logits=compare_logits(logits),
        input_shapes=tuple(tuple(array.shape) for array in given.candidate),
        limits=limits,
        name=name,
        notes=notes,
        caveats=tuple(caveats),
    )


def _of_the_same_name(layers: list[LayerComparison], limits: Limits) -> list[LayerComparison]:
    """The inner tensors that have nothing but the name in common with PyTorch's, if all results are at parity."""
    results = [layer for layer in layers if layer.is_output]
    if not results or any(limits.objection(layer, FLOAT32) for layer in results):
        return []
    return [
        layer
        for layer in layers
        if not layer.is_output
        and limits.objection(layer, FLOAT32)
        and not layer.views[FLOAT32].relative_error <= _ALIKE
    ]


def _call(inputs: Inputs, dtype: Any, model: nn.Module) -> Any:
    with in_mode(model, training=False):
        return inputs.call_reference(model, dtype)


def _orders(rank: int) -> tuple[tuple[int, ...], ...]:
    """PyTorch's axes in the orders in which runtimes put channels."""
    same = tuple(range(rank))
    return (moved(rank), (0, *same[-1:], *same[1:-1]), same) if rank > 2 else (same,)


def _nearest(truth: Tensor, actual: Tensor, orders: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The order of PyTorch's axes in which its numbers, in the shape of `actual`, are nearest to it."""
    return min(
        orders,
        key=lambda axes: float((actual - truth.permute(axes).reshape(actual.shape)).abs().nan_to_num().sum()),
    )


def _axes(truth: Tensor, actual: Tensor) -> tuple[int, ...] | None:
    """The order of axes of a file's tensor, the nearest if several fit: runtimes put channels in different places."""
    orders = _orders(truth.ndim)
    if truth.ndim != actual.ndim:
        return None
    fitting = [axes for axes in orders if tuple(truth.shape[axis] for axis in axes) == tuple(actual.shape)]
    if len(set(fitting)) <= 1:
        return fitting[0] if fitting else None
    return _nearest(truth, actual, fitting)
