"""The train state: parameters, optimizer and the EMA trees, and how a gradient moves them.

Twin EMA (iSM, Sec. 4): a slow average of the parameters for sampling, and a fast one for the
consistency target, which then follows the online network closely. Equal decays are one EMA.
Further slow averages can be had beside the first, to choose among after one training.
"""

import dataclasses
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ism_jax import ranges

SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16")
Decay = Annotated[float, "[0, 0.999999]"]  # nearer to 1, float32 makes it 1
MAX_OTHERS = 8  # inference averages beside the first, each as large as the parameters


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW.

  Attributes:
    learning_rate: after the warm-up.
    schedule: "constant", or "cosine" to zero at the end of the run.
    warmup_steps: of a linear warm-up from zero.
    b1: decay of Adam's first moment.
    b2: decay of its second moment.
    eps: of Adam, added to the root of the second moment.
    weight_decay: decoupled, as a share of the learning rate; 0 is Adam.
    clip_norm: bound on the global norm of the gradient; 0 is none.
    mu_dtype: of the first moment, "float32" or "bfloat16", which saves two bytes a parameter.
  """

  learning_rate: Annotated[float, "[1e-9, 1]"]
  schedule: Annotated[str, SCHEDULES]
  warmup_steps: Annotated[int, "[0, 1e6]"]
  b1: Decay
  b2: Decay
  eps: Annotated[float, "[1e-20, 1]"]  # a gradient that is zero is divided by it
  weight_decay: Annotated[float, "[0, 10]"]
  clip_norm: Annotated[float, "[0, 1e6]"]
  mu_dtype: Annotated[str, DTYPES] = dataclasses.field(default="float32", metadata={"fixed": True})

  def __post_init__(self):
    ranges.check_fields(self, "optimizer")


@dataclasses.dataclass(frozen=True)
class EmaConfig:
  """The averages.

  Attributes:
    inference_decay: per step, of the tree that samples: `ema`.
    target_decay: per step, of the tree that makes the consistency target. Equal to
      `inference_decay`, the two trees are equal: one EMA, as SM has.
    warmup: whether decays start low, at most (1 + n) / (10 + n) after n steps, so that the average
      forgets the initialisation. (A constant 0.999 keeps 9 % of it after 2,400 steps.) It holds for
      all trees, so that equal decays stay one EMA; 0.95 is reached after 171 steps.
    others: per step, of further averages to sample with, at most 8, each four bytes a parameter:
      (0.999, 0.9995) are the trees `ema:0.999` and `ema:0.9995`. Nothing is trained otherwise.
  """

  inference_decay: Decay
  target_decay: Decay
  warmup: bool
  others: tuple[Decay, ...] = dataclasses.field(
    default=(), metadata={"learnt": False, "fixed": True}
  )

  def __post_init__(self):
    ranges.check_fields(self, "ema")
    if len({self.inference_decay, *self.others}) <= len(self.others):
      raise ValueError(
        f"config.ema.others={self.others}: give each decay once, and without inference_decay="
        f"{self.inference_decay}, which is there anyway."
      )
    if len(self.others) > MAX_OTHERS:
      raise ValueError(
        f"config.ema.others={self.others} are {len(self.others)} decays, and {MAX_OTHERS} the "
        "most: give fewer."
      )

  @property
  def decays(self) -> dict[str, float]:
    """The decay of each of the other averages by its name: {"ema:0.999": 0.999}."""
    return {f"ema:{decay}": decay for decay in self.others}


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: int32 scalar, steps done.
    params: online parameters.
    ema: slow average, for sampling.
    target_ema: fast average, for the consistency target.
    others: further averages for sampling, by the names in `EmaConfig.decays`.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  target_ema: Any
  others: dict[str, Any] = flax.struct.field(default_factory=dict)


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate by step, for a run of `steps`."""
  after = optax.constant_schedule(cfg.learning_rate)
  if cfg.schedule == "cosine":
    after = optax.cosine_decay_schedule(cfg.learning_rate, max(1, steps - cfg.warmup_steps))
  if not cfg.warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, cfg.learning_rate, cfg.warmup_steps)
  return optax.join_schedules([warmup, after], [cfg.warmup_steps])


def optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """AdamW after clipping of the gradient's global norm."""
  rate = learning_rate(cfg, steps)
  adamw = optax.adamw(
    rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mu_dtype=jnp.dtype(cfg.mu_dtype)
  )
  # One structure with clipping and without: a run that diverged continues with it switched on.
  clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
  return optax.chain(clip, adamw)


def decay_at(decay: float, step, warmup: bool):
  """The decay of the update that follows `step` steps."""
  step = jnp.asarray(step, jnp.float32)
  return jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.float32(decay)


def average(ema, params, decay):
  """E13: decay * ema + (1 - decay) * params, leaf by leaf; `update` does it to all averages."""
  return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def create(params, tx: optax.GradientTransformation, others=()) -> TrainState:
  """The state before the first step; the averages are copies, as donation needs.

  Args:
    others: names of further averages.
  """
  copy = lambda: jax.tree.map(jnp.copy, params)
  step, opt_state = jnp.zeros((), jnp.int32), tx.init(params)
  return TrainState(step, params, opt_state, copy(), copy(), {name: copy() for name in others})


def update(state: TrainState, gradient, tx: optax.GradientTransformation, ema: EmaConfig):
  """One optimizer step, then all averages."""
  updates, opt_state = tx.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  averaged = lambda tree, decay: average(tree, params, decay_at(decay, state.step, ema.warmup))
  slow = averaged(state.ema, ema.inference_decay)
  fast = averaged(state.target_ema, ema.target_decay)
  others = {name: averaged(state.others[name], decay) for name, decay in ema.decays.items()}
  return TrainState(state.step + 1, params, opt_state, ema=slow, target_ema=fast, others=others)
