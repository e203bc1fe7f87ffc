"""The Inception network of FID, Inception Score and sFID (Szegedy et al. 2015, arXiv:1512.00567).

This is TensorFlow's graph of December 2015, which Heusel et al. (2017, arXiv:1706.08500) made the
standard. It is not torchvision's Inception: it has 1008 classes, average pools leave out the
padding, the last block takes maxima where the paper has averages, and its own bilinear resize to
299x299 puts corners where pixels' centres belong. Weights come from the file that pytorch-fid and
torch-fidelity publish; modules are named by that file's keys.

Axes: B batch, H/W image size, C channels; h/w, i/j positions before and after resizing.
"""

import functools

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.pretrained import weights

PUBLISHED = weights.Published(
  what="FID Inception",
  file="weights-inception-2015-12-05-6726825d.pth",
  sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
  # pytorch-fid's pt_inception-2015-12-05-6726825d.pth is the same file.
  url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
  "weights-inception-2015-12-05-6726825d.pth",
)
WHAT = "2048 features of the FID Inception of 2015"
SIZE = 299
_CLASSES = 1008
_NORM = ("weight", "bias", "running_mean", "running_var")
_NORM_EPSILON = 1e-3
_SPATIAL_CHANNELS = 7


def load(name: str = "") -> weights.Pretrained:
  """Loads weights by name: see `weights.load`."""
  shapes = weights.shapes_of(_Network(), SIZE)
  return weights.load(name, PUBLISHED, shapes, params_from_state_dict, gain=2)


def features(params, images):
  """What the metrics see of each image.

  Args:
    params: {layer: {"kernel", "bias"}}; the batch normalisations are folded into the convolutions
      before them.
    images: uint8 [B, H, W, 3], RGB, of any size.
  Returns:
    {output: float32 array}:
    "features": [B, 2048], averages over positions before the classifier: FID, KID, and precision
      and recall;
    "spatial": [B, 2023], rows, columns and the first 7 channels of the `mixed_6/conv` of ADM's
      evaluator (guided-diffusion): sFID;
    "logits": [B, 1008], *without* the classifier's bias: the Inception Score.
  """
  return _Network().apply({"params": params}, (resize(images) - 128) / 128)


def resize(images):
  """Resizes as TensorFlow 1 does: bilinearly, without anti-aliasing or half-pixel centres.

  uint8 [B, H, W, 3] -> float32 [B, 299, 299, 3] in [0, 255], not rounded; pixel i is the input at
  i * H / 299.
  """
  weights.check_images(images)
  height, width = images.shape[1:3]
  # Two taps each, as a product of matrices: a fiftieth of the network's work, and fast on a TPU,
  # where gathering is not.
  return jnp.einsum(
    "ih,bhwc,jw->bijc",
    _interpolation(height),
    images.astype(jnp.float32),
    _interpolation(width),
    precision=weights.PRECISION,
  )


def params_from_state_dict(arrays, source="the state dict"):
  """Parameters, as in `features`, from tensors in pytorch-fid's and torch-fidelity's layout.

  Args:
    arrays: NumPy arrays by key; batch normalisation's counts of batches may be there or not.
    source: where the arrays are from, for the ValueError of `weights.check_tensors`.
  """
  arrays = {key: a for key, a in arrays.items() if not str(key).endswith(".num_batches_tracked")}
  layers = traverse_util.unflatten_dict(weights.shapes_of(_Network(), SIZE))
  shapes = {}
  for layer, leaves in layers.items():
    kernel, width = weights.torch_shape(leaves["kernel"].shape), leaves["bias"].shape
    if layer == "fc":
      shapes |= {"fc.weight": kernel, "fc.bias": width}
    else:
      shapes |= {f"{layer}.conv.weight": kernel} | {f"{layer}.bn.{kind}": width for kind in _NORM}
  weights.check_tensors(
    arrays,
    shapes,
    source=source,
    what="the FID Inception's weights",
    needed=f"the tensors of {PUBLISHED.url}; torchvision's Inception is another network",
  )
  params = {}
  for layer in layers:
    if layer == "fc":
      kernel, bias = arrays["fc.weight"].T, arrays["fc.bias"]
    else:
      norm = {kind: np.asarray(arrays[f"{layer}.bn.{kind}"], np.float64) for kind in _NORM}
      scale = norm["weight"] / np.sqrt(norm["running_var"] + _NORM_EPSILON)
      kernel = arrays[f"{layer}.conv.weight"].transpose(2, 3, 1, 0) * scale
      bias = norm["bias"] - norm["running_mean"] * scale
    params[layer] = {"kernel": kernel, "bias": bias}
  return jax.tree.map(lambda a: np.ascontiguousarray(a, np.float32), params)


def _interpolation(size):
  """[299, size] weights of the input's pixels in each output pixel, at most two of them not 0."""
  # In float32, as TensorFlow computes the positions.
  position = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
  rows, low = np.arange(SIZE), position.astype(np.int64)
  high_weight = position - low.astype(np.float32)
  matrix = np.zeros((SIZE, size), np.float32)
  matrix[rows, low] = 1 - high_weight
  matrix[rows, np.minimum(low + 1, size - 1)] += high_weight  # the edge is repeated
  return matrix


