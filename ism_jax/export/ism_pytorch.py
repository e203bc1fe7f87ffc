"""iSM in PyTorch: the network and its few-step sampler, in one file that needs PyTorch alone.

  model = load("FOLDER")                    # that python -m ism_jax export wrote
  x0 = draw_noise(model, 8, seed=0)         # [8, C, H, W]
  x1 = sample(model, x0, c=torch.arange(8), w=1.5, steps=4)
  pixels = to_pixels(model, x1)             # latents need diffusers, or an autoencoder of yours

Time runs from noise (t=0) to data (t=1); a step of size d moves x_t to x_t + d s(x_t, t, c, d, w).
w = 0 is no guidance; the usual classifier-free-guidance scale is 1 + w. Step sizes are dyadic, 1,
1/2, ..., 1/128, and the network is told d = 0 for the finest. Module names are those of the
official SiT code, with two more embedders, of d and of w, in its conditioning sum.

"Improved Training Technique for Shortcut Models" (arXiv:2510.21250); SiT (arXiv:2401.08740). Made
by ism_jax, Apache License 2.0.

Asked for `ISMTransformer2DModel`, this module makes it of diffusers' classes: the same network, as
pipeline.py has it. Nothing else here needs diffusers but the decoding of latents.

Axes: B batch, C channels, H/W image size, T tokens, D width, K features of a head.
"""

from collections import OrderedDict
import dataclasses
from fractions import Fraction
import functools
import json
import math
import os
import pathlib
import struct
import warnings

import torch
from torch import nn
from torch.nn import functional

__all__ = [
  "Config",
  "SiT",
  "as_tensor",
  "check_samples",
  "decode",
  "draw_noise",
  "image_shape",
  "load",
  "parse_schedule",
  "prepare",
  "read_config",
  "read_safetensors",
  "sample",
  "to_pixels",
  "velocity",
]

FINEST = 128  # steps of the finest schedule
_FREQUENCIES = 128  # of the sinusoids that embed a scalar
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where the weights of a folder are, as diffusers names them, and where older exports have them.
_WEIGHTS = {
  "transformer/diffusion_pytorch_model.safetensors": "transformer/config.json",
  "model.safetensors": "config.json",
}
_AUTOENCODER = "vae"  # a folder beside
_LONGEST_HEADER = 10**8  # bytes of a safetensors file
_DECODED_TOGETHER = 4  # latents at a time: 256x256 images take about 0.3 GB each


@dataclasses.dataclass(frozen=True)
class Config:
  """The network, and what sampling needs to know of its training: `config.json`.

  Attributes:
    depth, width, heads: of the transformer.
    patch: side of a patch in pixels.
    image_size, channels: of what the network sees: pixels in [-1, 1], or latents. [H, W] where
      they are not square.
    num_classes: classes 0, 1, ...; label `num_classes` is "no class".
    guided: whether w is an input of the network.
    w_max: of a guided network, the largest w it was trained at.
    fixed_w: of a network with fixed guidance, the w that its steps of 1/64 and longer have learnt.
    t_interval: with fixed guidance, steps of 1/128 are guided from this t on.
    vae: autoencoder of the latents: a folder, or a name on the Hugging Face hub; "" where images
      are pixels.
    vae_scale, vae_shift: latents are vae_scale (z - vae_shift) of the autoencoder's own, z.
    two_pass: whether it has learnt velocities alone, so that every step is one of Euler's, guided
      in two passes from t_interval on.
    w_scaled: whether the output is multiplied by 1 + w.
  """

  depth: int
  width: int
  heads: int
  patch: int
  image_size: int | list[int]
  channels: int
  num_classes: int
  guided: bool
  w_max: float
  fixed_w: float
  t_interval: float
  vae: str
  vae_scale: float
  vae_shift: float = 0.0
  two_pass: bool = False
  w_scaled: bool = False


def image_shape(config) -> tuple[int, int, int]:
  """(C, H, W) of what the network of a `Config` sees."""
  size = config.image_size
  height, width = (size, size) if isinstance(size, int) else size
  return config.channels, height, width


