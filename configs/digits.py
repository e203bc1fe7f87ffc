"""iSM on scikit-learn's handwritten digits (1,797 real 8x8 images): minutes on two CPU cores.

A step takes about 34 ms of one core and its share of the pairing 7 ms; the first grid of samples is
there after 250 steps.

`--config=configs/digits.py:VARIANT` selects a row of the ablation, see `base.VARIANTS`; ism is the
default.
"""

from configs import base


def get_config(variant: str = "ism"):
  """The config of a variant."""
  config = base.get_base()
  config.update({
      "steps": 4_000,
      "batch_size": 128,
      "scan_steps": 4,
      "data": {
          "name": "digits", "image_size": 8, "channels": 1, "num_classes": 10, "num_threads": 2,
          "flip": False, "vae": "",
      },
      "model": {"size": "SiT-XXS/4", "dtype": "float32", "remat": "none", "unroll": 3},
      # On 60 pools 53.5 iterations (all converge), 40 ms of CPU a pool, attained gain 0.9927;
      # 1e-3: 238 (63 % converge, the rest stop at 300), 177 ms, 0.9942.
      "coupling": {"pool_size": 4, "class_penalty": 5.0, "threshold": 1e-2},
      "optimizer": {"learning_rate": 4e-3, "schedule": "cosine", "warmup_steps": 200},
      # 4,000 steps are too short for 0.9999.
      "ema": {"inference_decay": 0.999, "target_decay": 0.95, "warmup": True},
      # To measure the gradient of each loss alone compiles for half a minute.
      "log": {"every": 100, "gradients_every": 0},
      "checkpoint": {"every": 1_000, "keep": 2},
      "sample": {"steps": "1", "num_images": 100, "batch_size": 100},
      "monitor": {"every": 250, "score": True},
      "evaluation": {
          "num_images": 1_797, "batch_size": 600, "enlarge": 8, "w": (0.0, 0.25, 0.5, 1.0, 2.0),
          "networks": "classifier",
      },
  })  # fmt: skip
  # One EMA: the best for sm of 0.95, 0.99 and 0.999 (5.7, 6.1 and 6.5 times the floor, one step).
  return base.apply_variant(config, variant, one_ema=0.95)
