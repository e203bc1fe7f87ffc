"""DINOv2 ViT-L/14 (Oquab et al. 2023, arXiv:2304.07193), as FD-DINOv2 uses it.

FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675) compares the normed class tokens of images that PIL
resized to 224x224, aspect ratio ignored. The network was trained on 37x37 patches and interpolates
its position embedding to 16x16; the published one, of PyTorch's hub, adds 0.1 patches to the size
when it does. Weights come from the hub's file or from that of transformers, which hold the same
values.

Axes: B batch, H/W image size, C channels, T tokens, D width, N heads, K features of a head, P patch
pixels times channels.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ism_jax.pretrained import weights

WHAT = "1024 features of DINOv2 ViT-L/14, the normed class token (images resized as PIL does)"
PUBLISHED = weights.Published(
  what="DINOv2 ViT-L/14",
  file="dinov2_vitl14_pretrain.pth",
  url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
  sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue
DEVIATION = (0.229, 0.224, 0.225)

_BITS = 22  # after the point of PIL's coefficients: an int32 less 8 of a pixel and 2 to spare

# {module or parameter: (its key in the hub's file, its keys in transformers')}
_KEYS = {
  "cls_token": ("cls_token", ("embeddings.cls_token",)),
  "pos_embed": ("pos_embed", ("embeddings.position_embeddings",)),
  "patch_embed": ("patch_embed.proj", ("embeddings.patch_embeddings.projection",)),
  "norm": ("norm", ("layernorm",)),
} | {
  f"blocks/{name}": (f"blocks.{{}}.{hub}", tuple(f"encoder.layer.{{}}.{key}" for key in keys))
  for name, hub, keys in (
    ("norm1", "norm1", ("norm1",)),
    ("qkv", "attn.qkv", tuple(f"attention.attention.{a}" for a in ("query", "key", "value"))),
    ("proj", "attn.proj", ("attention.output.dense",)),
    ("ls1", "ls1.gamma", ("layer_scale1.lambda1",)),
    ("norm2", "norm2", ("norm2",)),
    ("fc1", "mlp.fc1", ("mlp.fc1",)),
    ("fc2", "mlp.fc2", ("mlp.fc2",)),
    ("ls2", "ls2.gamma", ("layer_scale2.lambda1",)),
  )
}
_KINDS = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}
_UNUSED = ("mask_token", "embeddings.mask_token")  # it stands for hidden patches in training


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
  """The architecture.

  Attributes:
    depth: blocks.
    width: of a token.
    heads: of the attention.
    patch: side of a patch in pixels.
    positions: side of the square of patches that the position embedding was trained on.
    image_size: side in pixels that images are resized to.
    interpolate_offset: patches added to the size that the position embedding is interpolated to,
      which moves all points a little: 0.1 in the published network, 0 in transformers'.
  """

  depth: int = 24
  width: int = 1024
  heads: int = 16
  patch: int = 14
  positions: int = 37
  image_size: int = 224
  interpolate_offset: float = 0.1

  def __post_init__(self):
    if self.image_size % self.patch:
      raise ValueError(f"image_size={self.image_size} must be a multiple of patch={self.patch}.")
    if self.width % self.heads:
      raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}.")


VIT_L14 = Dinov2Config()


def load(name: str) -> weights.Pretrained:
  """Loads weights by name, see `weights.load`: a file is the hub's, or that of transformers."""
  to_params = functools.partial(params_from_state_dict, VIT_L14)
  shapes = weights.shapes_of(_VisionTransformer(VIT_L14), VIT_L14.image_size)
  return weights.load(name, PUBLISHED, shapes, to_params)


def features(params, images, cfg: Dinov2Config = VIT_L14):
  """What FD-DINOv2 compares of images uint8 [B, H, W, 3], of any height and width.

  {"features": float32 [B, D]}, the normed class token; D = 1024 in the published network.
  """
  weights.check_images(images)
  pixels = resize_bicubic(images, cfg.image_size).astype(jnp.float32) / 255
  pixels = (pixels - np.float32(MEAN)) / np.float32(DEVIATION)
  return {"features": _VisionTransformer(cfg).apply({"params": params}, pixels)}


