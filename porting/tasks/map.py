"""Find the key map between two models named on the command line."""

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
from porting.wording import reason_of


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
    """Build both models and propose the key map between them. `build_model` lists the forms of `source` and `target`.

    `inputs` is an `.npz` file with the Keras model's inputs by name; the default is random inputs of the right shapes.
    Raises FamilyError if a model cannot be built or run, and SourceError if `inputs` cannot be read.
    """
    progress("starting TensorFlow")
    start_tensorflow()
    progress("building the models")
    reference = pytorch_model(source, source_arguments or {})
    candidate = keras_model(target, target_arguments or {})
    given = read_inputs(inputs) if inputs is not None else random_inputs(getattr(candidate, "inputs", None))
    try:
        return propose_map(
            reference, candidate, given, pairs=pairs, rows=rows, absorb_epsilon=absorb_epsilon, progress=progress
        )
    except (RuntimeError, TypeError, ValueError) as error:  # a model rejects these inputs
        raise FamilyError(
            f"the models cannot be run on these inputs: {reason_of(error)}",
            hint="Give inputs that both models accept with --inputs FILE.npz, named like the Keras model's inputs.",
        ) from None
