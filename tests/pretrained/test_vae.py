"""The VAE against a network written out in NumPy, and against PyTorch's own (diffusers)."""

import dataclasses
import hashlib
import json

import hub_stand_in
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import scipy.signal

from ism_jax.pretrained import vae

# Two levels of one block: every kind of layer, and quick to compile.
TINY = vae.VaeConfig(channels=(4, 8), blocks=1, groups=2)
OLD_SPELLING = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def published_shapes(cfg):
  """{key: shape} of a diffusers AutoencoderKL, written down from its state dict."""
  shapes, channels = {}, cfg.channels

  def conv(key, inputs, outputs, size=3):
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (outputs, inputs, size, size), (outputs,)

  def vectors(key, width):
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (width,), (width,)

  def resnet(key, inputs, outputs):
    vectors(f"{key}.norm1", inputs)
    conv(f"{key}.conv1", inputs, outputs)
    vectors(f"{key}.norm2", outputs)
    conv(f"{key}.conv2", outputs, outputs)
    if inputs != outputs:
      conv(f"{key}.conv_shortcut", inputs, outputs, 1)

  def mid(key, width):
    resnet(f"{key}.resnets.0", width, width)
    vectors(f"{key}.attentions.0.group_norm", width)
    for name in OLD_SPELLING:
      shapes[f"{key}.attentions.0.{name}.weight"] = (width, width)
      shapes[f"{key}.attentions.0.{name}.bias"] = (width,)
    resnet(f"{key}.resnets.1", width, width)

  def ends(key, inputs, first, last, outputs):
    conv(f"{key}.conv_in", inputs, first)
    mid(f"{key}.mid_block", channels[-1])
    vectors(f"{key}.conv_norm_out", last)
    conv(f"{key}.conv_out", last, outputs)

  ends("encoder", 3, channels[0], channels[-1], 8)
  ends("decoder", 4, channels[-1], channels[0], 3)
  conv("quant_conv", 8, 8, 1)
  conv("post_quant_conv", 4, 4, 1)
  for side, block, widths, depth, mover in (
    ("encoder.down_blocks", channels[0], channels, cfg.blocks, "downsamplers"),
    ("decoder.up_blocks", channels[-1], channels[::-1], cfg.blocks + 1, "upsamplers"),
  ):
    inputs = block
    for i, width in enumerate(widths):
      for j in range(depth):
        resnet(f"{side}.{i}.resnets.{j}", inputs, width)
        inputs = width
      if i < len(channels) - 1:
        conv(f"{side}.{i}.{mover}.0.conv", width, width)
  return shapes


def random_state_dict(cfg):
  """Weights of which none is special: norms scale by about 1, and no bias is zero."""
  rng = np.random.default_rng(0)
  state = {}
  for key, shape in published_shapes(cfg).items():
    noise = rng.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
      state[key] = noise / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    else:
      state[key] = 0.3 * noise + (key.endswith("weight") and "norm" in key)
    if "conv_in" in key:
      state[key] *= 1e-3  # what the first norms see is so small that their epsilon matters
  return {key: value.astype(np.float32) for key, value in state.items()}


def old_spelling(state):
  """The same weights as older files have them."""
  renamed = {}
  for key, value in state.items():
    for new, old in OLD_SPELLING.items():
      key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    renamed[key] = value
  return renamed


