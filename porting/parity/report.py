"""Defines parity: the results of a comparison and the verdict on them. Nothing here computes or imports a model.

Two runs answer whether the Keras model computes what the PyTorch model computes:

exact    both models in float64 on the same input: are they the same function? Two correct programs agree to about
         1e-15 of the result; the smallest mistakes lie far above that.
float32  both models in float32, against PyTorch in float64: does Keras round about as well as PyTorch does?

The outputs decide the verdict, and the layers show where a mistake is. A ratio is Keras's distance to PyTorch's float64
result in units of rounding: PyTorch's own float32 distance, scaled by 2^-29 to float64's rounding in the exact view.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from porting.call_names import without_number
from porting.errors import failed_parity
from porting.wording import counted, listed

# The name under which the models' own results are compared, after all layers.
OUTPUT = "output"
# Half the distance between 1 and the next number of a type: what one rounding can do, relative to the value.
FLOAT32_ROUNDOFF = 2.0**-24
FLOAT64_ROUNDOFF = 2.0**-53
# Measured over healthy ports and planted mistakes (CONTRIBUTING.md, "What parity means").
DEFAULT_MAX_RATIO = 64.0
DEFAULT_MAX_EXACT_RATIO = 256.0
# A tensor with fewer elements does not show how large PyTorch's rounding is: by chance it may be almost nothing.
FEW_ELEMENTS = 1024
EXACT, FLOAT32 = "exact", "float32"
VIEWS = (EXACT, FLOAT32)
# A cause that leaves at most this share of a difference unexplained has reproduced it up to rounding.
REPRODUCED = 1e-6


# What runs an exported file, by the name of the format.
RUNTIMES = {"litert": "LiteRT", "onnx": "ONNX Runtime", "saved_model": "TensorFlow"}


@dataclass(frozen=True)
class Distance:
    """The greatest absolute value and the root mean square over all elements."""

    max: float = 0.0
    rms: float = 0.0


@dataclass(frozen=True)
class Difference:
    """The difference of `actual` (Keras) to `expected` (PyTorch), both float32, over all elements of all batches.

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
    """One setting of one layer that differs between the two sides, and what to do about it.

    `training` is whether it matters only in training, `counts` whether it fails the check.
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
    """The settings that were compared: the number of layers, the number of settings, and every difference."""

    layers: int
    settings: int
    differences: tuple[SettingDifference, ...]

    @property
    def failures(self) -> tuple[SettingDifference, ...]:
        return tuple(difference for difference in self.differences if difference.counts)


WIRING, WEIGHTS = "wiring", "weights"


@dataclass(frozen=True)
class Diagnosis:
    """A cause in plain words.

    `unexplained` is the share of the RMS difference that it leaves. `checked` lists all causes that were tried. A
    `pattern` describes only what the difference looks like, not its cause. `basis` is `WIRING` if another tensor of the
    run explains it, `WEIGHTS` if it only says that weights differ, and else "".
    """

    layer: str
    cause: str
    unexplained: float
    checked: tuple[str, ...]
    pattern: bool = False
    basis: str = ""

    @classmethod
    def certain(cls, layer: str, cause: str) -> Diagnosis:
        """A cause that explains the whole difference, and beside which nothing else was tried."""
        return cls(layer, cause, 0.0, (cause,))

    @property
    def confidence(self) -> str:
        """How sure the cause is: "certain", "likely" or "pattern". A reproduced mistake leaves almost nothing."""
        if self.pattern:
            return "pattern"
        return "certain" if self.unexplained <= REPRODUCED else "likely"


@dataclass(frozen=True)
class Culprit:
    """Where two models part: the first layer whose difference reaches the outputs.

    `layer` is PyTorch's name, `target` is Keras's. `is_input` means that the layer is right and its input is wrong.
    `feeder` is then the module whose code feeds it, by default the one that holds it.
    `relative` is the RMS difference over the RMS of the truth.
    """

    layer: str
    target: str
    reason: str
    relative: float
    is_input: bool = False
    diagnosis: Diagnosis | None = None
    feeder: str | None = None

    @property
    def culprit(self) -> str:
        """The layer with the mistake: `layer`, or the one that feeds it; "" is the model as a whole."""
        if not self.is_input:
            return self.layer
        return self.layer.rpartition(".")[0] if self.feeder is None else self.feeder

    def __str__(self) -> str:
        if self.is_input:
            return f"{self.culprit or 'the model'} feeds {self.layer} wrongly: {self.reason}"
        return f"{self.layer}: {self.reason}"


# A layer that computes in float32 whatever it is told is one step, so it rounds about as PyTorch does in float32. The
# truth goes on in its place, so no later tensor would show more.
MAX_RATIO_INSIDE = 8.0


@dataclass(frozen=True)
class View:
    """One comparison of a layer against PyTorch in float64.

    `scale` is the size of the truth, `expected_error` is PyTorch's distance by rounding, and `actual_error` is Keras's
    distance. `problem` says why there is no number. `usual_rounding` is the usual rounding of such a tensor, relative
    to the scale; it is 0 for tensors of `FEW_ELEMENTS` elements or more. `roundoff` is one rounding of the computed
    type.
    """

    scale: Distance
    expected_error: Distance
    actual_error: Distance
    problem: str = ""
    usual_rounding: float = 0.0
    roundoff: float = FLOAT32_ROUNDOFF

    @property
    def noise(self) -> Distance:
        """The unit of the ratio: PyTorch's distance, the usual rounding or one rounding, whichever is greatest."""
        rounding = max(self.usual_rounding, self.roundoff)
        return Distance(
            max(self.expected_error.max, rounding * self.scale.max),
            max(self.expected_error.rms, rounding * self.scale.rms),
        )

    @property
    def ratio(self) -> float:
        """Keras's distance in units of the noise, the worse of greatest and RMS difference; infinite for a problem."""
        if self.problem or not all(map(math.isfinite, (self.scale.max, self.scale.rms))):
            return math.inf
        noise = self.noise
        return max(_ratio(self.actual_error.max, noise.max), _ratio(self.actual_error.rms, noise.rms))

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
        """PyTorch's RMS distance to the truth over the truth's RMS; 0 if the latter is 0."""
        return self.expected_error.rms / self.scale.rms if self.scale.rms else 0.0


