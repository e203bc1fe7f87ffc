"""The FID Inception: its resize against TensorFlow's loop, the network against torch-fidelity's."""

import re
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy

from ism_jax.pretrained import inception, weights
from ism_jax.runtime import files, sharding
from ism_jax.runtime.sharding import AXIS, P

# torch-fidelity's names of our outputs; it has no sFID.
NAMES = {"features": "2048", "logits": "logits_unbiased"}
WIDTHS = {"features": 2048, "spatial": 2023, "logits": 1008}


def convolutions():
  """{layer: (outputs, inputs, height, width)}, written down from torch-fidelity's state dict."""
  shapes = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
  }

  def block(name, **branches):
    shapes.update({f"{name}.{branch}": shape for branch, shape in branches.items()})

  for name, n, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
    block(
      f"Mixed_{name}",
      branch1x1=(64, n, 1, 1),
      branch5x5_1=(48, n, 1, 1),
      branch5x5_2=(64, 48, 5, 5),
      branch3x3dbl_1=(64, n, 1, 1),
      branch3x3dbl_2=(96, 64, 3, 3),
      branch3x3dbl_3=(96, 96, 3, 3),
      branch_pool=(pool, n, 1, 1),
    )
  block(
    "Mixed_6a",
    branch3x3=(384, 288, 3, 3),
    branch3x3dbl_1=(64, 288, 1, 1),
    branch3x3dbl_2=(96, 64, 3, 3),
    branch3x3dbl_3=(96, 96, 3, 3),
  )
  for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
    block(
      f"Mixed_{name}",
      branch1x1=(192, 768, 1, 1),
      branch7x7_1=(c, 768, 1, 1),
      branch7x7_2=(c, c, 1, 7),
      branch7x7_3=(192, c, 7, 1),
      branch7x7dbl_1=(c, 768, 1, 1),
      branch7x7dbl_2=(c, c, 7, 1),
      branch7x7dbl_3=(c, c, 1, 7),
      branch7x7dbl_4=(c, c, 7, 1),
      branch7x7dbl_5=(192, c, 1, 7),
      branch_pool=(192, 768, 1, 1),
    )
  block(
    "Mixed_7a",
    branch3x3_1=(192, 768, 1, 1),
    branch3x3_2=(320, 192, 3, 3),
    branch7x7x3_1=(192, 768, 1, 1),
    branch7x7x3_2=(192, 192, 1, 7),
    branch7x7x3_3=(192, 192, 7, 1),
    branch7x7x3_4=(192, 192, 3, 3),
  )
  for name, n in (("7b", 1280), ("7c", 2048)):
    block(
      f"Mixed_{name}",
      branch1x1=(320, n, 1, 1),
      branch3x3_1=(384, n, 1, 1),
      branch3x3_2a=(384, 384, 1, 3),
      branch3x3_2b=(384, 384, 3, 1),
      branch3x3dbl_1=(448, n, 1, 1),
      branch3x3dbl_2=(384, 448, 3, 3),
      branch3x3dbl_3a=(384, 384, 1, 3),
      branch3x3dbl_3b=(384, 384, 3, 1),
      branch_pool=(192, n, 1, 1),
    )
  return shapes


