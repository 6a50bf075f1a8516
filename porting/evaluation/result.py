"""The result of an evaluation, computed from its tally: accuracies with intervals, changed answers, and their cause."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from porting.evaluation.decoding import REFUSED, REMARKS
from porting.evaluation.judge import ARMS, CALIBRATION_BINS, MODEL, OWN, PYTORCH, SAME, STEPS, WORST
from porting.evaluation.tally import Tally
from porting.kinds.transforms import Array

SCHEMA_VERSION = 1
# The names of the arms in reports.
TITLES = {PYTORCH: "PyTorch", SAME: "Keras, same tensors", OWN: "Keras, own preprocessing"}
# The maximum number of classes for which a permutation of labels is searched, because its matrix is dense.
_MOST_CLASSES = 2048
_FEWEST_LABELLED = 40
_LEAST_GAIN = 0.1
_LARGEST_EXPONENT = 700.0
# Perplexities whose relative difference is smaller count as equal.
_SAME = 1e-6


@dataclass(frozen=True)
class Share:
    """`right` of `total`, with Wilson's 95% interval. The rate and interval are None if `total` is 0."""

    right: int
    total: int
    rate: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ArmResult:
    """One arm on the whole data set.

    `calibration_error` is the expected calibration error over 15 bins of confidence, and `bins` are `(count, mean
    confidence, share right)`. `perplexity` is that of a language model. `seconds` is the time spent in the model.
    """

    name: str
    top1: Share
    top5: Share
    calibration_error: float | None = None
    bins: tuple[tuple[int, float, float], ...] = ()
    not_finite: int = 0
    perplexity: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """Two consecutive arms on the same samples: the effect of the model, or of the preprocessing.

    Of `answers` compared, `flips` differ, of which `ties` are within float32's noise. `lost` counts samples that only
    the first arm has right, `won` those that only the second has right, and `p_value` is McNemar's. `points` is the
    difference of the top-1 accuracies in percentage points. `kl` is in nats. `exchanged` holds pairs of classes: where
    the first arm answers one, the second mostly answers the other.
    """

    name: str
    arms: tuple[str, str]
    answers: int
    flips: int
    ties: int
    lost: int = 0
    won: int = 0
    p_value: float | None = None
    points: float | None = None
    kl: float | None = None
    largest_change: float | None = None
    distance: float | None = None
    exchanged: tuple[tuple[int, int], ...] = ()

    @property
    def agreement(self) -> float | None:
        return 1 - self.flips / self.answers if self.answers else None

    @property
    def blamed(self) -> bool:
        """Whether this step changes answers beyond float32's ties."""
        return self.flips > self.ties


@dataclass(frozen=True)
class LabelAdvice:
    """A permutation that explains the labels: `mapping` pairs the data set's labels with the model's classes.

    It lists only the labels that change. `plain` and `permuted` are accuracies on the half of the samples that the
    permutation was not derived from.
    """

    plain: float
    permuted: float
    mapping: tuple[tuple[int, int], ...]

    @property
    def shift(self) -> int | None:
        """The offset of the labels, if it is the same for all."""
        shifts = {model - label for label, model in self.mapping}
        return shifts.pop() if len(shifts) == 1 else None


@dataclass(frozen=True)
class ClassResult:
    """One class: the number of its samples, and how many of them each arm has right."""

    number: int
    samples: int
    right: dict[str, int]


@dataclass(frozen=True)
class Evaluation:
    """Both models on a data set. `flips` and `worst` hold samples by step, `refused` and `remarks` counts by cause.

    `refused_samples`, `remarked`, `outside` and `duplicate_samples` name the first samples of each.
    """

    samples: int
    labelled: int
    classes: int
    arms: tuple[ArmResult, ...]
    steps: tuple[StepResult, ...]
    flips: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    worst: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    per_class: tuple[ClassResult, ...] = ()
    class_names: tuple[str, ...] = ()
    label_advice: LabelAdvice | None = None
    refused: dict[str, int] = field(default_factory=dict)
    refused_samples: list[dict[str, Any]] = field(default_factory=list)
    remarks: dict[str, int] = field(default_factory=dict)
    remarked: dict[str, list[str]] = field(default_factory=dict)
    outside_the_head: int = 0
    outside: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    duplicate_samples: list[list[str]] = field(default_factory=list)
    tokens: int = 0
    notes: tuple[str, ...] = ()
    noise: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)

    def arm(self, name: str) -> ArmResult | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def step(self, name: str) -> StepResult | None:
        return next((step for step in self.steps if step.name == name), None)

    @property
    def blame(self) -> str:
        """The cause of changed answers: "the model", "the preprocessing", both, or "nothing"."""
        return " and ".join(f"the {step.name}" for step in self.steps if step.blamed) or "nothing"

    def class_name(self, number: Any) -> str:
        """The name of a class if it is known, else its number."""
        known = isinstance(number, int) and 0 <= number < len(self.class_names)
        return self.class_names[number] if known else str(number)


