"""Attention: written out, and the TPU's kernel as JAX's interpreter runs it."""

import dataclasses
import functools

from examples import random_params
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import attention, model
from ism_jax.performance import topology
from ism_jax.runtime import sharding


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


def packed(key, tokens, width):
  """(product [2, T, 3 D], bias [3 D], cotangent [2, T, D])."""
  keys = jax.random.split(key, 3)
  shapes = (2, tokens, 3 * width), (3 * width,), (2, tokens, width)
  return list(map(jax.random.normal, keys, shapes))


def value_and_gradients(kind, heads, product, bias, cotangent):
  """(out, gradient of the product, of the bias) of `attend`."""
  tokens = product.shape[1]
  out, vjp = jax.vjp(lambda p, b: attention.attend(p, b, tokens, heads, kind), product, bias)
  return (out, *vjp(cotangent))


def errors(actual, expected):
  norm = lambda a: np.linalg.norm(np.float64(a))
  pairs = zip(map(np.float64, actual), map(np.float64, expected), strict=True)
  return [norm(a - b) / norm(b) for a, b in pairs]


# Tokens of 256 x 256 and of 512 x 512 images, and half a block; heads of 72 and of 64 features.
@pytest.mark.parametrize(
  ("tokens", "width", "heads"), [(256, 1152, 16), (1024, 128, 2), (128, 128, 2)]
)
def test_the_kernel_and_its_gradient_are_those_of_the_softmax(key, tokens, width, heads):
  """In float32, and in bfloat16 nearer to float32 than written out."""
  arrays = packed(key, tokens, width)
  halves = [a.astype(jnp.bfloat16) for a in arrays]
  rounded = [a.astype(jnp.float32) for a in halves]
  with jax.default_matmul_precision("highest"):
    exact, exact_rounded = (value_and_gradients("xla", heads, *a) for a in (arrays, rounded))
  written_out = value_and_gradients("xla", heads, *halves)
  with pltpu.force_tpu_interpret_mode():
    kernel, half = (value_and_gradients("tpu", heads, *a) for a in (arrays, halves))
  assert max(errors(kernel, exact)) < 3e-6
  assert {a.dtype for a in half} == {jnp.dtype(jnp.bfloat16)}
  assert max(errors(half, exact_rounded)) < 0.01
  assert np.all(np.less(errors(half, exact_rounded), errors(written_out, exact_rounded)))


TINY = model.ModelConfig("SiT-XS/1", "float32", remat="names", unroll=1)  # width 128


def test_the_networks_gradient_on_a_tpu_is_that_on_a_cpu(key, monkeypatch):
  """Through the scan over layers, keeping by name what the backward pass needs."""
  call = attention.pl.pallas_call
  monkeypatch.setattr(attention.pl, "pallas_call", functools.partial(call, interpret=True))
  cpu, tpu = (model.SiT(TINY, 10, True, device_kind) for device_kind in ("cpu", "TPU v6 lite"))
  assert (cpu.attention_for((8, 16)), tpu.attention_for((8, 16))) == ("xla", "tpu")
  params = random_params(cpu, (8, 16, 1))
  x = jax.random.normal(key, (2, 8, 16, 1))
  t, c = jnp.array([0.25, 0.5]), jnp.array([3, 10])
  d, w = jnp.array([0.0, 0.25]), jnp.array([0.0, 1.5])

  def gradient(network):
    loss = lambda p: jnp.sum(model.velocity_function(network, p)(x, t, c, d, w) ** 2)
    return jax.jit(jax.value_and_grad(loss))(params)

  for a, b in zip(*map(jax.tree.leaves, (gradient(tpu), gradient(cpu))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "kernels"), [("names", 2), ("dots", 3)])
def test_what_is_kept_by_name_is_not_computed_again(remat, kernels):
  """Kernels of a gradient compiled for a v6e: forward, backward; forward again if not kept."""
  devices = topology.describe("v6e:2x2").devices
  everywhere = sharding.replicated(sharding.data_mesh(devices[:1]))
  cfg = dataclasses.replace(TINY, dtype="bfloat16", remat=remat)
  network, numbers = model.SiT(cfg, 10, True, "TPU v6 lite"), jnp.zeros(2)
  shapes = jax.eval_shape(lambda k: model.init_params(k, network, (8, 16, 1)), jax.random.key(0))
  inputs = (jnp.zeros((2, 8, 16, 1)), numbers, numbers.astype(int), numbers, numbers)
  loss = lambda p: jnp.sum(model.velocity_function(network, p)(*inputs))
  compiled = jax.jit(jax.grad(loss), in_shardings=everywhere).lower(shapes).compile()
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.parametrize(
  ("device_kind", "tokens", "width", "heads", "dtype", "kind"),
  [
    ("TPU v4", 256, 1152, 16, "bfloat16", "tpu"),
    ("TPU v5", 256, 384, 6, "bfloat16", "tpu"),
    ("TPU v6 lite", 1024, 1152, 16, "bfloat16", "tpu"),
    ("TPU v5 lite", 256, 1152, 16, "float32", "tpu"),
    ("TPU v4", 1024, 1152, 16, "bfloat16", "xla"),  # more than the chip holds
    ("TPU v3", 1024, 1152, 16, "bfloat16", "xla"),
    ("TPU v6 lite", 64, 1152, 16, "bfloat16", "xla"),  # patches of 4
    ("TPU v6 lite", 384, 1152, 16, "bfloat16", "xla"),
    ("TPU v6 lite", 256, 96, 3, "bfloat16", "xla"),
    ("NVIDIA H100 80GB HBM3", 256, 1152, 16, "bfloat16", "cudnn"),
    ("NVIDIA H100 80GB HBM3", 256, 1152, 16, "float32", "xla"),
    ("cpu", 256, 1152, 16, "bfloat16", "xla"),
    (None, 256, 1152, 16, "bfloat16", "xla"),
  ],
)
def test_attention_is_chosen_by_device_and_size(
  device_kind, tokens, width, heads, dtype, kind, caplog
):
  attention.choose.cache_clear()
  with caplog.at_level("INFO", logger="absl"):
    assert attention.choose(device_kind, tokens, width, heads, jnp.dtype(dtype)) == kind
  is_fallback = str(device_kind).startswith("TPU") and kind == "xla"
  assert (f"no kernel fits it on {device_kind}" in caplog.text) == is_fallback
