"""iSM on ImageNet 256x256, as 32x32x4 latents of sd-vae-ft-mse: SiT-XL/2 with the paper's values.

The paper reports FID-50K 5.27 / 2.44 / 2.05 / 1.93 / 1.88 in 1 / 2 / 4 / 8 / 128 steps after 800 K
iterations. Those are the paper's numbers: this project has not run this config.
"""

from configs import base


def get_config(variant: str = "ism"):
  """The config of a variant."""
  return base.apply_variant(base.get_base(), variant)
