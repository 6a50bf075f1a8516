"""Port a file of Keras weights back to a PyTorch checkpoint. The result is checked before it gets its name."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from porting.errors import KeyMapError, OptionError, OutputError, ParityError, failed_parity
from porting.families.base import Family, Spec
from porting.families.given import GivenFamily
from porting.files import weights_file
from porting.files.atomic import output_errors, reserve
from porting.files.result import PendingResult, pending_result
from porting.files.survey import survey_file
from porting.kinds.transforms import Array
from porting.mapping.convert import invert, refuse_non_finite
from porting.mapping.naming import naming_called
from porting.models.frameworks import start_tensorflow
from porting.models.traverse import named_variables
from porting.parity.report import ParityReport, refusal
from porting.progress import SILENT, Progress
from porting.reports.document import to_json
from porting.run import describe_run
from porting.tasks.case import Case, case_of_file, open_case, refuse_another, without_head
from porting.tasks.check import compare_models
from porting.tasks.options import CheckOptions
from porting.wording import counted

if TYPE_CHECKING:
    import keras

TORCH_SUFFIXES = (".pth.tar", ".pth", ".pt", ".bin")
SAFETENSORS = ".safetensors"
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class RevertResult:
    """The result of a revert: a checkpoint of the model that `spec` describes. `report` is None without a check.

    `notes` are sentences that a user of the file must know.
    """

    path: Path
    spec: Spec
    state_dict: dict[str, Array]
    report: ParityReport | None = None
    report_path: Path | None = None
    notes: tuple[str, ...] = ()


def revert(
    family: Family,
    variant: str,
    weights: Path,
    out: Path,
    *,
    layout: str | None = None,
    num_classes: int | None = None,
    dtype: str = "float32",
    check: bool = True,
    options: CheckOptions | None = None,
    progress: Progress = SILENT,
) -> RevertResult:
    """Write the weights of a Keras file, fine-tuned or not, as a PyTorch state_dict.

    `layout` names the publisher whose tensor names to write: by default those of the ported checkpoint, else the
    family's first. `num_classes` (0: no head) is read from the file by default. What was written is read back and
    compared bit by bit. With `check`, it is also loaded into the PyTorch model and compared with the Keras model
    according to `options`. If it passes, it gets its name, with the report beside it as `OUT.parity.json`.

    Raises SourceError, WeightsFileError, CheckpointError if weights are not finite, KeyMapError if the layout is
    unknown or its head does not fit, OutputError, ParityError if what is read back differs, or FailedParityError.
    `out` is then unchanged.
    """
    suffix = _suffix_of(out)
    weights_file.require_file(weights)
    with pending_result(out, suffix, inputs={"--weights": [weights]}) as pending:
        return _revert(
            family,
            variant,
            weights,
            pending,
            layout=layout,
            num_classes=num_classes,
            dtype=dtype,
            check=check,
            options=options or CheckOptions(),
            progress=progress,
        )


def _revert(
    family: Family,
    variant: str,
    weights: Path,
    pending: PendingResult,
    *,
    layout: str | None,
    num_classes: int | None,
    dtype: str,
    check: bool,
    options: CheckOptions,
    progress: Progress,
) -> RevertResult:
    out, temporary = pending.out, pending.path
    survey = survey_file(weights)
    refuse_another(family, variant, survey, weights)
    ported_from = case_of_file(family, variant, survey, num_classes=num_classes)
    target = case_of_file(family, variant, survey, layout=layout, num_classes=num_classes)
    if num_classes is not None and isinstance(family, GivenFamily):
        raise OptionError(
            "--classes does not change two models of your own: their head is what --source and --target make",
            hint="Give the number of classes to the functions with --source-arg and --target-arg.",
        )
    _refuse_other_head(weights, family.classes_in(variant, [shape for _, shape, _ in survey.tensors]), target)
    if not ported_from.num_classes:
        target, ported_from = without_head(target), without_head(ported_from)
    progress("starting TensorFlow")
    start_tensorflow()
    progress("reading the weights")
    candidate = ported_from.load_candidate(weights)
    progress("converting")
    try:
        state_dict = invert(_values(candidate), target.key_map, family.tensor_shapes(target.spec))
    except ValueError as error:
        raise KeyMapError(f"{weights}: {error}", hint=family.expected(target.spec)) from None
    non_finite = refuse_non_finite(state_dict, where=str(weights), allowed=options.allow_non_finite)
    state_dict = {name: _cast(name, array, dtype) for name, array in state_dict.items()}
    unused = target.unused_tensors()
    state_dict |= unused
    progress("writing")
    with output_errors(out):
        _save(temporary, state_dict)
    progress("reading back")
    case = open_case(family, variant, temporary, layout=target.naming.name, progress=progress)
    _refuse_other_tensors(case, state_dict)
    case.refuse_other_tensors()
    case = replace(case, spec=replace(case.spec, stated=target.spec.stated))
    notes = (*_setting_notes(ported_from, target), *_counter_notes(unused))
    if not check:
        pending.commit(None)
        return RevertResult(out, target.spec, state_dict, notes=notes)
    report = compare_models(case, candidate, options, progress)
    facts = {"weights": weights.name, "non_finite": list(non_finite), "file": pending.identity()}
    context = {**describe_run(), **case.describe(), **facts}
    context["source"]["name"] = out.name
    report = replace(report, context=context)
    if not report.passed:
        raise failed_parity(f"{out} was not written: {refusal(report)}", report)
    report_path = pending.commit(to_json(report))
    return RevertResult(out, target.spec, state_dict, report, report_path, notes)


def _counter_notes(tensors: Mapping[str, Array]) -> Iterator[str]:
    """A note on counters, such as a BatchNorm's number of batches, which Keras does not keep."""
    names = Counter(name.rpartition(".")[2] for name, array in tensors.items() if array.ndim == 0 and not array.any())
    for name, count in names.items():
        yield f"Keras does not keep {name}: {counted(count, 'tensor')} of that name set to 0."


