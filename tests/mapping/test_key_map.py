from __future__ import annotations

import pytest

from porting.errors import KeyMapError
from porting.kinds.transforms import Layout
from porting.mapping.key_map import KeyMap, KeyRule, Kind, TensorEntry


def test_each_rule_is_expanded_over_the_indices_with_its_placeholders() -> None:
    rules = [
        KeyRule("stem{s}.conv", "stem{s}/conv", Kind.CONV, bias=False),
        KeyRule("block{s}.{j}.scale", "block{s}.{j}/scale", Kind.PARAMETER),
        KeyRule("head", "top", Kind.DENSE),
    ]
    key_map = KeyMap.expand(rules, [{}, {"s": 1}, {"s": 2}, {"s": 1, "j": 0}])
    assert key_map.entries == (
        TensorEntry("stem1.conv.weight", "stem1/conv/kernel", Layout.OIHW_TO_HWIO),
        TensorEntry("stem2.conv.weight", "stem2/conv/kernel", Layout.OIHW_TO_HWIO),
        TensorEntry("block1.0.scale", "block1.0/scale", Layout.IDENTITY),
        TensorEntry("head.weight", "top/kernel", Layout.OI_TO_IO),
        TensorEntry("head.bias", "top/bias", Layout.IDENTITY),
    )


def test_batch_norm_drops_its_counter_by_name() -> None:
    key_map = KeyMap.expand([KeyRule("bn", "bn", Kind.BATCH_NORM)], [{}], drops=["unused.weight"])
    assert key_map.drops == {"bn.num_batches_tracked", "unused.weight"}
    assert [entry.target for entry in key_map.entries] == [
        "bn/gamma",
        "bn/beta",
        "bn/moving_mean",
        "bn/moving_variance",
    ]


@pytest.mark.parametrize(
    ("source", "target", "side"), [("a", "x", "source"), ("b", "w", "target")], ids=["source", "target"]
)
def test_two_rows_may_not_claim_one_name(source: str, target: str, side: str) -> None:
    rules = [KeyRule("a", "w", Kind.PARAMETER), KeyRule(source, target, Kind.PARAMETER)]
    with pytest.raises(KeyMapError, match=f"claim the same {side}: {'a' if side == 'source' else 'w'}"):
        KeyMap.expand(rules, [{}])


def test_a_rule_whose_placeholders_have_no_indices_is_refused() -> None:
    with pytest.raises(KeyMapError, match=r"rule 'block\{k\}': no indices were given for \['k'\]"):
        KeyMap.expand([KeyRule("block{k}", "block{k}", Kind.CONV)], [{}, {"s": 1}])
