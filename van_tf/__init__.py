"""Visual Attention Network (arXiv 2202.09741) for Keras 3 and TensorFlow.

import van_tf

model = van_tf.van_b1()
model.load_weights("van_b1.h5")
"""

from van_tf.config import VARIANTS, VanConfig
from van_tf.fusion import fuse
from van_tf.model import (
    features,
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
from van_tf.optimizers import AdamW
from van_tf.preprocessing import (
    CIFAR10_CLASSES,
    Preprocessing,
    decode_predictions,
    load_image,
    prepare_images,
    preprocess_input,
)

__all__ = [
    "CIFAR10_CLASSES",
    "VARIANTS",
    "AdamW",
    "Preprocessing",
    "VanConfig",
    "decode_predictions",
    "features",
    "fuse",
    "load_image",
    "prepare_images",
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