def evaluation_of(tally: Tally, *, classes: int, names: tuple[str, ...], noise: float) -> Evaluation:
    """Compute the evaluation from the tally of a whole data set. `names` holds all class names, or none."""
    counts = tally.counts
    labelled = counts["labelled"]
    arms = tuple(_arm(tally, name, labelled) for name in ARMS if tally.seconds.get(name) is not None)
    ran = {arm.name for arm in arms}
    steps = tuple(_step(tally, name) for name, pair in STEPS.items() if set(pair) <= ran)
    remarks = {name.partition(":")[2]: count for name, count in counts.items() if name.startswith("remark:")}
    return Evaluation(
        samples=counts["samples"],
        labelled=labelled,
        classes=classes,
        arms=arms,
        steps=steps,
        flips={step.name: tally.first(f"{step.name}:flips") for step in steps},
        worst={step.name: tally.first(f"{step.name}:worst", WORST) for step in steps},
        per_class=_classes(counts, [arm.name for arm in arms]),
        class_names=names,
        label_advice=_label_advice(counts, classes, labelled),
        refused={name.partition(":")[2]: n for name, n in sorted(counts.items()) if name.startswith("refused:")},
        refused_samples=tally.first("refused"),
        remarks=dict(sorted(remarks.items())),
        remarked={name: [each["sample"] for each in tally.first(f"remark:{name}", 20)] for name in sorted(remarks)},
        outside_the_head=counts["label outside the head"],
        outside=tally.first("outside", 20),
        duplicates=sum(len(group) - 1 for group in duplicates(tally.hashes)),
        tokens=counts["tokens"],
        noise=noise,
        seconds=dict(tally.seconds),
    )


def share(right: int, total: int) -> Share:
    """A share with Wilson's 95% score interval."""
    from scipy.stats import binomtest

    if not total:
        return Share(right, total)
    found = binomtest(right, total).proportion_ci(0.95, method="wilson")
    return Share(right, total, right / total, float(found.low), float(found.high))


