"""Does the Keras model compute what the PyTorch model computes? The judge is PyTorch itself, in float64.

A fixed tolerance is a guess: two correct float32 programs differ by what their orders of summation make of
rounding, and that grows with depth, width and scale. So the reference runs twice, in float32 and in float64. The
float64 run is the truth; PyTorch's own float32 distance to it is the noise that nobody can be blamed for. A layer
is at parity when Keras's distance to the truth is at most `max_ratio` times that noise.

This is the accumulated view: both models run from the same input, so the figures are what a user gets.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.activations import record_layers, record_modules
from porting.layout import Array
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    import keras
    from torch import nn

SCHEMA_VERSION = 1
# The name under which the models' own results are compared, after all layers.
OUTPUT = "output"
# Half the distance between 1 and the next float32: what one rounding can do, relative to the value.
FLOAT32_ROUNDOFF = 2.0**-24
DEFAULT_MAX_RATIO = 8.0


@dataclass(frozen=True)
class Distance:
    """How far two results are apart, over all elements: greatest absolute and root mean square difference."""

    max: float = 0.0
    rms: float = 0.0


@dataclass(frozen=True)
class TensorComparison:
    """One layer's output on both sides, against the float64 truth.

    `expected` is PyTorch in float32 and `actual` is Keras. `scale` is the size of the truth itself. `ratio` is
    Keras's distance to the truth in units of `noise`: PyTorch's distance or one rounding of the scale, whichever
    is greater; taken for the greatest and for the RMS difference, the worse of the two. `problem` says why a
    comparison failed where a ratio cannot.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    scale: Distance
    expected_error: Distance
    actual_error: Distance
    difference: Distance
    ratio: float
    passed: bool
    problem: str = ""


@dataclass(frozen=True)
class LogitsComparison:
    """What the user sees of the last layer: `top1_agreement` of `samples` images have the same best class."""

    samples: int
    top1_agreement: int
    max_probability_change: float


