"""Square crops of scikit-learn's two photographs as a TFDS dataset, with held-out places.

A Chinese temple and a dahlia, 427x640 pixels in colour, shipped inside scikit-learn: nothing is
downloaded. Of its columns every third strip, 5/4 of a crop wide, is held out: a crop of `test` lies
inside one such strip and a crop of `train` between two, so that no pixel of the one is a pixel of
the other.
Written as ArrayRecord, without TensorFlow.
"""

import dataclasses
from typing import ClassVar

from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from ism_jax.data.digits import image_features

# Narrow strips, so that both splits see all of a scene: with every fourth strip of 64 held out, the
# splits were as far from each other (Fréchet distance) as blurred crops; now a fourth of that.
_PERIOD = 3  # strips 2, 5, ... are held out


@dataclasses.dataclass(eq=False, kw_only=True)
class CropsConfig(tfds.core.BuilderConfig):
  """size: height and width of a crop, in pixels."""

  size: int


class Photos(tfds.core.GeneratorBasedBuilder):
  """`image` uint8 [size, size, 3], `label` 0 (china) or 1 (flower), both equally often.

  Splits: `train`, 32,768 crops, and `test`, 8,192. The places of a photograph's crops are drawn
  uniformly and without replacement, by a fixed seed.
  """

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS: ClassVar = [
    CropsConfig(name=f"crops{size}", description=f"Crops of {size}x{size} pixels.", size=size)
    for size in (16, 32)
  ]
  code_path = epath.Path(__file__)  # see digits.py

  def _info(self):
    size = self.builder_config.size
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_sample_images.html",
      features=image_features((size, size, 3), names=["china", "flower"]),
    )

  def _split_generators(self, dl_manager):  # nothing to download
    return {
      "train": self._generate_examples(16_384, held_out=False),
      "test": self._generate_examples(4_096, held_out=True),
    }

  def _generate_examples(self, per_class, held_out):
    from sklearn.datasets import load_sample_image  # slow to import, and only preparation needs it

    size = self.builder_config.size
    for label, name in enumerate(self.info.features["label"].names):
      photo = load_sample_image(f"{name}.jpg")
      rng = np.random.default_rng((held_out, label))
      for i, (y, x) in enumerate(draw_places(rng, photo.shape[:2], size, held_out, per_class)):
        yield f"{name}{i}", {"image": photo[y : y + size, x : x + size], "label": label}


def draw_places(rng, shape, size, held_out, count):
  """Where crops begin: `count` different places (y, x), int [count, 2], all equally likely.

  Args:
    shape: (height, width) of the photograph.
    held_out: whether the crops lie in held-out strips, or else outside of them all.
  """
  height, width = shape
  strip = np.arange(width) // (size * 5 // 4)
  column_held_out = strip % _PERIOD == _PERIOD - 1
  columns_of_crop = np.lib.stride_tricks.sliding_window_view(column_held_out, size)
  x = np.flatnonzero((columns_of_crop == held_out).all(axis=1))
  y, i = np.divmod(rng.choice((height - size + 1) * len(x), count, replace=False), len(x))
  return np.stack([y, x[i]], axis=1)
