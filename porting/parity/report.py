"""What parity means: the results of a comparison and the verdict on them. `porting.parity.compare` makes them.

Does the Keras model compute what the PyTorch model computes? The judge is PyTorch itself, in float64.

A fixed tolerance is a guess: two correct float32 programs differ by what their orders of summation make of
rounding, and that grows with depth, width and scale. So the reference runs in float32 and in float64. The float64
run is the truth; PyTorch's own float32 distance to it is the noise that nobody can be blamed for. A layer is at parity
when Keras's distance to the truth is at most `max_ratio` times that noise, in each of three views:

accumulated  both models run from the same input; what the user gets.
isolated     every Keras layer is fed the reference's own input to that layer and hands on the reference's own
             output, so a mistake shows in its layer and nowhere else.
input        in that same run, what a layer was about to be fed, against what the reference fed to it; a mistake
             between two layers shows here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The name under which the models' own results are compared, after all layers.
OUTPUT = "output"
# Half the distance between 1 and the next float32: what one rounding can do, relative to the value.
FLOAT32_ROUNDOFF = 2.0**-24
DEFAULT_MAX_RATIO = 8.0
# A tensor with fewer elements does not tell how large PyTorch's rounding is: by luck it may be next to nothing.
FEW_ELEMENTS = 1024
ACCUMULATED, ISOLATED, INPUT = "accumulated", "isolated", "input"
VIEWS = (ACCUMULATED, ISOLATED, INPUT)
# A cause that leaves at most this share of a difference has reproduced it but for rounding.
REPRODUCED = 1e-3


@dataclass(frozen=True)
class Distance:
    """Greatest absolute and root mean square value, over all elements."""

    max: float = 0.0
    rms: float = 0.0


@dataclass(frozen=True)
class Difference:
    """`actual` (Keras) against `expected` (PyTorch), both float32, over all elements of all batches.

    `relative` is the RMS difference over the RMS of `expected`; `sqnr_db` the same as a ratio of powers. ULP
    distances are counted in float32's units in the last place. `worst_index` is in Keras's axis order, with the
    image's number first. `share_over` is the share of elements whose distance to the truth is over the limit.
    `ulp_histogram` counts the sampled elements that are 0, 1, 2 to 3, 4 to 7, ... units apart.
    """

    max: float = 0.0
    mean: float = 0.0
    rms: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0
    sqnr_db: float = math.inf
    ulp_median: float = 0.0
    ulp_p999: float = 0.0
    ulp_max: float = 0.0
    nonfinite_expected: int = 0
    nonfinite_actual: int = 0
    worst_index: tuple[int, ...] = ()
    worst_expected: float = 0.0
    worst_actual: float = 0.0
    share_over: float = 0.0
    ulp_histogram: tuple[int, ...] = ()


@dataclass(frozen=True)
class SettingDifference:
    """One setting of one layer that is not the same on both sides."""

    layer: str
    setting: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.setting} is {self.actual} in Keras, {self.expected} in PyTorch"


@dataclass(frozen=True)
class Audit:
    """What was compared, in how many layers, and every difference."""

    layers: int
    settings: int
    differences: tuple[SettingDifference, ...]


@dataclass(frozen=True)
class Diagnosis:
    """A cause in plain words.

    `unexplained` is the share of the RMS difference that it leaves; `checked` is all that was tried.
    """

    layer: str
    cause: str
    unexplained: float
    checked: tuple[str, ...]

    @property
    def confidence(self) -> str:
        """How sure it is: a reproduced mistake leaves next to nothing."""
        return "certain" if self.unexplained <= REPRODUCED else "likely"


@dataclass(frozen=True)
class View:
    """One comparison of a layer against the float64 truth.

    `scale` is the size of the truth; `expected_error` and `actual_error` are PyTorch's and Keras's float32
    distances to it. `problem` says why there is no number. `usual_rounding` is what rounding does here as a rule,
    relative to the scale; it is known for tensors of fewer than `FEW_ELEMENTS` elements, and 0 for all others.
    """

    scale: Distance
    expected_error: Distance
    actual_error: Distance
    problem: str = ""
    usual_rounding: float = 0.0

    @property
    def ratio(self) -> float:
        """Keras's distance in units of the noise, the worse of greatest and RMS difference; infinite for a problem.

        The noise is PyTorch's distance, or the usual rounding or one rounding of the scale where that is greater.
        """
        if self.problem:
            return math.inf
        rounding = max(self.usual_rounding, FLOAT32_ROUNDOFF)
        return max(
            _ratio(self.actual_error.max, self.expected_error.max, rounding * self.scale.max),
            _ratio(self.actual_error.rms, self.expected_error.rms, rounding * self.scale.rms),
        )

    @property
    def relative_rounding(self) -> float:
        """PyTorch's RMS distance to the truth over the truth's RMS; 0 where that is 0."""
        return self.expected_error.rms / self.scale.rms if self.scale.rms else 0.0


def _ratio(actual_error: float, expected_error: float, rounding: float) -> float:
    if not all(map(math.isfinite, (actual_error, expected_error, rounding))):
        return math.inf
    if actual_error == 0.0:
        return 0.0
    noise = max(expected_error, rounding)
    return actual_error / noise if noise else math.inf


@dataclass(frozen=True)
class LayerComparison:
    """One call of a layer on both sides.

    `kind` is the PyTorch class; `shape` the output's, in Keras's axis order, over all samples. `difference` is
    Keras against PyTorch, both float32, in the accumulated view.
    """

    source: str
    target: str
    kind: str
    shape: tuple[int, ...]
    expected_dtype: str
    actual_dtype: str
    views: dict[str, View]
    difference: Difference

    @property
    def ratio(self) -> float:
        return max((view.ratio for view in self.views.values()), default=math.inf)


@dataclass(frozen=True)
class LogitsComparison:
    """What the user sees of the last layer, over `samples` rows of logits."""

    samples: int
    top1_agreement: int
    top5_agreement: int
    max_probability_change: float


@dataclass(frozen=True)
class Limits:
    """What parity allows. The ratio follows from float64; `atol` and `rtol` are added where a user wants them.

    `atol` bounds the greatest difference between Keras and PyTorch, `rtol` that difference over the layer's
    greatest value. `per_layer` gives layers a `max_ratio` of their own, by PyTorch's name.
    """

    max_ratio: float = DEFAULT_MAX_RATIO
    atol: float | None = None
    rtol: float | None = None
    per_layer: Mapping[str, float] = field(default_factory=dict)

    def of(self, source: str) -> float:
        """The `max_ratio` of one layer, whichever of its calls."""
        return self.per_layer.get(source, self.per_layer.get(source.partition("#")[0], self.max_ratio))

    def objection(self, layer: LayerComparison, view_name: str) -> str:
        """Why a layer is not at parity in one view, "" where it is."""
        view, difference = layer.views[view_name], layer.difference
        limit = self.of(layer.source)
        if view.problem:
            return view.problem
        if not view.ratio <= limit:
            if not math.isfinite(view.ratio):
                return "values that are not finite"
            return f"{view.ratio:.3g} times PyTorch's own rounding, {limit:g} allowed"
        if view_name == ACCUMULATED:
            if self.atol is not None and not difference.max <= self.atol:
                return f"differs by {difference.max:.3g}, {self.atol:g} allowed (atol)"
            if self.rtol is not None and not difference.max <= self.rtol * view.scale.max:
                relative = difference.max / view.scale.max if view.scale.max else math.inf
                return f"differs by {relative:.3g} of its greatest value, {self.rtol:g} allowed (rtol)"
        return ""


@dataclass(frozen=True)
class Divergence:
    """Where and how two models part. `layer` is PyTorch's name; `view` the one that shows it; `reason` by how much."""

    layer: str
    view: str
    reason: str

    @property
    def culprit(self) -> str:
        """Whose mistake it is: the layer's own, or of the one that feeds it; "" is the model as a whole."""
        return self.layer.rpartition(".")[0] if self.view == INPUT else self.layer

    def __str__(self) -> str:
        if self.view == INPUT:
            return f"{self.culprit or 'the model'} feeds {self.layer} wrongly: {self.reason}"
        return f"{self.layer}: {self.reason}"


@dataclass(frozen=True)
class ParityReport:
    """All comparisons in data flow, what could not be paired, and the verdict that follows from the limits.

    `audit` compares the settings that numbers do not show. `stress` holds the reports of the same models on other
    weights and inputs, each under its `name`. `diagnosis` says what the first divergence looks like.
    """

    layers: tuple[LayerComparison, ...]
    unpaired_source: tuple[str, ...]
    unpaired_target: tuple[str, ...]
    logits: LogitsComparison | None
    input_shapes: tuple[tuple[int, ...], ...]
    limits: Limits = field(default_factory=Limits)
    name: str = "as ported"
    audit: Audit | None = None
    diagnosis: Diagnosis | None = None
    stress: tuple[ParityReport, ...] = ()
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True only when something was compared, no layer diverges in any view, no setting differs, and under
        stress too.
        """
        settings_agree = self.audit is None or not self.audit.differences
        return bool(self.layers) and not self.divergences and settings_agree and all(r.passed for r in self.stress)

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        """Every layer and view that is not at parity, in data flow."""
        found = []
        for layer in self.layers:
            for view in layer.views:
                if reason := self.limits.objection(layer, view):
                    found.append(Divergence(layer.source, view, reason))
        return tuple(found)

    @property
    def first_divergence(self) -> Divergence | None:
        """The culprit: the first layer that is wrong by itself, or is fed wrongly; else the first that is off.

        In the isolated and input views an error stays where it is made, so they are asked first.
        """
        found = self.divergences
        local = next((divergence for divergence in found if divergence.view != ACCUMULATED), None)
        return local or next(iter(found), None)

    def failed(self, layer: LayerComparison) -> bool:
        return any(self.limits.objection(layer, view) for view in layer.views)

    @property
    def worst(self) -> LayerComparison:
        return max(self.layers, key=lambda layer: layer.ratio)


def refusal(report: ParityReport) -> str:
    """Why a report is not one of parity, in one line."""
    first = report.first_divergence
    under_stress = next((run for run in report.stress if not run.passed), None)
    if first is not None:
        return f"not at parity; first divergence: {first}"
    if report.audit is not None and report.audit.differences:
        return f"a setting differs: {report.audit.differences[0]}"
    if under_stress is not None:
        return f"not at parity under stress, {under_stress.name}: {under_stress.first_divergence}"
    return "nothing could be compared"
