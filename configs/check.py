"""A few steps on a few latents: the whole path of ImageNet in minutes, for `launch/check.sh`.

Everything is as in `imagenet256.py` but the size of the network, the length and the data: latents
of an autoencoder at random weights, which mean nothing.
"""

from configs import base


def get_config(variant: str = "ism"):
  """The config of a variant."""
  config = base.get_base()
  config.update({
      "steps": 16,
      "batch_size": 32,
      "scan_steps": 2,
      "data": {"num_classes": 15, "num_threads": 2, "vae": "random-small"},
      "model": {"size": "SiT-XXS/2"},
      "coupling": {"pool_size": 4},
      "log": {"every": 4, "gradients_every": 16},
      "checkpoint": {"every": 8},
      "sample": {"num_images": 30, "batch_size": 16},
      "monitor": {"every": 8, "num_images": 30, "steps": (1,)},
      "evaluation": {
          "num_images": 30, "batch_size": 16, "steps": (1, 2), "w": (0.5,), "weights": "random",
      },
  })  # fmt: skip
  return base.apply_variant(config, variant)
