"""The plan of an evaluation: plain values from which any process can build the models."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import FamilyError, SourceError
from porting.evaluation.engines import Arm
from porting.evaluation.items import Block
from porting.evaluation.judge import OWN, PYTORCH, SAME, Judge
from porting.evaluation.samples import Batch, Prepare, load_images, load_tokens, prepare_own
from porting.evaluation.tally import Tally
from porting.evaluation.texts import TextJudge
from porting.exporting import open_runtime
from porting.families.base import Family, Spec
from porting.families.specs import load_function
from porting.files.exported_file import form_of
from porting.kinds.transforms import Array
from porting.models.frameworks import load_triton, start_tensorflow
from porting.models.images import prepare_in_tensorflow
from porting.models.inputs import Inputs, leaves_by_key, names_in_reference
from porting.parity.report import FLOAT32_ROUNDOFF
from porting.tasks.case import Case, open_case
from porting.wording import reason_of

if TYPE_CHECKING:
    from torch import nn

_CALIBRATED_ON = 8
# The number of blocks to try if nothing in the first can be read.
_BLOCKS_TO_TRY = 64


@dataclass(frozen=True)
class Plan:
    """Which models to run, and how to prepare their inputs.

    `weights` is a file of Keras weights, or a file or folder from `van-port export`. `checkpoint` holds arguments of
    `open_case`. `own` is the preprocessing of the third arm: "own" is the usual one of the family in Keras,
    "tensorflow" uses TensorFlow's defaults, "none" leaves out the third arm, and FILE.py:FUNCTION takes `(H, W, 3)`
    uint8 and returns float32. `shared` is such a function for the tensors that both models take, or "" for the
    family's own. Texts are truncated to `longest` tokens. `threads` is the number of threads per model, which affects
    the rounding of its sums. `fitted` finds the remaining fields.
    """

    family: Family
    variant: str
    weights: Path
    checkpoint: Mapping[str, Any]
    own: str = "own"
    shared: str = ""
    longest: int = 128
    threads: int = 1
    spec: Spec | None = None
    classes: int = 0
    vocabulary: int = 0
    noise: float = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"case", "reference", "_prepares"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @cached_property
    def case(self) -> Case:
        return open_case(self.family, self.variant, **self.checkpoint)

    @cached_property
    def reference(self) -> nn.Module:
        """The PyTorch model. Loading it sets PyTorch's thread count to `threads`."""
        load_triton()
        import torch

        torch.set_num_threads(self.threads)
        return self.case.load_reference()

    def require_functions(self) -> None:
        """Raise FamilyError, SourceError or OptionError if a FILE.py:FUNCTION for preprocessing cannot be loaded."""
        for function in (self.shared, self.own):
            if function not in {"", "none", "own", "tensorflow"}:
                _function(function)

    def fitted(self, blocks: Iterable[Block]) -> Plan:
        """A copy with the fields that running the PyTorch model on the first readable samples determines.

        Raises FamilyError if the model returns no classes, or takes neither images nor tokens, and SourceError if none
        of the first samples can be read.
        """
        from torch import nn

        spec = self.case.spec
        given = self.case.check_inputs()
        if isinstance(given, dict):
            if "token_ids" not in given:
                raise FamilyError(
                    f"evaluate cannot run {self.family.name}, which takes {', '.join(given)}",
                    hint="It needs a model of images or of token_ids.",
                )
            tables = [each for each in self.reference.modules() if isinstance(each, nn.Embedding)]
            return replace(self, spec=spec, vocabulary=tables[0].num_embeddings)
        if spec.naming.has_head and not spec.num_classes:
            raise FamilyError(
                "the checkpoint has no head, and evaluate needs a classifier", hint="Use a checkpoint with a head."
            )
        fitted = replace(self, spec=spec)
        refused: list[tuple[int, str, str, str]] = []
        for block in itertools.islice(blocks, _BLOCKS_TO_TRY):
            batch = fitted.load(replace(block, items=block.items[: 4 * _CALIBRATED_ON]))
            if batch.samples:
                classes, noise = self._calibrated(batch.same[:_CALIBRATED_ON])
                return replace(fitted, classes=classes, noise=noise)
            refused += batch.refused
        raise SourceError(
            "none of the first samples can be read: " + "; ".join(f"{name}: {why}" for _, name, why, _ in refused[:3]),
            hint="Check --data: `van-port evaluate --help` lists the forms that it accepts.",
        )

    def _calibrated(self, images: Array) -> tuple[int, float]:
        """The number of classes, and PyTorch's float32 noise: its RMS distance from float64, relative to the logits."""
        import torch

        tensor = _channels_first(images)
        with torch.inference_mode():
            try:
                single = _tensor(self.reference(tensor)).numpy().astype(np.float64)
            except RuntimeError as error:
                raise FamilyError(
                    f"the PyTorch model cannot run on images of shape {images.shape[1:]}: {reason_of(error)}",
                    hint="Prepare them with --pytorch-preprocessing FILE.py:FUNCTION.",
                ) from None
            if single.ndim != 2:
                raise FamilyError(
                    f"the model returns an array of shape {single.shape}, and evaluate needs a classifier",
                    hint="Evaluate the model with its head.",
                )
            inputs = Inputs((tensor.numpy(),), (tensor.numpy(),), (None,))
            double = _tensor(inputs.call_reference(copy.deepcopy(self.reference).double(), torch.float64)).numpy()
        scale = np.sqrt(np.square(double).mean())
        noise = float(np.sqrt(np.square(single - double).mean()) / scale) if scale else 0.0
        return single.shape[1], max(noise, FLOAT32_ROUNDOFF)

    @cached_property
    def _prepares(self) -> tuple[Prepare, Prepare | None]:
        """The preprocessing of the shared tensors, and that of the third arm."""
        spec = self.spec or self.case.spec
        shared = _function(self.shared) if self.shared else self.family.prepare_reference(spec)
        if self.own == "none":
            return shared, None
        if self.own == "own":
            return shared, self.family.prepare_candidate(spec)
        if self.own == "tensorflow":
            return shared, partial(prepare_in_tensorflow, preprocessing=self.family.preprocessing(spec))
        return shared, _function(self.own)

    def load(self, block: Block, pool: Executor | None = None) -> Batch:
        """Read and prepare a block for both models."""
        started = time.perf_counter()
        if self.vocabulary:
            batch = load_tokens(block, self.longest, self.vocabulary)
        else:
            shared, own = self._prepares
            batch = load_images(block, shared, pool, keep_pixels=own is not None)
        batch.seconds["loading"] = time.perf_counter() - started
        return batch

    def arm(self, name: str) -> contextlib.AbstractContextManager[Arm]:
        """Load one of the two models, `PYTORCH` or `SAME`. The latter also runs the third arm."""
        return contextlib.nullcontext(_ReferenceArm(self)) if name == PYTORCH else _candidate_arm(self)

    def judge(self, batch: Batch) -> Tally:
        if self.vocabulary:
            table = self.family.tied_head
            head = self.case.state_dict[table] if table else None
            return TextJudge(self.vocabulary, head).judge(batch)
        return Judge(self.classes, self.noise).judge(batch)


