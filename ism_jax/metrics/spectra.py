"""How much of sets of images lies at which frequencies.

Axes: N images, H/W size, C channels.
"""

import numpy as np
import pywt

from ism_jax.data import to_unit_range


def radial_power(images):
  """Power spectrum of images, averaged over rings of equal frequency, images and channels.

  A Hann window keeps the jump between opposite edges out of the high frequencies; each image's mean
  is taken off first.

  Args:
    images: uint8 [N, H, W, C].
  Returns:
    float64 [S // 2]: mean power at 1, ..., S // 2 cycles in S pixels, in any direction, where S is
    the smaller of H and W; of values in [-1, 1].
  """
  images = to_unit_range(np.asarray(images), np.float64)
  if images.ndim != 4:
    raise ValueError(f"images have shape {images.shape}; needed are [N, H, W, C].")
  size = images.shape[1:3]
  window = np.outer(*(np.hanning(n + 2)[1:-1] for n in size))[:, :, None]
  window /= np.sqrt(np.mean(window**2))
  centred = images - images.mean(axis=(1, 2), keepdims=True)
  power = np.zeros(size)
  for start in range(0, len(images), 1024):
    spectrum = np.fft.fft2(centred[start : start + 1024] * window, axes=(1, 2))
    power += np.sum(np.abs(spectrum) ** 2, axis=(0, 3))
  power /= images.size
  rows, columns = (np.fft.fftfreq(n, 1 / n) * (min(size) / n) for n in size)
  ring = np.hypot(rows[:, None], columns[None, :]).round().astype(int).ravel()
  totals = np.bincount(ring, power.ravel()) / np.bincount(ring)
  return totals[1 : min(size) // 2 + 1]


def finest_octave(spectrum) -> float:
  """Mean power of the upper half of the frequencies of `radial_power`."""
  return float(np.mean(spectrum[len(spectrum) // 2 :]))


def band_energies(images):
  """Mean square of the coefficients of each level of a full Haar decomposition.

  Args:
    images: uint8 [N, H, W, C]; the smaller side decides how many levels there are.
  Returns:
    float64 [levels]: the three detail bands of each level together, finest first, of values in
    [-1, 1]. The coarsest approximation, which is the image's mean, is left out.
  """
  images = to_unit_range(np.asarray(images), np.float64)
  levels = pywt.dwt_max_level(min(images.shape[1:3]), "haar")
  _, *details = pywt.wavedec2(images, "haar", level=levels, axes=(1, 2))
  return np.array([np.mean(np.square(bands)) for bands in reversed(details)])
