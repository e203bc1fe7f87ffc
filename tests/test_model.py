from examples import random_params, tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import experiment, model

PUBLISHED = {  # million parameters of SiT-*/2 (Ma et al. 2024, Table 1)
  "SiT-S/2": 33,
  "SiT-B/2": 130,
  "SiT-L/2": 458,
  "SiT-XL/2": 675,
}


def config(**changes):
  values = {"size": "SiT-XXS/2", "dtype": "float32", "remat": "none", "unroll": 1}
  return model.ModelConfig(**values | changes)


def shapes_of(cfg, shape=(32, 32, 4), num_classes=1000, guided=True):
  network = model.SiT(cfg, num_classes, guided)
  return jax.eval_shape(lambda: model.init_params(jax.random.key(0), network, shape))


def inputs(key, n=3, size=(8, 8)):
  x = jax.random.normal(key, (n, *size, 1))
  t = jnp.linspace(0.1, 0.8, n)
  return x, t, jnp.arange(n), jnp.full(n, 0.25), jnp.full(n, 0.5)


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_have_the_published_number_of_parameters(size):
  shapes = shapes_of(config(size=size))
  count = sum(np.prod(a.shape) for a in jax.tree.leaves(shapes))
  width = shapes["d_embedder"]["mlp_2"]["bias"].shape[0]
  embedders = 2 * (257 * width + (width + 1) * width)  # of d and w, which SiT does not have
  assert round((count - embedders) / 1e6) == pytest.approx(PUBLISHED[size], abs=1)


def numpy_sit(params, x, t, c, d, w, *, patch, heads):
  """SiT's forward pass written out with loops over blocks and heads, float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  dense = lambda q, h: h @ q["kernel"] + q["bias"]
  silu = lambda h: h / (1 + np.exp(-h))
  gelu = lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  norm = lambda h: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)

  def embed(q, a):
    frequencies = 10_000 ** (-np.arange(128) / 128)
    angles = np.asarray(a, np.float64)[:, None] * frequencies
    h = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    return dense(q["mlp_2"], silu(dense(q["mlp_0"], h)))

  level = np.where(np.asarray(d) == 0, 0, np.log2(np.maximum(d, 1 / 128) * 128))
  condition = embed(p["t_embedder"], t) + p["y_embedder"]["embedding"][np.asarray(c)]
  condition = silu(condition + embed(p["d_embedder"], level) + embed(p["w_embedder"], w))
  n, *size, channels = x.shape
  rows, columns = (side // patch for side in size)
  width = p["x_embedder"]["bias"].size
  omega = 10_000 ** (-np.arange(width // 4) / (width / 4))
  out = np.zeros((n, *size, channels))
  for b in range(n):
    tokens = []
    for i in range(rows):
      for j in range(columns):
        pixels = np.asarray(x[b, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch])
        sinusoids = [f(k * omega) for k in (j, i) for f in (np.sin, np.cos)]
        tokens.append(dense(p["x_embedder"], pixels.ravel()) + np.concatenate(sinusoids))
    h = np.stack(tokens)
    for layer in range(p["blocks"]["fc1"]["bias"].shape[0]):
      q = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
      shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(
        dense(q["adaLN_modulation"], condition[b]), 6
      )
      qkv = dense(q["attn"]["qkv"], norm(h) * (1 + scale_a) + shift_a)
      query, key_, value = np.split(qkv, 3, axis=1)
      k = width // heads
      heard = []
      for head in range(heads):
        s = slice(head * k, (head + 1) * k)
        score = query[:, s] @ key_[:, s].T / np.sqrt(k)
        attention = np.exp(score - score.max(1, keepdims=True))
        heard.append(attention / attention.sum(1, keepdims=True) @ value[:, s])
      h = h + gate_a * dense(q["attn"]["proj"], np.concatenate(heard, 1))
      m = norm(h) * (1 + scale_m) + shift_m
      h = h + gate_m * dense(q["fc2"], gelu(dense(q["fc1"], m)))
    shift, scale = np.split(dense(p["final_adaLN_modulation"], condition[b]), 2)
    h = dense(p["final_linear"], norm(h) * (1 + scale) + shift)
    for i in range(rows):
      for j in range(columns):
        pixels = h[i * columns + j].reshape(patch, patch, channels)
        out[b, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = pixels
  return out


@pytest.mark.parametrize("size", [(8, 8), (4, 10), (6, 2)])
def test_the_network_is_sit_written_out_in_numpy(key, size):
  network = model.SiT(config(), 10, True)
  params = random_params(network, (*size, 1))
  x, t, c, d, w = inputs(key, size=size)
  d = jnp.array([0.0, 1 / 64, 1.0])
  out = model.velocity_function(network, params)(x, t, c, d, w)
  expected = numpy_sit(params, np.asarray(x, np.float64), t, c, d, w, patch=2, heads=3)
  np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 3)])
def test_positions_are_those_of_sits_code_on_a_grid_of_rows_and_columns(grid):
  """SiT's get_2d_sincos_pos_embed, with one count each of rows and columns."""
  one_axis = lambda positions, omega: np.einsum("m,d->md", positions.reshape(-1), omega)
  omega = 1.0 / 10_000 ** (np.arange(12, dtype=np.float64) / 12.0)  # of width 48
  across, down = np.meshgrid(np.arange(grid[1]), np.arange(grid[0]))  # columns first
  angles = one_axis(across, omega), one_axis(down, omega)
  expected = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
  actual = model.position_embedding(48, grid)
  assert actual.dtype == np.float32 and actual.shape == (np.prod(grid), 48)
  np.testing.assert_array_equal(actual, expected.astype(np.float32))


