"""Read how a VAN is built from configurations and training arguments stored with its weights."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from porting.errors import KeyMapError

if TYPE_CHECKING:
    from porting.references.van import VanShape

_BATCH_NORM_EPSILON = 1e-5
_EPSILON = "layer_norm_eps"


def stated_settings(variant: str, shape: VanShape, facts: Mapping[str, Any]) -> dict[str, float]:
    """The stated settings; raises KeyMapError for a setting that contradicts this VAN.

    This reads `config.json` of transformers, `hyper_parameters` of Lightning, `args` of timm's training script, and
    the configuration in mmengine's `meta`.
    """
    later = len(shape.depths) - 1
    known = {
        "hidden_sizes": list(shape.embed_dims),
        "embed_dims": list(shape.embed_dims),
        "depths": list(shape.depths),
        "mlp_ratios": list(shape.mlp_ratios),
        "num_channels": shape.in_chans,
        "in_chans": shape.in_chans,
        "in_channels": shape.in_chans,
        # All published VAN code uses these values; others would change the function but not the tensors.
        "hidden_act": "gelu",
        "strides": [4] + [2] * later,
        "patch_sizes": [7] + [3] * later,
    }
    found: dict[str, float] = {}
    for place, settings in _statements(facts):
        for name, value in settings.items():
            expected = known.get(name)
            if expected is not None and value != expected:
                raise _refused(variant, place, name, value, expected)
            if name == _EPSILON:
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                    raise _refused(variant, place, name, value, "a number between 0 and 1")
                found[name] = float(value)
            if name in {"bn_eps", "batch_norm_eps"} and value != _BATCH_NORM_EPSILON:
                raise _refused(variant, place, name, value, _BATCH_NORM_EPSILON)
    return found


def _refused(variant: str, place: str, name: str, value: Any, expected: Any) -> KeyMapError:
    return KeyMapError(
        f"{place} states {name} {value!r:.100}, but van_{variant} has {expected!r}: this is a different model",
        hint=f"Check --variant, or describe the model with --config FILE, if {name} is one of its settings.",
    )


def _statements(facts: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place in ("config.json", "hyper_parameters", "args"):
        settings = facts.get(place)
        if isinstance(settings, Mapping) and settings.get("model_type", "van") == "van":
            yield place, settings
        elif isinstance(settings, Mapping):
            raise KeyMapError(
                f"{place} states the model type {settings['model_type']!r:.100}, but this family is van",
                hint="Give the checkpoint of a VAN.",
            )
    meta = facts.get("meta")
    text = meta.get("cfg", meta.get("config")) if isinstance(meta, Mapping) else None
    if isinstance(text, str):
        yield from _of_mmengine(text)


def _of_mmengine(text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find `dict(type='VAN', ...)` in a configuration, which is Python source. The source is parsed but never run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        entries = _entries(node)
        if _literal(entries.get("type")) != "VAN":
            continue
        settings = {name: _literal(value) for name, value in entries.items()}
        norm = _entries(entries["norm_cfg"]) if "norm_cfg" in entries else {}
        if "eps" in norm:
            settings["batch_norm_eps"] = _literal(norm["eps"])
        kind = _literal(norm["type"]) if "type" in norm else "BN"
        if kind not in {"BN", "SyncBN", "BN2d"}:
            raise KeyMapError(
                f"the configuration in meta states norm_cfg of type {kind!r:.100}, but VAN has BN",
                hint="A VAN with another normalisation cannot be built here.",
            )
        yield "the configuration in meta", settings


def _entries(node: ast.AST) -> dict[str, ast.expr]:
    """The entries of `dict(a=1)` or `{"a": 1}`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {each.arg: each.value for each in node.keywords if each.arg is not None}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}
    return {}


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
