"""SiT (arXiv:2401.08740), conditioned on noise level t, step size d, class c and guidance w.

A ViT over patches with adaLN-zero, exactly SiT's but for two more embedders in the conditioning
sum: d enters as its level (a sinusoid of d itself barely tells 0 from 1/128), w as it is. t is
embedded as SiT does, so published SiT weights fit.

Axes: B batch, T tokens, D width, H heads, P patch pixels times channels, K features of a head.
"""

import dataclasses
import functools
import math
from typing import Annotated

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from ism_jax import attention, guidance, paths, ranges

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "names", "dots", "full")
ATTENTIONS = ("auto", "xla")
MAX_TOKENS = 2**16
# What remat "names" keeps of a block: what its matrix products and its attention make.
NAMES = ("modulation", "qkv", "attention", "proj", "fc1", "fc2")
_INTERVAL = "interval_embedder"
_SIZES = {  # depth, width, heads; the published sizes, and two small ones for 8x8 digits
  "XL": (28, 1152, 16),
  "L": (24, 1024, 16),
  "B": (12, 768, 12),
  "S": (12, 384, 6),
  "XS": (6, 128, 4),
  "XXS": (3, 96, 3),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network.

  Attributes:
    size: "SiT-{S,B,L,XL}/{2,4,8}" of the published sizes, and small "SiT-{XXS,XS}"; the number is
      the patch size in pixels, and may be 1 too.
    dtype: of the blocks' activations and matrix products, "float32" or "bfloat16"; parameters, the
      conditioning, softmax and output are float32 always.
    remat: what a block keeps for the backward pass: "none" keeps all, "names" `NAMES` (cuDNN's
      attention runs forward again all the same), "dots" the matrix products without their biases,
      "full" its input only.
    unroll: blocks per iteration of the scan over layers.
    attention: "auto" takes the fused kernel that the device has for these sizes, see
      `attention.choose`; "xla" writes it out on every device.
  """

  size: str = dataclasses.field(metadata={"fixed": True})
  dtype: Annotated[str, DTYPES]
  remat: Annotated[str, REMATS] = dataclasses.field(metadata={"learnt": False})
  unroll: Annotated[int, "[1, 100]"] = dataclasses.field(metadata={"learnt": False})
  attention: Annotated[str, ATTENTIONS] = dataclasses.field(
    default="auto", metadata={"learnt": False}
  )

  def __post_init__(self):
    ranges.check_fields(self, "model")
    size, _, patch = self.size.removeprefix("SiT-").partition("/")
    if not self.size.startswith("SiT-") or size not in _SIZES or patch not in ("1", "2", "4", "8"):
      raise ValueError(
        f"model.size={self.size!r} is unknown; known are SiT-{{{','.join(_SIZES)}}}/{{1,2,4,8}}."
      )

  @property
  def dimensions(self) -> tuple[int, int, int]:
    """Depth, width and heads."""
    return _SIZES[self.size.removeprefix("SiT-").partition("/")[0]]

  @property
  def patch(self) -> int:
    """Side of a patch in pixels."""
    return int(self.size.partition("/")[2])


def frequencies(count: int, max_period: float = 10_000.0):
  """[count] of a sinusoid, from 1 to 1/max_period."""
  return jnp.exp(-math.log(max_period) * jnp.arange(count, dtype=jnp.float32) / count)


def sinusoid(a, dim: int = 256):
  """[B] -> [B, dim]: [cos(a f), sin(a f)] at dim/2 frequencies f."""
  angles = a.astype(jnp.float32)[:, None] * frequencies(dim // 2)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


@functools.lru_cache
def position_embedding(width: int, grid: tuple[int, int]) -> np.ndarray:
  """[T, width] fixed 2-D sinusoids, [sin, cos] per axis, column number first (as SiT's)."""
  omega = 1.0 / 10_000 ** (np.arange(width // 4) / (width / 4))
  rows, columns = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
  halves = []
  for position in (columns, rows):
    angles = position.reshape(-1, 1) * omega
    halves += [np.sin(angles), np.cos(angles)]
  return np.concatenate(halves, axis=1).astype(np.float32)


def modulate(x_BxTxD, shift_BxD, scale_BxD):
  """adaLN: x (1 + scale) + shift."""
  return x_BxTxD * (1 + scale_BxD[:, None]) + shift_BxD[:, None]


_norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_bias=False, use_scale=False)
_dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
_dense_zero = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)


class ScalarEmbedder(nn.Module):
  """A scalar per example [B] -> [B, D]: sinusoids, then an MLP, in float32.

  (bfloat16 cannot tell t = 127/128 from 1.)
  """

  width: int

  @nn.compact
  def __call__(self, a):
    dense = functools.partial(nn.Dense, self.width, kernel_init=nn.initializers.normal(0.02))
    return dense(name="mlp_2")(nn.silu(dense(name="mlp_0")(sinusoid(a))))


class Projection(nn.Module):
  """The two terms of nn.Dense, apart: (x W [.., F], b [F])."""

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return x @ kernel, bias


class Attention(nn.Module):
  """Multi-head self-attention over the tokens [B T, D] or [B, T, D] of images."""

  heads: int
  dtype: jnp.dtype
  implementation: str

  @nn.compact
  def __call__(self, x, tokens: int):
    width = x.shape[-1]
    product, bias = Projection(3 * width, self.dtype, name="qkv")(x)
    h = attention.attend(product, bias, tokens, self.heads, self.implementation)
    h = checkpoint_name(h, "attention")
    return checkpoint_name(_dense(width, dtype=self.dtype, name="proj")(h), "proj")


class Block(nn.Module):
  """A transformer block with adaLN-zero conditioning.

  Attributes:
    heads: of the attention.
    dtype: of activations and matrix products.
    attention: as `attention.choose` names it.
    flat: whether the matrix products run over flat tokens [B T, D]. XLA's CPU backend is slow with
      three axes; for TPUs it fuses shift, scale and gate with the products only where there are.
  """

  heads: int
  dtype: jnp.dtype
  attention: str
  flat: bool

  @nn.compact
  def __call__(self, x_BxTxD, condition_BxD):
    b, tokens, width = x_BxTxD.shape
    dense = functools.partial(_dense, dtype=self.dtype)
    norm = functools.partial(_norm, dtype=self.dtype)
    rows = (lambda a: a.reshape(b * tokens, -1)) if self.flat else lambda a: a
    images = lambda a: a.reshape(b, tokens, -1)

    modulation = _dense_zero(6 * width, dtype=self.dtype, name="adaLN_modulation")(condition_BxD)
    modulation = checkpoint_name(modulation, "modulation")
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    h = modulate(norm(name="norm1")(x_BxTxD), shift_a, scale_a)
    h = Attention(self.heads, self.dtype, self.attention, name="attn")(rows(h), tokens)
    x_BxTxD += gate_a[:, None] * images(h)
    h = modulate(norm(name="norm2")(x_BxTxD), shift_m, scale_m)
    h = checkpoint_name(dense(4 * width, name="fc1")(rows(h)), "fc1")
    h = checkpoint_name(dense(width, name="fc2")(nn.gelu(h)), "fc2")
    x_BxTxD += gate_m[:, None] * images(h)
    return x_BxTxD, None  # a scan's carry and its (empty) output


class SiT(nn.Module):
  """The velocity s(x_t, t, c, d, w).

  Attributes:
    cfg: size and numerics.
    num_classes: classes; the label table has one row more, the null class, its last.
    guided: whether w is an input. (A network with fixed guidance has no w embedder.)
    w_scaled: whether the output is multiplied by 1 + w, see `ObjectiveConfig`.
    interval: whether the start of the guidance interval is an input beside w.
    device_kind: of the devices that compute it, as JAX names it; None for a program that XLA may
      divide among devices by itself, or that is for several platforms. It decides layout and
      kernels, not what is computed.
  """

  cfg: ModelConfig
  num_classes: int
  guided: bool
  device_kind: str | None = None
  w_scaled: bool = False
  interval: bool = False

  @nn.compact
  def __call__(self, x, t, c, d, w):
    """x [B, H, W, C]; t, c (int), d, w [B] -> [B, H, W, C] float32.

    Where the interval is an input, w is [B, 2], with its start; see `guidance.parts`.
    """
    depth, width, heads = self.cfg.dimensions
    patch, dtype = self.cfg.patch, jnp.dtype(self.cfg.dtype)
    b, height, wide, channels = x.shape
    check_image_size(self.cfg, (height, wide))
    grid = (height // patch, wide // patch)
    tokens = grid[0] * grid[1]

    embed = nn.Embed(
      self.num_classes + 1,
      width,
      embedding_init=nn.initializers.normal(0.02),
      name="y_embedder",
    )
    condition = ScalarEmbedder(width, name="t_embedder")(t) + embed(c)
    condition += ScalarEmbedder(width, name="d_embedder")(paths.level(d))
    if self.interval:
      w, start = guidance.parts(w)
      condition += ScalarEmbedder(width, name=_INTERVAL)(start)
    if self.guided:
      condition += ScalarEmbedder(width, name="w_embedder")(w)
    condition = nn.silu(condition)  # every adaLN begins with it

    # A convolution of stride `patch` is a matrix product over patches, pixels row by row.
    x = x.reshape(b, grid[0], patch, grid[1], patch, channels).transpose(0, 1, 3, 2, 4, 5)
    x = _dense(width, dtype=dtype, name="x_embedder")(x.reshape(b * tokens, -1))
    x = x.reshape(b, tokens, width) + position_embedding(width, grid).astype(dtype)

    block, policies = Block, jax.checkpoint_policies
    if self.cfg.remat != "none":
      policy = {
        "names": policies.save_only_these_names(*NAMES),
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": None,
      }[self.cfg.remat]
      block = nn.remat(Block, policy=policy, prevent_cse=False)
    blocks = nn.scan(
      block,
      length=depth,
      unroll=self.cfg.unroll,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
    )
    implementation = self.attention_for((height, wide))
    flat = not (self.device_kind or "").startswith("TPU")
    x, _ = blocks(heads, dtype, implementation, flat, name="blocks")(x, condition)

    modulation = _dense_zero(2 * width, dtype=dtype, name="final_adaLN_modulation")(condition)
    x = modulate(_norm(dtype=dtype, name="norm_final")(x), *jnp.split(modulation, 2, axis=-1))
    x = _dense_zero(patch * patch * channels, dtype=dtype, name="final_linear")(
      x.reshape(b * tokens, width)
    )
    x = x.reshape(b, *grid, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, height, wide, channels).astype(jnp.float32)
    return x * paths.expand(1 + w, x) if self.w_scaled else x

  def attention_for(self, image_shape: tuple[int, ...]) -> str:
    """What computes the attention of images [H, W, ..]; see `attention.choose`."""
    if self.cfg.attention == "xla":
      return "xla"
    _, width, heads = self.cfg.dimensions
    tokens = math.prod(image_shape[:2]) // self.cfg.patch**2
    return attention.choose(self.device_kind, tokens, width, heads, jnp.dtype(self.cfg.dtype))


def check_image_size(cfg: ModelConfig, size: tuple[int, int]) -> None:
  """Raises ValueError where the patch does not divide the image, or makes too many tokens of it."""
  if any(n % cfg.patch for n in size):
    raise ValueError(
      f"{size[0]}x{size[1]} images do not split into the {cfg.patch}x{cfg.patch} patches of "
      f"model.size={cfg.size!r}: choose a patch size that divides data.image_size."
    )
  if (tokens := math.prod(size) // cfg.patch**2) > MAX_TOKENS:
    raise ValueError(
      f"{size[0]}x{size[1]} images are {tokens} tokens of model.size={cfg.size!r}, and "
      f"{MAX_TOKENS} is the most: choose a larger patch, or a smaller data.image_size."
    )


def init_params(key, model: SiT, shape: tuple[int, int, int]):
  """Parameters of a model of [H, W, C] images; float32."""
  zero = jnp.zeros(1)
  w = jnp.zeros((1, 2)) if model.interval else zero
  return model.init(key, jnp.zeros((1, *shape)), zero, zero.astype(int), zero, w)["params"]


def at_interval(model: SiT, params, start: float):
  """(model, params) of the network whose guidance begins at `start`, without an input for that.

  The embedding of one start is a constant of the conditioning, and so is added to that of every
  class.
  """
  if not model.interval:
    return model, params
  width = model.cfg.dimensions[1]
  constant = ScalarEmbedder(width).apply({"params": params[_INTERVAL]}, jnp.full(1, start))
  table = {"embedding": params["y_embedder"]["embedding"] + constant}
  others = {name: a for name, a in params.items() if name != _INTERVAL}
  return model.clone(interval=False), others | {"y_embedder": table}


def velocity_function(model: SiT, params):
  """velocity(x_t, t, c, d, w) of these parameters."""
  return lambda x_t, t, c, d, w: model.apply({"params": params}, x_t, t, c, d, w)
