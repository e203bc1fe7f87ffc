"""DINOv2 against a network written out in NumPy, against PIL's resize, and against PyTorch's."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
import scipy.special

from ism_jax.pretrained import dinov2
from ism_jax.runtime import sharding
from ism_jax.runtime.sharding import AXIS, P

# 3x3 patches of 4x4 pixels, interpolated from 5x5: every part of the network, quick to compile.
TINY = dinov2.Dinov2Config(depth=2, width=8, heads=2, patch=4, positions=5, image_size=12)
BLOCK = {  # the hub's names in a block, and those of transformers
  "norm1.": ["norm1."],
  "attn.qkv.": [f"attention.attention.{name}." for name in ("query", "key", "value")],
  "attn.proj.": ["attention.output.dense."],
  "ls1.gamma": ["layer_scale1.lambda1"],
  "norm2.": ["norm2."],
  "mlp.fc1.": ["mlp.fc1."],
  "mlp.fc2.": ["mlp.fc2."],
  "ls2.gamma": ["layer_scale2.lambda1"],
}

features = jax.jit(dinov2.features, static_argnames="cfg")


def published_shapes(cfg):
  """{key: shape} of the hub's model, written down from its state dict."""
  width = cfg.width
  shapes = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, 1 + cfg.positions**2, width),
    "mask_token": (1, width),
    "patch_embed.proj.weight": (width, 3, cfg.patch, cfg.patch),
    "patch_embed.proj.bias": (width,),
    "norm.weight": (width,),
    "norm.bias": (width,),
  }
  for i in range(cfg.depth):
    for name, outputs, inputs in (
      ("attn.qkv", 3 * width, width),
      ("attn.proj", width, width),
      ("mlp.fc1", 4 * width, width),
      ("mlp.fc2", width, 4 * width),
    ):
      shapes[f"blocks.{i}.{name}.weight"] = (outputs, inputs)
      shapes[f"blocks.{i}.{name}.bias"] = (outputs,)
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
      shapes[f"blocks.{i}.{name}"] = (width,)
    shapes[f"blocks.{i}.ls1.gamma"] = shapes[f"blocks.{i}.ls2.gamma"] = (width,)
  return shapes


def random_state_dict(cfg):
  """Weights of which none is special: LayerScale and norms of about 1, and no bias is zero."""
  rng = np.random.default_rng(0)
  state = {}
  for key, shape in published_shapes(cfg).items():
    noise = rng.standard_normal(shape)
    if key.endswith("weight") and len(shape) > 1:
      state[key] = noise / np.sqrt(np.prod(shape[1:]))
    else:
      is_factor = ("norm" in key and key.endswith("weight")) or key.endswith("gamma")
      state[key] = 0.3 * noise + is_factor
  state["patch_embed.proj.weight"] *= 3  # so that attention is far from an average
  return {key: value.astype(np.float32) for key, value in state.items()}


def transformers_spelling(state):
  """The same weights as transformers has them."""
  renamed = {
    "embeddings.cls_token": state["cls_token"],
    "embeddings.mask_token": state["mask_token"],
    "embeddings.position_embeddings": state["pos_embed"],
    "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
    "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
    "layernorm.weight": state["norm.weight"],
    "layernorm.bias": state["norm.bias"],
  }
  for key, value in state.items():
    if key.startswith("blocks."):
      _, i, name = key.split(".", 2)
      hub = next(hub for hub in BLOCK if name.startswith(hub))
      parts = np.split(value, len(BLOCK[hub]))
      for new, part in zip(BLOCK[hub], parts, strict=True):
        renamed[f"encoder.layer.{i}.{name.replace(hub, new)}"] = part
  return renamed


