"""Find the weights in a checkpoint that also holds wrappers, averages, optimizers and counters.

Training scripts and libraries store a state_dict under a key of their choice, next to other state. Every dict of
tensors is a candidate, whatever its key. Known entries that no model uses are dropped by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porting.errors import CheckpointError

Fit = Callable[[Collection[str]], float]

_DEEPEST = 3
# The names of averaged weights in timm, torchvision, mmengine, BasicSR and others.
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?|swa|shadow)([._]|$)", re.IGNORECASE)
# What torch.compile, FSDP and activation checkpointing insert into names.
_INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# DataParallel, DistributedDataParallel, AveragedModel.
_PREFIXES = ("module.",)
# AveragedModel's counter, and the counters that thop leaves in each module.
_BOOKKEEPING = re.compile(r"n_averaged|(.*\.)?total_(ops|params)")
# The least fit at which one of several dicts is chosen.
_GOOD_FIT = 0.5


@dataclass(frozen=True)
class Weights:
    """A state_dict and where it was found.

    `key` is the dotted entry of the file that held it, or "" for the top level. `prefixes` were removed from all names.
    `dropped` lists entries beside the weights that no model has. `others` lists the keys of other dicts of tensors.
    """

    tensors: dict[str, Any]
    key: str = ""
    prefixes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    is_ema: bool = False
    has_ema: bool = False
    others: tuple[str, ...] = field(default=())


def find_weights(
    path: Path,
    contents: Any,
    *,
    ema: bool = False,
    key: str | None = None,
    prefix: str | None = None,
    fit: Fit | None = None,
) -> Weights:
    """Find the state_dict in `contents`; raises CheckpointError if there is none, or if the choice is ambiguous.

    `key` and `prefix` decide if given. Otherwise `fit`, which says how well names agree with the model's (0 to 1),
    chooses among several dicts, and decides whether a prefix shared by all names belongs to the file or to the model.
    """
    if not isinstance(contents, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(contents).__name__}, not a state_dict", hint="Save `model.state_dict()` instead."
        )
    found = _candidates(contents)
    averaged = {name for name in found if _AVERAGED.search(name)}
    chosen = _chosen(path, found, averaged, ema, key, fit, contents)
    tensors, dropped = _without_bookkeeping(found[chosen])
    tensors, prefixes, more = _without_prefixes(path, tensors, prefix, fit)
    others = tuple(sorted(found.keys() - {chosen}))
    return Weights(tensors, chosen, prefixes, (*dropped, *more), chosen in averaged, bool(averaged), others)


def _candidates(contents: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """All dicts of tensors, by dotted key."""
    found: dict[str, Mapping[str, Any]] = {}

    def visit(key: str, value: Mapping[Any, Any], depth: int) -> None:
        if "param_groups" in value:  # an optimizer's
            return
        if any(isinstance(name, str) and is_tensor(item) for name, item in value.items()):
            found[key] = value
        if depth < _DEEPEST:
            for name, item in value.items():
                if isinstance(name, str) and isinstance(item, Mapping):
                    visit(f"{key}.{name}" if key else name, item, depth + 1)

    visit("", contents, 0)
    if "" in found and len(found) > 1:
        # A few tensors beside a state_dict, such as a mean, are not a state_dict themselves.
        count = {name: sum(map(is_tensor, value.values())) for name, value in found.items()}
        if max(count[name] for name in count if name) >= count[""]:
            del found[""]
        else:
            return {"": found[""]}
    return found


def _chosen(
    path: Path,
    found: Mapping[str, Mapping[str, Any]],
    averaged: Collection[str],
    ema: bool,
    key: str | None,
    fit: Fit | None,
    contents: Mapping[Any, Any],
) -> str:
    if key is not None:
        if key in found:
            return key
        raise CheckpointError(
            f"{path}: has no tensors under the key {key!r}", hint=f"It has tensors under {_listed(found) or 'no key'}."
        )
    if ema and not averaged:
        raise CheckpointError(
            f"{path}: has no moving averages of weights: no key of a dict of tensors says ema, average, swa or shadow",
            hint=f"Omit --ema, or name the key with --key. It has tensors under {_listed(found) or 'no key'}.",
        )
    plain = [name for name in found if name not in averaged]
    group = [name for name in found if name in averaged] if ema or not plain else plain
    if not group:
        held = ", ".join(f"{name!s:.60} ({type(value).__name__})" for name, value in list(contents.items())[:10])
        raise CheckpointError(
            f"{path}: contains no state_dict or other dict of tensors; it holds {held or 'nothing'}",
            hint="Save `model.state_dict()` with torch.save.",
        )
    if len(group) == 1:
        return group[0]
    if fit is not None:
        fits = {name: _best_fit(found[name], fit) for name in group}
        order = sorted(group, key=lambda name: -fits[name])
        if fits[order[0]] >= _GOOD_FIT and fits[order[1]] < fits[order[0]]:
            return order[0]
    raise CheckpointError(
        f"{path}: has several dicts of tensors: {_listed({name: found[name] for name in group})}",
        hint="Choose one with --key.",
    )


def _best_fit(entries: Mapping[str, Any], fit: Fit) -> float:
    tensors, _ = _without_bookkeeping(entries)
    names = list(_without_wrappers(tensors)[0])
    return max(fit(each) for _, each in _stripped_forms(names))


def _listed(found: Mapping[str, Mapping[str, Any]]) -> str:
    shown = [
        f"{name or 'the top'} ({sum(map(is_tensor, value.values()))} tensors)" for name, value in list(found.items())
    ]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")


def _without_bookkeeping(entries: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    kept = {
        name: value
        for name, value in entries.items()
        if isinstance(name, str) and is_tensor(value) and not _BOOKKEEPING.fullmatch(name)
    }
    return kept, tuple(str(name) for name in entries if name not in kept)


def _without_wrappers(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Remove what wrappers of modules insert into names, repeatedly, because wrappers nest."""
    taken: list[str] = []
    tensors = dict(tensors)
    while tensors:
        if prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            taken.append(prefix)
            continue
        infix = next((i for i in _INFIXES if any(name.startswith(i) or f".{i}" in name for name in tensors)), None)
        if infix is None:
            break
        renamed = {name.replace(infix, ""): tensor for name, tensor in tensors.items()}
        if len(renamed) != len(tensors):
            break
        tensors = renamed
        taken.append(infix)
    return tensors, tuple(taken)