class NumpyVae:
  """Both halves in float64, one image at a time, [C, H, W] as in PyTorch."""

  def __init__(self, cfg, state):
    self.state = {key: np.float64(value) for key, value in state.items()}
    self.cfg, self.levels = cfg, len(cfg.channels)

  def conv(self, key, x, stride=1, pad=((1, 1), (1, 1))):
    kernel, bias = self.state[f"{key}.weight"], self.state[f"{key}.bias"]
    if kernel.shape[-1] == 1:
      pad = ((0, 0), (0, 0))
    x = np.pad(x, ((0, 0), *pad))
    out = [sum(map(scipy.signal.correlate2d, x, k, ["valid"] * len(x))) for k in kernel]
    return (np.stack(out) + bias[:, None, None])[:, ::stride, ::stride]

  def norm(self, key, x):
    weight, bias = self.state[f"{key}.weight"], self.state[f"{key}.bias"]
    grouped = x.reshape(self.cfg.groups, -1)
    mean, variance = grouped.mean(1, keepdims=True), grouped.var(1, keepdims=True)
    x = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    return x * weight[:, None, None] + bias[:, None, None]

  def silu_norm(self, key, x):
    x = self.norm(key, x)
    return x / (1 + np.exp(-x))

  def resnet(self, key, x):
    h = self.conv(f"{key}.conv1", self.silu_norm(f"{key}.norm1", x))
    h = self.conv(f"{key}.conv2", self.silu_norm(f"{key}.norm2", h))
    if f"{key}.conv_shortcut.weight" in self.state:
      x = self.conv(f"{key}.conv_shortcut", x)
    return x + h

  def attention(self, key, x):
    dense = lambda name, h: (
      h @ self.state[f"{key}.{name}.weight"].T + self.state[f"{key}.{name}.bias"]
    )
    h = self.norm(f"{key}.group_norm", x).reshape(len(x), -1).T
    q, k, v = (dense(name, h) for name in ("to_q", "to_k", "to_v"))
    weight = np.exp(q @ k.T / np.sqrt(len(x)))
    weight /= weight.sum(1, keepdims=True)
    return x + dense("to_out.0", weight @ v).T.reshape(x.shape)

  def mid(self, key, x):
    x = self.resnet(f"{key}.resnets.0", x)
    return self.resnet(f"{key}.resnets.1", self.attention(f"{key}.attentions.0", x))

  def encode(self, image):
    """[H, W, 3] -> [h, w, 8], the log-variance as it comes."""
    x = self.conv("encoder.conv_in", np.moveaxis(np.float64(image), -1, 0))
    for i in range(self.levels):
      for j in range(self.cfg.blocks):
        x = self.resnet(f"encoder.down_blocks.{i}.resnets.{j}", x)
      if i < self.levels - 1:
        key = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        x = self.conv(key, x, stride=2, pad=((0, 1), (0, 1)))
    x = self.silu_norm("encoder.conv_norm_out", self.mid("encoder.mid_block", x))
    return np.moveaxis(self.conv("quant_conv", self.conv("encoder.conv_out", x)), 0, -1)

  def decode(self, latent):
    """[h, w, 4] of the training scale -> [H, W, 3]."""
    x = self.conv("post_quant_conv", np.moveaxis(np.float64(latent) / 0.18215, -1, 0))
    x = self.mid("decoder.mid_block", self.conv("decoder.conv_in", x))
    for i in range(self.levels):
      for j in range(self.cfg.blocks + 1):
        x = self.resnet(f"decoder.up_blocks.{i}.resnets.{j}", x)
      if i < self.levels - 1:
        x = self.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", np.kron(x, np.ones((1, 2, 2))))
    x = self.silu_norm("decoder.conv_norm_out", x)
    return np.moveaxis(self.conv("decoder.conv_out", x), 0, -1)


encode = jax.jit(vae.encode, static_argnums=0)
decode = jax.jit(vae.decode, static_argnums=0)


