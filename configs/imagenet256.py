"""iSM on ImageNet 256x256, as 32x32x4 latents of sd-vae-ft-mse: SiT-XL/2 with the paper's values.

  python -m ism_jax encode --images=IMAGENET --out=DIR
  python -m ism_jax train --config=configs/imagenet256.py --config.data.dir=DIR --workdir=W

Behind a colon, comma-separated: a row of the ablation (see `base.VARIANTS`; ism), a size (xl2, l2,
b2, s2; xl2) and 250k, the length of the paper's ablation (800 K):

  --config=configs/imagenet256.py:wavelet,250k
  --config=configs/imagenet256.py:b2

The word finetune begins with a trained SiT instead of a new network, by default its own file
SiT-XL-2-256.pt in the folder one is in, and of REPA's by init_time:

  --config=configs/imagenet256.py:finetune --config.init_from=SiT-XL-2-256.pt
  --config=configs/imagenet256.py:finetune --config.init_from=FILE --config.init_time=data_to_noise

It is 100 K steps, an eighth of the cost below, and keeps ten checkpoints for choosing among them,
each of about 13.6 GB; see configs/README.md.

Compiled ahead of time it fits v4, v5p and v6e from 4 chips, and v5e from 8. By calculation 800 K
steps are 20 hours at least and about 51 on a v6e:2x2, 34 and 56 on a v5p:2x2x1, 45 and 68 on a
v5e:2x4, 13 and 28 on a v6e:2x4; 64 chips are for batch_size=1024 (what that rests on is in
ism_jax/performance/README.md). They are 1.9e20 FLOPs of the network.

The paper reports FID-50K 5.27 / 2.44 / 2.05 / 1.93 / 1.88 in 1 / 2 / 4 / 8 / 128 steps after 800 K
iterations, and for the rows of its ablation, after 250 K, in one step / four:

  ig 9.62 / 3.17 (w_max 2.0: 10.10 in one step, 5.0: 10.38)
  interval 8.49 / 2.81 (t_interval 0.1: 3.14 in four steps, 0.5: 19.22 / 2.84)
  wavelet 8.12 / 2.64
  sot 7.97 / 2.23 (pool_size 1: 8.07 / 2.51, 8: 8.03 / 2.28)
  ism 6.56 / 2.16 (target_decay 0.999: 7.43 in one step)

Those are the paper's numbers: this project has not run this config, nor the fine-tuning.
"""

from configs import base

_SIZES = {f"{size.lower()}2": f"SiT-{size}/2" for size in ("XL", "L", "B", "S")}
_LENGTHS = {"250k": 250_000}
_FINETUNE = "finetune"


def get_config(words: str = "ism"):
  """The config of comma-separated words: variant, size, length, finetune; each may be left out."""
  return apply(base.get_base(), words)


def apply(config, words: str):
  """Sets the variant, size and length that are named, and the fine-tuning; returns the config."""
  config.data.title = "ImageNet"
  config.checkpoint.update({"every": 5_000, "keep_every": 100_000})
  config.monitor.update({"every": 25_000, "num_images": 80, "w": 1.5})
  config.sample.w = 1.5
  words = words.split(",")
  variants = [word for word in words if word in base.VARIANTS]
  if len(variants) > 1:
    raise ValueError(f"{','.join(variants)!r} names {len(variants)} variants: name one.")
  base.apply_variant(config, *variants or ["ism"])
  if _FINETUNE in words:
    _finetune(config)
  for word in words:
    if word in _SIZES:
      config.model.size = _SIZES[word]
    elif word in _LENGTHS:
      config.steps = _LENGTHS[word]
    elif word not in (*variants, _FINETUNE):
      raise ValueError(
        f"{word!r} is no variant, size or length; known are {', '.join(base.VARIANTS)}; "
        f"{', '.join(_SIZES)}; {', '.join(_LENGTHS)}; {_FINETUNE}."
      )
  return config


def _finetune(config):
  """From a trained SiT: what it knows first, the velocity, then short jumps, then long ones.

  The optimizer is that of DMF's fine-tuning; the rest is a guess.
  """
  pixels = 8 * config.data.image_size
  config.update({"init_from": f"SiT-XL-2-{pixels}.pt", "steps": 100_000})
  config.optimizer.update({"b2": 0.95, "clip_norm": 1.0})
  if config.objective.shares[2]:
    config.objective.curriculum = 0.5
  if config.objective.guidance == "intrinsic":
    config.objective.w_ramp = 0.25
  config.checkpoint.keep_every = 10_000
  config.monitor.update({"every": 5_000, "steps": (1, 2)})
