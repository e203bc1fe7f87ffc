"""iSM on 16x16 crops of scikit-learn's two photographs: colour images in minutes on two CPU cores.

`--config=configs/photos.py:VARIANT` selects a row of the ablation, see `base.VARIANTS`; ism is the
default.
"""

from configs import base


def get_config(variant: str = "ism"):
  """The config of a variant."""
  config = base.get_base()
  config.update({
      "steps": 2_000,
      "batch_size": 32,
      "scan_steps": 4,
      "data": {
          "name": "photos/crops16", "image_size": 16, "channels": 3, "num_classes": 2,
          "flip": False, "num_threads": 2, "vae": "",
      },
      "model": {"size": "SiT-XXS/2", "dtype": "float32", "remat": "none", "unroll": 3},
      "coupling": {"pool_size": 8, "class_penalty": 5.0},
      "optimizer": {"learning_rate": 4e-3, "schedule": "cosine", "warmup_steps": 200},
      # 2,000 steps are too short for 0.9999.
      "ema": {"inference_decay": 0.999, "target_decay": 0.95, "warmup": True},
      "log": {"every": 200},
      "checkpoint": {"every": 2_000, "keep": 2},
      "sample": {"steps": "1", "num_images": 100, "batch_size": 100},
      "monitor": {"every": 1_000, "score": True},
      "evaluation": {
          "num_images": 512, "batch_size": 512, "enlarge": 4, "w": (0.0, 0.5, 1.0),
          "networks": "random,classifier", "reference_split": "test",
      },
  })  # fmt: skip
  # One EMA: as for digits.
  return base.apply_variant(config, variant, one_ema=0.95)