def images_of(shape, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def latents_of(shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(a, b, relative=1e-4):
  assert a.shape == b.shape
  np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max())


@pytest.fixture
def tiny_files(tmp_path, monkeypatch):
  """The published architecture is a tiny one; returns its weights and the file that holds them."""
  monkeypatch.setattr(vae, "SD_VAE", TINY)
  state = random_state_dict(TINY)
  path = tmp_path / vae.WEIGHTS
  safetensors.numpy.save_file(state, path)
  return state, path


def assert_same_params(params, state):
  expected = vae.params_from_state_dict(TINY, state)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_encoder_and_decoder_are_the_network_written_out_in_numpy():
  state = random_state_dict(TINY)
  params = vae.params_from_state_dict(TINY, state)
  reference = NumpyVae(TINY, state)
  images, latents = images_of((2, 8, 12, 3)), latents_of((2, 4, 6, 4))
  moments = encode(TINY, params, images)
  expected = np.stack([reference.encode(image) for image in images])
  assert_close(moments[..., :4], expected[..., :4])
  assert_close(moments[..., 4:], expected[..., 4:])
  decoded = decode(TINY, params, latents)
  assert_close(decoded, np.stack([reference.decode(latent) for latent in latents]))


def test_the_published_architecture_has_the_published_tensors():
  shapes = published_shapes(vae.SD_VAE)
  assert len(shapes) == 248
  assert sum(np.prod(shape) for shape in shapes.values()) == 83_653_863
  # No value is read: this asks only whether keys and shapes are all there, and no others.
  empty = {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}
  params = vae.params_from_state_dict(vae.SD_VAE, empty)
  assert len(jax.tree.leaves(params)) == 248
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 83_653_863
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_the_old_spelling_of_the_attention_and_its_1x1_convolutions_are_the_same_weights():
  state = random_state_dict(TINY)
  old = old_spelling(state)
  assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
  assert len(set(old) - set(state)) == 16
  assert_same_params(vae.params_from_state_dict(TINY, old), state)
  convolutions = {
    key: value[:, :, None, None] if "attentions" in key and value.ndim == 2 else value
    for key, value in old.items()
  }
  assert_same_params(vae.params_from_state_dict(TINY, convolutions), state)


def test_the_log_variance_is_clamped_and_the_mean_is_not():
  params = vae.params_from_state_dict(TINY, random_state_dict(TINY))
  params["quant_conv"]["bias"] = np.float32([500, -500, 0, 0, 500, -500, 15, -25])
  moments = np.asarray(encode(TINY, params, images_of((2, 8, 12, 3))))
  np.testing.assert_array_equal(moments[..., 4], 20)
  np.testing.assert_array_equal(moments[..., 5], -30)
  assert np.all(np.abs(moments[..., 6:] - [15, -25]) < 5) and np.ptp(moments[..., 6]) > 0
  assert np.all(moments[..., 0] > 400) and np.all(moments[..., 1] < -400)


def test_a_sampled_latent_is_the_scaled_gaussian_in_float32_also_of_float16_moments():
  rng = np.random.default_rng(0)
  mean = rng.normal(0, 5, (3, 2, 2, 4)).astype(np.float16)
  log_variance = rng.uniform(-30, 20, (3, 2, 2, 4)).astype(np.float16)
  noise = rng.standard_normal((3, 2, 2, 4)).astype(np.float32)
  moments = np.concatenate([mean, log_variance], axis=-1)
  latent = vae.sample_latent(jnp.asarray(moments), jnp.asarray(noise), 0.18215)
  deviation = np.sqrt(np.exp(np.float64(log_variance)))
  assert latent.dtype == jnp.float32
  # float16 could not hold these products to 1e-5.
  np.testing.assert_allclose(
    latent, 0.18215 * (np.float64(mean) + deviation * noise), rtol=1e-5, atol=1e-5
  )
  with pytest.raises(
    ValueError, match=r"noise of shape \(3, 2, 2, 8\) .* needed is \(3, 2, 2, 4\)"
  ):
    vae.sample_latent(jnp.asarray(moments), jnp.asarray(moments), 0.18215)


def test_every_product_asks_for_full_precision():
  """On TPUs and GPUs the default is less than float32: bfloat16 and TF32."""
  params = vae.params_from_state_dict(TINY, random_state_dict(TINY))
  shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)
  for half, argument in ((vae.encode, shape(1, 8, 8, 3)), (vae.decode, shape(1, 1, 1, 4))):
    text = jax.jit(half, static_argnums=0).lower(TINY, params, argument).as_text()
    products = [s for s in text.splitlines() if "dot_general" in s or "stablehlo.convolution" in s]
    assert len(products) > 15
    assert all("HIGHEST" in product for product in products)


def test_input_that_does_not_fit_is_an_error_that_says_what_does():
  images, latents = jnp.zeros((1, 20, 24, 3)), jnp.zeros((1, 2, 2, 3))
  with pytest.raises(ValueError, match=r"images of 20x24 pixels .* multiples of 8. Crop .* 16x24"):
    vae.encode(vae.SD_VAE, {}, images)
  with pytest.raises(ValueError, match=r"got images of uint8 .* needed are floats \[B, H, W, 3\]"):
    vae.encode(TINY, {}, images.astype(jnp.uint8))
  with pytest.raises(ValueError, match=r"got latents of float32 \(1, 2, 2, 3\); .* \[B, H, W, 4\]"):
    vae.decode(TINY, {}, latents)
  with pytest.raises(ValueError, match=r"channels=\(4, 6\) must be multiples of groups=4"):
    vae.VaeConfig(channels=(4, 6), groups=4)


def test_weights_load_from_a_file_from_its_folder_and_offline_from_the_hub_cache(
  tiny_files, tmp_path, monkeypatch
):
  state, path = tiny_files
  snapshot = tmp_path / "hub" / "models--someone--some-vae" / "snapshots" / "abc"
  snapshot.mkdir(parents=True)
  (snapshot / vae.WEIGHTS).write_bytes(path.read_bytes())
  (snapshot.parents[1] / "refs").mkdir()
  (snapshot.parents[1] / "refs" / "main").write_text("abc")
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  for name in (str(path), str(path.parent), "someone/some-vae"):
    loaded = vae.load(name)
    assert (loaded.cfg, loaded.name) == (TINY, name)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same_params(loaded.params, state)
  write_config(snapshot / vae.WEIGHTS, scaling_factor=0.13025)
  assert vae.load("someone/some-vae").cfg.scale == 0.13025