def resize_bicubic(images, size: int):
  """Resizes as PIL does, bit for bit: `Image.resize((size, size), Image.BICUBIC)`.

  uint8 [B, H, W, C] -> [B, size, size, C]: rows first, then columns, each rounded to 8 bits;
  widened where it shrinks, so that every pixel counts. All sums are of integers, so every backend
  gives the same. PIL 13 takes the columns first where that is less work, for images that are taller
  than `size` and whose height shrinks more than their width; FD-DINOv2 was published, and is
  computed here, with the order of those before.
  """
  return _resize_axis(_resize_axis(images, 2, size), 1, size)


def position_weights(cfg: Dinov2Config) -> np.ndarray:
  """Bicubic interpolation of the position embedding along one side, as PyTorch does it.

  float32 [image_size // patch, positions]: a row of weights for each patch of the image. The cubic
  (a = -3/4) is not widened where it shrinks, and points beyond an edge take the edge's value.
  """
  side, trained = cfg.image_size // cfg.patch, cfg.positions
  if side == trained:
    return np.eye(side, dtype=np.float32)
  scale = trained / (side + cfg.interpolate_offset)
  points = (np.arange(side) + 0.5) * scale - 0.5
  rows = np.zeros((side, trained))
  for neighbour in range(-1, 3):
    at = np.floor(points).astype(int) + neighbour
    np.add.at(rows, (np.arange(side), np.clip(at, 0, trained - 1)), _cubic(points - at, -0.75))
  return rows.astype(np.float32)


def params_from_state_dict(cfg: Dinov2Config, arrays, source="the state dict"):
  """Parameters, a nested dict of float32 arrays, from PyTorch's tensors.

  Args:
    arrays: NumPy arrays of any float type, by the keys of the hub's model or of transformers'
      Dinov2Model.
    source: where the arrays are from, for the ValueError of `weights.check_tensors`.
  """
  arrays = {key: array for key, array in arrays.items() if key not in _UNUSED}
  is_hub = not any(str(key).startswith(("embeddings.", "encoder.")) for key in arrays)
  shapes = weights.shapes_of(_VisionTransformer(cfg), cfg.image_size)
  return weights.params_from_tensors(
    arrays,
    {path: _tensors(cfg, path, leaf.shape, is_hub) for path, leaf in shapes.items()},
    shapes,
    source=source,
    what="the weights of DINOv2 ViT-L/14 without registers",
    needed=f"the tensors of {PUBLISHED.url} or of https://huggingface.co/facebook/dinov2-large",
  )


def _tensors(cfg: Dinov2Config, path, shape, is_hub) -> list[dict[str, tuple[int, ...]]]:
  """PyTorch's tensors for a parameter: of each layer, {key: shape} of what is concatenated."""
  kind, is_stacked = path[-1], path[0] == "blocks"
  shape = shape[1:] if is_stacked else shape
  if path == ("patch_embed", "kernel"):
    shape = (shape[1], 3, cfg.patch, cfg.patch)  # [D, C, H, W]
  elif kind == "kernel":
    shape = weights.torch_shape(shape)
  hub, transformers = _KEYS["/".join(path[:-1] if kind in _KINDS else path)]
  names = (hub,) if is_hub else transformers
  part = (shape[0] // len(names), *shape[1:])
  return [
    {name.format(i) + _KINDS.get(kind, ""): part for name in names}
    for i in range(cfg.depth if is_stacked else 1)
  ]


def _resize_axis(images, axis, size):
  if images.shape[axis] == size:
    return images
  total = 1 << (_BITS - 1)  # one half
  # A few taps for each pixel: less work than a matrix product, of which nearly all would be zeros.
  for index, coefficient in zip(*_taps(images.shape[axis], size), strict=True):
    pixels = jnp.take(images, index, axis=axis).astype(jnp.int32)
    total += pixels * np.expand_dims(coefficient, [i for i in range(images.ndim) if i != axis])
  return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)