def _stripped_forms(names: list[str]) -> list[tuple[str, list[str]]]:
    """The names unchanged, and without one, two, ... leading parts that all of them share.

    Also without one that most of them have, such as those of a body that was saved with another head.
    """
    forms = [("", names)]
    taken = ""
    while names:
        part = names[0].partition(".")[0] + "."
        if part == names[0] + "." or not all(name.startswith(part) for name in names):
            break
        names = [name.removeprefix(part) for name in names]
        taken += part
        forms.append((taken, names))
    shared, rest = forms[-1]
    starts = Counter(f"{name.partition('.')[0]}." for name in rest if "." in name)
    usual, count = max(starts.items(), key=lambda each: each[1], default=("", 0))
    without = [name.removeprefix(usual) for name in rest]
    if len(rest) / 2 < count < len(rest) and len(set(without)) == len(rest):
        forms.append((shared + usual, without))
    return forms


def _without_prefixes(
    path: Path, tensors: dict[str, Any], prefix: str | None, fit: Fit | None
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    tensors, taken = _without_wrappers(tensors)
    if prefix is not None:
        prefix = prefix if prefix.endswith(".") or not prefix else f"{prefix}."
        kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if not kept:
            starts = sorted({name.partition(".")[0] for name in tensors})
            raise CheckpointError(
                f"{path}: no tensor name starts with {prefix!r}", hint=f"The names start with {', '.join(starts[:10])}."
            )
        return kept, (*taken, prefix), tuple(name for name in tensors if not name.startswith(prefix))
    if fit is None or not tensors:
        return tensors, taken, ()
    # max returns the first of the best fits, so a prefix that the model's own names have stays.
    best, names = max(_stripped_forms(list(tensors)), key=lambda form: fit(form[1]))
    return (
        dict(zip(names, tensors.values(), strict=True)),
        (*taken, best) if best else taken,
        (),
    )


def is_tensor(value: Any) -> bool:
    """Whether `value` is a PyTorch tensor. PyTorch is imported only here."""
    import torch

    return isinstance(value, torch.Tensor)
