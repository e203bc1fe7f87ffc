"""What all configs share: iSM's values, and the rows of the paper's ablation as variants.

"Open" marks what the paper leaves open; configs/README.md says why each default is what it is.
"""

import ml_collections

# The techniques that each row of the ablation has: added one by one, as in the paper, and each one
# alone taken out of iSM (without the twin EMA, iSM is the row `sot`).
_TECHNIQUES = ("ig", "interval", "wavelet", "sot", "twin")
_ROWS = {"sm": (), "sm_compounding": ()}
_ROWS |= {name: _TECHNIQUES[: i + 1] for i, name in enumerate((*_TECHNIQUES[:-1], "ism"))}
_ROWS |= {f"no_{out}": tuple(t for t in _TECHNIQUES if t != out) for out in _TECHNIQUES[:-1]}
OTHERS = ("fm", "meanflow", "imf", "split", "plus")  # which are not the paper's
VARIANTS = (*_ROWS, *OTHERS)


def get_base() -> ml_collections.ConfigDict:
  """iSM with the paper's values; the configs that use it set data, size and length."""
  return ml_collections.ConfigDict(
    {
      "variant": "ism",
      "seed": 0,
      "steps": 800_000,  # paper
      "batch_size": 256,  # open; SiT, DiT and SM
      "micro_batches": 1,
      "scan_steps": 8,
      "init_from": "",  # a workdir; a state dict of SiT or an export, also by its name on the hub
      "init_time": "noise_to_data",  # "data_to_noise" of REPA's and DMF's state dicts
      "placement": "auto",
      "gradient_dtype": "float32",
      "profile_steps": 0,
      "data": {
        "name": "latents",
        "dir": "",  # that `ism_jax encode` made; of TFDS's datasets "" is TFDS's default
        # Latents of sd-vae-ft-mse. (height, width) where they differ: of any type.
        "image_size": ml_collections.FieldReference(32, field_type=object),
        "channels": 4,
        "num_classes": 1000,
        "flip": True,
        "seed": 0,
        "num_threads": 16,
        "vae": "stabilityai/sd-vae-ft-mse",
        "title": "",
        "vae_scale": 0.18215,  # of sd-vae-ft-mse; SDXL's has 0.13025
        "vae_shift": 0.0,
        "may_change": False,
        # Of the images of a folder.
        "crop": "centre",
        "orient": True,
        "background": "white",
        "max_pixels": 178_956_970,  # where PIL stops
        "held_out": 0.1,
      },
      "model": {
        "size": "SiT-XL/2",  # paper
        "dtype": "bfloat16",
        "remat": "names",
        "unroll": 1,
        "attention": "auto",
      },
      "objective": {
        "shares": (2, 1, 1),  # open
        "alpha": 1.0,  # paper
        "beta": 1.0,  # paper
        "gamma": 1.0,  # paper
        "guidance": "intrinsic",  # paper
        "fixed_w": 0.5,  # of the SM variants: CFG 1.5, SM
        "w_max": 3.5,  # paper
        "w_spacing": 0.25,  # paper
        "t_interval": 0.3,  # paper
        "guidance_parameters": "online",  # open
        "label_dropout": 0.1,  # open; SiT, DiT and SM
        "times": "grid",  # open; SM
        "clip": 0.0,  # open; SM clips at 4
        # What follows is not the paper's, and off.
        "times_mean": 0.4,
        "times_deviation": 1.0,
        "grid_share": 0.0,
        "jumps": "dyadic",
        "jump_probabilities": (),
        "target": "two_steps",
        "split": 0.5,
        "tangent": "path",
        "rollout": False,
        "curriculum": 0.0,
        "guided_velocity": "path",
        "w_drawn": "grid",
        "w_ramp": 0.0,
        "t_interval_max": 0.0,
        "w_scaled": False,
      },
      "wavelet": {
        "form": "norm",  # open
        "family": "haar",  # open
        "levels": -1,  # paper: log2(size), 5 for 32x32
        "weights": (),
        "losses": ("consistency",),  # open
        "epsilon": 1e-3,  # open
        "tree": "pyramid",
      },
      "coupling": {
        "coupling": "ot",  # paper
        "pool_size": 32,  # paper: K
        "epsilon": 0.05,  # open
        "pairing": "permutation",  # open
        "class_penalty": 0.0,  # paper: label-agnostic
        "max_iterations": 300,  # open
        "threshold": 1e-3,  # open
        "momentum": 1.5,  # open
        # Of coupling="classwise", which is not the paper's.
        "class_rounds": 16,
        "class_epsilon": 0.01,
        "class_steps": 2_000,
        "class_batch": 1_024,
      },
      "optimizer": {
        "learning_rate": 1e-4,  # open; SiT, DiT and SM
        "schedule": "constant",  # open
        "warmup_steps": 0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,  # open; SiT and DiT
        "clip_norm": 0.0,
        "mu_dtype": "float32",
      },
      "ema": {
        "inference_decay": 0.9999,  # paper
        "target_decay": 0.95,  # paper
        "warmup": False,
        "others": (),  # paper: none
      },
      "log": {"every": 100, "gradients_every": 1_000, "wandb": ""},
      "checkpoint": {"every": 10_000, "keep": 3, "keep_every": 0},
      "sample": {
        "num_images": 64,
        "steps": "4",
        "w": 0.5,
        "label": "all",
        "seed": 0,
        "batch_size": 64,
      },
      "monitor": {"every": 0, "num_images": 500, "steps": (1, 4), "w": 0.5, "score": False},
      "evaluation": {
        "num_images": 50_000,
        "steps": (1, 2, 4, 8, 128),
        "w": (0.0, 0.5, 1.0, 2.0),
        "seeds": (0,),
        "batch_size": 512,
        "enlarge": 1,
        "labels": "balanced",
        "rounding": "nearest",
        "networks": "inception",
        "weights": "",
        "reference": "",
        "reference_split": "train",
        "save_samples": False,
        "at_end": False,
      },
    }
  )


def apply_variant(
  config: ml_collections.ConfigDict, variant: str, one_ema: float | None = None
) -> ml_collections.ConfigDict:
  """Turns iSM into a row of its ablation.

  Args:
    one_ema: the decay of the rows with one EMA; None for that of the inference EMA.
  """
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is unknown; known are {', '.join(VARIANTS)}.")
  config.variant = variant
  if variant in OTHERS:
    return _apply_other(config, variant)
  techniques = _ROWS[variant]
  if "twin" not in techniques:
    decay = config.ema.inference_decay if one_ema is None else one_ema
    config.ema.inference_decay = config.ema.target_decay = decay
  if "sot" not in techniques:
    config.coupling.coupling = "independent"
  if "wavelet" not in techniques:
    config.wavelet.form = "l2"
  if "interval" not in techniques:
    config.objective.t_interval = 0.0
  if "ig" not in techniques:  # guidance of one strength, in the target's finest step
    config.objective.guidance = "fixed_finest"
    config.objective.shares = (3, 0, 1)  # the rows of the guidance loss go to the velocity
    config.evaluation.w = (config.objective.fixed_w,)
    config.sample.w = config.monitor.w = config.objective.fixed_w
  # SM, with the shares, weights and clipping of its authors' code. Their code departs from this in
  # two places: 1e-5 in path and velocity (see `paths`), and AdamW's weight decay of 0.1 (here 0).
  if not techniques:
    if variant == "sm_compounding":
      config.objective.guidance = "fixed_every_level"
    config.objective.shares = (7, 0, 1)
    config.objective.alpha = 7 / 8  # one mean over the batch
    config.objective.gamma = 1 / 8
    config.objective.clip = 4.0
  return config


def _apply_other(config, variant):
  """Turns iSM into a method that is not the paper's, as configs/README.md describes it."""
  objective = config.objective
  if variant == "plus":
    objective.update({"w_scaled": True, "w_drawn": "log_uniform"})
    objective.jump_probabilities = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0)  # of 1/64, 1/32, ..., 1
    return config
  objective.times = "logit_normal"
  if variant == "split":
    objective.update({"jumps": "continuous", "grid_share": 0.5, "split": 0.25})
    return config
  config.ema.target_decay = config.ema.inference_decay  # no target is of an average
  config.coupling.coupling = "independent"
  config.wavelet.form = "l2"
  if variant == "fm":
    objective.update({"guidance": "two_pass", "shares": (1, 0, 0), "times_mean": 0.0})  # SD 3
    return config
  objective.update({"target": "identity", "jumps": "continuous"})
  objective.tangent = {"meanflow": "path", "imf": "network"}[variant]
  config.wavelet.update({"form": "adaptive", "losses": ("velocity", "guidance", "consistency")})
  config.model.attention = "xla"  # which has a derivative in forward mode
  return config
