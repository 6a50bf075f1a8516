"""The provenance of weights, as stored in files and reports."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from porting.files.checkpoint import Checkpoint
from porting.sources.table import GIVEN_BY_PATH, Source

_VERSIONED = ("van-port", "torch", "tensorflow", "tensorflow-cpu", "keras", "numpy", "h5py")


def describe_source(source: Source | None, loaded: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint. `source` is its row in the table, None for a file given by path."""
    return {
        "name": source.label if source else loaded.path.name,
        "sha256": loaded.sha256,
        "license": source.license if source else GIVEN_BY_PATH,
        "format": loaded.format,
        "wrapper": loaded.wrapper,
        "prefixes": list(loaded.prefixes),
        "ema": loaded.is_ema,
    }


def versions() -> dict[str, str]:
    """The versions of the packages used. Missing ones are left out, because TensorFlow has several package names."""
    installed = {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}
    return {name: metadata.version(name) for name in _VERSIONED if name in installed}