@functools.lru_cache
def _taps(before, after):
  """Where each pixel comes from: indices and int32 coefficients of 2^-22, both [taps, after]."""
  scale = before / after
  width = max(scale, 1.0)
  center = (np.arange(after) + 0.5) * scale
  start = np.maximum((center - 2 * width + 0.5).astype(int), 0)
  end = np.minimum((center + 2 * width + 0.5).astype(int), before)
  index = start + np.arange(np.max(end - start))[:, None]
  # In the order of PIL's operations, so that no last bit falls to the other side.
  coefficients = _cubic((index - center + 0.5) * (1.0 / width), -0.5) * (index < end)
  coefficients /= functools.reduce(np.add, coefficients)
  rounded = np.trunc(coefficients * 2**_BITS + np.copysign(0.5, coefficients))
  return np.minimum(index, before - 1), rounded.astype(np.int32)


def _cubic(x, a):
  """The convolution kernel of cubic interpolation with slope a at 1 (Keys 1981)."""
  x = np.abs(x)
  near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_dense = functools.partial(nn.Dense, precision=weights.PRECISION)
_einsum = functools.partial(jnp.einsum, precision=weights.PRECISION)
# The fast variance, E[x^2] - E[x]^2, cancels where a token's mean is large.
_norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class _Block(nn.Module):
  """A transformer block, each branch of which is scaled by feature (LayerScale)."""

  heads: int

  @nn.compact
  def __call__(self, x_BxTxD, _):
    b, tokens, width = x_BxTxD.shape
    scale = lambda name: self.param(name, nn.initializers.ones, (width,))

    # The matrix products run over flat tokens: XLA's CPU backend is slow with three axes.
    h = _norm(name="norm1")(x_BxTxD).reshape(-1, width)
    h = _dense(3 * width, name="qkv")(h).reshape(b, tokens, 3, self.heads, width // self.heads)
    q_BxTxNxK, k_BxTxNxK, v_BxTxNxK = jnp.moveaxis(h, 2, 0)
    score_BxNxTxT = _einsum("btnk,bsnk->bnts", q_BxTxNxK, k_BxTxNxK)
    weight_BxNxTxT = nn.softmax(score_BxNxTxT / np.sqrt(width // self.heads, dtype=np.float32))
    h = _einsum("bnts,bsnk->btnk", weight_BxNxTxT, v_BxTxNxK).reshape(-1, width)
    x_BxTxD += scale("ls1") * _dense(width, name="proj")(h).reshape(x_BxTxD.shape)

    h = _norm(name="norm2")(x_BxTxD).reshape(-1, width)
    h = nn.gelu(_dense(4 * width, name="fc1")(h), approximate=False)
    x_BxTxD += scale("ls2") * _dense(width, name="fc2")(h).reshape(x_BxTxD.shape)
    return x_BxTxD, None  # a scan's carry and its (empty) output


class _VisionTransformer(nn.Module):
  cfg: Dinov2Config

  @nn.compact
  def __call__(self, x):
    """x [B, H, W, 3], normalised, of the config's size -> [B, D], the normed class token."""
    cfg = self.cfg
    b, side, positions = len(x), cfg.image_size // cfg.patch, cfg.positions
    zeros = nn.initializers.zeros
    class_token = self.param("cls_token", zeros, (1, 1, cfg.width))
    embedding = self.param("pos_embed", zeros, (1, 1 + positions**2, cfg.width))

    # A convolution of stride `patch` is a matrix product over patches, pixels row by row.
    x = x.reshape(b, side, cfg.patch, side, cfg.patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = _dense(cfg.width, name="patch_embed")(x.reshape(b * side**2, -1))
    grid = embedding[0, 1:].reshape(positions, positions, cfg.width)
    weights_SxS = position_weights(cfg)
    grid = _einsum("ir,jc,rcd->ijd", weights_SxS, weights_SxS, grid)
    x = x.reshape(b, side**2, cfg.width) + grid.reshape(side**2, cfg.width)
    class_token = jnp.broadcast_to(class_token + embedding[:, :1], (b, 1, cfg.width))
    x_BxTxD = jnp.concatenate([class_token, x], axis=1)

    blocks = nn.scan(
      _Block, length=cfg.depth, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    x_BxTxD, _ = blocks(cfg.heads, name="blocks")(x_BxTxD, None)
    return _norm(name="norm")(x_BxTxD[:, 0])