def _float32(layer, x):
  """A linear layer in float32, whatever its dtype: bfloat16 cannot tell t = 127/128 from 1."""
  return functional.linear(x.float(), layer.weight.float(), layer.bias.float())


class ScalarEmbedder(nn.Module):
  """A scalar per example [B] -> [B, D]: sinusoids, then an MLP, in float32."""

  def __init__(self, width):
    super().__init__()
    self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

  def forward(self, a):
    steps = torch.arange(_FREQUENCIES, dtype=torch.float32, device=a.device) / _FREQUENCIES
    angles = a.float()[:, None] * torch.exp(-math.log(10_000) * steps)
    h = functional.silu(_float32(self.mlp[0], torch.cat([angles.cos(), angles.sin()], dim=1)))
    return _float32(self.mlp[2], h)


class PatchEmbedder(nn.Module):
  """[B, C, H, W] -> [B, T, D], row by row."""

  def __init__(self, channels, patch, width):
    super().__init__()
    self.proj = nn.Conv2d(channels, width, patch, stride=patch)  # as SiT's state dict has it

  def forward(self, x):
    weight = self.proj.weight
    # As a matrix product: convolutions take TF32 for float32 on GPUs, unless told otherwise.
    patches = functional.pixel_unshuffle(x.to(weight.dtype), weight.shape[-1]).flatten(2)
    return functional.linear(patches.mT.contiguous(), weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
  """Multi-head self-attention over tokens, [B, T, D] -> [B, T, D]."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    b, tokens, width = x.shape
    qkv = self.qkv(x).reshape(b, tokens, 3, self.heads, width // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    x_BxHxTxK = functional.scaled_dot_product_attention(q, k, v)
    return self.proj(x_BxHxTxK.transpose(1, 2).reshape(b, tokens, width))


def _modulate(x, shift, scale):
  """adaLN of x [B, T, D] by [B, D]: norm(x) (1 + scale) + shift."""
  x = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
  return x * (1 + scale[:, None]) + shift[:, None]


def _modulation(width, count):
  return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


def _modulations(layers, condition):
  return layers(condition.to(layers[1].weight.dtype)).split(layers[1].in_features, dim=1)


class Block(nn.Module):
  """A transformer block, tokens [B, T, D] -> [B, T, D], with adaLN conditioning by [B, D]."""

  def __init__(self, width, heads):
    super().__init__()
    linear = lambda inputs, outputs: nn.Linear(inputs * width, outputs * width)
    self.attn = Attention(width, heads)
    self.mlp = nn.Sequential(OrderedDict(fc1=linear(1, 4), act=nn.GELU("tanh"), fc2=linear(4, 1)))
    self.adaLN_modulation = _modulation(width, 6)

  def forward(self, x, condition):
    modulations = _modulations(self.adaLN_modulation, condition)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulations
    x = x + gate_a[:, None] * self.attn(_modulate(x, shift_a, scale_a))
    return x + gate_m[:, None] * self.mlp(_modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
  """Tokens [B, T, D], condition [B, D] -> the pixels of the patches [B, T, ph pw C]."""

  def __init__(self, width, patch, channels):
    super().__init__()
    self.linear = nn.Linear(width, patch * patch * channels)
    self.adaLN_modulation = _modulation(width, 2)

  def forward(self, x, condition):
    return self.linear(_modulate(x, *_modulations(self.adaLN_modulation, condition)))


class SiT(nn.Module):
  """The velocity s(x_t, t, c, d, w); parameters mean nothing until a state dict is loaded.

  Activations have the dtype of the parameters; conditioning and output are float32.
  """

  def __init__(self, config: Config):
    super().__init__()
    self._config, width = config, config.width
    _, height, wide = image_shape(config)
    tokens = (height // config.patch) * (wide // config.patch)
    self.x_embedder = PatchEmbedder(config.channels, config.patch, width)
    self.t_embedder = ScalarEmbedder(width)
    # The last row is the null class.
    classes = nn.Embedding(config.num_classes + 1, width)
    self.y_embedder = nn.Sequential(OrderedDict(embedding_table=classes))
    self.d_embedder = ScalarEmbedder(width)
    if config.guided:
      self.w_embedder = ScalarEmbedder(width)
    self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
    self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
    self.final_layer = FinalLayer(width, config.patch, config.channels)

  @property
  def config(self) -> Config:
    """The network's config."""
    return self._config

  def forward(self, x, t, c, d, w=None):
    """The network itself, unguided where it is not trained to be guided: see `velocity`.

    Args:
      x: [B, C, H, W], of any floating dtype.
      t: time, [B].
      c: classes, int [B].
      d: step sizes, [B]; 0 for a step of 1/128.
      w: guidance, [B], of guided networks; others ignore it.
    Returns:
      [B, C, H, W] float32.
    """
    config = self._config
    # d enters as its level: 0 for a step of 1/128, 7 for a step of 1.
    level = torch.log2(torch.where(d == 0, 1.0, d.float() * FINEST))
    condition = self.t_embedder(t) + self.y_embedder(c).float() + self.d_embedder(level)
    if config.guided:
      condition = condition + self.w_embedder(w)
    x = self.x_embedder(x) + self.pos_embed
    for block in self.blocks:
      x = block(x, condition)
    x = self.final_layer(x, condition)
    patch, (channels, height, wide) = config.patch, image_shape(config)
    x = x.reshape(-1, height // patch, wide // patch, patch, patch, channels)
    x = x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, wide).float()
    return x * (1 + w)[:, None, None, None] if config.w_scaled else x


def load(folder, device="cpu", dtype=None) -> SiT:
  """The network of an export, for sampling.

  Args:
    folder: that `python -m ism_jax export` wrote, or diffusers from it.
    device: of the parameters.
    dtype: of the parameters; None for that of the file.
  Raises:
    FileNotFoundError: it is no such folder.
    ValueError: a file is damaged, or one is not the other's.
  """
  folder = pathlib.Path(folder).expanduser()
  present = [name for name in _WEIGHTS if (folder / name).is_file()]
  if not present:
    raise FileNotFoundError(
      f"{folder} is no export: it has no {' and no '.join(_WEIGHTS)}. Name the folder that "
      "python -m ism_jax export wrote."
    )
  path, config_path = folder / present[0], folder / _WEIGHTS[present[0]]
  config = read_config(config_path)
  if config.vae and (folder / _AUTOENCODER).is_dir():
    config = dataclasses.replace(config, vae=str(folder / _AUTOENCODER))
  with torch.device("meta"):  # no memory, no initialisation
    model = SiT(config)
  try:
    model.load_state_dict(read_safetensors(path), assign=True)
  except RuntimeError as error:  # it lists all keys
    raise ValueError(
      f"{path} is not of the network of {config_path}: {error} Copy both again."
    ) from error
  return model.to(device, dtype).eval().requires_grad_(False)


def read_config(path) -> Config:
  """The config of a file of JSON, whose other entries are not read.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or none of an export.
  """
  with open(path, encoding="utf-8") as file:
    try:
      values = json.load(file)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{path} is damaged ({error}). Copy the folder again.") from error
  fields = {field.name: field.default for field in dataclasses.fields(Config)}
  required = [name for name, default in fields.items() if default is dataclasses.MISSING]
  if not isinstance(values, dict) or (missing := [n for n in required if n not in values]):
    lacks = f"lacks {', '.join(missing)}" if isinstance(values, dict) else "holds no object"
    raise ValueError(f"{path} {lacks}: it is no config of an export. Export it again.")
  return Config(**{name: values[name] for name in fields if name in values})


def read_safetensors(path) -> dict[str, torch.Tensor]:
  """The tensors of a safetensors file.

  It has the length of a header (8 bytes), the header (JSON: of each tensor its type, shape and
  place), and the tensors' bytes.

  Raises:
    ValueError: the file is damaged, or no safetensors file.
  """
  size, tensors = os.path.getsize(path), {}
  try:
    with open(path, "rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      data_size = size - 8 - length
      if data_size < 0 or length > _LONGEST_HEADER:
        raise ValueError(f"its header of {length} bytes does not end, or is too long")
      header = json.loads(file.read(length))
      header.pop("__metadata__", None)
      for key, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if end - begin != math.prod(shape) * dtype.itemsize or not 0 <= begin <= end <= data_size:
          raise ValueError(f"{key}, of shape {shape}, has bytes {begin} to {end} of {data_size}")
        file.seek(8 + length + begin)
        data = bytearray(file.read(end - begin))
        tensors[key] = torch.frombuffer(data, dtype=dtype).reshape(shape)
  # JSON that nests too deeply is a RuntimeError.
  except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error) as error:
    raise ValueError(
      f"{path} ({size} bytes) is damaged, or no safetensors file that can be read here "
      f"({type(error).__name__}: {error}). Copy it again."
    ) from error
  return tensors


def parse_schedule(steps) -> list[tuple[float, float]]:
  """The steps of a sampling schedule as (t, d) pairs, d = 0 for a step of 1/128.

  Args:
    steps: a number of equal steps (1, 2, 4, ..., 128), or explicit step lengths such as
      "1/2,1/4,1/4", each dyadic, each starting at a multiple of itself, together 1.
  Raises:
    ValueError: where the schedule leaves the grid that training covers.
  """
  text = str(steps).strip()
  try:
    if "e" in text.lower():  # 1e999999999 would be computed
      raise ValueError
    if "," in text or "/" in text:
      lengths = [Fraction(part) for part in text.split(",")]
    else:
      lengths = [Fraction(1, int(text))] * min(int(text), FINEST)
  except (ValueError, ZeroDivisionError):
    lengths = []
  schedule, t, finest = [], Fraction(0), Fraction(1, FINEST)
  for step in lengths:
    if step <= 0 or step.numerator != 1 or FINEST % step.denominator or t % step:
      break
    schedule.append((float(t), 0.0 if step == finest else float(step)))
    t += step
  if t != 1 or len(schedule) < len(lengths):
    raise ValueError(
      f"steps={steps!r} is no schedule: give a count (1, 2, 4, ..., {FINEST}), or step lengths of "
      f"1, 1/2, ..., 1/{FINEST} that add up to 1 and start at multiples of themselves, such as "
      "1/2,1/4,1/4."
    )
  return schedule


def draw_noise(model, count: int, seed: int) -> torch.Tensor:
  """Noise [count, C, H, W] float32 of a seed, the same on every device; on the model's device.

  Image i depends on the seed and on i alone, not on the count.
  """
  if count < 1:
    raise ValueError(f"count={count} must be at least 1.")
  if not 0 <= seed < 2**32:  # PyTorch's generator takes 32 bits of it
    raise ValueError(f"seed={seed} would draw the noise of seed {seed % 2**32}: give [0, 2^32).")
  shape = (count, *image_shape(model.config))
  noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
  return noise.to(model.pos_embed.device)


@torch.no_grad()
def sample(model, x0, c, w=0.0, steps=4) -> torch.Tensor:
  """Integrates noise to samples, one call of the network for each step.

  Args:
    model: a `SiT`, also as torch.compile returns it.
    x0: [B, C, H, W], standard normal: a tensor, or an array that goes to the model's device.
    c: classes, one or [B]; `num_classes` is no class.
    w: guidance, one or [B]. Networks with fixed guidance have learnt theirs in the longer steps;
      steps of 1/128 are guided by w, in two calls each.
    steps: a count or a schedule, see `parse_schedule`.
  Returns:
    [B, C, H, W] float32 on the device of x0: pixels in [-1, 1] or latents, see `to_pixels`.
  Raises:
    ValueError: an argument is not what the network was trained for; says what is.
    FloatingPointError: samples are not finite.
  """
  x, c, w, schedule = prepare(model, x0, c, w, steps)
  for t, d in schedule:
    x = x + (d or 1 / FINEST) * velocity(model, x, t, d, c, w)
  return check_samples(x)


def prepare(model, x0, c, w, steps):
  """The arguments of `sample` as (x0 [B, C, H, W], c int64 [B], w float32 [B], schedule).

  Raises:
    ValueError: as `sample`.
  """
  config, schedule = model.config, parse_schedule(steps)
  x = as_tensor("x0", x0, model.pos_embed.device).float()
  if x.ndim != 4 or tuple(x.shape[1:]) != image_shape(config) or not len(x):
    shape = ", ".join(map(str, image_shape(config)))
    raise ValueError(f"x0 has shape {tuple(x.shape)}; the network needs [B, {shape}], B >= 1.")
  c, w = (_one_each(name, a, x) for name, a in (("c", c), ("w", w)))
  if c.dtype == torch.bool or c.is_floating_point():
    raise ValueError(f"classes are {c.dtype}; needed are whole numbers.")
  if not 0 <= int(c.min()) <= int(c.max()) <= config.num_classes:
    raise ValueError(
      f"classes are 0..{config.num_classes - 1}, and {config.num_classes} for none; got "
      f"{int(c.min())}..{int(c.max())}."
    )
  w = w.float()
  if not bool(((w >= 0) & (w <= 100)).all()):
    raise ValueError("w is negative or beyond 100; w = 0 is no guidance (a CFG scale of 1 + w).")
  if config.guided and bool((w > config.w_max).any()):
    warnings.warn(f"w is beyond the trained maximum, w_max={config.w_max}.", stacklevel=4)
  longer = any(d > 0 for _, d in schedule) and not config.two_pass
  other = (w - config.fixed_w).abs() > 1e-6  # which a scale of 1 + w may round away
  if not config.guided and longer and bool(other.any()):
    raise ValueError(
      f"this network has learnt the fixed guidance w={config.fixed_w} in its long steps. Use "
      f"w={config.fixed_w}, or {FINEST} steps."
    )
  return x, c.long(), w, schedule


def velocity(model, x, t: float, d: float, c, w) -> torch.Tensor:
  """The guided velocity of one step, of a schedule's t and d.

  Networks with fixed guidance are called twice in steps of 1/128, and guided from t_interval on;
  those that have learnt velocities alone in every step.

  Args:
    x: [B, C, H, W].
    c: int64 [B].
    w: float32 [B].
  Returns:
    [B, C, H, W] float32.
  """
  config = model.config
  on_each = lambda a, n: torch.full((n,), a, device=x.device)
  d = 0.0 if config.two_pass else d
  if config.guided or d:
    return model(x, on_each(t, len(x)), c, on_each(d, len(x)), w)
  c = torch.cat([c, torch.full_like(c, config.num_classes)])
  both = model(torch.cat([x, x]), on_each(t, len(c)), c, on_each(d, len(c)))
  s_cond, s_uncond = both.chunk(2)
  w = w if t >= config.t_interval else torch.zeros_like(w)
  return s_uncond + (1 + w)[:, None, None, None] * (s_cond - s_uncond)


def check_samples(x) -> torch.Tensor:
  """Samples [B, C, H, W], unless some are not finite: FloatingPointError."""
  if not bool(x.isfinite().all()):
    raise FloatingPointError(
      "samples are not finite: the noise was not, or the network's numbers exceed its dtype's "
      "(float16 ends at 65,504: use bfloat16 or float32)."
    )
  return x


def decode(model, x1, vae) -> torch.Tensor:
  """Latents [B, C, h, w] as images [B, 3, H, W] float32 in about [-1, 1], on their device."""
  said, scale, shift = getattr(vae, "config", None), model.config.vae_scale, model.config.vae_shift
  factors = (getattr(said, "scaling_factor", None), getattr(said, "shift_factor", None) or 0.0)
  if factors[0] is not None and factors != (scale, shift):
    raise ValueError(
      f"this autoencoder has scaling_factor={factors[0]} and shift_factor={factors[1]}; the "
      f"network's latents have {scale} and {shift}: pass the autoencoder that it was trained with, "
      f"{model.config.vae}."
    )
  dtype = next(vae.parameters()).dtype
  parts = (x1 / scale + shift).to(dtype).split(_DECODED_TOGETHER)
  return torch.cat([vae.decode(part).sample.float() for part in parts])


@torch.no_grad()
def to_pixels(model, x1, vae=None) -> torch.Tensor:
  """Samples [B, C, H, W] as images, uint8 [B, H, W, C]; latents are decoded.

  Args:
    x1: as `sample` returns them.
    vae: of latents, the autoencoder: a diffusers AutoencoderKL, or whatever has its `decode`. None
      is that of the export, through diffusers: its folder, or else downloaded; kept until another
      is needed.
  Raises:
    ValueError: the autoencoder's own config scales latents in another way than training did.
  """
  if model.config.vae:
    vae = _autoencoder(model.config.vae).to(x1.device) if vae is None else vae
    x1 = decode(model, x1.to(next(vae.parameters()).device), vae)
  return (127.5 * (x1 + 1)).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@functools.lru_cache(maxsize=1)
def _autoencoder(name: str):
  """diffusers' AutoencoderKL of a folder or of the hub."""
  remedy = "Pass the autoencoder as vae=, a diffusers AutoencoderKL."
  try:
    from diffusers import AutoencoderKL  # of latent models alone
  except ImportError as error:
    raise ImportError(
      f"latents are decoded by diffusers: pip install diffusers. {remedy}"
    ) from error
  try:
    return AutoencoderKL.from_pretrained(name).requires_grad_(False)
  except (OSError, ValueError) as error:  # no folder, no network, no such repository
    raise OSError(
      f"the autoencoder {name!r} of these latents is not to be had: {error} {remedy}"
    ) from error


def as_tensor(name: str, values, device) -> torch.Tensor:
  """A tensor of numbers, an array or nested lists; a ValueError names the argument."""
  if isinstance(values, torch.Tensor):
    return values
  try:
    return torch.tensor(values, device=device)
  except (TypeError, ValueError, RuntimeError) as error:
    kind = type(values).__name__
    raise ValueError(f"{name} is a {kind} that is no numbers, array or tensor: {error}") from error


def _one_each(name, values, x) -> torch.Tensor:
  """One number for each of x, on its device: [B]."""
  values = as_tensor(name, values, x.device).to(x.device)
  if values.ndim > 1 or (values.ndim == 1 and len(values) != len(x)):
    raise ValueError(
      f"{name} has shape {tuple(values.shape)}; needed is a number, or [{len(x)}], one for each "
      "image of x0."
    )
  return values.expand(len(x))


@functools.cache
def _in_diffusers():
  from diffusers.configuration_utils import ConfigMixin, register_to_config
  from diffusers.models.modeling_utils import ModelMixin

  class ISMTransformer2DModel(SiT, ModelMixin, ConfigMixin):
    """`SiT` as a model of diffusers: its loading and saving, and the keys of SiT's state dict."""

    config = ConfigMixin.config  # of the same values
    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
      self,
      depth: int,
      width: int,
      heads: int,
      patch: int,
      image_size: int | list[int],
      channels: int,
      num_classes: int,
      guided: bool,
      w_max: float,
      fixed_w: float,
      t_interval: float,
      vae: str,
      vae_scale: float,
      vae_shift: float = 0.0,
      two_pass: bool = False,
      w_scaled: bool = False,
      auto_map: dict | None = None,  # AutoModel's entry of config.json
    ):
      values = dict(self.config)
      super().__init__(
        Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})
      )

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
      """Saves config.json, and beside it this file, without which it is not loaded."""
      super().save_config(save_directory, push_to_hub, **kwargs)
      source = pathlib.Path(__file__)
      (pathlib.Path(save_directory) / source.name).write_bytes(source.read_bytes())

  ISMTransformer2DModel.__qualname__ = ISMTransformer2DModel.__name__  # which pickle looks up
  return ISMTransformer2DModel


def __getattr__(name):
  # A class that diffusers looks up here. Made on demand, since this file needs PyTorch alone.
  if name == "ISMTransformer2DModel":
    return _in_diffusers()
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
