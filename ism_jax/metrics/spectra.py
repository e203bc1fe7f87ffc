"""How much of sets of images lies at which frequencies.

Axes: N images, H size, C channels.
"""

import numpy as np
import pywt

from ism_jax.data import to_unit_range


def radial_power(images):
  """Power spectrum of images, averaged over rings of equal frequency, images and channels.

  A Hann window keeps the jump between opposite edges out of the high frequencies; each image's mean
  is taken off first.

  Args:
    images: uint8 [N, H, H, C].
  Returns:
    float64 [H / 2]: mean power at 1, ..., H / 2 cycles per image, of values in [-1, 1].
  """
  images = to_unit_range(np.asarray(images), np.float64)
  size = images.shape[1]
  if images.ndim != 4 or images.shape[2] != size or size % 2:
    raise ValueError(f"images have shape {images.shape}; needed are [N, H, H, C] with H even.")
  hann = np.hanning(size + 2)[1:-1]
  window = np.outer(hann, hann)[:, :, None]
  window /= np.sqrt(np.mean(window**2))
  centred = images - images.mean(axis=(1, 2), keepdims=True)
  power = np.zeros((size, size))
  for start in range(0, len(images), 1024):
    spectrum = np.fft.fft2(centred[start : start + 1024] * window, axes=(1, 2))
    power += np.sum(np.abs(spectrum) ** 2, axis=(0, 3))
  power /= images.size
  cycles = np.fft.fftfreq(size, 1 / size)
  ring = np.hypot(cycles[:, None], cycles[None, :]).round().astype(int).ravel()
  totals = np.bincount(ring, power.ravel()) / np.bincount(ring)
  return totals[1 : size // 2 + 1]


def finest_octave(spectrum) -> float:
  """Mean power of the upper half of the frequencies of `radial_power`."""
  return float(np.mean(spectrum[len(spectrum) // 2 :]))


def band_energies(images):
  """Mean square of the coefficients of each level of a full Haar decomposition.

  Args:
    images: uint8 [N, H, H, C], H a power of two times an odd number.
  Returns:
    float64 [levels]: the three detail bands of each level together, finest first, of values in
    [-1, 1]. The coarsest approximation, which is the image's mean, is left out.
  """
  images = to_unit_range(np.asarray(images), np.float64)
  levels = pywt.dwt_max_level(images.shape[1], "haar")
  _, *details = pywt.wavedec2(images, "haar", level=levels, axes=(1, 2))
  return np.array([np.mean(np.square(bands)) for bands in reversed(details)])
