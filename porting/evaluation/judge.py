"""Judge one batch: turn the results of the arms into counts, sums and lists that merge."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from porting.evaluation.samples import Batch, opened
from porting.evaluation.tally import Tally
from porting.kinds.transforms import Array
from porting.parity.report import DEFAULT_MAX_RATIO

# The names of the arms in results and reports.
PYTORCH, SAME, OWN = "pytorch", "keras", "keras_own"
ARMS = (PYTORCH, SAME, OWN)
# Consecutive arms differ in one thing: the model, then the preprocessing.
MODEL, PREPROCESSING = "model", "preprocessing"
STEPS = dict(zip((MODEL, PREPROCESSING), pairwise(ARMS), strict=True))
CALIBRATION_BINS = 15
# The number of most-changed samples that reports show.
WORST = 20
_TOP = 5
_THUMBNAIL = 96


@dataclass(frozen=True)
class Judge:
    """A judge of batches of images. `noise` is PyTorch's float32 error, relative to the RMS of a sample's logits."""

    classes: int
    noise: float

    def judge(self, batch: Batch) -> Tally:
        """Turn a batch into a tally. `batch.results` holds the logits or probabilities of each arm, `(N, classes)`."""
        tally = opened(batch)
        if not batch.samples:
            return tally
        inside = range(self.classes)
        labels = np.array([sample.label if sample.label in inside else -1 for sample in batch.samples])
        for sample in batch.samples:
            if sample.label is not None and not 0 <= sample.label < self.classes:
                tally.counts["label outside the head"] += 1
                record = {"sample": sample.name, "label": sample.label}
                tally.keep("outside", sample.number, sample.number, record)
        tally.counts["labelled"] += int((labels >= 0).sum())
        scores = {arm: log_probabilities(result) for arm, result in batch.results.items()}
        for arm, score in scores.items():
            self._count_arm(tally, arm, score, labels, batch)
        for step, (first, second) in STEPS.items():
            if first in scores and second in scores:
                self._compare(tally, step, scores[first], scores[second], batch)
        return tally

    def _count_arm(self, tally: Tally, arm: str, scores: Array, labels: Array, batch: Batch) -> None:
        answers, right_at = scores.argmax(1), ranks(scores, labels)
        confidence = np.exp(scores[np.arange(len(scores)), answers])
        bad = ~np.isfinite(scores).all(1)
        tally.counts[f"{arm}:not finite"] += int(bad.sum())
        for place, label in enumerate(labels):
            if label < 0:
                continue
            right = bool(right_at[place] == 0)
            tally.counts[f"{arm}:top1"] += right
            tally.counts[f"{arm}:top5"] += bool(right_at[place] < _TOP)
            tally.counts[f"{arm}:class:{label}"] += right
            # Count both halves of the data set separately, so that a finding from one can be tested on the other.
            half = batch.samples[place].number % 2
            tally.counts[f"{arm}:answers:{half}:{label}:{answers[place]}"] += 1
            if arm == PYTORCH:
                tally.counts[f"labels:{label}"] += 1
            if np.isfinite(confidence[place]):
                bin_ = min(int(confidence[place] * CALIBRATION_BINS), CALIBRATION_BINS - 1)
                tally.counts[f"{arm}:bin:{bin_}"] += 1
                tally.counts[f"{arm}:bin:{bin_}:right"] += right
                tally.add(f"{arm}:bin:{bin_}", float(confidence[place]))

    def _compare(self, tally: Tally, step: str, first: Array, second: Array, batch: Batch) -> None:
        """Compare two arms on the same samples."""
        arms = STEPS[step]
        answers = first.argmax(1), second.argmax(1)
        divergence = kl(first, second)
        change = np.abs(np.exp(first) - np.exp(second)).max(1)
        sizes = np.where(np.isfinite(change), change, np.inf)
        most = {int(place) for place in np.argsort(-sizes, kind="stable")[:WORST] if sizes[place] > 0}
        for place, sample in enumerate(batch.samples):
            one, other = int(answers[0][place]), int(answers[1][place])
            if sample.label is not None and 0 <= sample.label < self.classes:
                outcome = f"{int(one == sample.label)}{int(other == sample.label)}"
                tally.counts[f"{step}:outcome:{outcome}"] += 1
            tally.counts[f"{step}:answered:{one}"] += 1
            tally.add(f"{step}:kl", float(divergence[place]))
            record: dict[str, Any] = {
                "sample": sample.name,
                "label": sample.label,
                "answers": {arms[0]: one, arms[1]: other},
                "kl": float(divergence[place]),
                "probability_change": float(change[place]),
            }
            if one == other:
                tally.counts[f"{step}:same"] += 1
            else:
                margin = self._margin(batch.results[arms[0]][place], one, other)
                tie = margin <= DEFAULT_MAX_RATIO
                record |= {"margin": margin, "tie": tie}
                tally.counts[f"{step}:flips"] += 1
                tally.counts[f"{step}:ties"] += tie
                tally.counts[f"{step}:flip:{one}:{other}"] += 1
                tally.keep(f"{step}:flips", sample.number, sample.number, record | _pictures(batch, place, step))
            if place in most:
                shown = _pictures(batch, place, step) if step == PREPROCESSING else {}
                tally.keep(f"{step}:worst", -float(sizes[place]), sample.number, record | shown)

    def _margin(self, result: Array, one: int, other: int) -> float:
        """How far the first arm's answer is ahead of the other answer, in units of float32's noise."""
        noise = self.noise * max(float(np.sqrt(np.square(result, dtype=np.float64).mean())), 1e-30)
        return float((np.float64(result[one]) - np.float64(result[other])) / noise)


def log_probabilities(result: Array) -> Array:
    """Convert logits, or probabilities if all rows are probabilities, to log probabilities in float64."""
    values = result.astype(np.float64)
    finite = values[np.isfinite(values).all(1)]
    if (finite >= 0).all() and np.allclose(finite.sum(1), 1.0, atol=1e-3) and len(finite):
        return np.log(np.maximum(values, 1e-300))
    shifted = values - values.max(1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def ranks(scores: Array, labels: Array) -> Array:
    """The number of classes ranked before each label. Of equal scores, the smaller class number ranks first."""
    own = scores[np.arange(len(scores)), np.maximum(labels, 0)][:, None]
    earlier = np.arange(scores.shape[1])[None] < np.maximum(labels, 0)[:, None]
    ahead = ((scores > own) | ((scores == own) & earlier)).sum(1)
    # A label whose score is NaN ranks last, because comparisons with NaN are false.
    found: Array = np.where(np.isfinite(own[:, 0]), ahead, scores.shape[1])
    return found


def kl(first: Array, second: Array) -> Array:
    """The KL divergence of the second distribution from the first, one number per row, in nats."""
    found: Array = np.maximum((np.exp(first) * (first - second)).sum(1), 0.0)
    return found


def _pictures(batch: Batch, place: int, step: str) -> dict[str, Any]:
    """The input image of each arm, as data URIs; empty for texts."""
    if not isinstance(batch.same, np.ndarray) or batch.same.ndim != 4 or batch.same.shape[3] not in {1, 3}:
        return {}
    seen = {SAME: batch.same[place]}
    if step == PREPROCESSING and batch.own is not None:
        seen[OWN] = batch.own[place]
    low, high = batch.same[place].min(), batch.same[place].max()
    return {"pictures": {arm: _picture(array, low, high) for arm, array in seen.items()}}


def _picture(array: Array, low: float, high: float) -> str:
    from PIL import Image

    pixels = np.clip((array - low) / max(high - low, 1e-6) * 255.0, 0, 255)
    image = Image.fromarray(np.repeat(pixels.astype(np.uint8), 3 // array.shape[2], axis=2))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
