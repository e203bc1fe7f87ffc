"""The 8x8 handwritten digits of scikit-learn as a TFDS dataset.

1,797 greyscale images of 17 levels in 10 classes, shipped inside scikit-learn: nothing is
downloaded, so this is the dataset of smoke runs and tests. Written as ArrayRecord, without
TensorFlow.
"""

from etils import epath
import numpy as np
import tensorflow_datasets as tfds

_MAX_LEVEL = 16  # scikit-learn counts ink in 0..16


def image_features(shape, **classes):
  """TFDS's features of images uint8 of a shape, and their classes."""
  # Raw bytes: tfds.features.Image needs TensorFlow to encode, and plain tensors are slower to read.
  image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
  return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(**classes)})


class Digits(tfds.core.GeneratorBasedBuilder):
  """`image` uint8 [8, 8, 1] in 0..255, `label` 0..9; one split, `train`."""

  VERSION = tfds.core.Version("1.0.0")
  # TFDS's own search for this file needs importlib_resources, which it does not declare as a
  # dependency on Python 3.9 and later.
  code_path = epath.Path(__file__)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
      features=image_features((8, 8, 1), num_classes=10),
    )

  def _split_generators(self, dl_manager):  # nothing to download
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    from sklearn.datasets import load_digits  # slow to import, and only preparation needs it

    digits = load_digits()
    images = np.round(digits.images * (255 / _MAX_LEVEL)).astype(np.uint8)[..., None]
    for i, (image, label) in enumerate(zip(images, digits.target, strict=True)):
      yield i, {"image": image, "label": int(label)}