def _setting_notes(ported_from: Case, target: Case) -> tuple[str, ...]:
    """Notes on settings of these weights for which the code of the written naming has another default."""
    notes = []
    for name, value in ported_from.spec.settings.items():
        usual = target.naming.settings.get(name, value)
        if value != usual:
            notes.append(
                f"These weights need {name} {value:g}, but code with {target.naming.name} names uses {usual:g}: "
                f"set {name} there, or its results will differ."
            )
    return tuple(notes)


def _refuse_other_head(weights: Path, classes: int | None, target: Case) -> None:
    """Raise KeyMapError if the file has a head and the target has none, or one with another number of classes."""
    if not classes:
        return
    if not naming_called(target.family.namings, target.naming.name).head:
        with_head = [naming.name for naming in target.family.namings if naming.head]
        raise KeyMapError(
            f"{weights} has a head of {classes} classes, but {target.naming.name} names include no head",
            hint=f"Use names that include one: --layout {' or '.join(with_head)}.",
        )
    if classes != target.num_classes:
        raise KeyMapError(
            f"{weights} has a head of {classes} classes, but {target.num_classes} classes were requested",
            hint="Omit --classes.",
        )


def _suffix_of(path: Path) -> str:
    for suffix in (*TORCH_SUFFIXES, SAFETENSORS):
        if path.name.endswith(suffix) and path.name != suffix:
            return suffix
    raise OutputError(
        f"{path}: the suffix does not name a format to write",
        hint=f"Use one of {', '.join((*TORCH_SUFFIXES, SAFETENSORS))}.",
    )


def _values(model: keras.Model) -> dict[str, Array]:
    return {name: np.asarray(variable) for name, variable in named_variables(model).items()}


def _cast(name: str, array: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        cast: Array = np.asarray(array.astype(DTYPES[dtype], copy=False), order="C")
    if not np.isfinite(cast.astype(np.float32)[np.isfinite(array)]).all():
        raise OutputError(f"{name} has values that {dtype} cannot hold", hint="Write it with --dtype float32.")
    return cast


def _save(path: Path, state_dict: Mapping[str, Array]) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: _tensor(array) for name, array in state_dict.items()}
    reserve(path, sum(array.nbytes for array in state_dict.values()))
    try:
        if path.name.endswith(SAFETENSORS):
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            torch.save(tensors, path)
    except (RuntimeError, SafetensorError) as error:  # both wrap an OSError in these
        raise OSError(errno.EIO, str(error).partition("\n")[0]) from None


def _tensor(array: Array) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:  # torch has the type, but does not accept NumPy's
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _refuse_other_tensors(case: Case, state_dict: Mapping[str, Array]) -> None:
    """Raise ParityError unless the tensors read back match those written bit for bit."""
    found = case.state_dict
    differing = [name for name, array in state_dict.items() if not _same_bits(found.get(name), array)]
    if differing or found.keys() != state_dict.keys():
        raise ParityError(
            f"read back from the file, {counted(len(differing), 'tensor')} not as written"
            + (f"; the first is {differing[0]}" if differing else ""),
            hint="The cause is the disk or this version of PyTorch. Please report it.",
        )


def _same_bits(one: Array | None, other: Array) -> bool:
    return (
        one is not None and one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )
