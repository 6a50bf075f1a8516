"""Where the data that travels with the package lies."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def weights_folder() -> Path:
    """The folder `weights/`: inside the package when installed from a wheel, beside it in a working copy."""
    installed = _PACKAGE / "weights"
    return installed if installed.is_dir() else _PACKAGE.parent / "weights"