class _ReferenceArm:
    def __init__(self, plan: Plan) -> None:
        self._model = plan.reference

    def prepare(self, batch: Batch, pool: Executor | None = None) -> None:
        pass

    def __call__(self, batch: Batch) -> None:
        import torch

        if not batch.samples:
            return
        started = time.perf_counter()
        with torch.inference_mode():
            if isinstance(batch.same, dict):
                names = names_in_reference(self._model, tuple(batch.same)) or ()
                arrays = (torch.from_numpy(array) for array in batch.same.values())
                result = self._model(**dict(zip(names, arrays, strict=True)))
            else:
                result = self._model(_channels_first(batch.same))
        batch.results[PYTORCH] = _tensor(result).numpy()
        batch.seconds[PYTORCH] = time.perf_counter() - started


class _CandidateArm:
    def __init__(self, run: Callable[[Any], Array], own: Prepare | None) -> None:
        self._run, self._own = run, own

    def prepare(self, batch: Batch, pool: Executor | None = None) -> None:
        if self._own is not None:
            started = time.perf_counter()
            prepare_own(batch, self._own, pool)
            batch.seconds["preparing Keras's own"] = time.perf_counter() - started

    def __call__(self, batch: Batch) -> None:
        if not batch.samples:
            return
        started = time.perf_counter()
        batch.results[SAME] = self._run(batch.same)
        batch.seconds[SAME] = time.perf_counter() - started
        if batch.own is not None:
            started = time.perf_counter()
            same = batch.own is batch.same
            batch.results[OWN] = batch.results[SAME] if same else self._run(batch.own)
            batch.seconds[OWN] = time.perf_counter() - started


@contextlib.contextmanager
def _candidate_arm(plan: Plan) -> Iterator[Arm]:
    start_tensorflow(plan.threads)
    own = None if plan.vocabulary else plan._prepares[1]
    form = form_of(plan.weights)
    if form is None:
        model = plan.case.load_candidate(plan.weights)

        def run(given: Any) -> Array:
            return np.asarray(_tensor(model.predict_on_batch(given)))

        yield _CandidateArm(run, own)
        return
    with open_runtime(form, plan.weights, []) as runtime:

        def run_exported(given: Any) -> Array:
            named = given if isinstance(given, dict) else {"images": given}
            count = len(next(iter(named.values())))
            rows = []
            for place in range(count):
                results, _ = runtime.run({name: array[place : place + 1] for name, array in named.items()})
                rows.append(results[min(results)])
            return np.concatenate(rows)

        yield _CandidateArm(run_exported, own)


def _tensor(result: Any) -> Any:
    """The tensor that a model returns, or the first of several."""
    return next(iter(leaves_by_key(result).values()))


def _channels_first(images: Array) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def _function(spec: str) -> Prepare:
    """Load FILE.py:FUNCTION, which takes `(H, W, 3)` uint8 and returns `(H, W, C)` float32."""
    function = load_function(spec)
    return lambda image: np.asarray(function(np.asarray(image)), np.float32)