def test_a_new_network_predicts_zero_and_its_gates_are_closed(key):
  network = model.SiT(config(), 10, True)
  params = model.init_params(key, network, (8, 8, 1))
  np.testing.assert_array_equal(model.velocity_function(network, params)(*inputs(key)), 0)
  np.testing.assert_array_equal(params["blocks"]["adaLN_modulation"]["kernel"], 0)


@pytest.mark.parametrize("changes", [*({"remat": r} for r in model.REMATS[1:]), {"unroll": 3}])
def test_remat_and_unrolling_change_neither_output_nor_gradient(key, changes):
  network, other = model.SiT(config(), 10, True), model.SiT(config(**changes), 10, True)
  params = random_params(network, (8, 8, 1))
  f = lambda net: jax.jit(
    jax.value_and_grad(lambda p: jnp.sum(model.velocity_function(net, p)(*inputs(key)) ** 2))
  )
  for a, b in zip(*map(jax.tree.leaves, (f(network)(params), f(other)(params))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_bfloat16_blocks_stay_near_float32_and_keep_float32_outside(key):
  network = model.SiT(config(), 10, True)
  half = model.SiT(config(dtype="bfloat16"), 10, True)
  params = random_params(network, (8, 8, 1))
  full, low = (model.velocity_function(n, params)(*inputs(key)) for n in (network, half))
  assert low.dtype == jnp.float32
  error = jnp.linalg.norm(full - low) / jnp.linalg.norm(full)
  assert 1e-5 < error < 0.05
  assert {a.dtype for a in jax.tree.leaves(shapes_of(config(dtype="bfloat16")))} == {
    jnp.dtype("float32")
  }


def test_without_intrinsic_guidance_there_is_no_w_embedder(key):
  sm = experiment.parse(tiny_config("sm")).network()
  params = random_params(sm, (8, 8, 1))
  assert "w_embedder" not in params
  x, t, c, d, w = inputs(key)
  velocity = model.velocity_function(sm, params)
  np.testing.assert_array_equal(velocity(x, t, c, d, w), velocity(x, t, c, d, w + 1))


def test_neighbouring_step_sizes_are_told_apart(key):
  """The embedding of d = 0 differs from that of 1/64 as much as 1/2 from 1, or the finest blurs."""
  embedding = model.sinusoid(
    jax.vmap(lambda d: model.paths.level(d))(jnp.array([0, 1 / 64, 1 / 2, 1]))
  )
  gap = lambda i, j: jnp.linalg.norm(embedding[i] - embedding[j])
  assert 0.5 < gap(0, 1) / gap(2, 3) < 2


@pytest.mark.parametrize("size", ["SiT-H/2", "XL/2", "SiT-XL/3", "SiT-XL"])
def test_an_unknown_size_lists_the_known_ones(size):
  with pytest.raises(ValueError, match="known are SiT-"):
    config(size=size)


def test_an_unknown_attention_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"model\.attention='flash' is unknown; known are auto, xla"):
    config(attention="flash")


def test_an_image_that_the_patch_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="9x8 images do not split into the 2x2 patches"):
    model.check_image_size(config(), (9, 8))
