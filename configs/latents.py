"""iSM on your own images as latents, for images of 128 pixels and more.

  python -m ism_jax encode --images=FOLDER --size=256 --out=DIR
  python -m ism_jax train --config=configs/latents.py --config.data.dir=DIR

Sizes, classes and the autoencoder come from the manifest in DIR, and the rest follows from the
number of images, as for configs/images.py, whose words go here, too.
"""

from configs import base, images


def get_config(words: str = "ism"):
  """The config of comma-separated words, see `images.get_config`."""
  config = base.get_base()
  config.data.update({
      "image_size": -1, "channels": -1, "num_classes": -1, "vae": "auto", "vae_scale": -1.0,
      "num_threads": 8,
  })  # fmt: skip
  return images.leave_open(config, words)