def _ratio(error: float, noise: float) -> float:
    if not (math.isfinite(error) and math.isfinite(noise)):
        return math.inf
    if error == 0.0:
        return 0.0
    return error / noise if noise else math.inf


@dataclass(frozen=True)
class LayerComparison:
    """One result of a layer on both sides.

    `kind` is the PyTorch class. `shape` is the shape of the output, in Keras's axis order, over all samples.
    `difference` is Keras against PyTorch, both float32. `rewritten` says how a layer is written in another way, if its
    own result differs and all later ones agree again. Such a layer does not fail the check. `is_output` marks a result
    of the model.
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
    is_output: bool = False

    @property
    def ratio(self) -> float:
        """The ratio of the worst view. In the exact view, the unit is the rounding of float64."""
        return max((view.ratio for view in self.views.values()), default=math.inf)


@dataclass(frozen=True)
class LogitsComparison:
    """The effect on what a user sees: classes and probabilities, over `samples` rows of logits."""

    samples: int
    top1_agreement: int
    top5_agreement: int
    max_probability_change: float


@dataclass(frozen=True)
class Loud:
    """The outputs on `what`, weights or inputs on which hidden mistakes show. `relative` is as in Culprit."""

    what: str
    relative: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit


@dataclass(frozen=True)
class Verified:
    """Which weights of the Keras model the check has verified.

    `weights` and `verified` count numbers. `unverified` names the variables that no compared result depends on. If a
    key map is given, or the paired layers imply one, `differing` names the variables that differ from the checkpoint
    in any bit, of `compared_bits` variables compared, and `details` says how each differs. `through_layers` is whether
    tensors inside the models were compared, not only the outputs. `whole_numbers` means that all results are whole
    numbers, such as those of an argmax, which hide most mistakes. Only weights before a tensor with fractions that
    agrees count then, or those that were compared bit by bit. `unproven` names layers that nothing proves: no result
    depends on their weights, as before a rounding, and PyTorch computes nothing that they return.
    """

    weights: int
    verified: int
    unverified: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    through_layers: bool = True
    compared_bits: int = 0
    details: tuple[str, ...] = ()
    whole_numbers: bool = False
    unproven: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """What parity allows. Ratios relate to the float64 truth; `atol` and `rtol` are additional, if a user wants them.

    `atol` bounds the greatest difference between Keras and PyTorch in float32, `rtol` that difference over the
    layer's greatest value. `per_layer` gives single layers their own `max_ratio`, by PyTorch's name.
    """

    max_ratio: float = DEFAULT_MAX_RATIO
    atol: float | None = None
    rtol: float | None = None
    per_layer: Mapping[str, float] = field(default_factory=dict)
    max_exact_ratio: float = DEFAULT_MAX_EXACT_RATIO

    def of(self, source: str) -> float:
        """The `max_ratio` of a layer, for any of its calls."""
        return self.per_layer.get(source, self.per_layer.get(without_number(source), self.max_ratio))

    def objection(self, layer: LayerComparison, view_name: str) -> str:
        """Why a layer is not at parity in one view; "" if it is."""
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
    """All comparisons in the order of data flow, what has no partner, and the verdict by the limits.

    `problem` says why nothing could be compared. `exact_model` says how the Keras model became float64; "" without an
    exact view. `float32_inside` names the layers that always compute in float32 and are judged by its rounding. `axes`
    describes the order of axes of inputs and outputs on both sides. `audit` compares settings. `culprits` are all
    mistakes that were found, in the order of data flow. `precision` is the type in which the Keras model computes.
    `caveats` say what was not compared, or differs without effect.
    `stress` holds the reports of the same models on other weights and inputs, each under its `name`.
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
    caveats: tuple[str, ...] = ()
    stress: tuple[ParityReport, ...] = ()
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was compared and there are no objections, under stress too."""
        return not self.objections

    @property
    def objections(self) -> tuple[str, ...]:
        """Every reason against parity, the gravest first."""
        found = [self.problem] if self.problem else []
        if not self.layers and not found:
            found.append("nothing could be compared")
        found += [str(divergence) for divergence in self.divergences]
        found += [f"{layer.source}: nothing was compared" for layer in self.layers if not layer.views]
        # In the exact view only the outputs decide.
        exact = [layer for layer in self.layers if EXACT in layer.views]
        if exact and not any(layer.is_output and not layer.rewritten for layer in exact):
            found.append("no output of the models was compared")
        if self.loud is not None and not self.loud.passed:
            found.append(f"the outputs differ by {self.loud.relative:.2g} on {self.loud.what}")
        if self.verified is not None:
            if self.verified.differing:
                first = next(iter(self.verified.details), self.verified.differing[0])
                found.append(f"{counted(len(self.verified.differing), 'weight')} not the checkpoint's: {first}")
            if self.verified.whole_numbers and self.verified.unverified and not self.verified.compared_bits:
                found.append(
                    f"the results are whole numbers, which do not show {listed(self.verified.unverified)}: "
                    "return what they were made from too, or give a key map"
                )
            elif self.verified.unproven:
                first, more = self.verified.unproven[0], len(self.verified.unproven) - 1
                where = f"{first}, and {counted(more, 'layer')} behind it," if more else first
                found.append(
                    f"a mistake in {where} that no result shows: PyTorch computes nothing like what {first} returns, "
                    "and no result depends on its weights, as before a rounding"
                )
            elif self.verified.weights and not self.verified.verified:
                found.append("no weight of the Keras model was observed in use")
        if self.audit is not None and self.audit.failures:
            found.append(f"{counted(len(self.audit.failures), 'setting')} not equal, first {self.audit.failures[0]}")
        found += [
            f"not at parity under stress, {run.name}: {run.objections[0]}" for run in self.stress if not run.passed
        ]
        return tuple(found)

    def __str__(self) -> str:
        """The verdict, then what was found: culprits, causes, and settings that differ."""
        from porting.reports import as_text

        return as_text(self)

    def __repr__(self) -> str:
        first = str(self).partition("\n")[0]
        return f"<ParityReport: {first}>"

    def require_parity(self) -> ParityReport:
        """Return the report itself. Raises ParityError, with the verdict and the findings, if it has not passed."""
        if not self.passed:
            raise failed_parity(str(self), self)
        return self

    def to_html(self) -> str:
        """The report as a single HTML page without external resources."""
        from porting.reports.html import to_html

        return to_html(self)

    def _repr_html_(self) -> str:
        """Show the page in notebooks, in a frame that keeps its style separate."""
        from html import escape

        return f'<iframe srcdoc="{escape(self.to_html())}" style="width: 100%; height: 40rem; border: 0"></iframe>'

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report in the format of the suffix: .html, .md, .xml (JUnit) or .json. Raises OutputError."""
        from porting.reports import save_report

        save_report(self, Path(path))

    @cached_property  # `failed` asks for it once per layer
    def divergences(self) -> tuple[Divergence, ...]:
        """All divergences in the order of data flow.

        In the exact view these are of the outputs, and of layers that compute in float32; in float32 of all layers.
        """
        return tuple(
            Divergence(layer.source, view, reason)
            for layer in self.layers
            for view in layer.views
            if (reason := self._objection(layer, view))
        )

    def _objection(self, layer: LayerComparison, view: str) -> str:
        """Why a layer fails in a view by itself; "" if it does not."""
        ratio = layer.views[view].ratio
        inside = view == EXACT and layer.views[view].roundoff == FLOAT32_ROUNDOFF
        if view != EXACT or (layer.is_output and not (inside and ratio > MAX_RATIO_INSIDE)):
            return self.limits.objection(layer, view)
        if ratio <= MAX_RATIO_INSIDE or (layer.source not in self.float32_inside and not layer.is_output):
            return ""
        return f"{ratio:.3g} times the rounding of float32, in which it computes; {MAX_RATIO_INSIDE:g} allowed"

    @property
    def runtime(self) -> str:
        """What was compared with PyTorch: "Keras", or the runtime of an exported file."""
        export = self.context.get("export")
        form = export.get("format") if isinstance(export, dict) else None
        return RUNTIMES.get(form, "Keras") if isinstance(form, str) else "Keras"

    @property
    def first_divergence(self) -> Culprit | Divergence | None:
        """The first culprit, otherwise the first divergence; None if there is neither."""
        found = self.divergences
        if not found and (self.loud is None or self.loud.passed):
            return None
        return next(iter(self.culprits), None) or next(iter(found), None)

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The cause or the pattern of the first culprit's difference; None if unknown."""
        return self.culprits[0].diagnosis if self.culprits else None

    def failed(self, layer: LayerComparison) -> bool:
        """Whether a layer is not at parity. In the exact view, layers count only if an output differs."""
        exact_counts = any(divergence.view == EXACT for divergence in self.divergences)
        return any(
            self.limits.objection(layer, view) if exact_counts else self._objection(layer, view) for view in layer.views
        )

    @property
    def worst(self) -> LayerComparison:
        """The layer that rounds worst in float32. If none was compared in float32, the worst of all."""
        rounded = [layer for layer in self.layers if FLOAT32 in layer.views]
        if rounded:
            return max(rounded, key=lambda layer: layer.views[FLOAT32].ratio)
        return max(self.layers, key=lambda layer: layer.ratio)

    @property
    def worst_exact(self) -> View | None:
        """The worst exact view of the outputs; None if there is none."""
        views = [layer.views[EXACT] for layer in self.layers if layer.is_output and EXACT in layer.views]
        return max(views, key=lambda view: view.ratio, default=None)


def refusal(report: ParityReport) -> str:
    """Say in one line why a report is not at parity."""
    first = report.first_divergence
    if first is not None:
        return f"not at parity; first divergence: {first}"
    return report.objections[0] if report.objections else "nothing could be compared"
