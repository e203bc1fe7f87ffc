"""Attention: written out, and the TPU's kernel as JAX's interpreter runs it."""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import attention, model
from ism_jax.runtime import sharding
from ism_jax.runtime.sharding import AXIS, P


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("size", [1, 30])  # of q and k: with 30 most weights are 0 or 1
def test_attention_and_its_gradient_are_those_of_the_library(key, dtype, tolerance, size):
  q, k, v, ahead = jax.random.normal(key, (4, 2, 3, 16, 8)).astype(dtype)
  q, k = size * q, size * k

  def library(*heads_first):
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in heads_first)
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v), 1, 2)

  for compute in (lambda f: f(q, k, v), lambda f: jax.vjp(f, q, k, v)[1](ahead)):
    actual, expected = (jnp.stack(compute(f)) for f in (attention.written_out, library))
    assert actual.dtype == expected.dtype == dtype
    actual, expected = np.float32(actual), np.float32(expected)
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) <= size * tolerance * np.linalg.norm(expected)


def packed(key, tokens, width, dtype=jnp.float32):
  """(product [2, T, 3 D], bias [3 D], cotangent [2, T, D]) of this dtype."""
  shapes = (2, tokens, 3 * width), (3 * width,), (2, tokens, width)
  return [
    jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True)
  ]


def value_and_gradients(kind, heads, product, bias, cotangent):
  """(out, gradient of the product, of the bias) of `attend`."""
  out, vjp = jax.vjp(lambda p, b: attention.attend(p, b, heads, kind), product, bias)
  return (out, *vjp(cotangent))


def errors(actual, expected):
  norm = lambda a: np.linalg.norm(np.float64(a))
  return [
    norm(np.float64(a) - np.float64(e)) / norm(e) for a, e in zip(actual, expected, strict=True)
  ]


# Tokens of 256 x 256 and of 512 x 512 images, and of half a block; heads of 72 and of 64 features.
@pytest.mark.parametrize(
  ("tokens", "width", "heads"), [(256, 1152, 16), (1024, 128, 2), (128, 128, 2)]
)
def test_the_kernel_and_its_gradient_are_those_of_the_softmax(key, tokens, width, heads):
  """In float32, and in bfloat16 nearer to float32 than written out."""
  arrays = packed(key, tokens, width)
  with jax.default_matmul_precision("highest"):
    exact = value_and_gradients("xla", heads, *arrays)
    with pltpu.force_tpu_interpret_mode():
      kernel = value_and_gradients("tpu", heads, *arrays)
  assert max(errors(kernel, exact)) < 3e-6
  halves = [a.astype(jnp.bfloat16) for a in arrays]
  with jax.default_matmul_precision("highest"):
    exact = value_and_gradients("xla", heads, *(a.astype(jnp.float32) for a in halves))
  with pltpu.force_tpu_interpret_mode():
    kernel = value_and_gradients("tpu", heads, *halves)
  assert all(a.dtype == jnp.bfloat16 for a in kernel)
  for ours, written_out in zip(
    errors(kernel, exact), errors(value_and_gradients("xla", heads, *halves), exact), strict=True
  ):
    assert ours < min(0.01, written_out)


def test_the_networks_gradient_on_a_tpu_is_that_on_a_cpu(key, monkeypatch):
  """Scanned and rematerialised by name, with rows split over devices whose mesh is checked."""
  monkeypatch.setitem(model._SIZES, "XS", (2, 128, 2))
  cfg = model.ModelConfig("SiT-XS/1", "float32", remat="names", unroll=1)
  cpu, tpu = (model.SiT(cfg, 10, True, device_kind) for device_kind in ("cpu", "TPU v6 lite"))
  assert cpu.attention(256) == "xla" and tpu.attention(256) == "tpu"
  from examples import random_params

  params = random_params(cpu, (8, 16, 1))
  x = jax.random.normal(key, (2, 8, 16, 1))
  t, w, d = jnp.array([0.25, 0.5]), jnp.array([0.0, 1.5]), jnp.array([0.0, 0.25])
  c = jnp.array([3, 10])
  mesh = sharding.data_mesh(jax.devices()[:2])

  def gradient(network):
    def on_device(params, *rows):
      params = jax.tree.map(lambda p: jax.lax.pcast(p, AXIS, to="varying"), params)
      loss = lambda p: jnp.sum(model.velocity_function(network, p)(*rows) ** 2)
      return jax.lax.psum(jax.value_and_grad(loss)(params), AXIS)

    rows = (P(AXIS),) * 5
    return jax.shard_map(on_device, mesh=mesh, in_specs=(P(), *rows), out_specs=P())

  expected = jax.jit(gradient(cpu))(params, x, t, c, d, w)
  with pltpu.force_tpu_interpret_mode():
    actual = jax.jit(gradient(tpu))(params, x, t, c, d, w)
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
  ("device_kind", "tokens", "width", "heads", "dtype", "kind"),
  [
    *(
      ("TPU v4", 256, w, h, "bfloat16", "tpu") for _, w, h in model._SIZES.values() if w % 128 == 0
    ),
    ("TPU v6 lite", 1024, 1152, 16, "bfloat16", "tpu"),
    ("TPU v5 lite", 256, 1152, 16, "float32", "tpu"),
    ("TPU v4", 1024, 1152, 16, "bfloat16", "xla"),  # more than the chip holds
    ("TPU v6 lite", 64, 1152, 16, "bfloat16", "xla"),  # patches of 4
    ("TPU v6 lite", 384, 1152, 16, "bfloat16", "xla"),
    ("TPU v6 lite", 256, 96, 3, "bfloat16", "xla"),
    ("NVIDIA H100 80GB HBM3", 256, 1152, 16, "bfloat16", "cudnn"),
    ("NVIDIA H100 80GB HBM3", 256, 1152, 16, "float32", "xla"),
    ("cpu", 256, 1152, 16, "bfloat16", "xla"),
    (None, 256, 1152, 16, "bfloat16", "xla"),
  ],
)
def test_attention_is_chosen_by_device_and_size(device_kind, tokens, width, heads, dtype, kind):
  assert attention.choose(device_kind, tokens, width, heads, jnp.dtype(dtype)) == kind
