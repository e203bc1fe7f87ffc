"""iSM in PyTorch: the network and its few-step sampler, in one file that needs PyTorch alone.

  model = load("FOLDER")                    # with model.safetensors and config.json
  x0 = draw_noise(model, 8, seed=0)
  x1 = sample(model, x0, c=torch.arange(8), w=1.5, steps=4)
  pixels = to_pixels(model, x1)             # latents need diffusers, or an autoencoder of yours

Time runs from noise (t=0) to data (t=1); a step of size d moves x_t to x_t + d s(x_t, t, c, d, w).
w = 0 is no guidance; the usual classifier-free-guidance scale is 1 + w. Step sizes are dyadic, 1,
1/2, ..., 1/128, and the network is told d = 0 for the finest. Module names are those of the
official SiT code, with two more embedders, of d and of w, in its conditioning sum.

"Improved Training Technique for Shortcut Models" (arXiv:2510.21250); SiT (arXiv:2401.08740). Made
by ism_jax, Apache License 2.0.

Axes: B batch, C channels, H/W image size, T tokens, D width, K features of a head.
"""

from collections import OrderedDict
import dataclasses
from fractions import Fraction
import json
import math
import os
import struct
import warnings

import torch
from torch import nn
from torch.nn import functional

FINEST = 128  # steps of the finest schedule
_FREQUENCIES = 128  # of the sinusoids that embed a scalar
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODED_TOGETHER = 4  # latents at a time: 256x256 images take about 0.3 GB each


