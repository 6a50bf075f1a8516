from __future__ import annotations

from typing import Any

import pytest

from van_tf import VARIANTS, VanConfig


def test_variants_are_named_as_their_keys() -> None:
    assert list(VARIANTS) == ["nano", "b0", "b1", "b2", "b3", "b4", "b5", "b6"]
    assert all(name == config.name for name, config in VARIANTS.items())


def test_to_dict_has_all_that_builds_it_again() -> None:
    assert VanConfig(**VARIANTS["b5"].to_dict()) == VARIANTS["b5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 16), (1,), (4, 4)), "one number per stage each"),
        (((), (), ()), "one number per stage each"),
        (((8, 0), (1, 1), (4, 4)), "embed_dims must be positive integers"),
    ],
    ids=["uneven", "none", "zero"],
)
def test_stages_that_do_not_fit_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VanConfig("mine", *arguments)
