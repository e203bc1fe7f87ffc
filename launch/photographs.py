"""Cuts the photographs of scikit-learn and scikit-image into crops, a folder for each photograph.

  python launch/photographs.py OUT [CROPS] [ASPECT]

CROPS of each (default 4), of ASPECT = height / width (default 1); the shorter side is drawn from
200 pixels up to all there are. Nothing is downloaded: `pip install -e ".[check]"` has them.
"""

import pathlib
import sys

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

_NAMES = "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field"
_NAMES += " immunohistochemistry moon retina rocket"
_LEAST = 200


def cut(out: str, crops: int = 4, aspect: float = 1.0) -> None:
  """Writes the crops; see above."""
  photographs = {name: getattr(data, name)() for name in _NAMES.split()}
  photographs |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
  rng = np.random.default_rng(0)
  for name, photograph in photographs.items():
    folder = pathlib.Path(out) / name
    folder.mkdir(parents=True)
    for i in range(crops):
      side = rng.integers(_LEAST, 1 + min(photograph.shape[:2]))
      size = round(side * min(1, aspect)), round(side * min(1, 1 / aspect))
      y, x = (rng.integers(1 + n - m) for n, m in zip(photograph.shape, size, strict=False))
      crop = photograph[y : y + size[0], x : x + size[1]]
      Image.fromarray(crop).save(folder / f"{i}.jpg", quality=95)


if __name__ == "__main__":
  if not 2 <= len(sys.argv) <= 4:
    sys.exit(__doc__)
  cut(sys.argv[1], *map(int, sys.argv[2:3]), *map(float, sys.argv[3:4]))
