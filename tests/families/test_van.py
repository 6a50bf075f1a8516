from __future__ import annotations

import numpy as np
import pytest
import torch

from porting.errors import FamilyError
from porting.families.registry import family_names, get_family
from porting.families.van import RULES, VanFamily
from porting.references.van import VARIANTS, build_van


def test_registered_families() -> None:
    assert "van" in family_names()
    assert isinstance(get_family("van"), VanFamily)
    with pytest.raises(FamilyError, match="unknown family 'lenet'"):
        get_family("lenet")


def test_the_key_map_is_sixteen_rows() -> None:
    assert len(RULES) == 16


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_key_map_covers_the_state_dict_exactly(family: VanFamily, variant: str) -> None:
    with torch.device("meta"):
        keys = set(build_van(variant).state_dict())
    key_map = family.key_map(family.spec(variant))
    assert {name for entry in key_map.entries for name in entry.sources} | key_map.drops == keys
    assert all(name.endswith(".num_batches_tracked") for name in key_map.drops)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_gives_its_variant_and_classes_away(family: VanFamily, variant: str) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_van(variant, 21).state_dict().items()}
    state_dict = {name: np.broadcast_to(np.float32(0), tuple(shape)) for name, shape in shapes.items()}
    assert family.guess_variant(state_dict) == variant
    assert family.num_classes(variant, state_dict) == 21


def test_other_state_dicts_give_no_variant(family: VanFamily) -> None:
    assert family.guess_variant({"conv1.weight": np.zeros((8, 3, 3, 3))}) is None
    assert family.num_classes("b0", {}) == 1000
    assert family.num_classes("nano", {}) == 10


def test_preprocessing_is_the_official_one(family: VanFamily) -> None:
    b1 = family.preprocessing(family.spec("b1"))
    assert (b1.resize_size, b1.input_size, b1.mean, b1.std) == (248, 224, (0.5,) * 3, (0.5,) * 3)
