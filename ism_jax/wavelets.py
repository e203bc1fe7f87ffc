"""The multi-level wavelet distance of a prediction to its target (iSM, Sec. 4), through jaxwt.

The transform is linear, so the distance is a function of the bands of the error. By Parseval, an
orthonormal transform (Haar on even sizes; jaxwt has no periodic boundary for the others) leaves the
*sum* of squares as it was: a distance is new only through its band weights or its norm. The paper
gives neither; `WaveletConfig.form` names the choices.

Axes: B batch, H/W image size, C channels, N coefficients of a band.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import jaxwt
import pywt

from ism_jax import ranges

LOSSES = ("velocity", "guidance", "consistency")
FORMS = ("l2", "norm", "weighted", "adaptive")
TREES = ("pyramid", "packet")


@dataclasses.dataclass(frozen=True)
class WaveletConfig:
  """Which distance each of the three losses uses.

  Attributes:
    form: of the losses in `losses`; the others use the mean squared error.
      "l2": mean squared error, no wavelets.
      "norm": sum_b sqrt(n_b) sqrt(mean(c_b^2) + epsilon) / sum_b sqrt(n_b) over bands b of n_b
        coefficients c_b: a norm per band, so no band drowns in another.
      "weighted": sum_b weights[level of b] n_b mean(c_b^2) / n; equal to "l2" for unit weights.
      "adaptive": ||e||^2 / (||e||^2 + epsilon), the divisor without a gradient; no wavelets, and
        not the paper's, but MeanFlow's. It covers all three losses, or the others drown in it.
    family: a PyWavelets name. Haar is the only one that reaches full depth.
    levels: depth of the decomposition; -1 is the deepest the size allows, 0 is a single band (the
      error itself).
    weights: of "weighted": one per level, finest first, the last for the coarsest approximation
      (levels + 1 of them); () means all 1.
    losses: which of the three losses it covers. A norm learns medians where targets are random, so
      it biases velocity and guidance; consistency targets are deterministic.
    epsilon: of "norm" and "adaptive", in squared error: below it they turn quadratic.
    tree: "pyramid", which splits the approximation again at each level, or "packet", which splits
      every band (with Haar at full depth, a Walsh-Hadamard transform), for "norm".
  """

  form: Annotated[str, FORMS]
  family: Annotated[str, tuple(pywt.wavelist(kind="discrete"))]
  levels: Annotated[int, "[-1, 20]"]
  weights: tuple[Annotated[float, "[0, 1e4]"], ...]
  losses: tuple[Annotated[str, LOSSES], ...]
  epsilon: Annotated[float, "[1e-12, 1000]"]
  tree: Annotated[str, TREES] = "pyramid"

  def __post_init__(self):
    ranges.check_fields(self, "wavelet")
    if self.tree == "packet" and self.form != "norm":
      raise ValueError(
        f"wavelet.tree='packet' is of form='norm', and wavelet.form is {self.form!r}: set "
        "form='norm', or tree='pyramid'."
      )
    if self.form == "adaptive" and not set(LOSSES) <= set(self.losses):
      raise ValueError(
        f"wavelet.form='adaptive' with losses={self.losses}: its rows outweigh those of a mean "
        "squared error, of which nothing is learnt then; set wavelet.form='norm', or "
        f"wavelet.losses={LOSSES} with objective.target='identity'."
      )


def depth(cfg: WaveletConfig, size: tuple[int, int]) -> int:
  """Levels of the decomposition of an H x W image; raises if `cfg` asks for more than there are."""
  deepest = min(pywt.dwt_max_level(n, cfg.family) for n in size)
  if cfg.levels > deepest:
    raise ValueError(
      f"wavelet.levels={cfg.levels} is deeper than {size[0]}x{size[1]} images allow with "
      f"{cfg.family!r}: at most {deepest}. Set wavelet.levels={deepest}, or -1."
    )
  levels = deepest if cfg.levels == -1 else cfg.levels
  if cfg.form == "weighted" and cfg.weights and len(cfg.weights) != levels + 1:
    raise ValueError(
      f"wavelet.weights={cfg.weights} has {len(cfg.weights)} values; {levels} levels need "
      f"{levels + 1}: give them, finest first, the coarsest approximation last."
    )
  return levels


def bands(e, family: str, levels: int):
  """The wavelet bands of e [B, H, W, C]: a list of (level, [B, N]) pairs.

  Level 0 is the finest detail (three bands a level), `levels` the coarsest approximation. N runs
  over the coefficients of all channels.
  """
  flat = lambda band: band.reshape(e.shape[0], -1)
  if levels == 0:
    return [(0, flat(e))]
  # Channels first and default axes: jaxwt's `axes=` fails under jit.
  e_BxCxHxW = jnp.moveaxis(e, -1, 1)
  approximation, *details = jaxwt.wavedec2(e_BxCxHxW, family, mode="symmetric", level=levels)
  bands_by_level = [(levels, flat(approximation))]
  for level, triple in zip(range(levels - 1, -1, -1), details, strict=True):
    bands_by_level += [(level, flat(band)) for band in triple]
  return bands_by_level


def packet(e, family: str, levels: int):
  """The bands of the wavelet packet of e [B, H, W, C]: [B, 4^levels, N], of N coefficients each."""
  b, *_, channels = e.shape
  bands_BxFxHxW = jnp.moveaxis(e, -1, 1)
  for _ in range(levels):
    approximation, details = jaxwt.wavedec2(bands_BxFxHxW, family, mode="symmetric", level=1)
    split = jnp.stack([approximation, *details], axis=2)
    bands_BxFxHxW = split.reshape(b, -1, *split.shape[3:])
  return bands_BxFxHxW.reshape(b, channels, 4**levels, -1).swapaxes(1, 2).reshape(b, 4**levels, -1)


def distance(e, cfg: WaveletConfig, loss: str):
  """E9: the distance per example [B] of an error e [B, H, W, C], for one of the three losses.

  `WaveletConfig.form` has the equations.
  """
  if cfg.form == "l2" or loss not in cfg.losses:
    return jnp.mean(jnp.square(e).reshape(e.shape[0], -1), axis=-1)
  if cfg.form == "adaptive":
    squares = jnp.sum(jnp.square(e).reshape(e.shape[0], -1), axis=-1)
    return squares / jax.lax.stop_gradient(squares + cfg.epsilon)
  levels = depth(cfg, e.shape[1:3])
  if cfg.form == "norm" and cfg.tree == "packet":  # whose bands are all of one size
    energy = jnp.mean(jnp.square(packet(e, cfg.family, levels)), axis=-1)
    return jnp.mean(jnp.sqrt(energy + cfg.epsilon), axis=-1)
  energies = [  # (level of b, n_b, mean(c_b^2))
    (level, c_b.shape[-1], jnp.mean(jnp.square(c_b), axis=-1))
    for level, c_b in bands(e, cfg.family, levels)
  ]
  if cfg.form == "norm":
    norms = (math.sqrt(n_b) * jnp.sqrt(energy + cfg.epsilon) for _, n_b, energy in energies)
    return sum(norms) / sum(math.sqrt(n_b) for _, n_b, _ in energies)
  weights = cfg.weights or (1.0,) * (levels + 1)
  return sum(weights[level] * n_b / e[0].size * energy for level, n_b, energy in energies)