@dataclass(frozen=True)
class ParityReport:
    """All comparisons in data flow, and what could not be paired; layers that run twice count twice."""

    comparisons: tuple[TensorComparison, ...]
    unpaired_source: tuple[str, ...]
    unpaired_target: tuple[str, ...]
    logits: LogitsComparison
    max_ratio: float
    input_shape: tuple[int, ...]
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True only when something was compared and every comparison passed."""
        return bool(self.comparisons) and all(comparison.passed for comparison in self.comparisons)

    @property
    def first_divergence(self) -> TensorComparison | None:
        """The first layer in data flow that is not at parity."""
        return next((comparison for comparison in self.comparisons if not comparison.passed), None)

    @property
    def worst(self) -> TensorComparison:
        return max(self.comparisons, key=lambda comparison: comparison.ratio)

    def to_json(self) -> str:
        """The report as strict JSON; numbers that are not finite are null."""
        contents = {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "first_divergence": self.first_divergence.source if self.first_divergence else None,
            "max_ratio": self.max_ratio,
            "input_shape": self.input_shape,
            **self.context,
            "logits": vars(self.logits),
            "unpaired_source": self.unpaired_source,
            "unpaired_target": self.unpaired_target,
            "layers": [_comparison_to_dict(comparison) for comparison in self.comparisons],
        }
        return json.dumps(_finite(contents), indent=1, allow_nan=False) + "\n"


def _comparison_to_dict(comparison: TensorComparison) -> dict[str, Any]:
    return {name: vars(value) if isinstance(value, Distance) else value for name, value in vars(comparison).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _DistanceSum:
    """A Distance over batches that come one after another."""

    def __init__(self) -> None:
        self.max = 0.0
        self.sum_of_squares = 0.0
        self.count = 0

    def add(self, difference: Array) -> None:
        if difference.size:
            flat = difference.reshape(-1)
            # A NaN must stay one: max() of Python would lose it when it comes second.
            self.max = float(np.maximum(self.max, np.abs(flat).max()))
            self.sum_of_squares += float(np.dot(flat, flat))
            self.count += flat.size

    def total(self) -> Distance:
        return Distance(self.max, math.sqrt(self.sum_of_squares / self.count) if self.count else 0.0)


class _LayerSums:
    """Everything that is summed up for one layer."""

    def __init__(self, target: str, shape: tuple[int, ...]) -> None:
        self.target = target
        self.shape = shape
        self.scale, self.expected_error = _DistanceSum(), _DistanceSum()
        self.actual_error, self.difference = _DistanceSum(), _DistanceSum()
        self.problem = ""

    def compare(self, source: str, max_ratio: float) -> TensorComparison:
        scale, expected, actual = self.scale.total(), self.expected_error.total(), self.actual_error.total()
        ratio = max(
            _ratio(actual.max, expected.max, scale.max),
            _ratio(actual.rms, expected.rms, scale.rms),
        )
        problem = self.problem
        if problem:
            ratio = math.inf
        elif not math.isfinite(ratio):
            problem = "values that are not finite"
        passed = ratio <= max_ratio
        return TensorComparison(
            source, self.target, self.shape, scale, expected, actual, self.difference.total(), ratio, passed, problem
        )


def _ratio(actual_error: float, expected_error: float, scale: float) -> float:
    if not all(map(math.isfinite, (actual_error, expected_error, scale))):
        return math.inf
    if actual_error == 0.0:
        return 0.0
    noise = max(expected_error, FLOAT32_ROUNDOFF * scale)
    return actual_error / noise if noise else math.inf


def check_parity(
    reference: nn.Module,
    candidate: keras.Model,
    images: Array,
    *,
    pairs: Mapping[str, str] | None = None,
    max_ratio: float = DEFAULT_MAX_RATIO,
    batch_size: int = 1,
    progress: Progress = SILENT,
) -> ParityReport:
    """Runs both models on the same images and compares every layer that both have.

    `reference` takes `(N, C, H, W)` and gives `(N, classes)`; `images` is `(N, H, W, C)` float32 and goes to
    `candidate` as it is. Modules and layers pair by name, with `/` read as `.`; `pairs` gives Keras paths for
    modules where the two differ by more. Only one batch of activations is in memory at a time, and each pair is
    let go as soon as it is compared.

    Raises ValueError when there are no images.
    """
    import torch

    if not len(images):
        raise ValueError("at least one image is needed for a parity check")
    reference = reference.eval()
    truth_model = copy.deepcopy(reference).double()
    target_of = dict(pairs or {})
    sums: dict[str, _LayerSums] = {}
    unmatched: dict[str, None] = {}
    lone_targets: dict[str, None] = {}
    logits: dict[str, list[Array]] = {"expected": [], "actual": []}
    starts = range(0, len(images), batch_size)
    for step, start in enumerate(starts):
        batch = images[start : start + batch_size]
        tensor = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
        truth: dict[str, Array] = {}
        expected: dict[str, Array] = {}

        progress("PyTorch, float64", 3 * step, 3 * len(starts))
        with torch.inference_mode(), record_modules(truth_model, truth.__setitem__):
            truth[OUTPUT] = truth_model(tensor.double()).numpy()
        progress("PyTorch, float32", 3 * step + 1, 3 * len(starts))
        with torch.inference_mode(), record_modules(reference, expected.__setitem__):
            expected[OUTPUT] = reference(tensor).numpy()
        logits["expected"].append(expected[OUTPUT])

        for name, values in expected.items():
            target = target_of.get(name, name.replace(".", "/"))
            layer = sums.setdefault(name, _LayerSums(target, (len(images), *values.shape[1:])))
            layer.scale.add(truth[name])
            layer.expected_error.add(values - truth[name])
        compare = _comparing(sums, expected, truth, lone_targets)

        progress("Keras", 3 * step + 2, 3 * len(starts))
        with record_layers(candidate, compare):
            output = np.asarray(candidate(batch, training=False))
        compare(OUTPUT, output)
        logits["actual"].append(output)
        unmatched.update(dict.fromkeys(expected))
    progress("done", 3 * len(starts), 3 * len(starts))
    return ParityReport(
        comparisons=tuple(layer.compare(name, max_ratio) for name, layer in sums.items() if name not in unmatched),
        unpaired_source=tuple(unmatched),
        unpaired_target=tuple(lone_targets),
        logits=_compare_logits({side: np.concatenate(parts) for side, parts in logits.items()}),
        max_ratio=max_ratio,
        input_shape=tuple(images.shape),
    )


def _comparing(
    sums: Mapping[str, _LayerSums], expected: dict[str, Array], truth: dict[str, Array], lone_targets: dict[str, None]
) -> Callable[[str, Array], None]:
    """Compares a Keras layer's result as soon as it is there, and lets go of PyTorch's."""
    source_of = {_dotted(sums[name].target): name for name in expected}

    def compare(path: str, actual: Array) -> None:
        name = source_of.get(_dotted(path))
        if name is None or name not in expected:
            lone_targets[path] = None
            return
        sums[name].target = path
        _compare_actual(sums[name], actual, expected.pop(name), truth.pop(name))

    return compare


def _dotted(path: str) -> str:
    """Paths differ between the frameworks in their separator, and Keras also has dots inside a layer's name."""
    return path.replace("/", ".")


def _compare_actual(layer: _LayerSums, actual: Array, expected: Array, truth: Array) -> None:
    if actual.shape != truth.shape:
        layer.problem = f"shape {actual.shape} instead of {truth.shape}"
        return
    layer.actual_error.add(actual - truth)
    layer.difference.add(actual.astype(np.float64) - expected)


def _compare_logits(logits: Mapping[str, Array]) -> LogitsComparison:
    expected, actual = logits["expected"], logits["actual"]
    if expected.ndim != 2 or expected.shape != actual.shape:
        return LogitsComparison(len(expected), 0, math.nan)
    change = np.abs(_softmax(expected) - _softmax(actual))
    return LogitsComparison(
        samples=len(expected),
        top1_agreement=int((expected.argmax(1) == actual.argmax(1)).sum()),
        max_probability_change=float(change.max()),
    )


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities
