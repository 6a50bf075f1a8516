from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from porting.wording import counted, listed, reason_of


def test_counts() -> None:
    assert counted(1, "layer") == "1 layer"
    assert counted(1200, "layer") == "1,200 layers"
    assert counted(2, "class", "classes") == "2 classes"


def test_lists_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([*"abcd"], 2) == "a, b, and 2 more"


class Broken(keras.layers.Layer):  # type: ignore[misc]
    def call(self, x: object) -> object:
        raise ValueError("the reason")


def test_the_reason_is_told_without_its_frame() -> None:
    assert reason_of(ValueError("the reason\nmore")) == "the reason"
    assert reason_of(ValueError()) == "ValueError"
    with pytest.raises(ValueError, match="Exception encountered") as caught:
        Broken()(np.zeros((1, 2)))
    assert reason_of(caught.value) == "the reason"

    @tf.function  # type: ignore[untyped-decorator]
    def traced(x: object) -> object:
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="in user code") as caught:
        traced(1)
    assert reason_of(caught.value).endswith("the reason")
