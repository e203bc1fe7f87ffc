"""The whole evaluation against torch-fidelity: the same image files, the same weights."""

from examples import tiny_config
import jax
import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_sample_image
from test_inception import random_state_dict

from ism_jax.data import samples
from ism_jax.evaluation import evaluate, statistics
from ism_jax.metrics import features

COUNT = 60


def crops(seed, shrink):
  """Crops of the two photographs; those shrunk and enlarged again have lost their details."""
  rng = np.random.default_rng(seed)
  photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
  for i in range(COUNT):
    photograph = photographs[i % 2]
    y, x = (rng.integers(n - 64) for n in photograph.shape[:2])
    crop = Image.fromarray(photograph[y : y + 64, x : x + 64])
    yield np.asarray(crop.resize((64 // shrink,) * 2).resize((64, 64)))


@pytest.mark.slow
def test_our_numbers_of_real_photographs_are_those_of_torch_fidelity(pytorch, tmp_path):
  import torch_fidelity

  weights = str(tmp_path / "weights.pth")
  pytorch.save({k: pytorch.from_numpy(v) for k, v in random_state_dict().items()}, weights)
  for name, images in (("real", crops(0, 1)), ("drawn", crops(1, 4))):
    (tmp_path / name).mkdir()
    with samples.writer(str(tmp_path / f"{name}.npz"), COUNT, (64, 64, 3)) as add:
      for i, image in enumerate(images):
        add(image[None], [i % 2])
        Image.fromarray(image).save(tmp_path / name / f"{i:03d}.png")
  theirs = torch_fidelity.calculate_metrics(
    input1=str(tmp_path / "drawn"),
    input2=str(tmp_path / "real"),
    cuda=False,
    batch_size=20,
    isc=True,
    fid=True,
    kid=True,
    prc=True,
    kid_subset_size=COUNT,
    cache=False,
    verbose=False,
    feature_extractor="inception-v3-compat",
    feature_extractor_weights_path=weights,
    feature_layer_prc="2048",
    save_cpu_ram=True,
  )

  networks = (features.published("inception", weights),)
  files = statistics.make(
    samples.open(str(tmp_path / "real"), 2),
    networks,
    str(tmp_path / "statistics"),
    keep=COUNT,
    batch_size=20,
    devices=jax.devices()[:1],
  )
  config = tiny_config()
  config.evaluation.update(
    {"networks": "inception", "weights": weights, "reference": files["inception"], "batch_size": 24}
  )
  report = evaluate.evaluate_samples(config, str(tmp_path / "out"), str(tmp_path / "drawn.npz"))
  (result,) = report["results"]
  ours = result["scores"]["inception"]
  assert ours["frechet_distance"] > 1 and ours["recall"] < 0.9
  for name, of_theirs, tolerance in (
    ("frechet_distance", "frechet_inception_distance", 1e-3),
    ("kid", "kernel_inception_distance_mean", 1e-3),
    ("inception_score", "inception_score_mean", 1e-4),
    ("inception_score_sd", "inception_score_std", 1e-2),
  ):
    np.testing.assert_allclose(ours[name], theirs[of_theirs], rtol=tolerance, err_msg=name)
  for name in ("precision", "recall"):
    np.testing.assert_allclose(ours[name], theirs[name], atol=5e-3, err_msg=name)
