"""Power and band energies of images whose spectra are known."""

import numpy as np
import pytest

from ism_jax.metrics import spectra


@pytest.fixture
def rng():
  return np.random.default_rng(7)


def test_white_noise_has_its_variance_at_every_frequency(rng):
  sigma = 40.0
  images = np.clip(np.round(127.5 + sigma * rng.normal(size=(2000, 16, 16, 3))), 0, 255)
  power = spectra.radial_power(images.astype(np.uint8))
  assert power.shape == (8,)
  # The window moves a little of the lowest frequencies into the mean, which is taken off.
  np.testing.assert_allclose(power[1:], (sigma / 127.5) ** 2, rtol=0.02)


@pytest.mark.parametrize("cycles", [2, 4, 6])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [(16, 16), (16, 40), (24, 16), (17, 33)])
def test_a_wave_has_its_power_at_its_own_frequency(cycles, axis, size):
  """In cycles of the shorter side, whichever way it runs."""
  wave = np.cos(2 * np.pi * cycles / min(size) * np.arange(size[0 if axis else 1]) + 0.3)
  image = np.broadcast_to(wave[:, None] if axis else wave[None], size)
  images = np.round(127.5 + 100 * image).astype(np.uint8)[None, :, :, None]
  power = spectra.radial_power(images)
  assert power.argmax() == cycles - 1
  # Nothing of a slow wave leaks to the highest frequencies, as it would without a window.
  assert cycles > 4 or power[-1] < 1e-3 * power.max()


def test_band_energies_are_those_of_averages_and_differences(rng):
  """A Haar decomposition by hand, of as many levels as the smaller side has."""
  images = rng.integers(0, 256, (50, 4, 12, 2), np.uint8)
  x = images / 127.5 - 1
  details = []
  for _ in range(2):
    a, b, c, d = x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]
    bands = (a + b - c - d, a - b + c - d, a - b - c + d)
    details.append(np.mean([np.mean((band / 2) ** 2) for band in bands]))
    x = (a + b + c + d) / 2
  np.testing.assert_allclose(spectra.band_energies(images), details, rtol=1e-9)


def test_one_image_is_no_set():
  with pytest.raises(ValueError, match=r"\(8, 6, 1\)"):
    spectra.radial_power(np.zeros((8, 6, 1), np.uint8))
