"""Every common kind of checkpoint, written by its own library, is ported or named in an error."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

QUICK = {"torch"}


def load_script() -> Any:
    """Load a script, which belongs to no package."""
    path = Path(__file__).parents[2] / "scripts" / "checkpoint_kinds.py"
    spec = importlib.util.spec_from_file_location("checkpoint_kinds", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.mark.filterwarnings("ignore")  # warnings of the libraries that write the files
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[] if kind.needs in QUICK else pytest.mark.slow)
        for kind in script.kinds()
        if importlib.util.find_spec(kind.needs)
    ],
)
def test_a_kind_of_checkpoint(kind: Any, tmp_path: Path) -> None:
    assert kind.expected in script.outcome(kind, tmp_path, script.build())
