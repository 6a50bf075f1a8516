"""Judge one batch of texts: compare the next-token predictions of both models, or their features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from porting.evaluation.judge import MODEL, PYTORCH, SAME, kl, log_probabilities
from porting.evaluation.samples import Batch, opened
from porting.evaluation.tally import Tally
from porting.kinds.transforms import Array


@dataclass(frozen=True)
class TextJudge:
    """A judge of batches of token ids.

    Results are next-token logits, `(N, T, vocabulary)`, or features, `(N, T, width)`. If `head`, a token embedding of
    shape `(vocabulary, width)`, is given, features are multiplied by it to get logits.
    """

    vocabulary: int
    head: Array | None = None

    def judge(self, batch: Batch) -> Tally:
        tally = opened(batch)
        for place, sample in enumerate(batch.samples):
            length = int(batch.same["padding_mask"][place].sum())
            tokens = batch.same["token_ids"][place][:length]
            features = {arm: batch.results[arm][place][:length].astype(np.float64) for arm in (PYTORCH, SAME)}
            tally.counts["tokens"] += length
            for arm, values in features.items():
                tally.counts[f"{arm}:not finite"] += not np.isfinite(values).all()
            distance = _relative(features[PYTORCH], features[SAME])
            tally.add(f"{MODEL}:distance", distance)
            record = {"sample": sample.name, "distance": distance}
            scores = {arm: self._scores(values) for arm, values in features.items()}
            if all(score is not None for score in scores.values()):
                record |= self._compare(tally, scores[PYTORCH], scores[SAME], tokens)
            order = -distance if np.isfinite(distance) else -np.inf
            tally.keep(f"{MODEL}:worst", float(order), sample.number, record)
        return tally

    def _scores(self, features: Array) -> Array | None:
        if self.head is not None:
            features = features @ self.head.T.astype(np.float64)
        return log_probabilities(features) if features.shape[-1] == self.vocabulary else None

    def _compare(self, tally: Tally, first: Array | None, second: Array | None, tokens: Array) -> dict[str, float]:
        assert first is not None  # the caller has checked
        assert second is not None
        divergence, change = kl(first, second), np.abs(np.exp(first) - np.exp(second)).max(1)
        same = int((first.argmax(1) == second.argmax(1)).sum())
        tally.counts["positions"] += len(tokens)
        tally.counts[f"{MODEL}:same"] += same
        tally.counts[f"{MODEL}:flips"] += len(tokens) - same
        tally.counts["predicted"] += max(len(tokens) - 1, 0)
        for value in divergence:
            tally.add(f"{MODEL}:kl", float(value))
        for arm, scores in ((PYTORCH, first), (SAME, second)):
            for place in range(len(tokens) - 1):
                tally.add(f"{arm}:nll", -float(scores[place, tokens[place + 1]]))
        return {"flips": len(tokens) - same, "kl": float(divergence.max()), "probability_change": float(change.max())}


def _relative(first: Array, second: Array) -> float:
    """The RMS of the difference, relative to that of the first."""
    scale = float(np.sqrt(np.square(first).mean()))
    return float(np.sqrt(np.square(first - second).mean())) / (scale or 1.0)
