"""Where arrays live: the mesh, the ring, and the placements of the train state."""

import types

from examples import tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet256
from ism_jax import experiment, steps, train
from ism_jax.pretrained import vae
from ism_jax.runtime import checkpoints, sharding


@pytest.fixture(scope="module")
def mesh():
  return sharding.data_mesh()


class Device:
  """What a mesh asks of a device."""

  platform = device_kind = "TPU v5 lite"
  process_index = 0

  def __init__(self, number, slice_index):
    self.id, self.slice_index = number, slice_index

  def __repr__(self):
    return f"{self.slice_index}.{self.id}"


def test_devices_of_one_slice_stay_together():
  devices = [Device(i, i % 2) for i in range(8)]  # slices that arrive interleaved
  mesh = sharding.data_mesh(devices)
  assert dict(mesh.shape) == {"slice": 2, "data": 4}
  assert [{d.slice_index for d in row} for row in mesh.devices] == [{0}, {1}]


def test_a_process_reads_the_rows_of_its_devices_in_order_whatever_the_mesh(monkeypatch):
  """Its rows go where a single process would have put them, as training puts them there."""
  order = np.random.default_rng(0).permutation(8)
  shuffled = sharding.data_mesh([jax.devices()[i] for i in order])
  np.testing.assert_array_equal(sharding.local_rows(shuffled, 16), np.arange(16))
  whole = np.arange(16) * 10
  there = sharding.global_arrays(sharding.rows(shuffled), whole[sharding.local_rows(shuffled, 16)])
  np.testing.assert_array_equal(there, whole)
  # Of two processes, one with every second device of the mesh.
  places = type(sharding.rows(shuffled)).addressable_devices_indices_map
  halved = lambda self, shape: dict(list(places(self, shape).items())[::2])
  monkeypatch.setattr(type(sharding.rows(shuffled)), "addressable_devices_indices_map", halved)
  np.testing.assert_array_equal(sharding.local_rows(shuffled, 16), [0, 1, 4, 5, 8, 9, 12, 13])


def test_products_of_rows_over_the_ring_are_those_of_the_whole(mesh):
  x, y = jax.random.normal(jax.random.key(0), (2, 32, 48))
  product = jax.jit(lambda x, y: sharding.dot_rows(mesh, x, y))
  placed = jax.device_put((x, y), sharding.rows(mesh))
  np.testing.assert_allclose(product(*placed), x @ y.T, rtol=1e-5, atol=1e-5)
  compiled = product.lower(*placed).compile().as_text()
  assert "all-gather" not in compiled and "collective-permute" in compiled


def test_rows_are_taken_over_the_ring_without_gathering_them(mesh):
  x = jax.random.normal(jax.random.key(0), (32, 3, 2))
  indices = jax.random.permutation(jax.random.key(1), 32).at[3].set(5)  # one twice
  take = jax.jit(lambda x, i: sharding.take_rows(mesh, x, i))
  placed = jax.device_put((x, indices), sharding.rows(mesh))
  np.testing.assert_array_equal(take(*placed), x[indices])
  assert "all-gather" not in take.lower(*placed).compile().as_text()


def test_arrays_are_split_where_a_part_is_whole_rows_or_along_their_longest_axis(mesh):
  parts = lambda *shape: sharding.split(mesh, shape).spec
  assert parts(28, 64, 256) == jax.P(None, "data")
  assert parts(28, 16, 64) == jax.P(None, None, "data")
  assert parts(24, 64, 100) == jax.P(None, "data")
  assert parts(3, 10) == parts() == jax.P()


def placed(placement, devices, **changes):
  config = tiny_config()
  config.placement = placement
  config.update(changes)
  return experiment.parse(config), sharding.data_mesh(jax.devices()[:devices])


def two_calls(exp, mesh):
  """The state after a pool of 4 steps from random images, and the diagnostics of the coupling."""
  rng, keys = np.random.default_rng(0), steps.base_keys(0)
  pool = {
    "x1": rng.standard_normal((4, 64, *exp.image_shape), np.float32),
    "c": np.int32(rng.integers(10, size=(4, 64))),
  }
  pool = sharding.global_arrays(sharding.rows(mesh, axis=1), pool)
  state = steps.init_function(exp, mesh)(keys.init)
  pool, info = steps.couple_function(exp, mesh)(pool, keys, 0)
  train_steps = steps.steps_function(exp, mesh)
  for first in (0, 2):
    state, _ = train_steps(state, pool, keys, first)
  return state, info


@pytest.mark.slow
def test_a_sharded_state_trains_as_a_replicated_one():
  optimizer = {"eps": 1e-2, "clip_norm": 1.0}  # so that Adam does not blow rounding up
  changes = {"optimizer": optimizer, "ema": {"others": (0.2,)}}
  expected, paired = two_calls(*placed("replicated", 1, **changes))
  exp, mesh = placed("sharded", 8, **changes)
  state, info = two_calls(exp, mesh)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(state), strict=True
  ):
    np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))
  np.testing.assert_allclose(info["attained_gain"], paired["attained_gain"], rtol=1e-4)

  kernel = lambda tree: tree["blocks"]["fc1"]["kernel"]
  local = lambda a: a.addressable_shards[0].data.shape
  adam = next(s for s in state.opt_state[1] if hasattr(s, "mu"))
  averages = state.ema, state.target_ema, state.others["ema:0.2"]
  for tree in (state.params, *averages, adam.mu, adam.nu):
    assert np.prod(local(kernel(tree))) == kernel(tree).size // 8


