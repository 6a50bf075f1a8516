"""What parity means: the results of a comparison, and the verdict on them. Nothing here computes or imports a model.

Does the Keras model compute what the PyTorch model computes? Two questions, each with the run that answers it:

exact    both models in float64 on the same input: are they the same function? Two correct programs agree to about
         1e-15 of the result; the smallest mistakes lie far above that.
float32  both models in float32, against PyTorch in float64: does Keras round about as well as PyTorch does?

The outputs judge, the layers locate. A ratio is Keras's distance to PyTorch's float64 result in units of what rounding
does: PyTorch's own float32 distance, for the exact view times 2^-29, which is what float64 makes of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The name under which the models' own results are compared, after all layers.
OUTPUT = "output"
# Half the distance between 1 and the next number of a type: what one rounding can do, relative to the value.
FLOAT32_ROUNDOFF = 2.0**-24
FLOAT64_ROUNDOFF = 2.0**-53
# Measured over healthy ports and planted mistakes (CONTRIBUTING.md, "What parity means").
DEFAULT_MAX_RATIO = 64.0
DEFAULT_MAX_EXACT_RATIO = 256.0
# A tensor with fewer elements does not tell how large PyTorch's rounding is: by luck it may be next to nothing.
FEW_ELEMENTS = 1024
EXACT, FLOAT32 = "exact", "float32"
VIEWS = (EXACT, FLOAT32)
ROUNDOFF = {EXACT: FLOAT64_ROUNDOFF, FLOAT32: FLOAT32_ROUNDOFF}
# A cause that leaves at most this share of a difference has reproduced it but for rounding.
REPRODUCED = 1e-6


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
    """One setting of one layer that is not the same on both sides, and what to do about it.

    `training` is whether it changes nothing at inference; `counts` whether it fails the check.
    """

    layer: str
    setting: str
    expected: str
    actual: str
    advice: str = ""
    training: bool = False
    counts: bool = True

    def __str__(self) -> str:
        advice = f" ({self.advice})" if self.advice else ""
        return f"{self.layer}: {self.setting} is {self.actual} in Keras, {self.expected} in PyTorch{advice}"


@dataclass(frozen=True)
class Audit:
    """Settings that were compared: in how many layers, how many, and every difference."""

    layers: int
    settings: int
    differences: tuple[SettingDifference, ...]

    @property
    def failures(self) -> tuple[SettingDifference, ...]:
        return tuple(difference for difference in self.differences if difference.counts)


@dataclass(frozen=True)
class Diagnosis:
    """A cause in plain words.

    `unexplained` is the share of the RMS difference that it leaves; `checked` is all that was tried. A `pattern` says
    what the difference looks like, which is no cause.
    """

    layer: str
    cause: str
    unexplained: float
    checked: tuple[str, ...]
    pattern: bool = False

    @property
    def confidence(self) -> str:
        """How sure it is: a reproduced mistake leaves next to nothing."""
        if self.pattern:
            return "pattern"
        return "certain" if self.unexplained <= REPRODUCED else "likely"


@dataclass(frozen=True)
class Culprit:
    """Where two models part: the first layer from which a difference goes on to the outputs.

    `layer` is PyTorch's name, `target` Keras's. `is_input` is whether the layer is right and what feeds it is wrong.
    `relative` is the RMS difference over the RMS of the truth.
    """

    layer: str
    target: str
    reason: str
    relative: float
    is_input: bool = False
    diagnosis: Diagnosis | None = None

    @property
    def culprit(self) -> str:
        """Whose mistake it is: the layer's own, or of the one that feeds it; "" is the model as a whole."""
        return self.layer.rpartition(".")[0] if self.is_input else self.layer

    def __str__(self) -> str:
        if self.is_input:
            return f"{self.culprit or 'the model'} feeds {self.layer} wrongly: {self.reason}"
        return f"{self.layer}: {self.reason}"


