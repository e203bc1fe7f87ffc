"""iSM on your own images, in pixels: what the data says is looked up, and the rest follows from it.

  python -m ism_jax train --config=configs/images.py --config.data.dir=FOLDER

FOLDER has a folder of images for each class, or images alone, which are one class; or it is a zip
or tar file of these. They are cropped to data.image_size, once, and a tenth is held out.

Values of -1 and "auto" come from the data or from the number of images, by the rule in
configs/README.md; what training begins with says which they are. --config.KEY=VALUE sets one.
Larger images are better encoded first: configs/latents.py.

Behind a colon, comma-separated: a row of the ablation (see `base.VARIANTS`; ism) and "quick", what
two CPU cores do in minutes:

  --config=configs/images.py:sm,quick
"""

from configs import base


def get_config(words: str = "ism"):
  """The config of comma-separated words: a variant, quick; each may be left out."""
  config = base.get_base()
  config.update({
      "data": {
          "name": "images", "image_size": 32, "channels": -1, "num_classes": -1, "num_threads": 8,
          "vae": "",
      },
      "evaluation": {
          "batch_size": 500, "reference_split": "test", "networks": "auto",
      },
  })  # fmt: skip
  return leave_open(config, words)


def leave_open(config, words: str):
  """Leaves to the number of images what follows from it; applies the words; returns the config."""
  variants = [word for word in words.split(",") if word != "quick"]
  if len(variants) > 1 or not set(variants) <= set(base.VARIANTS):
    raise ValueError(
      f"{words!r}: give one variant, quick, or both; variants are {', '.join(base.VARIANTS)}."
    )
  config.update({
      "steps": -1,
      "batch_size": -1,
      "scan_steps": -1,
      "model": {"size": "auto", "dtype": "auto", "remat": "auto"},
      "coupling": {"pool_size": -1},
      "optimizer": {"learning_rate": -1.0, "schedule": "auto", "warmup_steps": -1},
      "ema": {"inference_decay": -1.0, "warmup": True},
      "log": {"gradients_every": 0},
      "checkpoint": {"every": -1},
      "monitor": {"every": -1, "num_images": 80},
      "evaluation": {"num_images": -1},
  })  # fmt: skip
  one_ema = None
  if "quick" in words.split(","):
    # As photos.py, whose values are tried.
    config.update({
        "steps": 2_000,
        "batch_size": 32,
        "scan_steps": 4,
        "data": {"num_threads": 2},
        "model": {"size": "SiT-XXS/auto", "unroll": 3},
        "coupling": {"pool_size": 8, "class_penalty": 5.0},
        "optimizer": {"learning_rate": 4e-3, "schedule": "cosine"},
        "evaluation": {"num_images": 500, "steps": (1, 2, 4, 8)},  # 128 take longer than all
    })  # fmt: skip
    one_ema = 0.95
  return base.apply_variant(config, *variants or ["ism"], one_ema=one_ema)