@pytest.mark.slow
def test_a_checkpoint_of_a_sharded_state_continues_replicated_on_another_mesh(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
  config = tiny_config()
  config.placement, config.steps = "sharded", 4
  half = train.train(config, str(tmp_path / "run"))
  saved = jax.device_get(half)
  exp, mesh = placed("replicated", 2)
  with checkpoints.open_manager(tmp_path / "run", keep=1, read_only=True) as manager:
    state, _ = checkpoints.restore(manager, steps.abstract_state(exp, mesh))
  jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(state))
  config.placement, config.steps = "replicated", 8
  assert train.train(config, str(tmp_path / "run"), jax.devices()[:2]).step == 8


def test_gpus_without_fused_attention_have_no_kernels_kind():
  def kind(name, **attributes):
    device = types.SimpleNamespace(device_kind=name, **attributes)
    return sharding.device_kind(types.SimpleNamespace(devices=np.array([[device]])))

  h100 = "NVIDIA H100 80GB HBM3"
  assert kind(h100, compute_capability="9.0") == h100
  assert kind("NVIDIA GeForce RTX 2080 Ti", compute_capability="7.5") is None
  assert kind("AMD Instinct MI300X", compute_capability="gfx942") == "AMD Instinct MI300X"
  assert kind("cpu") == "cpu"


def test_the_state_is_sharded_where_accelerators_share_the_work_but_not_in_pods_of_three_axes(
  caplog,
):
  exp, mesh = placed("auto", 8)
  assert steps.placement(exp, mesh) == "replicated"  # CPUs

  def chips(count, kind, platform="tpu"):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    shape = {"slice": 1, "data": count}
    return types.SimpleNamespace(shape=shape, size=count, devices=np.array([device] * count))

  steps.placement.cache_clear()
  with caplog.at_level("INFO", logger="absl"):
    for count, kind, chosen in (
      (1, "TPU v6 lite", "replicated"),
      (64, "TPU v6 lite", "sharded"),
      (8, "TPU v4", "sharded"),
      (64, "TPU v4", "replicated"),
    ):
      assert steps.placement.__wrapped__(exp, chips(count, kind)) == chosen
      assert f"train state: {chosen}" in caplog.text
  assert steps.placement.__wrapped__(exp, chips(8, "NVIDIA H100", "gpu")) == "sharded"
  large = imagenet256.get_config()
  large.batch_size = 64 * 64  # rows that leave no room for the state
  assert steps.placement.__wrapped__(experiment.parse(large), chips(64, "TPU v4")) == "sharded"


def test_the_estimate_is_that_of_xl_on_a_pod():
  """Against ahead-of-time compilation for v5e:8x8: 16.4 GB with remat full, 19.6 without."""
  config = imagenet256.get_config()
  for remat, measured in (("full", 16.4e9), ("none", 19.6e9)):
    config.model.remat = remat
    np.testing.assert_allclose(
      steps.replicated_bytes(experiment.parse(config), 64), measured, rtol=0.03
    )
  exp = experiment.parse(config)
  config.ema.others = (0.99, 0.999)
  state = steps.abstract_state(exp, sharding.data_mesh())
  parameters = sum(a.size for a in jax.tree.leaves(state.params))
  more = steps.replicated_bytes(experiment.parse(config), 64) - steps.replicated_bytes(exp, 64)
  assert more == 2 * 4 * parameters


def test_a_latent_is_drawn_from_its_moments_anew_for_each_pool(mesh, monkeypatch):
  config = tiny_config()
  config.coupling.coupling = "independent"
  config.data.update({"name": "latents", "vae": "random-small", "channels": 4})
  exp = experiment.parse(config)
  keys = steps.base_keys(0)
  shape = (4, 64, 8, 8, 4)
  mean = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
  deviation = np.exp(np.linspace(-2, 0, 4, dtype=np.float16))
  moments = np.concatenate([mean, np.broadcast_to(2 * np.log(deviation), shape)], -1)
  couple = steps.couple_function(exp, mesh)
  latents = []
  for index in (0, 1):
    pool = {"moments": moments, "c": np.zeros((4, 64), np.int32)}
    pool = sharding.global_arrays(sharding.rows(mesh, axis=1), pool)
    latents.append(np.asarray(couple(pool, keys, index)[0]["x1"]))
  noise = (latents[0] / 0.18215 - mean) / deviation
  assert latents[0].dtype == np.float32 and abs(noise.mean()) < 0.02
  np.testing.assert_allclose(noise.std((0, 1, 2, 3)), 1, atol=0.02)
  other = (latents[1] / 0.18215 - mean) / deviation
  scales = []
  with monkeypatch.context() as patch:
    patch.setattr(vae, "sample_latent", lambda m, noise, *scale: scales.append(scale) or noise)
    config.data.update({"vae_scale": 0.13025, "vae_shift": 0.5})
    jax.eval_shape(steps.couple_function(experiment.parse(config), mesh), pool, keys, 0)
  assert scales == [(0.13025, 0.5)]
  assert abs(np.mean(noise * other)) < 0.02
  assert abs(jnp.corrcoef(noise.ravel(), mean.ravel().astype(np.float32))[0, 1]) < 0.02
