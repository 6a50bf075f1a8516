"""What a program outside Keras makes of the same images, against PyTorch, by the names of PyTorch's modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array
from porting.models.float64 import in_float64
from porting.models.inputs import Inputs, moved
from porting.parity.measure import DifferenceSum, DistanceSum, measure_distance, measure_size
from porting.parity.record import kinds_of, record
from porting.parity.report import (
    FLOAT32,
    FLOAT32_ROUNDOFF,
    OUTPUT,
    LayerComparison,
    Limits,
    ParityReport,
    View,
)
from porting.parity.summary import compare_logits, with_usual_rounding
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Layer:
    """One tensor that the program shows, over all images."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.scale, self.expected_error, self.actual_error = DistanceSum(), DistanceSum(), DistanceSum()
        self.difference = DifferenceSum()
        self.problem, self.dtype = "", ""
        self.shape: tuple[int, ...] = ()

    def include(self, rounded: Tensor, truth: Tensor, actual: Tensor, limit: float, index: int) -> None:
        axes = _axes(truth, actual)
        if axes is None:
            last = tuple(truth.shape[axis] for axis in (moved(truth.ndim) if truth.ndim > 2 else range(truth.ndim)))
            self.problem = f"shape {tuple(actual.shape)} instead of {last}"
            return
        self.scale.include(measure_size(truth))
        self.expected_error.include(measure_distance(rounded, truth))
        allowed = limit * max(self.expected_error.max, FLOAT32_ROUNDOFF * self.scale.max)
        difference = DifferenceSum(index)
        self.actual_error.include(difference.add(actual, truth.permute(axes).contiguous(), None, allowed))
        self.difference.include(difference)
        self.shape = (index + 1, *actual.shape[1:]) if actual.ndim else ()
        self.dtype = str(actual.dtype).removeprefix("torch.")

    def total(self, source: str) -> LayerComparison:
        view = View(self.scale.total(), self.expected_error.total(), self.actual_error.total(), self.problem)
        return LayerComparison(
            source, source, self.kind, self.shape, "float32", self.dtype, {FLOAT32: view}, self.difference.total()
        )


def compare_outputs(
    reference: nn.Module,
    run: Callable[[Array], Mapping[str, Array]],
    images: Array,
    *,
    rounded: nn.Module | None = None,
    limits: Limits | None = None,
    name: str = "as exported",
    progress: Progress = SILENT,
) -> ParityReport:
    """Compares what a program outside Keras makes of images with PyTorch, by the names of PyTorch's modules.

    `run` takes `(1, H, W, C)` and gives the tensors that it can show, `OUTPUT` among them, in either order of axes.
    `rounded` is the reference as it is in the program's precision; its distance to float64 is then the unit, by default
    the reference's own.

    Raises ValueError when there are no images.
    """
    import torch

    if not len(images):
        raise ValueError("at least one input is needed for a parity check")
    limits = limits or Limits()
    reference = reference.eval()
    truth_model, noisy_model = in_float64(reference), reference if rounded is None else rounded
    layers: dict[str, _Layer] = {}
    logits: list[tuple[Array, Array]] = []
    kinds = kinds_of(reference)
    axes = moved(images.ndim)
    for index, image in enumerate(images):
        progress("comparing what was exported", index, len(images))
        found = run(image[None])
        theirs = np.ascontiguousarray(np.moveaxis(image[None], -1, 1))
        inputs = Inputs((image[None],), (theirs,), (axes,))
        exact = record(truth_model, partial(_call, inputs, torch.float64))
        noisy = record(noisy_model, partial(_call, inputs, torch.float32))
        tensors = {call: each.outputs for call, each in exact.calls.items()} | {OUTPUT: list(exact.outputs.values())}
        units = {call: each.outputs for call, each in noisy.calls.items()} | {OUTPUT: list(noisy.outputs.values())}
        for source, truths in tensors.items():
            if source not in found or len(truths) != 1:
                continue
            layer = layers.setdefault(source, _Layer(kinds.get(source, "output")))
            actual = torch.from_numpy(np.array(found[source], np.float32))
            layer.include(units[source][0].tensor, truths[0].tensor, actual, limits.of(source), index)
        if len(tensors[OUTPUT]) == 1:
            logits.append((tensors[OUTPUT][0].tensor.numpy(), np.asarray(found[OUTPUT])))
    progress("done", len(images), len(images))
    return ParityReport(
        layers=tuple(with_usual_rounding([layer.total(source) for source, layer in layers.items()], reference)),
        unpaired_source=(),
        unpaired_target=(),
        logits=compare_logits(logits),
        input_shapes=(tuple(images.shape),),
        limits=limits,
        name=name,
    )


def _call(inputs: Inputs, dtype: Any, model: nn.Module) -> Any:
    return inputs.call_reference(model, dtype)


def _axes(truth: Tensor, actual: Tensor) -> tuple[int, ...] | None:
    """A file's tensors have no convention of their own: some runtimes keep channels last, some move them."""
    same = tuple(range(truth.ndim))
    orders = (moved(truth.ndim), (0, *same[-1:], *same[1:-1]), same) if truth.ndim > 2 else (same,)
    if truth.ndim != actual.ndim:
        return None
    fitting = [axes for axes in orders if tuple(truth.shape[axis] for axis in axes) == tuple(actual.shape)]
    if len(set(fitting)) <= 1:
        return fitting[0] if fitting else None
    return min(fitting, key=lambda axes: float((actual - truth.permute(axes)).abs().nan_to_num().sum()))
