"""The three losses of iSM, and the Shortcut Models (SM) baseline, as one regression per example.

L = alpha L_velocity + beta L_guidance + gamma L_consistency (iSM, Sec. 4). The losses differ only
in each example's (t, d, c, w) and target, so the rows of one batch are dealt to them in a fixed
pattern and share one network call for the gradient; targets come from calls without gradient. Each
loss is the mean over its rows of the *global* batch, so neither the number of devices nor of
micro-batches changes it.

A velocity function is called as `velocity(x_t, t, c, d, w)`; all but x_t are [B].

Axes: B batch, H/W image size, C channels.
"""

import dataclasses
import functools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from ism_jax import guidance, paths, ranges, wavelets

GUIDANCES = ("intrinsic", "fixed_finest", "fixed_every_level", "two_pass")
PARAMETERS = ("online", "target")
TIMES = ("grid", "uniform", "logit_normal")
JUMPS = ("dyadic", "continuous")
TARGETS = ("two_steps", "identity")
VELOCITIES = ("path", "network")
STRENGTHS = ("grid", "log_uniform")
Share = Annotated[int, "[0, 1000]"]
Weight = Annotated[float, "[0, 1e4]"]
OfRun = Annotated[float, "[0, 1]"]  # a part of the run; 0 is none
_OF_INTRINSIC = {  # what no other guidance reads, and where it is off
  "w_scaled": False, "w_drawn": "grid", "w_ramp": 0.0, "guided_velocity": "path",
  "t_interval_max": 0.0, "target": "two_steps",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The losses.

  Attributes:
    shares: rows of velocity, guidance and consistency in each sum(shares) rows of the batch; (2, 1,
      1) is 1/2, 1/4, 1/4. Open in the paper.
    alpha: weight of the velocity loss (1 in the paper, as the other two).
    beta: weight of the guidance loss.
    gamma: weight of the consistency loss.
    guidance: "intrinsic": w is a network input (iSM). "fixed_finest": SM; guidance of `fixed_w` in
      only the finest step of the consistency target. "fixed_every_level": the same at every level,
      the compounding that iSM's Sec. 3 describes. "two_pass": none is learnt, and every step of a
      sample is guided in two passes, as usual for flow matching; there are velocity rows only.
    fixed_w: w of the two fixed forms.
    w_max: the largest w that is drawn.
    w_spacing: w is drawn from 0, w_spacing, ..., w_max.
    t_interval: guidance is off for t < t_interval, the noisy side; 0 is no interval.
    guidance_parameters: whose conditional-unconditional difference guides: "online", or "target"
      (the fast EMA). Open in the paper.
    label_dropout: share of the velocity rows that train the null class (of the consistency rows
      too where fixed guidance needs a null class at every level).
    times: t of the velocity and guidance rows: "grid", multiples of 1/128 (SM), "uniform" on
      [0, 1), or "logit_normal". Open in the paper.
    clip: bound on |x_{t+d}| and on the consistency target, as SM's code has at 4; 0 is none.

  What follows is not the paper's, and off; configs/README.md says where it is from.

  Attributes:
    times_mean, times_deviation: of the logit of t, where times are logit-normal.
    grid_share: share of the rows whose times (and jumps) are on the grid all the same.
    jumps: of the consistency rows: "dyadic", or "continuous", between any two times.
    jump_probabilities: of d = 1/64, 1/32, ..., 1, as seven weights; () is uniform.
    target: of the consistency rows: "two_steps" (E7), or "identity", MeanFlow's (E16).
    split: the first of the two steps, as a share of the jump; 1/2 is E7.
    tangent: of the identity: "path", along the guided velocity of the path (MeanFlow), or
      "network", along the network's own at d = 0 (iMF).
    rollout: whether every second consistency row begins where the network's own jump of the row
      before it ends, with the gradient of that state.
    curriculum: part of the run in which long jumps are faded in, see `curriculum_weight`.
    guided_velocity: v of E6: "path", or "network", the network's own s_cond, whose target has no
      variance: guidance is then distilled, not regressed on noise.
    w_drawn: "grid", or "log_uniform", of the scale 1 + w in [1, 1 + w_max].
    w_ramp: part of the run in which the largest w grows to w_max.
    t_interval_max: where it is not 0, the start of the interval is an input of the network, drawn
      from [0, t_interval_max], and samples are guided from `t_interval` on, which any command sets.
    w_scaled: whether the network's output is multiplied by 1 + w, and each error divided by it.
  """

  shares: tuple[Share, Share, Share]
  alpha: Weight
  beta: Weight
  gamma: Weight
  guidance: Annotated[str, GUIDANCES] = dataclasses.field(metadata={"fixed": True})
  fixed_w: ranges.Guidance = dataclasses.field(metadata={"fixed": True})
  w_max: ranges.Guidance
  w_spacing: Annotated[float, "[0.001, 100]"]
  t_interval: Annotated[float, "[0, 1]"]
  guidance_parameters: Annotated[str, PARAMETERS]
  label_dropout: Annotated[float, "[0, 1]"]
  times: Annotated[str, TIMES]
  clip: Annotated[float, "[0, 1e6]"]
  times_mean: Annotated[float, "[-10, 10]"] = 0.4
  times_deviation: Annotated[float, "[0.01, 10]"] = 1.0
  grid_share: Annotated[float, "[0, 1]"] = 0.0
  jumps: Annotated[str, JUMPS] = "dyadic"
  jump_probabilities: tuple[Weight, ...] = ()
  target: Annotated[str, TARGETS] = "two_steps"
  split: Annotated[float, "[1e-4, 0.5]"] = 0.5
  tangent: Annotated[str, VELOCITIES] = "path"
  rollout: bool = False
  curriculum: OfRun = 0.0
  guided_velocity: Annotated[str, VELOCITIES] = "path"
  w_drawn: Annotated[str, STRENGTHS] = "grid"
  w_ramp: OfRun = 0.0
  t_interval_max: Annotated[float, "[0, 1]"] = dataclasses.field(
    default=0.0, metadata={"fixed": True}
  )
  w_scaled: bool = dataclasses.field(default=False, metadata={"fixed": True})

  def __post_init__(self):
    ranges.check_fields(self, "objective")
    self._check_losses()
    self._check_target()
    self._check_draws()

  def _check_losses(self):
    if self.shares[0] < 1:
      raise ValueError(
        f"objective.shares={self.shares}: give rows of velocity (at least 1), guidance and "
        "consistency, such as (2, 1, 1)."
      )
    if not any(share and weight for share, weight in zip(self.shares, self.weights, strict=True)):
      raise ValueError(
        f"objective.alpha={self.alpha}, beta={self.beta}, gamma={self.gamma} with "
        f"shares={self.shares}: nothing is learnt; give a loss that has rows a positive weight."
      )
    if not self.intrinsic and self.shares[1]:
      raise ValueError(
        f"objective.shares={self.shares} gives rows to the guidance loss, which "
        f"guidance={self.guidance!r} does not have: set the second share to 0."
      )
    if self.guidance == "two_pass" and any(self.shares[1:]):
      raise ValueError(
        f"objective.shares={self.shares} with guidance='two_pass', which learns velocities alone: "
        "set shares to (1, 0, 0)."
      )
    for name, off in _OF_INTRINSIC.items():
      if not self.intrinsic and getattr(self, name) != off:
        raise ValueError(
          f"objective.{name}={getattr(self, name)!r} is of intrinsic guidance, and guidance is "
          f"{self.guidance!r}: set it to {off!r}."
        )
    if self.t_interval > self.t_interval_max > 0:
      raise ValueError(
        f"objective.t_interval={self.t_interval} is beyond those that are drawn, up to "
        f"t_interval_max={self.t_interval_max}: set it to that or less."
      )

  def _check_target(self):
    if self.target == "identity" and self.shares[2] and self.jumps == "dyadic":
      raise ValueError(
        "objective.target='identity' is a derivative in t and d, of which dyadic jumps show the "
        "network no more than seven points: set jumps='continuous'."
      )
    if self.target == "identity" and self.clip:
      raise ValueError(
        f"objective.clip={self.clip} is of the two steps of a target, and target='identity' takes "
        "none: set clip to 0."
      )
    if self.tangent == "network" and self.target != "identity":
      raise ValueError(
        f"objective.tangent='network' is of target='identity', and target is {self.target!r}: set "
        "tangent='path'."
      )
    if self.split != 0.5 and self.target == "identity":
      raise ValueError(
        f"objective.split={self.split} is of the two steps of a target, and target='identity' "
        "takes none: set split to 0.5."
      )
    if self.split != 0.5 and self.jumps == "dyadic":
      raise ValueError(
        f"objective.split={self.split} makes two steps that are not dyadic, which dyadic jumps "
        "never train: set jumps='continuous'."
      )

  def _check_draws(self):
    if self.jumps == "continuous" and self.times == "grid":
      raise ValueError(
        "objective.jumps='continuous' are between two times, and times='grid' has none between: "
        "set times to uniform or logit_normal."
      )
    if self.grid_share and self.times == "grid":
      raise ValueError(
        f"objective.grid_share={self.grid_share} with times='grid', where all rows are on the grid:"
        " set times to uniform or logit_normal, or grid_share to 0."
      )
    if self.rollout and not self.shares[2]:
      raise ValueError(
        f"objective.rollout joins consistency rows, of which shares={self.shares} has none: set "
        "rollout to False."
      )
    if self.curriculum and not self.shares[2]:
      raise ValueError(
        f"objective.curriculum={self.curriculum} is of consistency rows, of which "
        f"shares={self.shares} has none: set it to 0."
      )
    if self.rollout and self.jumps == "continuous":
      raise ValueError(
        "objective.rollout joins two jumps on the grid, and jumps='continuous' are not: set "
        "rollout to False or jumps to dyadic."
      )
    if self.jump_probabilities and (
      len(self.jump_probabilities) != len(paths.JUMPS) or not sum(self.jump_probabilities)
    ):
      raise ValueError(
        f"objective.jump_probabilities={self.jump_probabilities}: give {len(paths.JUMPS)} weights, "
        "of d = 1/64, 1/32, ..., 1, which are not all 0, or () for equal ones."
      )
    if self.jump_probabilities and self.jumps == "continuous" and not self.grid_share:
      raise ValueError(
        "objective.jump_probabilities are of jumps on the grid, and with jumps='continuous' and "
        "grid_share=0 there are none: set grid_share, or jump_probabilities to ()."
      )
    if self.curriculum and self.jump_probabilities and not any(self.jump_probabilities[:-1]):
      raise ValueError(
        f"objective.curriculum={self.curriculum} with jump_probabilities of jumps of 1 alone, of "
        "which none is shorter: set curriculum to 0."
      )
    steps = self.w_max / self.w_spacing
    if self.w_drawn == "grid" and not math.isclose(steps, round(steps), abs_tol=1e-6):
      raise ValueError(
        f"objective.w_max={self.w_max} is not a multiple of w_spacing={self.w_spacing}: set it to "
        f"{max(1, round(steps)) * self.w_spacing:g}."
      )

  @property
  def intrinsic(self) -> bool:
    """Whether w is a network input."""
    return self.guidance == "intrinsic"

  @property
  def any_w(self) -> bool:
    """Whether a sample may have any w in any number of steps."""
    return self.guidance in ("intrinsic", "two_pass")

  @property
  def weights(self) -> tuple[float, float, float]:
    """Of the velocity, guidance and consistency loss."""
    return self.alpha, self.beta, self.gamma


class Rows(NamedTuple):
  """Which rows of a batch belong to which loss: arrays of row numbers."""

  velocity: np.ndarray
  guidance: np.ndarray
  consistency: np.ndarray


def deal_rows(n: int, shares: tuple[int, int, int]) -> Rows:
  """Deals n rows to the three losses, in a pattern that repeats every sum(shares) rows.

  Every run of whole periods holds each loss at its share, and a row's loss does not depend on how
  many devices and micro-batches there are.

  Raises:
    ValueError: if n is not a multiple of the period.
  """
  loss_of_row = number_losses(n, shares)
  return Rows(*(np.flatnonzero(loss_of_row == loss) for loss in range(3)))


def number_losses(n: int, shares: tuple[int, int, int]) -> np.ndarray:
  """[n] of 0, 1, 2: which of the three losses each row has; see `deal_rows`."""
  period = sum(shares)
  if n % period:
    near = max(period, round(n / period) * period)
    raise ValueError(
      f"{n} rows do not split into shares {shares}: they need a multiple of {period}; the nearest"
      f" is {near}."
    )
  return np.repeat(np.arange(3), shares)[np.arange(n) % period]


class Conditions(NamedTuple):
  """What each row is trained for: all [B], but w [B, 2] where the interval is an input.

  They are the inputs of the network, but for the w of fixed guidance: it shapes targets only.
  """

  t: jax.Array
  c: jax.Array
  d: jax.Array
  w: jax.Array


def draw_conditions(key, c, cfg: ObjectiveConfig, null_class: int, progress=1.0):
  """Draws (t, c, d, w) for a global batch with labels c [B], row by row for the row's loss.

  Velocity rows: d = 0, w = 0, c dropped at random. Guidance rows: d = 0, any w. Consistency rows:
  a jump d in {1/64, ..., 1} from a multiple of d, any w, or `fixed_w` where guidance is fixed.

  Args:
    progress: the part of the run that is done, for `w_ramp`.
  """
  n = c.shape[0]
  rows = deal_rows(n, cfg.shares)
  is_velocity = np.isin(np.arange(n), rows.velocity)
  is_consistency = np.isin(np.arange(n), rows.consistency)
  key_t, key_jump, key_start, key_w, key_drop = jax.random.split(key, 5)
  t, d = _draw_times(key_t, key_jump, key_start, is_consistency, cfg)
  if cfg.intrinsic:
    w = jnp.where(is_velocity, 0.0, _draw_strengths(key_w, n, cfg, progress))
    if cfg.t_interval_max:
      start = jax.random.uniform(jax.random.fold_in(key_w, 1), (n,), maxval=cfg.t_interval_max)
      w = jnp.stack([w, start], axis=-1)
  else:
    w = jnp.where(is_consistency, cfg.fixed_w, jnp.zeros(n))
  may_drop = is_velocity | (is_consistency & (cfg.guidance == "fixed_every_level"))
  drop = jax.random.bernoulli(key_drop, cfg.label_dropout, (n,)) & may_drop
  conditions = Conditions(t, jnp.where(drop, null_class, c), d, w)
  if not cfg.rollout:
    return conditions
  return _join_jumps(jax.random.fold_in(key_start, 1), conditions, rows.consistency)


def _draw_times(key_t, key_jump, key_start, is_consistency, cfg: ObjectiveConfig):
  """(t, d) of all rows."""
  n = len(is_consistency)
  jump = paths.draw_jump(key_jump, (n,), cfg.jump_probabilities)
  start = paths.draw_start(key_start, jump)
  if cfg.times == "grid":
    t = paths.draw_start(key_t, jnp.zeros(n))
  else:
    draw = functools.partial(jax.random.uniform, shape=(n,))
    if cfg.times == "logit_normal":
      law = (cfg.times_mean, cfg.times_deviation)
      draw = lambda key: paths.draw_times(key, (n,), *law)
    t = draw(key_t)
    key_end, key_grid, key_share = jax.random.split(jax.random.fold_in(key_t, 1), 3)
    on_grid = jax.random.bernoulli(key_share, cfg.grid_share, (n,))
    if cfg.jumps == "continuous":
      any_start, any_jump = paths.between(t, draw(key_end))
      start, jump = jnp.where(on_grid, start, any_start), jnp.where(on_grid, jump, any_jump)
    t = jnp.where(on_grid, paths.draw_start(key_grid, jnp.zeros(n)), t)
  return jnp.where(is_consistency, start, t), jnp.where(is_consistency, jump, 0.0)


def _draw_strengths(key, n: int, cfg: ObjectiveConfig, progress):
  """Guidance w [n]."""
  part = jnp.minimum(1.0, progress / cfg.w_ramp) if cfg.w_ramp else 1.0
  if cfg.w_drawn == "log_uniform":
    return jnp.expm1(jax.random.uniform(key, (n,)) * jnp.log1p(part * cfg.w_max))
  count = round(cfg.w_max / cfg.w_spacing) + 1
  if cfg.w_ramp:
    count = 1 + jnp.round(part * (count - 1)).astype(int)
  return cfg.w_spacing * jax.random.randint(key, (n,), 0, count).astype(jnp.float32)


def _join_jumps(key, conditions: Conditions, rows) -> Conditions:
  """Makes the second of each two consistency rows go on where the first ends, with its c and w.

  They begin and halve a jump of 2 d, so that t and d are distributed as without a rollout. A jump
  of 1 has none to follow: there the second row is another jump of 1.
  """
  first, second = rows[0::2], rows[1::2]
  _, c, d, w = (a[first] for a in conditions)
  follows = d <= 0.5
  t = paths.draw_start(key, jnp.where(follows, 2 * d, d))
  choose = lambda a, b: jnp.where(paths.expand(follows, a), a, b)
  return Conditions(
    conditions.t.at[rows].set(jnp.stack([t, jnp.where(follows, t + d, t)], 1).reshape(-1)),
    conditions.c.at[second].set(choose(c, conditions.c[second])),
    conditions.d.at[second].set(d),
    conditions.w.at[second].set(choose(w, conditions.w[second])),
  )


def follow_jumps(s_online, x_t, conditions: Conditions, shares):
  """The states x_t [B, H, W, C] where the second of two jumps begins where the first one ends.

  x_{t+d} = x_t + d s(x_t, t, c, d, w), with its gradient (cumulative consistency, rollout of two).

  Args:
    s_online: velocity function.
    conditions: [B], as `draw_conditions` joins them.
    shares: of the rows.
  """
  rows = deal_rows(len(x_t), shares).consistency
  first, second = rows[0::2], rows[1::2]
  of_first = Conditions(*(a[first] for a in conditions))
  x_next = paths.advance(x_t[first], s_online(x_t[first], *of_first), of_first.d)
  follows = paths.expand(of_first.d <= 0.5, x_next)
  return x_t.at[second].set(jnp.where(follows, x_next, x_t[second]))


def curriculum_weight(d, progress, cfg: ObjectiveConfig):
  """Of consistency rows [B]: 1 - s + s (1 - d) / E[1 - d], where s falls from 1 to 0.

  Short jumps first: the longest learn from the shorter. It has mean 1, and is 1 once `progress`,
  the part of the run that is done, reaches `curriculum`: a run that is given another length goes
  on where that is in the new one.
  """
  s = jnp.maximum(0.0, 1 - progress / cfg.curriculum)
  return 1 - s + s * (1 - d) / (1 - mean_jump(cfg))


@functools.lru_cache
def mean_jump(cfg: ObjectiveConfig) -> float:
  """E[d] of the consistency rows."""
  weights = cfg.jump_probabilities or (1.0,) * len(paths.JUMPS)
  dyadic = float(np.average(paths.JUMPS, weights=weights))
  if cfg.jumps == "dyadic":
    return dyadic
  quantiles = (np.arange(256) + 0.5) / 256
  if cfg.times == "logit_normal":
    logits = cfg.times_mean + cfg.times_deviation * scipy.special.ndtri(quantiles)
    quantiles = scipy.special.expit(logits)
  between = np.maximum(np.abs(quantiles[:, None] - quantiles), 1 / paths.FINEST).mean()
  return cfg.grid_share * dyadic + (1 - cfg.grid_share) * float(between)


def guidance_target(v, s_cond, s_uncond, w, t, t_interval):
  """E6: v + w (s_cond - s_uncond), but v where t < t_interval (iSM, intrinsic guidance).

  Args:
    v: [B, H, W, C] velocity of the path.
    s_cond: [B, H, W, C] the network's velocity for the label, at d = 0, w = 0.
    s_uncond: [B, H, W, C] the same for the null class.
    w: [B] guidance.
    t: [B] times.
    t_interval: the time from which guidance is on, one or [B].
  """
  w = guidance.interval_weight(w, t, t_interval)
  return v + paths.expand(w, v) * (s_cond - s_uncond)


def consistency_target(s_first, velocity, x_t, t, c, d, w, clip=0.0, split=0.5):
  """E7: the mean velocity of the two steps that one jump d must predict (iSM, self-consistency).

  (s(x_t, t, c, d/2, w) + s(x_{t+d/2}, t + d/2, c, d/2, w)) / 2, and with another `split` a
  a s(x_t, t, c, a d, w) + (1 - a) s(x_{t+ad}, t + a d, c, (1 - a) d, w) (SoFlow, alpha-Flow).

  Args:
    s_first: [B, H, W, C], the velocity of the first step: an argument since its call can be shared.
    velocity: the velocity function of the second step.
    x_t: [B, H, W, C] state at time t.
    t: [B], with t + d <= 1.
    c: [B] classes.
    d: [B] the jump.
    w: [B] guidance of both.
    clip: bound on |x_{t+d}| and on the target, 0 for none.
    split: the share of the first step.
  """
  first, second = paths.split(d, split)
  x_next = paths.travel(x_t, s_first, first)
  if clip:
    x_next = jnp.clip(x_next, -clip, clip)
  s_second = velocity(x_next, t + first, c, paths.as_step_size(second), w)
  target = split * s_first + (1 - split) * s_second
  return jnp.clip(target, -clip, clip) if clip else target


def identity_target(velocity, v, tangent, x_t, t, c, d, w):
  """E16: v + d (ds/dx . tangent + ds/dt - ds/dd), which the mean velocity of a jump is (MeanFlow).

  d s(x_t, t, d) is the integral of the velocity from t to t + d: its derivative along the path,
  with t + d held, is -v.

  Args:
    velocity: velocity function, which is differentiated in forward mode.
    v: [B, H, W, C] (guided) velocity of the path.
    tangent: [B, H, W, C] along which x_t moves.
    x_t, t, c, d, w: as of `consistency_target`.
  """
  mean_velocity = lambda x_t, t, d: velocity(x_t, t, c, d, w)
  along = (tangent, jnp.ones_like(t), -jnp.ones_like(d))
  _, derivative = jax.jvp(mean_velocity, (x_t, t, d), along)
  return v + paths.expand(d, v) * derivative


def in_one_call(velocity, *inputs):
  """The velocities of several lists of rows (x_t, t, c, d, w), in one call, or none for no rows."""
  sizes = [len(x_t) for x_t, *_ in inputs]
  if not sum(sizes):
    return [x_t for x_t, *_ in inputs]
  s = velocity(*map(jnp.concatenate, zip(*inputs, strict=True)))
  return jnp.split(s, np.cumsum(sizes)[:-1])


def regression_targets(s_online, s_ema, x0, x1, x_t, conditions, cfg, null_class):
  """What the network must predict for each row, [B, H, W, C]; gradients are stopped.

  E5: v for the velocity rows. E6 for the guidance rows, E7 for the consistency rows.

  x_t [B, H, W, C] are the states on the paths from x0 to x1; the others are as `losses` has them.
  """
  rows = deal_rows(len(x_t), cfg.shares)
  s_target = s_ema
  if not cfg.intrinsic:
    every_level = cfg.guidance == "fixed_every_level"
    s_target = guidance.fixed(
      s_ema, null_class=null_class, t_interval=cfg.t_interval, every_level=every_level
    )
  of_consistency = x_t[rows.consistency], Conditions(*(a[rows.consistency] for a in conditions))
  if identity := cfg.target == "identity":
    guided_rows = np.concatenate([rows.guidance, rows.consistency])  # their targets have the pair
  else:
    guided_rows = rows.guidance
  x_g, guided = x_t[guided_rows], Conditions(*(a[guided_rows] for a in conditions))
  zero, null = jnp.zeros(len(x_g)), jnp.full(len(x_g), null_class)
  unguided, strength, start = jnp.zeros_like(guided.w), guided.w, cfg.t_interval
  if cfg.t_interval_max:
    strength, start = guidance.parts(guided.w)
    unguided = jnp.stack([zero, start], axis=-1)
  cond = (x_g, guided.t, guided.c, zero, unguided)
  uncond = (x_g, guided.t, null, zero, unguided)
  x_c, jump = of_consistency
  first, _ = paths.split(jump.d, cfg.split)
  first_step = [] if identity else [(x_c, *jump._replace(d=paths.as_step_size(first)))]
  if cfg.guidance_parameters == "online":
    s_cond, s_uncond = in_one_call(s_online, cond, uncond)
    s_first = in_one_call(s_target, *first_step)
  else:
    s_cond, s_uncond, *s_first = in_one_call(s_target, cond, uncond, *first_step)
  v = paths.velocity(x0, x1)
  v_cond = v[guided_rows] if cfg.guided_velocity == "path" else s_cond
  v_guided = guidance_target(v_cond, s_cond, s_uncond, strength, guided.t, start)
  y = v.at[guided_rows].set(v_guided)
  if rows.consistency.size and identity:
    v_c = y[rows.consistency]
    tangent = v_c if cfg.tangent == "path" else s_online(x_c, *jump._replace(d=0 * jump.d))
    y = y.at[rows.consistency].set(identity_target(s_online, v_c, tangent, x_c, *jump))
  elif rows.consistency.size:
    settings = {"clip": cfg.clip, "split": cfg.split}
    two_steps = consistency_target(*s_first, s_target, x_c, *jump, **settings)
    y = y.at[rows.consistency].set(two_steps)
  return jax.lax.stop_gradient(y)


def losses(
  s_online,
  s_ema,
  x0,
  x1,
  conditions,
  cfg,
  wavelet_cfg,
  null_class,
  batch_size,
  weights=None,
  progress=1.0,
):
  """`regression_losses` (E8) of whole periods of rows (see `deal_rows`), with their targets.

  Args:
    s_online: velocity function; its last call carries a gradient, and a rollout's first, too.
    s_ema: velocity function of the target EMA.
    x0: [B, H, W, C] noise.
    x1: [B, H, W, C] images.
    conditions: of each row. Labels of guidance rows are never dropped.
    cfg: the ObjectiveConfig.
    wavelet_cfg: the WaveletConfig of their distances.
    null_class: label of "no class".
    batch_size, weights, progress: as for `regression_losses`, and so are the results.
  """
  x_t = paths.interpolate(x0, x1, conditions.t)
  if cfg.rollout:
    x_t = follow_jumps(s_online, x_t, conditions, cfg.shares)
  y = regression_targets(s_online, s_ema, x0, x1, x_t, conditions, cfg, null_class)
  settings = (cfg, wavelet_cfg, batch_size, weights, progress)
  return regression_losses(s_online, x_t, y, conditions, None, *settings)


def regression_losses(
  s_online,
  x_t,
  y,
  conditions,
  loss_of_row,
  cfg,
  wavelet_cfg,
  batch_size,
  weights=None,
  progress=1.0,
):
  """E8: alpha L_velocity + beta L_guidance + gamma L_consistency, of these rows.

  Each loss is the mean distance (E9) between prediction and target over its rows; what is returned
  is the share of these rows in the loss of the global batch.

  Args:
    s_online: velocity function.
    x_t: [B, H, W, C] states.
    y: [B, H, W, C] targets.
    conditions: of each row.
    loss_of_row: [B] of 0, 1, 2, the loss of each row, for any rows of a batch; None for rows that
      `deal_rows` deals.
    cfg: the ObjectiveConfig.
    wavelet_cfg: the WaveletConfig of their distances.
    batch_size: rows of the global batch. The sum of the results over all devices and micro-batches
      is the loss of the global batch.
    weights: (alpha, beta, gamma), scalars or an array [3]; None for those of `cfg`.
    progress: the part of the run that is done, for the curriculum.
  Returns:
    (loss, {"velocity": .., "guidance": .., "consistency": .., "jumps": ..}): scalars, and for each
    d of `paths.JUMPS` the sum of the consistency distances and their number, [2, 7], those of other
    jumps at the nearest level. (The other two losses have d = 0 only.)
  """
  weights = cfg.weights if weights is None else weights
  # A network with fixed guidance has no input w: see `guidance.fixed`.
  w = conditions.w if cfg.intrinsic else jnp.zeros_like(conditions.w)
  error = s_online(x_t, *conditions._replace(w=w)) - y
  if cfg.w_scaled:
    strength = guidance.parts(w)[0] if cfg.t_interval_max else w
    error /= paths.expand(1 + strength, error)
  total, parts = 0.0, {}
  for loss, (name, share, weight) in enumerate(zip(Rows._fields, cfg.shares, weights, strict=True)):
    if not share:
      continue
    rows = deal_rows(len(x_t), cfg.shares)[loss] if loss_of_row is None else slice(None)
    distances = wavelets.distance(error[rows], wavelet_cfg, name)
    if loss_of_row is not None:
      distances = jnp.where(loss_of_row == loss, distances, 0.0)
    count = batch_size * share // sum(cfg.shares)
    parts[name] = jnp.sum(distances) / count
    if name == "consistency" and cfg.curriculum:
      of_row = curriculum_weight(conditions.d[rows], progress, cfg)
      total += weight * jnp.sum(of_row * distances) / count
    else:
      total += weight * parts[name]
    if name == "consistency":
      # Rows of the other losses have d = 0, which is no jump.
      d = conditions.d[rows]
      level = jnp.where(d > 0, jnp.clip(jnp.round(paths.level(d)), 1), 0)
      is_jump = level == jnp.arange(1, paths.LEVELS)[:, None]
      parts["jumps"] = jnp.stack([is_jump @ distances, is_jump.sum(1)])
  return total, parts
