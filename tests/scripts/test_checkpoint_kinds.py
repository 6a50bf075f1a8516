"""Every kind of checkpoint that people have, made by the library that makes it, is ported or named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from scripts.checkpoint_kinds import Kind, build, kinds, outcome

QUICK = {"torch"}


@pytest.mark.filterwarnings("ignore")  # of the libraries that write the files
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[] if kind.needs in QUICK else pytest.mark.slow)
        for kind in kinds()
        if importlib.util.find_spec(kind.needs)
    ],
)
def test_a_kind_of_checkpoint(kind: Kind, tmp_path: Path) -> None:
    assert kind.expected in outcome(kind, tmp_path, build())
