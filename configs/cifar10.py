"""iSM on CIFAR-10 (50,000 colour images, 32x32), in pixels, for one GPU.

Untested: this project has not run this config. Its values are those for ImageNet; length, pools and
the network's size are guesses. TFDS's `cifar10` has to be there as ArrayRecord; the error where it
is not says how to prepare it.

`--config=configs/cifar10.py:VARIANT` selects a row of the ablation, see `base.VARIANTS`; ism is the
default.
"""

from configs import base


def get_config(variant: str = "ism"):
  """The config of a variant."""
  config = base.get_base()
  config.update({
      "steps": 200_000,  # 1,024 epochs
      "data": {
          "name": "cifar10", "image_size": 32, "channels": 3, "num_classes": 10,
          "flip": True,  # as usual for CIFAR-10
          "num_threads": 8, "vae": "",
      },
      "model": {"size": "SiT-S/2", "remat": "none"},  # 256 tokens, as ImageNet's latents have
      "coupling": {"pool_size": 8},  # 2,048 images
      "monitor": {"every": 5_000},
      "evaluation": {"num_images": 10_000, "batch_size": 500, "enlarge": 2},
  })  # fmt: skip
  return base.apply_variant(config, variant)