def write_config(path, **values):
  (path.parent / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | values))


def test_the_factors_are_those_of_the_config_beside_the_weights(tiny_files, tmp_path, caplog):
  _, path = tiny_files
  factors = lambda name: (vae.load(str(name)).cfg.scale, vae.load(str(name)).cfg.shift)
  assert factors(path) == (0.18215, 0.0)
  assert f"no {path.parent / 'config.json'}: latents are scaled by 0.18215" in caplog.text
  write_config(path, sample_size=256)  # as of sd-vae-ft-mse
  assert factors(path) == factors(path.parent) == (0.18215, 0.0)
  write_config(path, scaling_factor=0.13025, shift_factor=None, latents_mean=None)
  assert factors(path) == factors(f"{path.parent}/") == (0.13025, 0.0)
  write_config(path, scaling_factor=0.3611, shift_factor=0.1159)
  assert factors(path.parent) == (0.3611, 0.1159)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "is damaged, or another file"),
    ("[]", "is damaged, or another file"),
    ('{"_class_name": "AutoencoderTiny"}', "_class_name='AutoencoderTiny', and only"),
    ('{"_class_name": "VQModel"}', "_class_name='VQModel', and only 'AutoencoderKL' is known"),
    ('{"act_fn": "gelu"}', "act_fn='gelu', and only 'silu' is known"),
    ('{"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}', "down_block_types="),
    ('{"in_channels": 4}', "in_channels=4, and only 3 is known"),
    ('{"use_tiling_norm": true}', "use_tiling_norm=True, and only None is known"),
    ('{"latent_channels": 0}', "latent_channels=0 and .* must be at least 1"),
    ('{"block_out_channels": [4, 8, 8]}', "latents of 1/4 of an image's .* only 1/2 is known"),
    ('{"scaling_factor": "large"}', "scaling_factor is str, not"),
    ('{"scaling_factor": 0}', "scaling_factor=0.0 .*needed are a positive number"),
    ('{"scaling_factor": NaN}', "scaling_factor=nan"),
    ('{"norm_num_groups": 16}', r"channels=\(4, 8\) must be multiples of groups=16"),
    ('{"latents_mean": [0.5, 0, 0, 0]}', "latents_mean=.*, and only None is known"),
  ],
)
def test_a_config_that_the_weights_cannot_follow_is_refused(tiny_files, text, message):
  _, path = tiny_files
  (path.parent / "config.json").write_text(text)
  with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
    vae.load(str(path))


def test_decoding_undoes_the_scale_and_the_shift_of_training():
  params = vae.params_from_state_dict(TINY, random_state_dict(TINY))
  other = dataclasses.replace(TINY, scale=0.3611, shift=0.1159)
  z = latents_of((1, 2, 2, 4))
  scaled = [
    vae.sample_latent(jnp.concatenate([z, z], -1), jnp.zeros_like(z), cfg.scale, cfg.shift)
    for cfg in (TINY, other)
  ]
  np.testing.assert_allclose(scaled[1], 0.3611 * (z - 0.1159), rtol=1e-5)
  assert_close(decode(other, params, scaled[1]), decode(TINY, params, scaled[0]))


