"""Port trained weights from PyTorch to Keras and prove, layer by layer, that nothing was lost.

`check_parity` compares any two models:

    report = porting.check_parity(torch_model, keras_model, images)
    assert report.passed, report.first_divergence

`port_weights` copies a model's weights according to rows and checks the result. `revert_weights` copies them back:

    rows = [porting.KeyRule("conv{i}", "conv{i}", "conv"), porting.KeyRule("fc", "fc", "dense")]
    ported = porting.port_weights(torch_model, keras_model, rows, inputs=images).require_parity()

`propose_map` finds the rows by running both models. `evaluate` compares both on a data set. `get_family` returns a
family of models whose published checkpoints can be ported. `porting.tasks` has the functions behind the command line.
Files, families and rows that cannot be used raise a `PortingError`; wrong arguments of `check_parity` raise ValueError
or TypeError.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porting.errors import PortingError
    from porting.evaluation.result import Evaluation
    from porting.families.registry import get_family
    from porting.mapping.key_map import KeyMap
    from porting.mapping.rows_file import read_rows
    from porting.mapping.rules import KeyRule
    from porting.parity.compare import check_parity
    from porting.parity.report import Limits, ParityReport
    from porting.proposing.proposal import propose_map
    from porting.tasks.evaluate import evaluate
    from porting.tasks.weights import Ported, port_weights, revert_weights

__all__ = [
    "Evaluation",
    "KeyMap",
    "KeyRule",
    "Limits",
    "ParityReport",
    "Ported",
    "PortingError",
    "check_parity",
    "evaluate",
    "get_family",
    "port_weights",
    "propose_map",
    "read_rows",
    "revert_weights",
]

_HOMES = {
    "Evaluation": "porting.evaluation.result",
    "PortingError": "porting.errors",
    "evaluate": "porting.tasks.evaluate",
    "KeyMap": "porting.mapping.key_map",
    "KeyRule": "porting.mapping.rules",
    "Ported": "porting.tasks.weights",
    "port_weights": "porting.tasks.weights",
    "read_rows": "porting.mapping.rows_file",
    "propose_map": "porting.proposing.proposal",
    "revert_weights": "porting.tasks.weights",
    "Limits": "porting.parity.report",
    "ParityReport": "porting.parity.report",
    "check_parity": "porting.parity.compare",
    "get_family": "porting.families.registry",
}


def __getattr__(name: str) -> object:
    # Imported on first use, because `van-port --help` imports this package and must answer at once.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'porting' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
