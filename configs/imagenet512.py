"""iSM on ImageNet 512x512, as 64x64x4 latents of sd-vae-ft-mse: SiT-XL/2, six wavelet levels.

  python -m ism_jax encode --images=IMAGENET --size=512 --out=DIR
  python -m ism_jax train --config=configs/imagenet512.py --config.data.dir=DIR --workdir=W

Variants, sizes, lengths and the word finetune: as `imagenet256.py`. Compiled ahead of time for 64
chips it fits v4, v5e, v5p and v6e; a step is 0.17 s at least by calculation on a v5e:8x8, and about
0.25 (what that rests on is in ism_jax/performance/README.md), and 4.4 times the FLOPs of one of
256x256 (1,024 tokens instead of 256).

The paper's numbers at 512x512 are of another backbone, FlowDCN, after 300 K iterations: FID and
recall 37.05 and 0.55 in one step, 9.94 and 0.62 in four (SM: 43.81 and 0.11, 12.16 and 0.19). They
are no target for this config, which this project has not run.
"""

from configs import base, imagenet256


def get_config(words: str = "ism"):
  """The config of comma-separated words, see `imagenet256.get_config`."""
  config = base.get_base()
  config.data.image_size = 64
  return imagenet256.apply(config, words)