def mcnemar(lost: int, won: int) -> float | None:
    """McNemar's exact two-sided p-value for `lost` against `won` samples; None if both are 0."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else None


def _arm(tally: Tally, name: str, labelled: int) -> ArmResult:
    counts = tally.counts
    bins = []
    for each in range(CALIBRATION_BINS):
        count = counts[f"{name}:bin:{each}"]
        if count:
            confidence = tally.sum(f"{name}:bin:{each}") / count
            bins.append((count, confidence, counts[f"{name}:bin:{each}:right"] / count))
    total = sum(count for count, _, _ in bins)
    error = sum(count * abs(confidence - right) for count, confidence, right in bins) / total if total else None
    predicted = counts["predicted"]
    return ArmResult(
        name,
        share(counts[f"{name}:top1"], labelled),
        share(counts[f"{name}:top5"], labelled),
        error,
        tuple(bins),
        counts[f"{name}:not finite"],
        _perplexity(tally.mean(f"{name}:nll", predicted)),
        tally.seconds[name],
    )


def _step(tally: Tally, name: str) -> StepResult:
    counts = tally.counts
    lost, won = counts[f"{name}:outcome:10"], counts[f"{name}:outcome:01"]
    judged = sum(count for key, count in counts.items() if key.startswith(f"{name}:outcome:"))
    answers = counts[f"{name}:same"] + counts[f"{name}:flips"]
    worst = tally.first(f"{name}:worst", 1)
    distance = tally.mean(f"{name}:distance", counts["samples"]) if counts["tokens"] else None
    return StepResult(
        name,
        STEPS[name],
        answers,
        counts[f"{name}:flips"],
        counts[f"{name}:ties"],
        lost,
        won,
        mcnemar(lost, won),
        100 * (won - lost) / judged if judged else None,
        tally.mean(f"{name}:kl", answers),
        worst[0].get("probability_change") if worst else (0.0 if answers else None),
        distance,
        _exchanged(counts, name),
    )


def _perplexity(nll: float | None) -> float | None:
    if nll is None:
        return None
    return math.exp(nll) if nll < _LARGEST_EXPONENT else math.inf


def _exchanged(counts: Mapping[str, int], step: str) -> tuple[tuple[int, int], ...]:
    """Pairs of classes for which the second arm mostly answers one particular other class."""
    found = []
    for key, count in counts.items():
        if key.startswith(f"{step}:flip:"):
            one, other = map(int, key.rsplit(":", 2)[1:])
            if count > 2 and 2 * count > counts.get(f"{step}:answered:{one}", 0):
                found.append((one, other))
    return tuple(sorted(found))


def _classes(counts: Mapping[str, int], arms: Iterable[str]) -> tuple[ClassResult, ...]:
    numbers = sorted(int(key.partition(":")[2]) for key in counts if key.startswith("labels:"))
    return tuple(
        ClassResult(
            number,
            counts[f"labels:{number}"],
            {arm: counts.get(f"{arm}:class:{number}", 0) for arm in arms},
        )
        for number in numbers
    )


def _label_advice(counts: Mapping[str, int], classes: int, labelled: int) -> LabelAdvice | None:
    """Find a permutation of the labels on one half of the samples that explains PyTorch's answers on the other."""
    from scipy.optimize import linear_sum_assignment

    if labelled < _FEWEST_LABELLED or not 1 < classes <= _MOST_CLASSES:
        return None
    halves = np.zeros((2, classes, classes), np.int32)
    for key, count in counts.items():
        if key.startswith(f"{PYTORCH}:answers:"):
            half, label, answer = map(int, key.rsplit(":", 3)[1:])
            halves[half, label, answer] += count
    found, tried = halves
    # Of equally good assignments, prefer the one that keeps labels unchanged.
    rows, columns = linear_sum_assignment(found + 0.5 * np.eye(classes), maximize=True)
    total = int(tried.sum())
    plain, permuted = share(int(np.trace(tried)), total), share(int(tried[rows, columns].sum()), total)
    if plain.rate is None or permuted.rate is None or plain.high is None or permuted.low is None:
        return None
    if permuted.rate < plain.rate + _LEAST_GAIN or permuted.low < plain.high:
        return None
    present = halves.sum((0, 2)) > 0
    mapping = tuple((int(r), int(c)) for r, c in zip(rows, columns, strict=True) if r != c and present[r])
    return LabelAdvice(plain.rate, permuted.rate, mapping)