def images_of(shape, seed=0):
  """uint8 noise, the upper half black and white, where a cubic overshoots."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, shape, np.uint8)
  images[:, : shape[1] // 2] = np.where(images[:, : shape[1] // 2] > 128, 255, 0)
  return images


def pil_resize(image, size):
  """Rows, then columns: the order of every PIL before 13, whatever the installed one does."""
  rows = Image.fromarray(image).resize((size, image.shape[0]), Image.BICUBIC)
  return np.asarray(rows.resize((size, size), Image.BICUBIC))


def normalised(images, size):
  """float32 [B, size, size, 3], as the network sees images."""
  pixels = np.stack([pil_resize(image, size) for image in images]) / 255
  return np.float32((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])


def interpolated(grid, side, offset):
  """[N, N, D] -> [side, side, D]: bicubic, a point and a neighbour at a time."""
  trained, out = len(grid), np.zeros((side, side, grid.shape[-1]))

  def weight(distance):
    x = abs(distance)
    return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)

  for row, column in np.ndindex(side, side):
    y, x = ((i + 0.5) * trained / (side + offset) - 0.5 for i in (row, column))
    for j in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
      for i in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
        value = grid[min(max(j, 0), trained - 1), min(max(i, 0), trained - 1)]
        out[row, column] += weight(y - j) * weight(x - i) * value
  return out


def numpy_features(cfg, state, images):
  """The network in float64, one image at a time, from the hub's state dict."""
  state = {key: np.float64(value) for key, value in state.items()}
  dense = lambda key, x: x @ state[f"{key}.weight"].T + state[f"{key}.bias"]

  def norm(key, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * state[f"{key}.weight"] + state[f"{key}.bias"]

  side, features = cfg.image_size // cfg.patch, []
  table = state["pos_embed"][0]
  grid = table[1:].reshape(cfg.positions, cfg.positions, -1)
  positions = interpolated(grid, side, cfg.interpolate_offset)
  for image in normalised(images, cfg.image_size):
    tokens = [state["cls_token"][0, 0] + table[0]]
    for row, column in np.ndindex(side, side):
      y, x = cfg.patch * row, cfg.patch * column
      patch = np.moveaxis(image[y : y + cfg.patch, x : x + cfg.patch], -1, 0)
      kernel = state["patch_embed.proj.weight"]
      embedded = (kernel * patch).sum((1, 2, 3)) + state["patch_embed.proj.bias"]
      tokens.append(embedded + positions[row, column])
    x = np.stack(tokens)
    for i in range(cfg.depth):
      q, k, v = np.split(dense(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)), 3, axis=-1)
      mixed = []
      for head in np.split(np.arange(cfg.width), cfg.heads):
        score = q[:, head] @ k[:, head].T / np.sqrt(len(head))
        mixed.append(scipy.special.softmax(score, axis=-1) @ v[:, head])
      branch = dense(f"blocks.{i}.attn.proj", np.concatenate(mixed, axis=-1))
      x = x + state[f"blocks.{i}.ls1.gamma"] * branch
      hidden = dense(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
      hidden = hidden * scipy.special.ndtr(hidden)
      x = x + state[f"blocks.{i}.ls2.gamma"] * dense(f"blocks.{i}.mlp.fc2", hidden)
    features.append(norm("norm", x)[0])
  return np.stack(features)


def assert_close(values, wanted):
  """Within 1e-5 of the largest value; the approximate GELU would be 1e-4 off."""
  np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
  "height, width",
  [(256, 256), (32, 32), (512, 512), (224, 224), (299, 200), (160, 500), (500, 224), (1, 5)],
)
def test_resizing_equals_pils_bit_for_bit(height, width):
  images = images_of((2, height, width, 3))
  resized_images = jax.jit(dinov2.resize_bicubic, static_argnums=1)(images, 224)
  assert resized_images.dtype == jnp.uint8
  for image, resized in zip(images, resized_images, strict=True):
    np.testing.assert_array_equal(resized, pil_resize(image, 224))
    if height <= max(width, 224):  # there all versions of PIL agree
      at_once = Image.fromarray(image).resize((224, 224), Image.BICUBIC)
      np.testing.assert_array_equal(resized, np.asarray(at_once))


@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_the_network_equals_one_written_out_in_numpy(offset):
  cfg = dataclasses.replace(TINY, interpolate_offset=offset)
  state, images = random_state_dict(cfg), images_of((3, 20, 15, 3))
  wanted = numpy_features(cfg, state, images)
  assert np.std(wanted, axis=0).min() > 0.01  # images differ
  for spelled in (state, transformers_spelling(state)):
    params = dinov2.params_from_state_dict(cfg, spelled)
    tokens = features(params, images, cfg=cfg)["features"]
    assert tokens.dtype == jnp.float32
    assert_close(tokens, wanted)


def test_an_embedding_of_the_trained_size_is_taken_as_it_is():
  cfg = dataclasses.replace(TINY, positions=3)
  np.testing.assert_array_equal(dinov2.position_weights(cfg), np.eye(3))


def test_rows_that_are_split_over_devices_have_the_features_of_one_device():
  params = dinov2.params_from_state_dict(TINY, random_state_dict(TINY))
  images, mesh = images_of((16, 12, 12, 3)), sharding.data_mesh()
  split = jax.shard_map(
    lambda params, x: dinov2.features(params, x, TINY),
    mesh=mesh,
    in_specs=(P(), P(AXIS)),
    out_specs=P(AXIS),
  )
  assert mesh.size == 8
  np.testing.assert_allclose(
    jax.jit(split)(params, images)["features"],
    features(params, images, cfg=TINY)["features"],
    atol=1e-5,
  )


