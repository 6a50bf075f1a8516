"""The key map between two models that a command line names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import FamilyError, SourceError
from porting.kinds.transforms import Array
from porting.models.frameworks import start_tensorflow
from porting.progress import SILENT, Progress
from porting.proposing.proposal import Proposal, propose_map
from porting.families.specs import build_model

if TYPE_CHECKING:
    import keras

# Sides of inputs that a model leaves open.
_IMAGE_SIDE, _LENGTH = 224, 16
_TOKENS = 64


def map_models(
    source: str,
    target: str,
    *,
    source_arguments: Mapping[str, Any] | None = None,
    target_arguments: Mapping[str, Any] | None = None,
    inputs: Path | None = None,
    pairs: Mapping[str, str] | None = None,
    absorb_epsilon: bool = False,
    progress: Progress = SILENT,
) -> Proposal:
    """Builds both models and proposes the key map between them; `source` and `target` are as `build_model` takes them.

    `inputs` is an `.npz` with the Keras model's inputs by name, by default random ones of the shapes that it takes.
    Raises FamilyError where a model cannot be made or run, and SourceError for `inputs` that are none.
    """
    progress("starting TensorFlow")
    start_tensorflow()
    from torch import nn

    progress("building the models")
    reference = build_model(source, source_arguments or {})
    candidate = build_model(target, target_arguments or {})
    import keras

    if not isinstance(reference, nn.Module):
        raise FamilyError(f"{source} makes a {type(reference).__name__}, not a PyTorch model")
    if not isinstance(candidate, keras.Model):
        raise FamilyError(f"{target} makes a {type(candidate).__name__}, not a Keras model")
    given = _read(inputs) if inputs is not None else random_inputs(candidate)
    try:
        return propose_map(
            reference.eval(), candidate, given, pairs=pairs, absorb_epsilon=absorb_epsilon, progress=progress
        )
    except (RuntimeError, TypeError, ValueError) as error:  # a model that does not take these inputs
        first_line = str(error).strip().partition("\n")[0]
        raise FamilyError(
            f"the models cannot be run on these inputs: {first_line[:300]}",
            hint="Give inputs that both take with --inputs FILE.npz, named as the Keras model's.",
        ) from None


def random_inputs(candidate: keras.Model) -> Any:
    """Inputs of the shapes and types that a Keras model takes, one sample for images and two for all else."""
    tensors = candidate.inputs
    if not tensors:
        raise FamilyError("the Keras model does not say what it takes", hint="Give --inputs FILE.npz.")
    rng = np.random.default_rng(0)
    found = {tensor.name: _drawn(rng, tuple(tensor.shape), str(tensor.dtype), tensor.name) for tensor in tensors}
    return next(iter(found.values())) if len(found) == 1 else found


def _drawn(rng: np.random.Generator, shape: tuple[int | None, ...], dtype: str, name: str) -> Array:
    usual = _IMAGE_SIDE if len(shape) == 4 else _LENGTH
    sides = [2 if len(shape) < 4 else 1, *(usual if side is None else side for side in shape[1:])]
    if dtype.startswith(("int", "uint")):
        if "mask" in name:
            return np.ones(sides, dtype)
        return rng.integers(0, 2 if "segment" in name or "type" in name else _TOKENS, sides).astype(dtype)
    return rng.normal(size=sides).astype(np.float32)


def _read(path: Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise SourceError(f"{path}: not an .npz of inputs: {error}", hint="np.savez(FILE, name=array).") from None
    return next(iter(found.values())) if len(found) == 1 else found
