"""Where weights come from, in the words that files and reports carry."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from porting.files.checkpoint import Checkpoint
from porting.sources.table import Source

_VERSIONED = ("van-port", "torch", "tensorflow", "tensorflow-cpu", "keras", "numpy", "h5py")


def describe_source(source: Source | None, loaded: Checkpoint) -> dict[str, Any]:
    """What is known of a checkpoint; `source` is its row in the table, None for a file that was given by path."""
    return {
        "name": source.label if source else loaded.path.name,
        "sha256": loaded.sha256,
        "license": source.license if source else "unknown: the checkpoint was given by path",
        "format": loaded.format,
        "wrapper": loaded.wrapper,
        "prefixes": list(loaded.prefixes),
        "ema": loaded.is_ema,
    }


def versions() -> dict[str, str]:
    """Versions of what took part; TensorFlow goes by several names, so a name that is not installed is left out."""
    installed = {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}
    return {name: metadata.version(name) for name in _VERSIONED if name in installed}
