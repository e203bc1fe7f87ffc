"""TFDS's datasets, and ours that are written as such: opened by name, and checked.

Ours are prepared on first use; TFDS's are only read, because preparing them (encoding an image, for
one) needs TensorFlow.
"""

import difflib
import os
import textwrap

import numpy as np
import tensorflow_datasets as tfds

from ism_jax.data.digits import Digits
from ism_jax.data.photos import Photos
from ism_jax.runtime import files

OWN = (Digits, Photos)  # TFDS finds them by name, as all builders that are imported
_OWN_NAMES = "digits, photos/crops16, photos/crops32"


def root(directory: str) -> str:
  """The folder of all datasets, for `directory` of a DataConfig; a ValueError if there is none."""
  default = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
  if not directory and default.startswith("~"):  # which TFDS would make a folder of, here
    raise ValueError(
      "there is no home folder, in which TFDS keeps its datasets by default: set data.dir, "
      "TFDS_DATA_DIR or HOME."
    )
  files.check_utf8("data.dir", directory or default)
  return directory or default


def tfds_builder(name, directory):
  """The TFDS builder of a dataset, `directory` as in a DataConfig; a ValueError if unknown."""
  root(directory)
  try:
    return tfds.builder(name, data_dir=directory or None)
  # Of the name, config, version or code; files of JSON that are damaged raise yet others.
  except Exception as error:
    family = name.partition("/")[0]
    close = difflib.get_close_matches(family, tfds.list_builders(with_community_datasets=False))
    raise ValueError(
      f"data.name={name!r} is not a dataset that can be read; known: {_OWN_NAMES}, and TFDS's "
      f"by name or name/config, such as {', '.join(close or ['cifar10', 'mnist'])}. TFDS says: "
      f"{str(error).partition(chr(10))[0]}"
    ) from error


def open_split(builder, split, decoders=None):
  """A split of a TFDS dataset that is prepared: a random access source of its records.

  The split is as TFDS writes it: "test", "train[:90%]"; a ValueError if there is none.
  """
  try:
    return builder.as_data_source(split=split, decoders=decoders)
  # TFDS raises this for files in another format, and it assumes one where there are none.
  except NotImplementedError as error:
    name = builder.info.full_name.rpartition("/")[0]
    raise ValueError(
      f"dataset {name!r} is not at {builder.data_path} as ArrayRecord, and preparing it takes "
      "TensorFlow, which this project does without. In an environment of its own, `pip install "
      'tensorflow-cpu tensorflow-datasets importlib_resources` and `python -c "import '
      f"tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir='DIR')"
      ".download_and_prepare(file_format='array_record')\"`, with a DIR that does not have it in "
      f"another format. Then set data.dir=DIR, or copy DIR/{builder.name} to "
      f"{builder.data_dir_root}."
    ) from error


def image_and_label(name, features, one_size=False):
  """TFDS's features "image" and "label" of a dataset; a ValueError if it is of other things."""
  image, label = (dict(features.items()).get(key) for key in ("image", "label"))
  # TFDS's `dtype` needs TensorFlow.
  is_image = image is not None and image.np_dtype == np.uint8 and len(image.shape) == 3
  fits = is_image and not (one_size and None in image.shape)
  if not fits or not isinstance(label, tfds.features.ClassLabel):
    raise ValueError(
      f"dataset {name!r} {'does not fit' if one_size else 'is not one of classified images'}: "
      f"needed are 'image', uint8 [H, W, C]{' of one size' if one_size else ''}, and 'label', a "
      f"ClassLabel. It has {textwrap.shorten(str(features), 500)}. Name another dataset."
    )
  return image, label
