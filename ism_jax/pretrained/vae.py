"""The autoencoder of Stable Diffusion (sd-vae-ft-mse; Rombach et al. 2022, arXiv:2112.10752).

A convolutional encoder with three halvings gives the mean and the log-variance of a Gaussian over
latents, a decoder turns a latent into an image. Latents of the training scale are 0.18215 times
those of the decoder, which makes their variance about 1; other autoencoders of this architecture
have other factors, which their config.json says (SDXL's 0.13025). Weights come from the safetensors
file that diffusers publishes; the modules below are named by that file's keys.

Axes: B batch, H/W image size, h/w latent size (an eighth), C channels, T = h w tokens.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re

from absl import logging
from flax import traverse_util
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ism_jax.pretrained import hub, weights
from ism_jax.runtime import files

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
PUBLISHED = "stabilityai/sd-vae-ft-mse"
_HUB = "https://huggingface.co"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LOG_VARIANCES = (-30.0, 20.0)

# Of the attention's keys, as older files have them.
_OLD_SPELLING = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_KEY = re.compile(rf"^(.*attentions\.\d+)\.({'|'.join(_OLD_SPELLING)})\.(weight|bias)$")


@dataclasses.dataclass(frozen=True)
class VaeConfig:
  """The architecture.

  Attributes:
    channels: of the levels, from the image's resolution down; each level after the first halves it.
    blocks: residual blocks of an encoder level; a decoder level has one more.
    latent_channels: of a latent; its moments have twice as many.
    groups: of every group normalisation.
    scale, shift: a latent of the training scale is scale (z - shift) of one of the decoder, z;
      diffusers' scaling_factor and shift_factor.
  """

  channels: tuple[int, ...] = (128, 256, 512, 512)
  blocks: int = 2
  latent_channels: int = 4
  groups: int = 32
  scale: float = 0.18215
  shift: float = 0.0

  def __post_init__(self):
    if not (math.isfinite(self.scale) and self.scale > 0 and math.isfinite(self.shift)):
      raise ValueError(
        f"scaling_factor={self.scale} and shift_factor={self.shift}: needed are a positive number "
        "and a number, such as 0.18215 and 0."
      )
    if not self.channels or any(n < 1 or n % self.groups for n in self.channels):
      raise ValueError(
        f"channels={self.channels} must be multiples of groups={self.groups}, one for each level."
      )

  @property
  def factor(self) -> int:
    """Pixels of an image per pixel of its latent, along one side."""
    return 2 ** (len(self.channels) - 1)


SD_VAE = VaeConfig()
# The small one encodes a 256x256 image in a fraction of a second on a CPU.
_RANDOM = {"random": SD_VAE, "random-small": VaeConfig(channels=(16, 16, 32, 32), groups=8)}


def load(name: str) -> weights.Pretrained:
  """Loads an autoencoder by name.

  Args:
    name: a file that safetensors or `torch.save` wrote; a folder with
      `diffusion_pytorch_model.safetensors`; in either, `config.json` beside it says how latents are
      scaled; a repository on the Hugging Face hub such as
      "stabilityai/sd-vae-ft-mse" (see `hub`; downloaded once, then read from the hub's cache, also
      offline); or, for checks of a set-up without any weights, "random" (the published
      architecture) and "random-small" (a tiny one of the same down-sampling). Random weights are
      the same for everyone, and their latents mean nothing.
  Raises:
    FileNotFoundError: no weights are there or to be had; says what to download and what to pass.
    ValueError: the file is damaged, or holds other weights than the published architecture's.
  """
  if cfg := _RANDOM.get(name):
    return weights.random(name, weights.shapes_of(_Autoencoder(cfg), cfg.factor), cfg=cfg)
  path = _find(name)
  cfg, to_params = _configured(path), functools.partial(params_from_state_dict, SD_VAE)
  return weights.read(name, path, to_params, f"{_HUB}/{PUBLISHED}", cfg)


def checksum(name: str) -> str | None:
  """The checksum of an autoencoder's weights, see `load`; None where they are not to be had."""
  if name in _RANDOM:
    return load(name).sha256
  try:
    return files.sha256(_find(name))
  except FileNotFoundError:
    return None