class _Network(nn.Module):
  """Images [B, 299, 299, 3] of about [-1, 1] -> all outputs by name."""

  @nn.compact
  def __call__(self, x):
    def conv(x, layer, channels, size=1, stride=1, padding=None, pool=lambda x: x, block=""):
      name, precision = block + layer, weights.PRECISION
      sizes = (size, size) if isinstance(size, int) else size
      # But for two at the beginning, those of stride 1 keep the size, and strided ones do not pad.
      padding = padding or ("SAME" if stride == 1 else "VALID")
      x = nn.Conv(channels, sizes, stride, padding, precision=precision, name=name)(x)
      return nn.relu(pool(x))

    within = lambda block: functools.partial(conv, block=f"{block}.")
    outputs = {}
    x = conv(x, "Conv2d_1a_3x3", 32, 3, stride=2)
    x = conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
    x = conv(x, "Conv2d_2b_3x3", 64, 3)
    x = _halve(x)
    x = conv(x, "Conv2d_3b_1x1", 80)
    x = conv(x, "Conv2d_4a_3x3", 192, 3, padding="VALID")
    x = _halve(x)
    for block, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
      x = _block_35(within(block), x, pooled)
    x = _block_35_to_17(within("Mixed_6a"), x)
    widths = {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}
    for block, width in widths.items():
      x = _block_17(within(block), x, width)
      if block == "Mixed_6d":  # mixed_6 of TensorFlow's graph, whose first branch is its `conv`
        outputs["spatial"] = x[..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
    x = _block_17_to_8(within("Mixed_7a"), x)
    x = _block_8(within("Mixed_7b"), x, _average_branch)
    # An oddity of this graph, with which it was trained.
    x = _block_8(within("Mixed_7c"), x, _maximum_branch)
    outputs["features"] = x = x.mean((1, 2))
    outputs["logits"] = _Classifier(name="fc")(x)
    return outputs


class _Classifier(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], _CLASSES))
    # Part of the published file; the Inception Score leaves it out.
    self.param("bias", nn.initializers.zeros, (_CLASSES,))
    return jnp.dot(x, kernel, precision=weights.PRECISION)


def _block_35(conv, x, pooled):
  return _joined(
    conv(x, "branch1x1", 64),
    _chain(conv, x, ("branch5x5_1", 48), ("branch5x5_2", 64, 5)),
    _chain(conv, x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
    _average_branch(conv, x, pooled),
  )


def _block_35_to_17(conv, x):
  double = ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)
  return _joined(conv(x, "branch3x3", 384, 3, 2), _chain(conv, x, *double), _halve(x))


def _block_17(conv, x, width):
  name, row, column = "branch7x7", (1, 7), (7, 1)
  single = (f"{name}_1", width), (f"{name}_2", width, row), (f"{name}_3", 192, column)
  double = (f"{name}dbl_1", width), (f"{name}dbl_2", width, column), (f"{name}dbl_3", width, row)
  double += (f"{name}dbl_4", width, column), (f"{name}dbl_5", 192, row)
  return _joined(
    conv(x, "branch1x1", 192),
    _chain(conv, x, *single),
    _chain(conv, x, *double),
    _average_branch(conv, x, 192),
  )


def _block_17_to_8(conv, x):
  name = "branch7x7x3"
  wide = (f"{name}_1", 192), (f"{name}_2", 192, (1, 7)), (f"{name}_3", 192, (7, 1))
  narrow = _chain(conv, x, ("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2))
  return _joined(narrow, _chain(conv, x, *wide, (f"{name}_4", 192, 3, 2)), _halve(x))


def _block_8(conv, x, pool_branch):
  single = conv(x, "branch3x3_1", 384)
  double = _chain(conv, x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3))
  return _joined(
    conv(x, "branch1x1", 320),
    conv(single, "branch3x3_2a", 384, (1, 3)),
    conv(single, "branch3x3_2b", 384, (3, 1)),
    conv(double, "branch3x3dbl_3a", 384, (1, 3)),
    conv(double, "branch3x3dbl_3b", 384, (3, 1)),
    pool_branch(conv, x, 192),
  )


def _average_branch(conv, x, channels):
  # In the graph the pool comes first. An average that leaves out the padding commutes with a 1x1
  # convolution and its bias, and here has a quarter to a tenth of the channels.
  average = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
  )
  return conv(x, "branch_pool", channels, pool=average)


def _maximum_branch(conv, x, channels):
  return conv(nn.max_pool(x, (3, 3), padding="SAME"), "branch_pool", channels)


def _chain(conv, x, *layers):
  for layer in layers:
    x = conv(x, *layer)
  return x


def _halve(x):
  return nn.max_pool(x, (3, 3), (2, 2))


def _joined(*branches):
  return jnp.concatenate(branches, axis=-1)