@dataclass(frozen=True)
class View:
    """One comparison of a layer against PyTorch in float64.

    `scale` is the size of the truth; `expected_error` is what rounding does and `actual_error` Keras's distance.
    `problem` says why there is no number. `usual_rounding` is what rounding does here as a rule, relative to the
    scale; it is known for tensors of fewer than `FEW_ELEMENTS` elements, and 0 for all others. `roundoff` is one
    rounding of the type that was computed in.
    """

    scale: Distance
    expected_error: Distance
    actual_error: Distance
    problem: str = ""
    usual_rounding: float = 0.0
    roundoff: float = FLOAT32_ROUNDOFF

    @property
    def ratio(self) -> float:
        """Keras's distance in units of the noise, the worse of greatest and RMS difference; infinite for a problem.

        The noise is PyTorch's distance, or the usual rounding or one rounding of the scale where that is greater.
        """
        if self.problem:
            return math.inf
        rounding = max(self.usual_rounding, self.roundoff)
        return max(
            _ratio(self.actual_error.max, self.expected_error.max, rounding * self.scale.max),
            _ratio(self.actual_error.rms, self.expected_error.rms, rounding * self.scale.rms),
        )

    @property
    def relative_error(self) -> float:
        """Keras's RMS distance over the truth's RMS; infinite for a problem."""
        if self.problem:
            return math.inf
        if not self.scale.rms:
            return math.inf if self.actual_error.rms else 0.0
        return self.actual_error.rms / self.scale.rms

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
    """One result of a layer, on both sides.

    `kind` is the PyTorch class; `shape` the output's, in Keras's axis order, over all samples. `difference` is
    Keras against PyTorch, both float32. `rewritten` says how a layer was written in another way, where its own result
    differs and all that follows agrees again; such a layer fails nothing.
    """

    source: str
    target: str
    kind: str
    shape: tuple[int, ...]
    expected_dtype: str
    actual_dtype: str
    views: dict[str, View]
    difference: Difference
    rewritten: str = ""

    @property
    def ratio(self) -> float:
        """The worst of its views; in the exact one that is in units of float64's rounding."""
        return max((view.ratio for view in self.views.values()), default=math.inf)

    @property
    def is_output(self) -> bool:
        return self.source.partition("[")[0] == OUTPUT


@dataclass(frozen=True)
class LogitsComparison:
    """What the user sees of the last layer, over `samples` rows of logits."""

    samples: int
    top1_agreement: int
    top5_agreement: int
    max_probability_change: float


@dataclass(frozen=True)
class Loud:
    """The outputs once more, on `what`: weights or inputs on which hidden mistakes show; `relative` as in Culprit."""

    what: str
    relative: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit


@dataclass(frozen=True)
class Verified:
    """Which of the Keras model's weights the check has seen at work.

    `weights` and `verified` count numbers; `unverified` names the variables that no compared result depends on.
    `differing` names those that are not the checkpoint's bit by bit, where a key map says which should be.
    `through_layers` is whether tensors inside the models were compared, not the outputs alone.
    """

    weights: int
    verified: int
    unverified: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    through_layers: bool = True
    compared_bits: int = 0


@dataclass(frozen=True)
class Limits:
    """What parity allows. The ratios follow from float64; `atol` and `rtol` are added where a user wants them.

    `atol` bounds the greatest difference between Keras and PyTorch in float32, `rtol` that difference over the
    layer's greatest value. `per_layer` gives layers a `max_ratio` of their own, by PyTorch's name.
    """

    max_ratio: float = DEFAULT_MAX_RATIO
    atol: float | None = None
    rtol: float | None = None
    per_layer: Mapping[str, float] = field(default_factory=dict)
    max_exact_ratio: float = DEFAULT_MAX_EXACT_RATIO

    def of(self, source: str) -> float:
        """The `max_ratio` of one layer, whichever of its calls."""
        return self.per_layer.get(source, self.per_layer.get(source.partition("#")[0], self.max_ratio))

    def objection(self, layer: LayerComparison, view_name: str) -> str:
        """Why a layer is not at parity in one view, "" where it is."""
        view, difference = layer.views[view_name], layer.difference
        if layer.rewritten:
            return ""
        if view.problem:
            return view.problem
        exact = view_name == EXACT
        limit = self.max_exact_ratio if exact else self.of(layer.source)
        if not view.ratio <= limit:
            if not math.isfinite(view.ratio):
                return "values that are not finite"
            if exact:
                return f"differs by {view.relative_error:.2g} in float64, {view.ratio:.3g} times rounding"
            return f"{view.ratio:.3g} times PyTorch's own rounding, {limit:g} allowed"
        if not exact:
            if self.atol is not None and not difference.max <= self.atol:
                return f"differs by {difference.max:.3g}, {self.atol:g} allowed (atol)"
            if self.rtol is not None and not difference.max <= self.rtol * view.scale.max:
                relative = difference.max / view.scale.max if view.scale.max else math.inf
                return f"differs by {relative:.3g} of its greatest value, {self.rtol:g} allowed (rtol)"
        return ""


@dataclass(frozen=True)
class Divergence:
    """A layer that is not at parity in one view. `layer` is PyTorch's name; `reason` says by how much."""

    layer: str
    view: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason}"