def duplicates(hashes: Array) -> list[list[int]]:
    """Groups of samples with identical files, by number. Files that could not be read have no hash."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    groups = np.split(order, starts[1:])
    return sorted([int(each) for each in group] for group in groups if len(group) > 1 and hashes[group[0]])


def objections(
    found: Evaluation, *, max_flips: int | None = None, max_drop: float | None = None, earlier: Evaluation | None = None
) -> list[str]:
    """The reasons why an evaluation fails its gates, as sentences.

    `max_flips` limits the answers that the model itself changes. `max_drop` limits by how many points of top-1 any
    Keras arm is below PyTorch. This evaluation must not be worse than `earlier`.
    """
    said = []
    model, pytorch = found.step(MODEL), found.arm(PYTORCH)
    if max_flips is not None and (model is None or not model.answers):
        said.append("--max-flips cannot be applied: no answers were compared")
    if max_drop is not None and not found.labelled:
        said.append("--max-drop cannot be applied: no sample has a label within the head")
    if earlier is not None and (found.samples, found.context.get("data")) != (
        earlier.samples,
        earlier.context.get("data"),
    ):
        said.append(f"the baseline used different data: {earlier.samples:,} samples of {earlier.context.get('data')}")
        earlier = None
    if max_flips is not None and model is not None and model.flips > max_flips:
        said.append(f"{model.flips:,} answers differ from PyTorch's on the same tensors; {max_flips:,} are allowed")
    for arm in found.arms:
        drop = _drop(arm, pytorch)
        if max_drop is not None and drop is not None and drop > max_drop:
            said.append(f"{TITLES[arm.name]}: top-1 is {drop:.2f} points below PyTorch's; {max_drop:g} are allowed")
        if arm.not_finite:
            said.append(f"{TITLES[arm.name]}: the results of {arm.not_finite:,} samples are NaN or infinite")
        before = earlier.arm(arm.name) if earlier is not None else None
        if before is not None and (arm.perplexity or 0.0) > (before.perplexity or math.inf) * (1 + _SAME):
            said.append(
                f"{TITLES[arm.name]}: perplexity is {arm.perplexity:.6g}, the baseline's is {before.perplexity:.6g}"
            )
        if before is not None and arm.top1.rate is not None and before.top1.rate is not None:
            loss = 100 * (before.top1.rate - arm.top1.rate)
            if loss > 0:
                said.append(f"{TITLES[arm.name]}: top-1 is {loss:.2f} points below the baseline's")
    for step in found.steps:
        old = earlier.step(step.name) if earlier is not None else None
        if old is not None and step.flips > old.flips:
            said.append(f"the {step.name} changes {step.flips:,} answers; in the baseline {old.flips:,}")
    return said


def _drop(arm: ArmResult, pytorch: ArmResult | None) -> float | None:
    if pytorch is None or arm.top1.rate is None or pytorch.top1.rate is None:
        return None
    return 100 * (pytorch.top1.rate - arm.top1.rate)


def explained(found: Evaluation) -> list[str]:
    """The findings as sentences, the most important first."""
    lines = []
    if (advice := found.label_advice) is not None:
        how = (
            f"every label is off by {advice.shift:+d}" if advice.shift else "a permutation of the labels explains them"
        )
        lines.append(
            f"The labels: {how}. PyTorch's top-1 is {advice.plain:.1%} with the labels as given and "
            f"{advice.permuted:.1%} with {_pairs_text(advice.mapping)}."
        )
    for arm in found.arms:
        if arm.not_finite:
            lines.append(f"{TITLES[arm.name]}: the results of {arm.not_finite:,} samples are NaN or infinite.")
    for step in found.steps:
        lines.append(_step_text(step, found))
    if found.outside_the_head:
        lines.append(
            f"Labels outside the head's {found.classes} classes: {found.outside_the_head:,}; those samples count only "
            "for agreement."
        )
    if found.duplicates:
        lines.append(f"Duplicate files: {found.duplicates:,}; they count like all other samples.")
    for cause, count in found.refused.items():
        were = "sample was" if count == 1 else "samples were"
        lines.append(f"{count:,} {were} left out: {cause} ({REFUSED.get(cause, 'not for this model')}).")
    for remark, count in found.remarks.items():
        what = f"{count:,} sample{'' if count == 1 else 's'}: {remark}"
        lines.append(what + (f" ({REMARKS[remark]})." if remark in REMARKS else "."))
    return lines


def _pairs_text(pairs: tuple[tuple[int, int], ...]) -> str:
    listed = ", ".join(f"label {label} as class {model}" for label, model in pairs[:6])
    return listed + (f" and {len(pairs) - 6} more" if len(pairs) > 6 else "")


def _step_text(step: StepResult, found: Evaluation) -> str:
    what = "The model" if step.name == MODEL else "The preprocessing"
    unit = "tokens" if found.tokens else "samples"
    if not step.answers:
        return f"{what}: results differ by {step.distance or 0.0:.1e} of their size on average."
    if not step.flips:
        text = f"{what}: no answer of {step.answers:,} {unit} changes"
        if step.largest_change is not None:
            text += f", and no probability by more than {step.largest_change:.1e}"
    else:
        ties = "" if not step.ties else f", {step.ties:,} of them ties within float32's noise"
        text = f"{what} changes {step.flips:,} of {step.answers:,} answers{ties}"
    if step.points is not None and step.flips:
        p_value = "" if step.p_value is None else f", McNemar p = {step.p_value:.2g}"
        text += f"; top-1 {step.points:+.2f} points ({step.lost:,} lost, {step.won:,} won{p_value})"
    if step.exchanged:
        name = found.class_name
        pairs = ", ".join(f"{name(i)} becomes {name(j)}" for i, j in step.exchanged[:4])
        text += f"; systematically: {pairs}" + (" and more" if len(step.exchanged) > 4 else "")
    return text + "."