def _configured(path) -> VaeConfig:
  """The published architecture with the factors of the `config.json` beside a file of weights.

  Raises:
    ValueError: it is damaged, or of an autoencoder that computes something else, which its weights
      do not show.
  """
  path = pathlib.Path(path).with_name(CONFIG)
  if not path.is_file():
    logging.warning(
      f"There is no {path}: latents are scaled by {SD_VAE.scale} and not shifted, as of "
      f"{PUBLISHED}. If these weights are others, put their {CONFIG} beside them."
    )
    return SD_VAE
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
    said = {key: value for key, value in values.items() if value is not None}
    scale = float(said.get("scaling_factor", SD_VAE.scale))
    cfg = dataclasses.replace(SD_VAE, scale=scale, shift=float(said.get("shift_factor", 0.0)))
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is no autoencoder's, or damaged: {error}. Fetch it again.") from error
  needed = {"norm_num_groups": cfg.groups, "act_fn": "silu"}
  needed |= {"latents_mean": None, "latents_std": None}
  if other := [key for key in needed if said.get(key, needed[key]) != needed[key]]:
    raise ValueError(
      f"{path} has {other[0]}={said[other[0]]!r}, and only {needed[other[0]]!r} is known here: "
      f"name another autoencoder, such as {PUBLISHED!r}."
    )
  return cfg