def test_absent_weights_are_one_error_that_says_what_to_download_and_where_to_put_it(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  remedy = f"Download {vae.WEIGHTS} from https://huggingface.co/stabilityai/sd-vae-ft-mse and"
  for name, reason in {
    "stabilityai/sd-vae-ft-mse": "hub did not give https://huggingface.co/stabilityai/sd-vae",
    str(tmp_path): f"that folder has no {vae.WEIGHTS}",
    str(tmp_path / "absent.safetensors"): "no such file or folder",
    "weights/vae.safetensors": "no such file or folder",
    "./stabilityai/sd-vae-ft-mse": "no such file or folder",
    "sd-vae": "no such file or folder",
  }.items():
    with pytest.raises(FileNotFoundError) as error:
      vae.load(name)
    message = str(error.value)
    assert message.startswith(f"no VAE weights under {name!r}: ") and "\n" not in message
    assert reason in message and remedy in message
    assert str(tmp_path / "hub") in message or "hub did not give" not in message
  with pytest.raises(FileNotFoundError, match=r"huggingface\.co/someone/other-vae \(.*offline"):
    vae.load("someone/other-vae")
  # The page of what does not exist would be no help.
  with (
    hub_stand_in.serve(tmp_path / "hub"),
    pytest.raises(FileNotFoundError, match="no such repository") as error,
  ):
    vae.load("stabilityai/sd-vae-ftmse")
  assert remedy in str(error.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_named_at_once(tiny_files):
  state, path = tiny_files
  del state["encoder.conv_in.bias"], state["decoder.mid_block.attentions.0.to_out.0.weight"]
  state["surplus"] = state["encoder.surplus.weight"] = state["encoder.conv_norm_out.weight"]
  state["encoder.mid_block.attentions.0.query.weight"] = np.zeros((8, 8), np.float32)  # twice
  state["decoder.conv_out.weight"] = np.zeros((3, 4, 1, 1), np.float32)
  state["quant_conv.weight"] = np.zeros((8, 8), np.float32)
  state["quant_conv.bias"] = np.zeros(7, np.float32)
  safetensors.numpy.save_file(state, path)
  with pytest.raises(ValueError) as error:
    vae.load(str(path))
  message = str(error.value)
  assert message.startswith(f"{path} does not hold this autoencoder's weights")
  lists = dict(part.split(": ", 1) for part in message.split(". Needed are")[0].split("; ")[1:])
  assert sorted(lists["missing"].split(", ")) == [
    "decoder.mid_block.attentions.0.to_out.0.weight",
    "encoder.conv_in.bias",
  ]
  assert lists["unexpected"].split(", ") == [
    "encoder.mid_block.attentions.0.query.weight",
    "encoder.surplus.weight",
    "surplus",
  ]
  for part in (
    "decoder.conv_out.weight is (3, 4, 1, 1), not (3, 4, 3, 3)",
    "quant_conv.weight is (8, 8), not (8, 8, 1, 1)",
    "quant_conv.bias is (7,), not (8,)",
  ):
    assert part in lists["of another shape"]
  assert lists["of another shape"].count(" is ") == 3


@pytest.mark.parametrize("damage", ["empty", "header", "tensors", "text"])
def test_a_damaged_or_foreign_file_is_an_error_that_names_it(tiny_files, damage):
  _, path = tiny_files
  content = path.read_bytes()
  start = 8 + int.from_bytes(content[:8], "little")
  path.write_bytes(
    {
      "empty": b"",
      "header": content[: start // 2],
      "tensors": content[:-1000],
      "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }[damage]
  )
  remedy = rf"Download it again.* https://huggingface\.co/{vae.PUBLISHED}"
  with pytest.raises(ValueError, match=remedy) as error:
    vae.load(str(path))
  assert str(error.value).startswith(str(path))


def test_weights_load_from_a_file_of_bfloat16(tiny_files):
  state, path = tiny_files
  state = {key: value.astype(ml_dtypes.bfloat16) for key, value in state.items()}
  safetensors.numpy.save_file(state, path)
  assert_same_params(vae.load(str(path)).params, state)


def test_random_weights_are_the_same_on_every_machine():
  # Data that was encoded with them elsewhere is refused if they change.
  assert vae.load("random-small").sha256.startswith("a49dc4d6636d")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random-small", "random"])
def test_random_weights_give_latents_and_images_of_ordinary_size(name):
  random = vae.load(name)
  images = images_of((2, 64, 48, 3))
  moments = encode(random.cfg, random.params, images)
  assert moments.shape == (2, 8, 6, 8)
  assert 0.1 < np.std(moments[..., :4]) < 10 and np.abs(moments[..., 4:]).max() < 10
  decoded = decode(random.cfg, random.params, random.cfg.scale * moments[..., :4])
  assert decoded.shape == images.shape
  assert 0.1 < np.std(decoded) < 2
  # What an image shows reaches its latent, and the latent the decoded image.
  assert np.abs(moments[0] - moments[1]).max() > 0.1
  assert np.abs(decoded[0] - decoded[1]).max() > 0.1


@pytest.fixture(scope="module")
def torch_vae(pytorch):
  """diffusers' AutoencoderKL of the published architecture at random weights."""
  import diffusers
  import torch

  network = diffusers.AutoencoderKL(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
  ).eval()
  state = random_state_dict(vae.SD_VAE)
  network.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
  return network


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_the_published_architecture_agrees_with_pytorch(torch_vae, tmp_path, spelling):
  import safetensors.torch
  import torch

  path = tmp_path / vae.WEIGHTS
  safetensors.torch.save_file(torch_vae.state_dict(), path)
  if spelling == "old":
    safetensors.numpy.save_file(old_spelling(safetensors.numpy.load_file(path)), path)
  loaded = vae.load(str(tmp_path))

  images, latents = images_of((2, 32, 48, 3)), latents_of((2, 4, 6, 4))
  to_torch = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
  from_torch = lambda x: np.moveaxis(x.numpy(), 1, -1)
  with torch.no_grad():
    gaussian = torch_vae.encode(to_torch(images)).latent_dist
    decoded = torch_vae.decode(to_torch(latents) / 0.18215).sample
  moments = encode(loaded.cfg, loaded.params, images)
  assert_close(moments[..., :4], from_torch(gaussian.mean))
  assert_close(moments[..., 4:], from_torch(gaussian.logvar))
  assert_close(decode(loaded.cfg, loaded.params, latents), from_torch(decoded))


SMALL = {
  "block_out_channels": (8, 8, 16, 16),
  "down_block_types": ("DownEncoderBlock2D",) * 4,
  "up_block_types": ("UpDecoderBlock2D",) * 4,
  "norm_num_groups": 4,
}
NO_CONVOLUTIONS = {"use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.parametrize(
  ("folder", "safe", "values"),
  [
    ("", True, {"scaling_factor": 0.18215, "layers_per_block": 2}),
    ("", False, {"scaling_factor": 0.13025, "force_upcast": False}),
    ("vae", True, {"scaling_factor": 1.5305, "shift_factor": 0.0609, "latent_channels": 16}),
    ("vae", False, {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16}),
    ("", True, {"mid_block_add_attention": False, "latent_channels": 8}),
  ],
  ids=["SD", "SDXL", "SD3", "FLUX", "no attention"],
)
def test_every_autoencoder_of_diffusers_agrees_with_it(pytorch, tmp_path, folder, safe, values):
  """From the files that diffusers writes: weights of either kind, in the folder of a pipeline."""
  import diffusers
  import torch

  values = SMALL | {"layers_per_block": 1} | values
  if values.get("latent_channels") == 16:
    values |= NO_CONVOLUTIONS
  torch.manual_seed(0)
  theirs = diffusers.AutoencoderKL(**values).eval()
  theirs.save_pretrained(tmp_path / folder, safe_serialization=safe)
  ours = vae.load(str(tmp_path))
  cfg, channels = ours.cfg, values.get("latent_channels", 4)
  assert (cfg.latent_channels, cfg.quant_conv) == (channels, "use_quant_conv" not in values)
  images, latents = images_of((2, 16, 24, 3)), latents_of((2, 2, 3, channels))
  to_torch = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
  with torch.no_grad():
    moments = theirs.encode(to_torch(images)).latent_dist.parameters
    z = to_torch(latents) / theirs.config.scaling_factor + (theirs.config.shift_factor or 0)
    decoded = theirs.decode(z).sample
  assert_close(encode(cfg, ours.params, images), np.moveaxis(moments.numpy(), 1, -1))
  assert_close(decode(cfg, ours.params, latents), np.moveaxis(decoded.numpy(), 1, -1))
  # As exports have it.
  again = diffusers.AutoencoderKL.from_config(vae.diffusers_config(cfg))
  state = {key: torch.from_numpy(array) for key, array in vae.state_dict(ours.params).items()}
  again.load_state_dict(state)
  with torch.no_grad():
    torch.testing.assert_close(again.decode(z).sample, decoded)


def test_a_pipelines_repository_stands_for_its_autoencoder(tiny_files, tmp_path, monkeypatch):
  state, path = tiny_files
  snapshot = tmp_path / "hub" / "models--someone--a-pipeline" / "snapshots" / "abc"
  (snapshot / "vae").mkdir(parents=True)
  (snapshot / "vae" / vae.WEIGHTS).write_bytes(path.read_bytes())
  write_config(snapshot / "vae" / vae.WEIGHTS, scaling_factor=1.5305, shift_factor=0.0609)
  (snapshot.parents[1] / "refs").mkdir()
  (snapshot.parents[1] / "refs" / "main").write_text("abc")
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  for name in ("someone/a-pipeline", "someone/a-pipeline/vae"):
    loaded = vae.load(name)
    assert vae.is_public(name) and (loaded.cfg.scale, loaded.cfg.shift) == (1.5305, 0.0609)
    assert_same_params(loaded.params, state)
