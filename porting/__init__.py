"""Ports trained weights from PyTorch to Keras and proves, layer by layer, that nothing was lost.

In the order in which data flows: `checkpoint` reads a file into a state_dict, `key_map` and `layout` say where each
tensor goes, `convert` brings it there, `weights_file` writes and reads the result, `activations`, `statistics`,
`comparison` and `parity` compare the two models, `audit`, `diagnosis` and `stress` look where numbers do not, `check`
and `port` put these together, and `reports` show what came out. `family` is what the engine asks of a model family.

`check_parity` is for any two models:

    report = porting.check_parity(torch_model, keras_model, images)
    assert report.passed, report.first_divergence
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porting.parity.compare import check_parity
    from porting.parity.report import Limits, ParityReport

__all__ = ["Limits", "ParityReport", "check_parity"]


def __getattr__(name: str) -> object:
    # Loaded when asked for: `van-port --help` imports this package and must answer at once.
    if name in __all__:
        from porting.parity import compare

        return getattr(compare, name)
    raise AttributeError(f"module 'porting' has no attribute {name!r}")