def encode(cfg: VaeConfig, params, images):
  """The Gaussian over latents of each image.

  Args:
    images: float [B, H, W, 3] in [-1, 1]; H and W are multiples of 8.
  Returns:
    moments float32 [B, H/8, W/8, 8]: the mean of the 4 latent channels, then their log-variance,
    clamped to [-30, 20]; not scaled.
  """
  _check("images", images, 3, ", scaled to [-1, 1]")
  height, width = images.shape[1:3]
  crop = [side // cfg.factor * cfg.factor for side in (height, width)]
  if crop != [height, width]:
    raise ValueError(
      f"images of {height}x{width} pixels have no whole latent: height and width must be multiples "
      f"of {cfg.factor}. Crop them to {crop[0]}x{crop[1]}."
    )
  x = images.astype(jnp.float32)
  moments = _Autoencoder(cfg).apply({"params": params}, x, method="encode")
  mean, log_variance = jnp.split(moments, 2, axis=-1)
  return jnp.concatenate([mean, jnp.clip(log_variance, *LOG_VARIANCES)], axis=-1)


def sample_latent(moments, noise, scale, shift=0.0):
  """A latent of the training scale, float32 [..., 4].

  scale (mean + exp(log_variance / 2) noise - shift).

  Args:
    moments: [..., 8] as `encode` returns them, of any float type.
    noise: [..., 4], standard normal.
  """
  mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  if noise.shape != mean.shape:
    raise ValueError(
      f"noise of shape {noise.shape} does not fit moments of shape {moments.shape}; "
      f"needed is {mean.shape}."
    )
  return scale * (mean + jnp.exp(log_variance / 2) * noise.astype(jnp.float32) - shift)


def decode(cfg: VaeConfig, params, latents):
  """The image of each latent, float [B, h, w, 4] of the training scale.

  float32 [B, 8 h, 8 w, 3], [-1, 1] but for overshoots, which are not clipped.
  """
  _check("latents", latents, cfg.latent_channels)
  z = latents.astype(jnp.float32) / cfg.scale + cfg.shift
  return _Autoencoder(cfg).apply({"params": params}, z, method="decode")


def params_from_state_dict(cfg: VaeConfig, arrays, source="the state dict"):
  """Parameters, a nested dict of float32 arrays, from PyTorch's tensors.

  Args:
    arrays: NumPy arrays by the keys of diffusers' AutoencoderKL, in either spelling of the
      attention's. Its projections may also be 1x1 convolutions, as old files have them.
    source: where the arrays are from, for the ValueError of `weights.check_tensors`.
  """
  renamed = {}
  for key, array in arrays.items():
    new = _OLD_KEY.sub(lambda m: f"{m[1]}.{_OLD_SPELLING[m[2]]}.{m[3]}", str(key))
    # Where one tensor comes in both spellings, the old one keeps its key, which is unexpected.
    renamed[key if new in arrays else new] = array
  shapes, tensors = weights.shapes_of(_Autoencoder(cfg), cfg.factor), {}
  for path, leaf in shapes.items():
    key = _key(path)
    shape = weights.torch_shape(leaf.shape) if path[-1] == "kernel" else leaf.shape
    if len(shape) == 2 and np.shape(renamed.get(key)) == (*shape, 1, 1):
      renamed[key] = renamed[key].reshape(shape)
    tensors[path] = [{key: shape}]
  return weights.params_from_tensors(
    renamed,
    tensors,
    shapes,
    source=source,
    what="this autoencoder's weights",
    needed=f"the tensors of {WEIGHTS} at {_HUB}/{PUBLISHED}, the layout of diffusers",
  )


def state_dict(params) -> dict[str, np.ndarray]:
  """The inverse of `params_from_state_dict`, in the newer spelling."""
  to_torch = lambda a: np.moveaxis(a, (-1, -2), (0, 1))
  return {
    _key(path): np.ascontiguousarray(to_torch(a) if path[-1] == "kernel" else a)
    for path, a in traverse_util.flatten_dict(params).items()
  }


def diffusers_config(cfg: VaeConfig) -> dict:
  """config.json of diffusers' AutoencoderKL."""
  levels = len(cfg.channels)
  return {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "block_out_channels": cfg.channels,
    "layers_per_block": cfg.blocks,
    "act_fn": "silu",
    "latent_channels": cfg.latent_channels,
    "norm_num_groups": cfg.groups,
    "scaling_factor": cfg.scale,
    "shift_factor": cfg.shift,
  }


def is_public(name: str) -> bool:
  """Whether a name of `load` means the same on every machine: no file or folder."""
  return name in _RANDOM or (bool(_HUB_NAME.fullmatch(name)) and not os.path.exists(name))


def _key(path):
  """("encoder", "down_blocks_0_resnets_1", "conv1", "kernel"): its key as PyTorch has it."""
  *modules, leaf = path
  modules = [re.sub(r"_(\d+)_?", r".\1.", name).strip(".") for name in modules]
  return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def _find(name):
  """The file of weights that a name stands for."""
  remedy = (
    f"Download {WEIGHTS} from {_HUB}/{PUBLISHED} and name that file, or the folder you put it in; "
    f"or name {PUBLISHED!r}, on a machine with network."
  )
  needed = {"what": "VAE weights", "remedy": remedy}
  path = hub.find(name, [WEIGHTS, CONFIG], **needed)
  if path.is_dir():
    path /= WEIGHTS
  if not path.is_file():
    raise hub.absent(name, f"that folder has no {WEIGHTS}", **needed)
  return path


def _check(what, array, channels, scale=""):
  is_float = jnp.issubdtype(array.dtype, jnp.floating)
  if array.ndim != 4 or array.shape[-1] != channels or not is_float:
    raise ValueError(
      f"got {what} of {array.dtype} {array.shape}; needed are floats [B, H, W, {channels}]{scale}."
    )


def _conv(channels, size=3, **options):
  options = {"padding": size // 2, "precision": weights.PRECISION} | options
  return nn.Conv(channels, (size, size), **options)


def _norm(cfg, name):
  # The fast variance, E[x^2] - E[x]^2, cancels where a group's mean is large.
  return nn.GroupNorm(cfg.groups, epsilon=1e-6, use_fast_variance=False, name=name)


class _ResidualBlock(nn.Module):
  cfg: VaeConfig
  channels: int

  @nn.compact
  def __call__(self, x):
    h = x
    for i in (1, 2):
      h = nn.silu(_norm(self.cfg, f"norm{i}")(h))
      h = _conv(self.channels, name=f"conv{i}")(h)
    if x.shape[-1] != self.channels:
      x = _conv(self.channels, size=1, name="conv_shortcut")(x)
    return x + h


class _Attention(nn.Module):
  """Self-attention over pixels with one head."""

  cfg: VaeConfig

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    dense = functools.partial(nn.Dense, channels, precision=weights.PRECISION)
    einsum = functools.partial(jnp.einsum, precision=weights.PRECISION)
    x_BxTxC = x.reshape(len(x), -1, channels)
    h_BxTxC = _norm(self.cfg, "group_norm")(x_BxTxC)
    q_BxTxC, k_BxTxC, v_BxTxC = (dense(name=f"to_{a}")(h_BxTxC) for a in "qkv")
    score_BxTxT = einsum("btc,bsc->bts", q_BxTxC, k_BxTxC)
    weight_BxTxT = nn.softmax(score_BxTxT / np.sqrt(channels))
    h_BxTxC = einsum("bts,bsc->btc", weight_BxTxT, v_BxTxC)
    return x + dense(name="to_out_0")(h_BxTxC).reshape(x.shape)


class _MidBlock(nn.Module):
  cfg: VaeConfig

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    x = _ResidualBlock(self.cfg, channels, name="resnets_0")(x)
    x = _Attention(self.cfg, name="attentions_0")(x)
    return _ResidualBlock(self.cfg, channels, name="resnets_1")(x)


class _Encoder(nn.Module):
  cfg: VaeConfig

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    x = _conv(cfg.channels[0], name="conv_in")(x)
    for i, channels in enumerate(cfg.channels):
      level = f"down_blocks_{i}"
      for j in range(cfg.blocks):
        x = _ResidualBlock(cfg, channels, name=f"{level}_resnets_{j}")(x)
      if i < len(cfg.channels) - 1:
        # Zeros on the right and at the bottom only.
        halve = {"strides": 2, "padding": ((0, 1), (0, 1))}
        x = _conv(channels, name=f"{level}_downsamplers_0_conv", **halve)(x)
    x = _MidBlock(cfg, name="mid_block")(x)
    x = nn.silu(_norm(cfg, "conv_norm_out")(x))
    return _conv(2 * cfg.latent_channels, name="conv_out")(x)


class _Decoder(nn.Module):
  cfg: VaeConfig

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    x = _conv(cfg.channels[-1], name="conv_in")(x)
    x = _MidBlock(cfg, name="mid_block")(x)
    for i, channels in enumerate(reversed(cfg.channels)):
      level = f"up_blocks_{i}"
      for j in range(cfg.blocks + 1):
        x = _ResidualBlock(cfg, channels, name=f"{level}_resnets_{j}")(x)
      if i < len(cfg.channels) - 1:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = _conv(channels, name=f"{level}_upsamplers_0_conv")(x)
    x = nn.silu(_norm(cfg, "conv_norm_out")(x))
    return _conv(3, name="conv_out")(x)


class _Autoencoder(nn.Module):
  cfg: VaeConfig

  def setup(self):
    self.encoder = _Encoder(self.cfg)
    self.quant_conv = _conv(2 * self.cfg.latent_channels, size=1)
    self.post_quant_conv = _conv(self.cfg.latent_channels, size=1)
    self.decoder = _Decoder(self.cfg)

  def encode(self, images):
    return self.quant_conv(self.encoder(images))

  def decode(self, latents):
    return self.decoder(self.post_quant_conv(latents))

  def __call__(self, images):
    """All parameters are used, which is what initialisation needs."""
    return self.decode(self.encode(images)[..., : self.cfg.latent_channels])