def random_state_dict():
  """Weights of which none is special: normalisations scale and shift, and no bias is zero."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  state = {"fc.weight": normal(1008, 2048) / 45, "fc.bias": 0.3 * normal(1008)}
  for layer, shape in convolutions().items():
    width = shape[0]
    # Some so small that the epsilon matters; what they divide is as small, so that no channel
    # drowns the others, and hides their errors.
    variance = np.where(normal(width) > 1, 1e-3, np.exp(0.3 * normal(width)))
    state[f"{layer}.conv.weight"] = normal(*shape) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    state[f"{layer}.bn.weight"] = np.exp(0.2 * normal(width)) * np.sqrt(variance)
    state[f"{layer}.bn.bias"] = 0.3 * normal(width)
    state[f"{layer}.bn.running_mean"] = 0.3 * normal(width) * np.sqrt(variance)
    state[f"{layer}.bn.running_var"] = variance
  return {key: np.asarray(value, np.float32) for key, value in state.items()}


@pytest.fixture(scope="module")
def state_dict():
  return random_state_dict()


def photographs(shape, seed=0):
  """Smooth images with edges, and one of noise."""
  rng = np.random.default_rng(seed)
  count, height, width, _ = shape
  y, x = np.mgrid[:height, :width] / 40
  wave = np.sin(y[..., None] * rng.uniform(0, 2, (count, 1, 1, 3)) + x[..., None])
  images = 128 + 120 * wave
  images[:, height // 3 : height // 2, width // 4 :] = rng.uniform(0, 255, (count, 1, 1, 3))
  images[-1] = rng.integers(0, 256, shape[1:])
  return images.astype(np.uint8)


@pytest.mark.parametrize("size", [(256, 256), (32, 32), (512, 300), (299, 299), (1, 450)])
def test_resizing_is_tensorflows_of_before_half_pixel_centres(size):
  image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
  resized = np.asarray(inception.resize(image[None]))[0]
  assert resized.shape == (299, 299, 3) and resized.dtype == np.float32

  def taps(i, length):
    position = np.float32(i) * np.float32(length / 299)
    low = int(np.floor(position))
    return low, min(low + 1, length - 1), float(position) - low

  positions = np.random.default_rng(1).integers(0, 299, (60, 2))
  for i, j in [(0, 0), (298, 298), *positions]:
    top, bottom, dy = taps(i, size[0])
    left, right, dx = taps(j, size[1])
    pixel = lambda row, column: image[row, column].astype(float)
    above = pixel(top, left) + (pixel(top, right) - pixel(top, left)) * dx
    below = pixel(bottom, left) + (pixel(bottom, right) - pixel(bottom, left)) * dx
    np.testing.assert_allclose(resized[i, j], above + (below - above) * dy, atol=1e-4)


@pytest.mark.parametrize(
  "images",
  [
    np.zeros((2, 8, 8, 3), np.float32),
    np.zeros((8, 8, 3), np.uint8),
    np.zeros((2, 8, 8, 1), np.uint8),
  ],
)
def test_images_are_uint8_in_colour(images):
  with pytest.raises(ValueError, match=r"needed are uint8 \[B, H, W, 3\]"):
    inception.features({}, images)


def test_other_weights_are_told_from_these(state_dict):
  inception.params_from_state_dict({**state_dict, "Mixed_5b.branch1x1.bn.num_batches_tracked": 3})
  torchvisions = dict(state_dict)
  torchvisions["fc.weight"] = np.zeros((1000, 2048))
  torchvisions["AuxLogits.fc.bias"] = np.zeros(1000)
  del torchvisions["Mixed_7c.branch_pool.bn.bias"]
  with pytest.raises(ValueError) as error:
    inception.params_from_state_dict(torchvisions, source="net.pth")
  for part in (
    "net.pth does not hold the FID Inception's weights",
    "missing: Mixed_7c.branch_pool.bn.bias; unexpected: AuxLogits.fc.bias; of another shape: "
    "fc.weight is (1000, 2048), not (1008, 2048)",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
  ):
    assert part in str(error.value)
  with pytest.raises(ValueError, match=r"missing: Conv2d_1a_3x3\.conv\.weight.* and 466 more"):
    inception.params_from_state_dict({})


def test_missing_weights_are_an_error_that_says_where_to_put_which_file(tmp_path, monkeypatch):
  monkeypatch.setenv("ISM_JAX_CACHE", str(tmp_path))
  monkeypatch.setattr(weights, "_fetch", mock.Mock(side_effect=OSError("no route to host")))
  file = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
  with pytest.raises(FileNotFoundError, match=re.escape(f"{inception.PUBLISHED.url} to {file}")):
    inception.load()


def test_random_weights_are_the_same_for_everyone():
  net = inception.load("random")
  assert net.name == "random"
  assert net.sha256 == "ea6b053ba13e8d2d2b8b2a22f010f4ccbdb08fa39f84a8c80e084f069f627528"


@pytest.mark.slow
def test_random_features_stay_in_range_and_differ_between_images():
  x = photographs((4, 96, 96, 3))
  features = jax.jit(inception.features)(inception.load("random").params, x)
  for name, width in WIDTHS.items():
    value = np.asarray(features[name])
    assert value.shape == (4, width) and np.isfinite(value).all()
    assert 0.1 < value.std() < 10, name
    assert np.all(np.std(value, axis=0).mean() > 0.03 * value.std()), name


@pytest.mark.slow
def test_features_do_not_depend_on_the_devices(state_dict):
  params = inception.params_from_state_dict(state_dict)
  x = photographs((2, 64, 80, 3))
  features = jax.jit(inception.features)
  mesh = sharding.data_mesh(jax.devices()[:2])
  by_rows = jax.jit(
    jax.shard_map(inception.features, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
  )
  for name, expected in features(params, x).items():
    for split in (by_rows(params, x), features(params, jax.device_put(x, sharding.rows(mesh)))):
      np.testing.assert_allclose(split[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def torch_inception(pytorch, state_dict, tmp_path_factory):
  """torch-fidelity's network of `state_dict`, its sFID features, and the two files it can read."""
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  folder = tmp_path_factory.mktemp("weights")
  state = {key: pytorch.from_numpy(value) for key, value in state_dict.items()}
  saved = folder / "new.pth", folder / "old.pth"
  for file in saved:
    pytorch.save(state, file, _use_new_zipfile_serialization=file.name == "new.pth")
  network = FeatureExtractorInceptionV3(
    "inception-v3-compat", list(NAMES.values()), feature_extractor_weights_path=str(saved[0])
  )
  spatial = []
  # mixed_6/conv of TensorFlow's graph, as torch-fidelity's own conversion of the weights has it.
  network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: spatial.append(call[-1]))

  def outputs(images):
    with pytorch.no_grad():
      values = network(pytorch.from_numpy(np.moveaxis(images, -1, 1).copy()))
    features = {name: value.numpy() for name, value in zip(NAMES, values, strict=True)}
    channels_last = np.moveaxis(spatial.pop().numpy(), 1, -1)
    features["spatial"] = channels_last[..., :7].reshape(len(images), -1)
    return features

  return outputs, saved


