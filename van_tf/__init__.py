"""Visual Attention Network (arXiv 2202.09741) for Keras 3 and TensorFlow.

import van_tf

model = van_tf.van_b1()
model.load_weights("van_b1.h5")
"""

from van_tf.config import VARIANTS, VanConfig
from van_tf.model import (
    preprocess_input,
    van,
    van_b0,
    van_b1,
    van_b2,
    van_b3,
    van_b4,
    van_b5,
    van_b6,
    van_nano,
)

__all__ = [
    "VARIANTS",
    "VanConfig",
    "preprocess_input",
    "van",
    "van_b0",
    "van_b1",
    "van_b2",
    "van_b3",
    "van_b4",
    "van_b5",
    "van_b6",
    "van_nano",
]
