"""Autoencoders as diffusers' AutoencoderKL has them: those of Stable Diffusion, SDXL, SD3, FLUX.

A convolutional encoder with three halvings gives the mean and the log-variance of a Gaussian over
latents, a decoder turns a latent into an image (Rombach et al. 2022, arXiv:2112.10752). Latents of
the training scale are 0.18215 times those of the decoder (sd-vae-ft-mse's), which makes their
variance about 1. What other autoencoders have instead (SDXL's 0.13025; the 16 channels and the
shift of SD3's and FLUX's) is in their config.json. Weights come from the files that diffusers
publishes; the modules below are named by those files' keys.

Axes: B batch, H/W image size, h/w latent size (an eighth), C channels, T = h w tokens.
"""

import dataclasses
import functools
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
_PIPELINE = "vae/"  # the folder of an autoencoder in a repository of a whole pipeline
_OLDER_WEIGHTS = "diffusion_pytorch_model.bin"
_PLACES = tuple(f"{at}{file}" for at in (_PIPELINE, "") for file in (WEIGHTS, _OLDER_WEIGHTS))
PUBLISHED = "stabilityai/sd-vae-ft-mse"
_HUB = "https://huggingface.co"
_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(/vae)?")
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
    quant_conv, post_quant_conv: whether a 1x1 convolution ends the encoder, begins the decoder.
    mid_attention: whether there is attention where the resolution is lowest.
  """

  channels: tuple[int, ...] = (128, 256, 512, 512)
  blocks: int = 2
  latent_channels: int = 4
  groups: int = 32
  scale: float = 0.18215
  shift: float = 0.0
  quant_conv: bool = True
  post_quant_conv: bool = True
  mid_attention: bool = True

  def __post_init__(self):
    if not (math.isfinite(self.scale) and self.scale > 0 and math.isfinite(self.shift)):
      raise ValueError(
        f"scaling_factor={self.scale} and shift_factor={self.shift}: needed are a positive number "
        "and a number, such as 0.18215 and 0."
      )
    if min(self.blocks, self.latent_channels, self.groups) < 1:
      raise ValueError(
        f"layers_per_block={self.blocks}, latent_channels={self.latent_channels} and "
        f"norm_num_groups={self.groups} must be at least 1."
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
_SMALL = VaeConfig(channels=(16, 16, 32, 32), groups=8)
_RANDOM = {
  "random": SD_VAE,
  "random-small": _SMALL,
  "random-small-16": dataclasses.replace(  # as SD3's and FLUX's
    _SMALL, latent_channels=16, scale=0.3611, shift=0.1159, quant_conv=False, post_quant_conv=False
  ),
}
# What config.json says of the architecture, by the field that has it.
_FIELDS = {
  "block_out_channels": "channels",
  "layers_per_block": "blocks",
  "latent_channels": "latent_channels",
  "norm_num_groups": "groups",
  "scaling_factor": "scale",
  "shift_factor": "shift",
  "use_quant_conv": "quant_conv",
  "use_post_quant_conv": "post_quant_conv",
  "mid_block_add_attention": "mid_attention",
}
_UNUSED = ("sample_size", "force_upcast")  # of config.json: not of what is computed here


def load(name: str) -> weights.Pretrained:
  """Loads an autoencoder by name.

  Args:
    name: a file that safetensors or `torch.save` wrote; a folder with
      `diffusion_pytorch_model.safetensors` or `.bin`, perhaps in `vae/`, as a whole pipeline has
      it; a repository of these on the Hugging Face hub such as "stabilityai/sd-vae-ft-mse" or
      "black-forest-labs/FLUX.1-dev" (see `hub`; downloaded once, then read from the hub's cache,
      also offline). `config.json` beside the weights says of which architecture they are and how
      latents are scaled. Or, for checks of a set-up without any weights, "random" (sd-vae-ft-mse's
      architecture), "random-small" (a tiny one of the same down-sampling) and "random-small-16"
      (of 16 channels). Random weights are the same for everyone, and their latents mean nothing.
  Raises:
    FileNotFoundError: no weights are there or to be had; says what to download and what to pass.
    ValueError: a file is damaged, the architecture is another, or the weights are of another one.
  """
  if cfg := _RANDOM.get(name):
    return weights.random(name, weights.shapes_of(_Autoencoder(cfg), cfg.factor), cfg=cfg)
  path = _find(name)
  cfg = _configured(path)
  to_params = functools.partial(params_from_state_dict, cfg)
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
  """The architecture of a file of weights, by the `config.json` beside it.

  Raises:
    ValueError: it is damaged, or of an autoencoder that computes something else.
  """
  path = pathlib.Path(path).with_name(CONFIG)
  if not path.is_file():
    logging.warning(
      f"There is no {path}: latents are scaled by {SD_VAE.scale} and not shifted, as of "
      f"{PUBLISHED}. If these weights are others, put their {CONFIG} beside them."
    )
    return SD_VAE
  remedy = f"Fetch it again, or name another AutoencoderKL, such as {PUBLISHED!r}."
  content = files.read_json(path, {}, remedy)
  said = {k: v for k, v in content.items() if v is not None}
  needed = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
  }
  known = {*needed, *_FIELDS, *_UNUSED}
  wrong = {key: None for key in said if said[key] and key not in known and key[0] != "_"}
  for key, value in (needed | wrong).items():
    used = said.get(key, value)
    if any(each != value for each in (used if isinstance(used, list) else [used])):
      raise ValueError(f"{path} has {key}={used!r}, and only {value!r} is known here. {remedy}")
  fields = {}
  try:
    for key, name in _FIELDS.items():
      default = getattr(SD_VAE, name)
      kind = type(default)
      value = said.get(key, list(default) if kind is tuple else default)
      files.check_shape(value, [int] if kind is tuple else kind, key)
      fields[name] = kind(value)
    cfg = VaeConfig(**fields)
  except ValueError as error:
    reason = str(error).rstrip(".")
    raise ValueError(f"{path} is no autoencoder's, or damaged: {reason}. {remedy}") from error
  if cfg.factor != SD_VAE.factor:
    raise ValueError(
      f"{path} has latents of 1/{cfg.factor} of an image's height and width, and only "
      f"1/{SD_VAE.factor} is known here. {remedy}"
    )
  return cfg


def encode(cfg: VaeConfig, params, images):
  """The Gaussian over latents of each image.

  Args:
    images: float [B, H, W, 3] in [-1, 1]; H and W are multiples of 8.
  Returns:
    moments float32 [B, H/8, W/8, 2 C]: the mean of the C latent channels, then their log-variance,
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
  """A latent of the training scale, float32 [..., C].

  scale (mean + exp(log_variance / 2) noise - shift).

  Args:
    moments: [..., 2 C] as `encode` returns them, of any float type.
    noise: [..., C], standard normal.
  """
  mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  if noise.shape != mean.shape:
    raise ValueError(
      f"noise of shape {noise.shape} does not fit moments of shape {moments.shape}; "
      f"needed is {mean.shape}."
    )
  return scale * (mean + jnp.exp(log_variance / 2) * noise.astype(jnp.float32) - shift)


