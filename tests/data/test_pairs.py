"""The noises of each image: made once, kept beside the data, and read in step with the images."""

import dataclasses

from examples import tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import couplings, data, experiment, steps, train
from ism_jax.data import pairs
from ism_jax.runtime import sharding


def classwise():
  """The config of the tests with quick pairs."""
  config = tiny_config()
  config.coupling.update(
    {"coupling": "classwise", "class_rounds": 3, "class_steps": 50, "class_batch": 64}
  )
  return config


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """(source, data config, coupling config, keys) of digits of their own."""
  config = classwise()
  config.data.dir = str(tmp_path_factory.mktemp("data"))
  exp = experiment.parse(config)
  return data.load_source(exp.data), exp.data, exp.coupling, steps.base_keys(0)


@pytest.fixture(scope="module")
def table(digits):
  return pairs.noise_seeds(*digits)


class Numbers:
  """Ten images, each its number."""

  def __len__(self):
    return 10

  def read(self, keys, mirror):
    return {"x1": np.float32(keys) * np.where(mirror, -1, 1)}, np.zeros(len(keys), np.int32)


def test_seeds_go_with_their_image_and_take_turns_by_epochs_after_a_resumption_too():
  seeds = np.arange(30, dtype=np.int32).reshape(10, 3)
  options = {"batch_size": 4, "pool_size": 2, "seed": 1, "flip": True, "seeds": seeds}
  stream = data.pools(Numbers(), **options)
  pools = [next(stream) for _ in range(5)]  # 40 images: four epochs
  x1, seed, mirror = (
    np.concatenate([p[k].ravel() for p in pools]) for k in ("x1", "seed", "mirror")
  )
  np.testing.assert_array_equal(seed, 3 * abs(x1) + np.arange(40) // 10 % 3)
  np.testing.assert_array_equal(x1 < 0, mirror & (x1 != 0))
  assert mirror.any() and not mirror.all()
  stream = data.pools(Numbers(), **options)
  next(stream)
  resumed = data.pools(Numbers(), **options)
  resumed.set_state(stream.get_state())
  jax.tree.map(np.testing.assert_array_equal, next(resumed), pools[1])


def test_a_table_is_kept_beside_the_data_and_made_anew_for_other_settings(
  digits, table, monkeypatch
):
  source, cfg, coupling, keys = digits
  made = []
  monkeypatch.setattr(pairs, "_make", lambda *a: made.append(1) or table + len(made))
  np.testing.assert_array_equal(pairs.noise_seeds(*digits), table)
  assert not made
  ot = dataclasses.replace(coupling, epsilon=0.5, class_penalty=0.0)  # of Sinkhorn
  np.testing.assert_array_equal(pairs.noise_seeds(source, cfg, ot, keys), table)
  others = (
    (source, cfg, dataclasses.replace(coupling, class_epsilon=0.02), keys),
    (source, dataclasses.replace(cfg, vae_scale=2.0), coupling, keys),
    (source, cfg, coupling, steps.base_keys(1)),
  )
  for count, other in enumerate(others, start=1):
    np.testing.assert_array_equal(pairs.noise_seeds(*other), table + count)
    np.testing.assert_array_equal(pairs.noise_seeds(*other), table + count)


def test_a_damaged_table_is_reported_and_replaced(digits, table, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(pairs.pipeline, "directory", lambda cfg: tmp_path)
  monkeypatch.setattr(pairs, "_make", lambda *a: table)
  pairs.noise_seeds(*digits)
  (path,) = (tmp_path / "pairs").iterdir()
  whole = path.read_bytes()
  for damaged in (whole[:-200], whole.replace(b"seeds", b"seats")):
    path.write_bytes(damaged)
    np.testing.assert_array_equal(pairs.noise_seeds(*digits), table)
    assert "are no use" in caplog.text and path.read_bytes()[:100] == whole[:100]
    caplog.clear()


def test_the_table_gains_within_each_class(digits, table):
  source, cfg, _, keys = digits
  images, labels = source.read(np.arange(len(source)), np.zeros(len(source), bool))
  x1 = images["x1"].reshape(len(source), -1)
  noise = couplings.numbered_noise(keys.noise, labels, table[:, 0], cfg.image_shape)
  noise = np.asarray(noise).reshape(x1.shape)
  for label in range(10):
    x = np.asarray(couplings.standardise(x1[labels == label]))
    assert np.sum(x * noise[labels == label], axis=1).mean() > 2  # deviations; 0 at random


def test_a_class_that_is_too_large_is_an_error_with_the_bound(digits, monkeypatch):
  source, cfg, coupling, keys = digits
  monkeypatch.setattr(pairs, "LARGEST", 64 * 180)
  with pytest.raises(ValueError, match=r"has 18\d images, and .* takes 180 of data.image_size=8"):
    pairs._make(source, cfg, coupling, keys)


def test_noise_is_that_of_the_seeds_mirrored_with_its_image_on_any_number_of_devices():
  exp, keys = experiment.parse(classwise()), steps.base_keys(0)
  rng, shape = np.random.default_rng(0), (4, 64)
  pool = {
    "x1": rng.standard_normal((*shape, 8, 8, 1), np.float32),
    "c": rng.integers(10, size=shape, dtype=np.int32),
    "seed": rng.integers(10**6, size=shape, dtype=np.int32),
    "mirror": rng.integers(2, size=shape) > 0,
  }
  coupled = []
  for devices in (1, 8):
    mesh = sharding.data_mesh(jax.devices()[:devices])
    placed = sharding.global_arrays(sharding.rows(mesh, axis=1), pool)
    assert jax.tree.map(jnp.shape, placed) == jax.tree.map(
      lambda a: a.shape, steps.abstract_pool(exp, mesh)
    )
    out, info = steps.couple_function(exp, mesh)(placed, keys, 5)
    coupled.append(jax.device_get(out))
    assert set(info) == {"class_shift"} and abs(info["class_shift"]) < 0.02
  jax.tree.map(np.testing.assert_array_equal, *coupled)
  for k, m in ((0, 0), (1, 7), (3, 63)):
    key = jax.random.fold_in(jax.random.fold_in(keys.noise, pool["c"][k, m]), pool["seed"][k, m])
    noise = np.asarray(jax.random.normal(key, (8, 8, 1)))
    expected = noise[:, ::-1] if pool["mirror"][k, m] else noise
    np.testing.assert_array_equal(coupled[0]["x0"][k, m], expected)
  np.testing.assert_array_equal(coupled[0]["x1"], pool["x1"])


def test_training_reads_the_seeds_of_its_own_keys(digits, table, tmp_path, monkeypatch):
  config = classwise()
  config.data.dir = digits[1].dir
  monkeypatch.setattr(pairs, "_make", None)  # it is there already
  pools = []
  monkeypatch.setattr(train, "_loop", lambda *a: pools.append(next(a[5])) or (a[7], None))
  train.train(config, str(tmp_path / "run"), jax.devices()[:1])
  assert np.isin(pools[0]["seed"], table[:, 0]).all()