@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 256), (200, 331), (299, 299)])
def test_all_features_agree_with_torch_fidelity(torch_inception, size):
  reference, saved = torch_inception
  x = photographs((2, *size, 3))
  net = inception.load(str(saved[size == (256, 256)]))
  features = jax.jit(inception.features)(net.params, x)
  expected = reference(x)
  assert set(expected) == set(features) == set(WIDTHS)
  for name, value in expected.items():
    assert value.shape == features[name].shape
    assert 0.05 < value.std() / np.abs(value).max() < 0.5, "no few values hide the others"
    # Of the largest value: rounding alone; 3e-6 of it was measured.
    np.testing.assert_allclose(
      features[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 256), (200, 331), (299, 299)])
def test_the_resized_image_agrees_with_torch_fidelity(pytorch, size):
  from torch_fidelity import interpolate_compat_tensorflow as tensorflow

  x = photographs((2, *size, 3))
  torch_x = pytorch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float32))
  expected = tensorflow.interpolate_bilinear_2d_like_tensorflow1x(
    torch_x, size=(299, 299), align_corners=False
  )
  expected = np.moveaxis(expected.numpy(), 1, -1)
  np.testing.assert_allclose(inception.resize(x), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_safetensors_hold_the_same_weights(state_dict, tmp_path):
  file = tmp_path / "inception.safetensors"
  safetensors.numpy.save_file(state_dict, file)
  net = inception.load(str(file))
  expected = inception.params_from_state_dict(state_dict)
  jax.tree.map(np.testing.assert_array_equal, net.params, expected)
  assert net.sha256 == files.sha256(file) and net.name == str(file)