def test_every_float32_product_asks_for_full_precision():
  """On TPUs and GPUs the default is less than float32: bfloat16 and TF32."""
  params = dinov2.params_from_state_dict(TINY, random_state_dict(TINY))
  text = features.lower(params, images_of((1, 12, 12, 3)), cfg=TINY).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  # Of the patches, twice of their positions, and in the block 4 layers and 2 in the attention.
  assert len(products) == 9
  assert all("HIGHEST" in product for product in products)


def test_weights_load_from_files_of_both_spellings(tmp_path, monkeypatch):
  monkeypatch.setattr(dinov2, "VIT_L14", TINY)
  state, path = random_state_dict(TINY), tmp_path / "model.safetensors"
  for spelled in (state, transformers_spelling(state)):
    safetensors.numpy.save_file(spelled, path)
    loaded = dinov2.load(str(path))
    assert loaded.name == str(path)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    kernel = loaded.params["blocks"]["qkv"]["kernel"]
    assert kernel.dtype == np.float32
    for i in range(TINY.depth):
      np.testing.assert_array_equal(kernel[i].T, state[f"blocks.{i}.attn.qkv.weight"])


def test_absent_weights_are_an_error_that_says_what_to_download(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"dinov2_vitl14_pretrain\.pth"):
    dinov2.load(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("spelling", ["hub", "transformers"])
def test_missing_unexpected_and_misshapen_tensors_are_all_named_at_once(spelling):
  state = random_state_dict(TINY)
  del state["mask_token"]  # nothing needs it
  state["blocks.1.mlp.fc2.weight"] = np.zeros((8, 31), np.float32)
  state["pos_embed"] = np.zeros((1, 25, 8), np.float32)
  wanted = {
    "missing": ["blocks.0.attn.proj.bias", "blocks.1.ls2.gamma"],
    "unexpected": ["register_tokens", "surplus"],
    "of another shape": [
      "blocks.1.mlp.fc2.weight is (8, 31), not (8, 32)",
      "pos_embed is (1, 25, 8), not (1, 26, 8)",
    ],
  }
  if spelling == "transformers":
    state = transformers_spelling(state | {"mask_token": np.zeros((1, 8), np.float32)})
    state["encoder.layer.0.attention.attention.query.weight"] = np.zeros((24, 8), np.float32)
    wanted["missing"] = [
      "encoder.layer.0.attention.output.dense.bias",
      "encoder.layer.1.layer_scale2.lambda1",
    ]
    wanted["of another shape"] = [
      "embeddings.position_embeddings is (1, 25, 8), not (1, 26, 8)",
      "encoder.layer.0.attention.attention.query.weight is (24, 8), not (8, 8)",
      "encoder.layer.1.mlp.fc2.weight is (8, 31), not (8, 32)",
    ]
  for key in wanted["missing"]:
    del state[key]
  for key in wanted["unexpected"]:
    state[key] = np.zeros(3, np.float32)
  with pytest.raises(ValueError) as error:
    dinov2.params_from_state_dict(TINY, state, source="some.pth")
  message, _, remedy = str(error.value).partition(". Needed are ")
  start, *parts = message.split("; ")
  assert start == "some.pth does not hold the weights of DINOv2 ViT-L/14 without registers"
  lists = dict(part.split(": ", 1) for part in parts)
  misshapen = lists.pop("of another shape")
  assert all(part in misshapen for part in wanted["of another shape"])
  assert misshapen.count(" is (") == len(wanted["of another shape"])
  assert {what: sorted(keys.split(", ")) for what, keys in lists.items()} == {
    what: wanted[what] for what in ("missing", "unexpected")
  }
  assert dinov2.PUBLISHED.url in remedy


def test_input_that_does_not_fit_is_an_error_that_says_what_does():
  with pytest.raises(ValueError, match=r"got images of float32 \(1, 8, 8, 3\); needed are uint8"):
    dinov2.features({}, jnp.zeros((1, 8, 8, 3)))
  with pytest.raises(ValueError, match=r"got images of uint8 \(1, 8, 8, 1\); .* \[B, H, W, 3\]"):
    dinov2.features({}, jnp.zeros((1, 8, 8, 1), jnp.uint8))
  with pytest.raises(ValueError, match="image_size=225 must be a multiple of patch=14"):
    dinov2.Dinov2Config(image_size=225)
  with pytest.raises(ValueError, match="width=100 must be a multiple of heads=16"):
    dinov2.Dinov2Config(width=100)


@pytest.mark.slow
def test_the_published_file_fits_in_both_spellings():
  shapes = published_shapes(dinov2.VIT_L14)
  assert len(shapes) == 343
  assert sum(np.prod(shape) for shape in shapes.values()) == 304_368_640
  # No value is read: this asks only whether keys and shapes are all there, and no others.
  empty = {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}
  for spelled in (empty, transformers_spelling(empty)):
    params = dinov2.params_from_state_dict(dinov2.VIT_L14, spelled)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 304_368_640 - 1024


@pytest.mark.slow
def test_random_weights_are_the_same_everywhere_and_tell_images_apart():
  random = dinov2.load("random")
  # What was measured with them elsewhere cannot be compared if they change.
  assert random.sha256.startswith("30e2eecd1d52")
  smooth = np.linspace(0, 255, 3 * 48 * 48).reshape(1, 48, 48, 3).astype(np.uint8)
  images = np.concatenate([images_of((2, 48, 48, 3)), smooth])
  tokens = np.asarray(features(random.params, images, cfg=dinov2.VIT_L14)["features"])
  assert tokens.shape == (3, 1024)
  assert 0.3 < np.std(tokens) < 3 and np.abs(tokens).max() < 10
  assert np.std(tokens, axis=0).mean() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_the_position_embedding_is_interpolated_as_pytorch_does(offset):
  """As the hub's model calls it, and as transformers does without the offset."""
  import torch

  grid = np.random.default_rng(0).standard_normal((37, 37, 5)).astype(np.float32)
  target = {"scale_factor": ((16 + 0.1) / 37,) * 2} if offset else {"size": (16, 16)}
  wanted = torch.nn.functional.interpolate(
    torch.from_numpy(grid).permute(2, 0, 1)[None], mode="bicubic", antialias=False, **target
  )
  rows = dinov2.position_weights(dataclasses.replace(dinov2.VIT_L14, interpolate_offset=offset))
  interpolated_grid = np.einsum("ir,jc,rcd->dij", rows, rows, grid)
  np.testing.assert_allclose(interpolated_grid, wanted[0].numpy(), atol=1e-5)


@pytest.mark.slow
def test_weights_load_from_a_file_that_pytorch_saved(tmp_path, monkeypatch):
  import torch

  monkeypatch.setattr(dinov2, "VIT_L14", TINY)
  state, path = random_state_dict(TINY), tmp_path / "dinov2_vitl14_pretrain.pth"
  torch.save({key: torch.from_numpy(value) for key, value in state.items()}, path)
  images = images_of((2, 20, 15, 3))
  tokens = features(dinov2.load(str(path)).params, images, cfg=TINY)["features"]
  assert_close(tokens, numpy_features(TINY, state, images))


@pytest.mark.slow
def test_the_published_architecture_agrees_with_transformers(pytorch, tmp_path, monkeypatch):
  """At its full width, and with 4 blocks of its 24."""
  import torch
  import transformers

  cfg = dataclasses.replace(dinov2.VIT_L14, depth=4, interpolate_offset=0.0)
  monkeypatch.setattr(dinov2, "VIT_L14", cfg)
  generator = torch.Generator().manual_seed(0)
  with torch.device("meta"):  # all of it is drawn below
    network = transformers.Dinov2Model(
      transformers.Dinov2Config(
        hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, image_size=518, patch_size=14
      )
    )
  network = network.to_empty(device="cpu").eval()
  images = images_of((2, 256, 300, 3))
  with torch.no_grad():
    for name, value in network.named_parameters():
      if value.ndim in (2, 4):
        value.normal_(std=value[0].numel() ** -0.5, generator=generator)
      else:
        is_factor = ("norm" in name and name.endswith("weight")) or "lambda" in name
        value.normal_(mean=float(is_factor), std=0.3, generator=generator)
    pixels = torch.from_numpy(np.moveaxis(normalised(images, 224), -1, 1).copy())
    wanted = network(pixels).pooler_output.numpy()
  network.save_pretrained(tmp_path)
  params = dinov2.load(str(tmp_path / "model.safetensors")).params
  assert np.std(wanted, axis=0).mean() > 0.01  # images differ by more than the tolerance
  assert_close(features(params, images, cfg=cfg)["features"], wanted)
