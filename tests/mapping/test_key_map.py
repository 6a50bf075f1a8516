from __future__ import annotations

import pytest

from porting.errors import KeyMapError
from porting.kinds.transforms import CONVOLUTION, DENSE, VECTOR
from porting.mapping.key_map import KeyMap, TensorEntry
from porting.mapping.rules import KeyRule


def names(*modules: str, bias: bool = True) -> list[str]:
    return [f"{module}.{leaf}" for module in modules for leaf in (("weight", "bias") if bias else ("weight",))]


def targets(rules: list[KeyRule], tensors: list[str]) -> list[str]:
    return [target for entry in KeyMap.match(rules, tensors).entries for target in entry.targets]


def test_rows_are_matched_against_the_names_that_there_are() -> None:
    rules = [
        KeyRule("stem{s}.conv", "stem{s}/conv", "conv"),
        KeyRule("block{s}.{j}.scale", "block{s}.{j}/scale", "parameter"),
        KeyRule("head", "top", "dense"),
    ]
    tensors = [*names("stem1.conv", "stem2.conv", bias=False), "block1.0.scale", "block1.10.scale", "block1.2.scale"]
    key_map = KeyMap.match(rules, [*tensors, *names("head")])
    assert key_map.entries == (
        TensorEntry.one("stem1.conv.weight", "stem1/conv/kernel", CONVOLUTION),
        TensorEntry.one("stem2.conv.weight", "stem2/conv/kernel", CONVOLUTION),
        TensorEntry.one("block1.0.scale", "block1.0/scale", VECTOR),
        TensorEntry.one("block1.2.scale", "block1.2/scale", VECTOR),
        TensorEntry.one("block1.10.scale", "block1.10/scale", VECTOR),
        TensorEntry.one("head.weight", "top/kernel", DENSE),
        TensorEntry.one("head.bias", "top/bias", VECTOR),
    )
    assert [pair.kind for pair in key_map.layers][-1] == "dense"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("stage{s+1}_block{j-1}", ["stage1_block0", "stage1_block1", "stage2_block0"]),
        ("stage{s}{j:letter}", ["stage0b", "stage0c", "stage1b"]),
        ("block_{s.j}", ["block_0", "block_1", "block_2"]),
        ("block_{s.j+1}", ["block_1", "block_2", "block_3"]),
    ],
    ids=["counted from another number", "letters", "straight through", "straight through from one"],
)
def test_the_other_side_may_count_otherwise(target: str, expected: list[str]) -> None:
    rules = [KeyRule("layer{s}.{j}.conv", target, "conv")]
    tensors = names("layer0.1.conv", "layer0.2.conv", "layer1.1.conv", bias=False)
    assert targets(rules, tensors) == [f"{name}/kernel" for name in expected]


def test_what_counts_straight_through_is_the_same_number_in_all_rows() -> None:
    rules = [KeyRule("b{s}.{j}.a", "block_{s.j}/a", "conv"), KeyRule("b{s}.{j}.b", "block_{s.j}/b", "conv")]
    tensors = names("b0.0.a", "b0.1.a", "b1.0.a", "b1.0.b", bias=False)
    assert targets(rules, tensors)[-2:] == ["block_2/a/kernel", "block_2/b/kernel"]


def test_a_source_may_count_in_letters() -> None:
    rules = [KeyRule("block{j:letter}.conv", "b{j}", "conv")]
    assert targets(rules, names("blocka.conv", "blockc.conv", bias=False)) == ["b0/kernel", "b2/kernel"]


def test_another_naming_has_the_same_targets_in_the_same_order() -> None:
    rules = [KeyRule("block{s}.conv", "block{s}/conv", "conv"), KeyRule("head", "head", "dense")]
    tensors = names("block1.conv", "block2.conv", "head")
    renamed = KeyMap.match(rules, tensors, sources=["stages.{s-1}.c", "fc"], drops=["unused"], foreign=("decoder.",))
    assert [target for entry in renamed.entries for target in entry.targets] == targets(rules, tensors)
    assert renamed.entries[2].sources[0] == "stages.1.c.weight"
    assert renamed.dropped(["unused", "decoder.x", "fc.weight"]) == ("decoder.x", "unused")


def test_batch_norm_drops_its_counter_by_name() -> None:
    tensors = [f"bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    key_map = KeyMap.match([KeyRule("bn", "bn", "batch_norm")], tensors, drops=["unused.weight"])
    assert key_map.drops == {"bn.num_batches_tracked", "unused.weight"}
    assert [target for entry in key_map.entries for target in entry.targets] == [
        "bn/gamma",
        "bn/beta",
        "bn/moving_mean",
        "bn/moving_variance",
    ]


@pytest.mark.parametrize(
    ("source", "target", "side"), [("a", "x", "source"), ("b", "w", "target")], ids=["source", "target"]
)
def test_two_rows_may_not_claim_one_name(source: str, target: str, side: str) -> None:
    rules = [KeyRule("a", "w", "parameter"), KeyRule(source, target, "parameter")]
    with pytest.raises(KeyMapError, match=f"claim the same {side}: {'a' if side == 'source' else 'w'}"):
        KeyMap.match(rules, ["a", "b"])


def test_rows_that_match_nothing_are_refused_all_at_once() -> None:
    rules = [KeyRule("block{k}", "block{k}", "conv"), KeyRule("a", "a", "parameter"), KeyRule("b", "b", "dense")]
    with pytest.raises(KeyMapError, match=r"no tensor of the PyTorch model matches: block\{k\}, b$"):
        KeyMap.match(rules, ["a"])


def test_a_row_of_an_unknown_kind_or_placeholder_is_refused() -> None:
    with pytest.raises(KeyMapError, match="there is no kind 'convolution'") as caught:
        KeyRule("a", "a", "convolution")
    assert "batch_norm" in caught.value.hint
    with pytest.raises(KeyMapError, match="placeholders that it lacks: j"):
        KeyRule("a{s}", "a{s}{j}", "conv")
    with pytest.raises(KeyMapError, match=r"\{s\*2\} is no placeholder"):
        KeyRule("a{s*2}", "a", "conv")
