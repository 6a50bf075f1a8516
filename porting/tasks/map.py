"""The key map between two models that a command line names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from porting.errors import FamilyError
from porting.families.given import keras_model, pytorch_model, random_inputs, read_inputs
from porting.mapping.rules import KeyRule
from porting.models.frameworks import start_tensorflow
from porting.progress import SILENT, Progress
from porting.proposing.proposal import Proposal, propose_map


def map_models(
    source: str,
    target: str,
    *,
    source_arguments: Mapping[str, Any] | None = None,
    target_arguments: Mapping[str, Any] | None = None,
    inputs: Path | None = None,
    pairs: Mapping[str, str] | None = None,
    rows: Sequence[KeyRule] = (),
    absorb_epsilon: bool = False,
    progress: Progress = SILENT,
) -> Proposal:
    """Builds both models and proposes the key map between them; `source` and `target` are as `build_model` takes them.

    `inputs` is an `.npz` with the Keras model's inputs by name, by default random ones of the shapes that it takes.
    Raises FamilyError where a model cannot be made or run, and SourceError for `inputs` that are none.
    """
    progress("starting TensorFlow")
    start_tensorflow()
    progress("building the models")
    reference = pytorch_model(source, source_arguments or {})
    candidate = keras_model(target, target_arguments or {})
    given = read_inputs(inputs) if inputs is not None else random_inputs(candidate)
    try:
        return propose_map(
            reference, candidate, given, pairs=pairs, rows=rows, absorb_epsilon=absorb_epsilon, progress=progress
        )
    except (RuntimeError, TypeError, ValueError) as error:  # a model that does not take these inputs
        first_line = str(error).strip().partition("\n")[0]
        raise FamilyError(
            f"the models cannot be run on these inputs: {first_line[:300]}",
            hint="Give inputs that both take with --inputs FILE.npz, named as the Keras model's.",
        ) from None