@dataclass(frozen=True)
class ParityReport:
    """All comparisons in data flow, what has no partner, and the verdict that follows from the limits.

    `problem` says why nothing could be compared. `exact_model` says how the Keras model became float64, "" where there
    was no exact view; `float32_inside` names the layers that compute in float32 whatever they are told, judged by
    float32's rounding. `axes` says how inputs and outputs lie on both sides. `audit` compares settings. `culprits` are
    all mistakes that were found, in data flow. `precision` is what the Keras model computes in. `stress` holds the
    reports of the same models on other weights and inputs, each under its `name`.
    """

    layers: tuple[LayerComparison, ...]
    unpaired_source: tuple[str, ...]
    unpaired_target: tuple[str, ...]
    logits: LogitsComparison | None
    input_shapes: tuple[tuple[int, ...], ...]
    limits: Limits = field(default_factory=Limits)
    name: str = "as ported"
    audit: Audit | None = None
    culprits: tuple[Culprit, ...] = ()
    problem: str = ""
    exact_model: str = ""
    float32_inside: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    loud: Loud | None = None
    verified: Verified | None = None
    precision: str = "float32"
    notes: tuple[str, ...] = ()
    stress: tuple[ParityReport, ...] = ()
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True only when something was compared and nothing objects, under stress too."""
        return not self.objections

    @property
    def objections(self) -> tuple[str, ...]:
        """Every reason why this is not parity, the gravest first."""
        found = [self.problem] if self.problem else []
        if not self.layers and not found:
            found.append("nothing could be compared")
        found += [str(divergence) for divergence in self.divergences]
        found += [f"{layer.source}: nothing was compared" for layer in self.layers if not layer.views]
        # In the exact view the outputs alone judge.
        exact = [layer for layer in self.layers if EXACT in layer.views]
        if exact and not any(layer.is_output and not layer.rewritten for layer in exact):
            found.append("no output of the models was compared")
        if self.loud is not None and not self.loud.passed:
            found.append(f"the outputs differ by {self.loud.relative:.2g} on {self.loud.what}")
        if self.verified is not None:
            if self.verified.differing:
                found.append(
                    f"{len(self.verified.differing)} weights are not the checkpoint's, "
                    f"first {self.verified.differing[0]}"
                )
            if self.verified.weights and not self.verified.verified:
                found.append("no weight of the Keras model was seen at work")
        if self.audit is not None and self.audit.failures:
            found.append(f"{len(self.audit.failures)} settings differ, first {self.audit.failures[0]}")
        found += [
            f"not at parity under stress, {run.name}: {run.objections[0]}" for run in self.stress if not run.passed
        ]
        return tuple(found)

    def __str__(self) -> str:
        """The verdict, and every reason against parity on a line of its own."""
        if self.passed:
            return f"at parity: {len(self.layers)} tensors compared"
        return "\n".join(["not at parity:", *(f"  {line}" for line in self.objections)])

    def __repr__(self) -> str:
        return f"<ParityReport: {' '.join(str(self).split())}>"

    def to_html(self) -> str:
        """The report as one page that needs nothing from anywhere."""
        from porting.reports.html import to_html

        return to_html(self)

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame, so that its style stays its own."""
        from html import escape

        return f'<iframe srcdoc="{escape(self.to_html())}" style="width: 100%; height: 40rem; border: 0"></iframe>'

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as the suffix says: .html, .md, .xml (JUnit) or .json; raises OutputError."""
        from porting.reports import write_report

        write_report(self, Path(path))

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        """What is not at parity, in data flow. In the exact view only the outputs judge; all layers round."""
        found = []
        for layer in self.layers:
            for view in layer.views:
                if (view != EXACT or layer.is_output) and (reason := self.limits.objection(layer, view)):
                    found.append(Divergence(layer.source, view, reason))
        return tuple(found)

    @property
    def first_divergence(self) -> Culprit | Divergence | None:
        """The first culprit; else the first layer that is off."""
        found = self.divergences
        if not found and (self.loud is None or self.loud.passed):
            return None
        return next(iter(self.culprits), None) or next(iter(found), None)

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What the first culprit's difference comes from, or looks like."""
        return self.culprits[0].diagnosis if self.culprits else None

    def failed(self, layer: LayerComparison) -> bool:
        """Whether a layer is off. In the exact view that counts only where the outputs are."""
        exact_counts = any(divergence.view == EXACT for divergence in self.divergences)
        return any(
            self.limits.objection(layer, view)
            for view in layer.views
            if view != EXACT or layer.is_output or exact_counts
        )

    @property
    def worst(self) -> LayerComparison:
        """The layer that rounds worst in float32, among those that were compared so; else the worst of all."""
        rounded = [layer for layer in self.layers if FLOAT32 in layer.views]
        if rounded:
            return max(rounded, key=lambda layer: layer.views[FLOAT32].ratio)
        return max(self.layers, key=lambda layer: layer.ratio)

    @property
    def worst_exact(self) -> View | None:
        """The exact view of the outputs, the worst of them."""
        views = [layer.views[EXACT] for layer in self.layers if layer.is_output and EXACT in layer.views]
        return max(views, key=lambda view: view.ratio, default=None)


def refusal(report: ParityReport) -> str:
    """Why a report is not one of parity, in one line."""
    first = report.first_divergence
    if first is not None:
        return f"not at parity; first divergence: {first}"
    return report.objections[0] if report.objections else "nothing could be compared"