@dataclasses.dataclass(frozen=True)
class Config:
  """The network, and what sampling needs to know of its training: `config.json`.

  Attributes:
    depth, width, heads: of the transformer.
    patch: side of a patch in pixels.
    image_size, channels: of what the network sees: pixels in [-1, 1], or latents.
    num_classes: classes 0, 1, ...; label `num_classes` is "no class".
    guided: whether w is an input of the network.
    w_max: of a guided network, the largest w it was trained at.
    fixed_w: of a network with fixed guidance, the w that its steps of 1/64 and longer have learnt.
    t_interval: with fixed guidance, steps of 1/128 are guided from this t on.
    vae: autoencoder of the latents, a name on the Hugging Face hub; "" where images are pixels.
    vae_scale: latents are `vae_scale` times the autoencoder's own.
  """

  depth: int
  width: int
  heads: int
  patch: int
  image_size: int
  channels: int
  num_classes: int
  guided: bool
  w_max: float
  fixed_w: float
  t_interval: float
  vae: str
  vae_scale: float


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
    self.config, width = config, config.width
    tokens = (config.image_size // config.patch) ** 2
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

  def forward(self, x, t, c, d, w=None):
    """x [B, C, H, W]; t, c (int), d, w [B] -> [B, C, H, W] float32.

    d is 0 for a step of 1/128. w is for guided networks only, and ignored by others.
    """
    # d enters as its level: 0 for a step of 1/128, 7 for a step of 1.
    level = torch.log2(torch.where(d == 0, 1.0, d.float() * FINEST))
    condition = self.t_embedder(t) + self.y_embedder(c).float() + self.d_embedder(level)
    if self.config.guided:
      condition = condition + self.w_embedder(w)
    x = self.x_embedder(x) + self.pos_embed
    for block in self.blocks:
      x = block(x, condition)
    x = self.final_layer(x, condition)
    patch, side = self.config.patch, self.config.image_size // self.config.patch
    x = x.reshape(-1, side, side, patch, patch, self.config.channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, self.config.channels, side * patch, side * patch).float()


def load(folder, device="cpu", dtype=None) -> SiT:
  """The network of a folder with `model.safetensors` and `config.json`, for sampling.

  Args:
    device, dtype: of the parameters; None for the dtype of the file.
  Raises:
    ValueError: a file is damaged, or one is not the other's.
  """
  config = read_config(os.path.join(folder, "config.json"))
  path = os.path.join(folder, "model.safetensors")
  with torch.device("meta"):  # no memory, no initialisation
    model = SiT(config)
  try:
    model.load_state_dict(read_safetensors(path), assign=True)
  except RuntimeError as error:  # it lists all keys
    raise ValueError(f"{path} is not of the network of config.json: {error}") from error
  return model.to(device, dtype).eval().requires_grad_(False)


def read_config(path) -> Config:
  """The config of a file of JSON, whose other entries say where the network comes from."""
  with open(path, encoding="utf-8") as file:
    try:
      values = json.load(file)
    except ValueError as error:
      raise ValueError(f"{path} is damaged ({error}). Copy the folder again.") from error
  names = [field.name for field in dataclasses.fields(Config)]
  if missing := [name for name in names if name not in values]:
    raise ValueError(f"{path} lacks {', '.join(missing)}: it is no config of an export.")
  return Config(**{name: values[name] for name in names})


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
      if data_size < 0:
        raise ValueError("it ends within its header")
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
  """Noise [count, C, H, W] of a seed, the same on every device; the model's device."""
  if not 0 <= seed < 2**32:  # PyTorch's generator takes 32 bits of it
    raise ValueError(f"seed={seed} would draw the noise of seed {seed % 2**32}: give [0, 2^32).")
  config = model.config
  shape = (count, config.channels, config.image_size, config.image_size)
  noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
  return noise.to(model.pos_embed.device)


@torch.no_grad()
def sample(model, x0, c, w=0.0, steps=4) -> torch.Tensor:
  """Integrates noise to samples, one call of the network for each step.

  Args:
    model: a `SiT`, also as torch.compile returns it.
    x0: [B, C, H, W], standard normal.
    c: classes, one or [B]; `num_classes` is no class.
    w: guidance, one or [B]. Networks with fixed guidance have learnt theirs in the longer steps;
      steps of 1/128 are guided by w, in two calls each.
    steps: a count or a schedule, see `parse_schedule`.
  Returns:
    [B, C, H, W] float32: pixels in [-1, 1] or latents, see `to_pixels`.
  Raises:
    ValueError: an argument is not what the network was trained for; says what is.
  """
  config, schedule = model.config, parse_schedule(steps)
  shape = (config.channels, config.image_size, config.image_size)
  if tuple(x0.shape[1:]) != shape:
    raise ValueError(f"x0 has shape {tuple(x0.shape)}; the network needs [B, {shape}].")
  x = x0.float()
  c = torch.as_tensor(c, device=x.device).long().expand(len(x))
  w = torch.as_tensor(w, dtype=torch.float32, device=x.device).expand(len(x))
  _check(config, c, w, schedule)
  for time, size in schedule:
    t, d = (torch.full((len(x),), a, device=x.device) for a in (time, size))
    finest = size == 0 and not config.guided
    s = _guided(model, x, t, c, d, w) if finest else model(x, t, c, d, w)
    x = x + (size or 1 / FINEST) * s
  return x


def _guided(model, x, t, c, d, w):
  """Two-pass guidance by w, from t_interval on."""
  null = torch.full_like(c, model.config.num_classes)
  twice = lambda a: torch.cat([a, a])
  s_cond, s_uncond = model(twice(x), twice(t), torch.cat([c, null]), twice(d)).chunk(2)
  w = torch.where(t >= model.config.t_interval, w, 0.0)
  return s_uncond + (1 + w)[:, None, None, None] * (s_cond - s_uncond)


def _check(config, c, w, schedule):
  if len(c) and not 0 <= int(c.min()) <= int(c.max()) <= config.num_classes:
    raise ValueError(
      f"classes are 0..{config.num_classes - 1}, and {config.num_classes} for none; got "
      f"{int(c.min())}..{int(c.max())}."
    )
  if not bool(((w >= 0) & (w <= 100)).all()):
    raise ValueError("w is negative or beyond 100; w = 0 is no guidance (a CFG scale of 1 + w).")
  if config.guided and bool((w > config.w_max).any()):
    warnings.warn(f"w is beyond the trained maximum, w_max={config.w_max}.", stacklevel=4)
  longer = any(d > 0 for _, d in schedule)
  if not config.guided and longer and bool((w != config.fixed_w).any()):
    raise ValueError(
      f"this network has learnt the fixed guidance w={config.fixed_w} in its long steps. Use "
      f"w={config.fixed_w}, or {FINEST} steps."
    )


@torch.no_grad()
def to_pixels(model, x1, vae=None) -> torch.Tensor:
  """Samples as images, uint8 [B, H, W, C]; latents are decoded.

  Args:
    x1: as `sample` returns them.
    vae: of latents, the autoencoder: a diffusers AutoencoderKL, or whatever has its `decode`. None
      downloads the one of the config through diffusers.
  """
  config = model.config
  if config.vae:
    if vae is None:
      from diffusers import AutoencoderKL  # of latent models alone

      vae = AutoencoderKL.from_pretrained(config.vae).to(x1.device)
    weight = next(vae.parameters())
    latents = (x1 / config.vae_scale).to(weight.device, weight.dtype).split(_DECODED_TOGETHER)
    x1 = torch.cat([vae.decode(part).sample.float() for part in latents])
  return (127.5 * (x1 + 1)).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
