import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from ism_jax import wavelets

NORM = wavelets.WaveletConfig(
  form="norm", family="haar", levels=-1, weights=(), losses=("consistency",), epsilon=1e-3
)
WEIGHTED = dataclasses.replace(NORM, form="weighted")
L2 = dataclasses.replace(NORM, form="l2")


def distance(cfg, e, loss="consistency"):
  return jax.jit(lambda e: wavelets.distance(e, cfg, loss))(e)


@pytest.mark.parametrize(
  ("family", "levels", "size"),
  [("haar", 5, (32, 32)), ("haar", 3, (8, 8)), ("db2", 3, (32, 32)), ("haar", 4, (24, 40))],
)
def test_the_bands_are_those_of_pywavelets(key, family, levels, size):
  e = jax.random.normal(key, (2, *size, 3))
  assert wavelets.depth(dataclasses.replace(NORM, family=family), size) == levels
  bands = jax.jit(lambda e: [b for _, b in wavelets.bands(e, family, levels)])(e)
  expected = pywt.wavedec2(np.moveaxis(e, -1, 1), family, mode="symmetric", level=levels)
  flat = [expected[0]] + [band for triple in expected[1:] for band in triple]
  assert len(bands) == len(flat) == 3 * levels + 1
  for band, reference in zip(bands, flat, strict=True):
    np.testing.assert_allclose(band, reference.reshape(2, -1), atol=1e-5)


def test_unit_weights_of_an_orthonormal_transform_are_the_mean_squared_error(key):
  e = jax.random.normal(key, (4, 16, 16, 2))
  np.testing.assert_allclose(distance(WEIGHTED, e), jnp.mean(e**2, axis=(1, 2, 3)), rtol=1e-5)


def test_level_weights_are_those_of_pywavelets_bands(key):
  e = jax.random.normal(key, (1, 8, 8, 1))
  cfg = dataclasses.replace(WEIGHTED, weights=(4.0, 3.0, 2.0, 0.5))
  approximation, *details = pywt.wavedec2(e[0, ..., 0], "haar")
  energy = 0.5 * np.sum(approximation**2)
  for weight, triple in zip((2.0, 3.0, 4.0), details, strict=True):  # coarsest first
    energy += weight * sum(np.sum(band**2) for band in triple)
  np.testing.assert_allclose(distance(cfg, e)[0], energy / 64, rtol=1e-5)


def test_the_norm_is_its_formula_in_numpy(key):
  e = jax.random.normal(key, (1, 8, 8, 1))
  approximation, *details = pywt.wavedec2(e[0, ..., 0], "haar")
  bands = [approximation] + [band for triple in details for band in triple]
  root_n = [np.sqrt(band.size) for band in bands]
  norms = [np.sqrt(np.mean(band**2) + 1e-3) for band in bands]
  np.testing.assert_allclose(
    distance(NORM, e)[0], np.dot(root_n, norms) / np.sum(root_n), rtol=1e-5
  )


def band_error(coarse: bool):
  """An error of unit energy that lies in one band only."""
  zeros = pywt.wavedec2(np.zeros((8, 8)), "haar")
  if coarse:
    zeros[0][...] = 1
  else:
    zeros[-1][2][0, 0] = 1  # diagonal detail of the finest level
  return jnp.asarray(pywt.waverec2(zeros, "haar"), jnp.float32)[None, :, :, None]


@pytest.mark.parametrize("cfg", [NORM, L2], ids=["norm", "l2"])
def test_a_small_error_beside_a_large_one_weighs_more_under_the_norm_and_not_under_l2(cfg):
  """The gradient towards the finest band, with and without a large error in the coarsest."""
  slope = jax.grad(lambda a, b: distance(cfg, a * band_error(False) + b * band_error(True))[0])
  to_coarse = jax.grad(lambda b, a: distance(cfg, a * band_error(False) + b * band_error(True))[0])
  small, large = 0.1, 10.0
  ratio = slope(small, large) / to_coarse(large, small)
  if cfg is L2:
    np.testing.assert_allclose(ratio, small / large, rtol=1e-4)
  else:
    assert ratio > 20 * small / large


@pytest.mark.parametrize(
  ("cfg", "ratio"),
  [
    (L2, 1.0),
    (WEIGHTED, 1.0),
    (dataclasses.replace(WEIGHTED, weights=(4.0, 1.0, 1.0, 1.0)), 4.0),
    # n_b = 16 against 1: an error of the same energy is in the norm's gradient
    # n_b^(1/2) a / (n_b rms_b), rms_b = sqrt(a^2 / n_b + epsilon).
    (NORM, np.sqrt((1 + 1e-3) / (1 / 16 + 1e-3)) / 4),
  ],
)
def test_the_gradient_of_a_fine_error_against_a_coarse_one_is_that_of_the_form(cfg, ratio):
  """For an error of unit energy in only the finest diagonal band, and in only the coarsest."""
  slope = lambda e: jax.grad(lambda a: distance(cfg, a * e)[0])(1.0)
  fine, coarse = slope(band_error(False)), slope(band_error(True))
  np.testing.assert_allclose(fine / coarse, ratio, rtol=1e-4)


def test_only_the_losses_it_covers_use_the_wavelet_distance(key):
  e = jax.random.normal(key, (2, 8, 8, 1))
  for loss in ("velocity", "guidance"):
    np.testing.assert_allclose(distance(NORM, e, loss), jnp.mean(e**2, axis=(1, 2, 3)), rtol=1e-6)
  assert np.all(np.abs(distance(NORM, e) - jnp.mean(e**2, axis=(1, 2, 3))) > 0.01)


def test_zero_levels_are_one_band(key):
  e = jax.random.normal(key, (1, 8, 8, 1))
  value = distance(dataclasses.replace(NORM, levels=0), e)[0]
  np.testing.assert_allclose(value, np.sqrt(np.mean(np.square(e)) + 1e-3), rtol=1e-5)


@pytest.mark.parametrize(
  ("change", "size", "message"),
  [
    ({"levels": 4}, 8, "at most 3"),
    ({"family": "db2", "levels": 4}, 32, "at most 3"),
    ({"form": "weighted", "weights": (1.0, 2.0)}, 8, "3 levels need 4"),
  ],
)
def test_more_levels_than_size_and_family_allow_are_refused(change, size, message):
  with pytest.raises(ValueError, match=message):
    wavelets.depth(dataclasses.replace(NORM, **change), (size, size))


@pytest.mark.parametrize(
  "change",
  [{"form": "l1"}, {"family": "mexh"}, {"losses": ("all",)}, {"levels": -2}, {"epsilon": 0.0}],
)
def test_values_that_mean_nothing_are_refused(change):
  with pytest.raises(ValueError, match=f"wavelet.{next(iter(change))}"):
    dataclasses.replace(NORM, **change)