def decode(cfg: VaeConfig, params, latents):
  """The image of each latent, float [B, h, w, C] of the training scale.

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
    "use_quant_conv": cfg.quant_conv,
    "use_post_quant_conv": cfg.post_quant_conv,
    "mid_block_add_attention": cfg.mid_attention,
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
  source = _HUB_NAME.sub(r"\1", name) if is_public(name) else name
  path = hub.find(source, [_PLACES, (f"{_PIPELINE}{CONFIG}", CONFIG)], **needed)
  if path.is_dir():
    path = next((path / place for place in _PLACES if (path / place).is_file()), path / WEIGHTS)
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
    if self.cfg.mid_attention:
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
    cfg, same = self.cfg, lambda x: x
    self.encoder = _Encoder(cfg)
    self.quant_conv = _conv(2 * cfg.latent_channels, size=1) if cfg.quant_conv else same
    self.post_quant_conv = _conv(cfg.latent_channels, size=1) if cfg.post_quant_conv else same
    self.decoder = _Decoder(cfg)

  def encode(self, images):
    return self.quant_conv(self.encoder(images))

  def decode(self, latents):
    return self.decoder(self.post_quant_conv(latents))

  def __call__(self, images):
    """All parameters are used, which is what initialisation needs."""
    return self.decode(self.encode(images)[..., : self.cfg.latent_channels])
