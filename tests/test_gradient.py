"""The gradient over devices and micro-batches, before clipping and Adam could hide an error."""

import functools

from examples import tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ism_jax import experiment, model, objectives, steps
from ism_jax import state as state_lib
from ism_jax.runtime import sharding

IDENTITY = {"target": "identity", "times": "logit_normal", "jumps": "continuous"}
PROGRESS = 0.25  # of the run, for a curriculum


def randomised(params, key):
  """Weights that are nowhere zero: at SiT's initialisation most gradients are."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  noise = [0.05 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, [a + n for a, n in zip(leaves, noise, strict=True)])


def problem(
  micro_batches=1,
  variant="ism",
  batch_size=128,
  unroll=3,
  placement="replicated",
  gradient_dtype="float32",
  **objective,
):
  """One fixed global batch: (experiment, arguments of the gradient function)."""
  config = tiny_config(variant)
  config.batch_size, config.micro_batches = batch_size, micro_batches
  config.model.unroll = unroll
  config.placement, config.gradient_dtype = placement, gradient_dtype
  config.model.attention = "xla"
  config.objective.update(objective)
  exp = experiment.parse(config)
  keys = jax.random.split(jax.random.key(1), 6)
  params = model.init_params(keys[0], exp.network(), exp.image_shape)
  online, target = randomised(params, keys[1]), randomised(params, keys[2])
  x0, x1 = (jax.random.normal(k, (batch_size, *exp.image_shape)) for k in keys[3:5])
  c = jnp.arange(batch_size) % 10
  conditions = objectives.draw_conditions(keys[5], c, exp.objective, exp.null_class)
  return exp, (online, target, x0, x1, conditions)


def gradient_and_metrics(devices, micro_batches, slices=1, **changes):
  """What training differentiates, on some devices, and all that is logged of it."""
  exp, arguments = problem(micro_batches, **changes)
  mesh = sharding.data_mesh(jax.devices()[:devices])
  if slices > 1:
    mesh = jax.sharding.Mesh(
      mesh.devices.reshape(slices, -1), mesh.axis_names, axis_types=mesh.axis_types
    )
  everywhere = sharding.replicated(mesh)
  gradient = jax.jit(steps.gradient_function(exp, mesh), in_shardings=everywhere)
  (loss, parts), grad = jax.device_get(gradient(*arguments, None, PROGRESS))
  return grad, {"loss": loss, **parts}


def gradient_and_loss(*split, **changes):
  """`gradient_and_metrics` with the loss alone."""
  grad, metrics = gradient_and_metrics(*split, **changes)
  return grad, metrics["loss"]


def relative_difference(a, b):
  """Largest difference of a leaf, relative to the leaf's norm."""
  return max(
    np.linalg.norm(x - y) / np.linalg.norm(y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@pytest.fixture(scope="module")
def reference():
  return gradient_and_loss(devices=1, micro_batches=1)


@pytest.mark.parametrize(("devices", "micro_batches"), [(8, 1), (1, 4), (8, 2), (2, 4)])
def test_the_raw_gradient_depends_neither_on_devices_nor_on_micro_batches(
  reference, devices, micro_batches
):
  grad, loss = gradient_and_loss(devices, micro_batches)
  np.testing.assert_allclose(loss, reference[1], rtol=1e-5)
  assert relative_difference(grad, reference[0]) < 1e-5


def test_sharded_parameters_get_their_part_of_the_same_gradient(reference):
  """Reduced and scattered; and summed in bfloat16, near it but not the same."""
  grad, loss = gradient_and_loss(8, 1, placement="sharded")
  np.testing.assert_allclose(loss, reference[1], rtol=1e-5)
  assert relative_difference(grad, reference[0]) < 1e-5
  grad, _ = gradient_and_loss(8, 2, placement="sharded", slices=2)
  assert relative_difference(grad, reference[0]) < 1e-5
  rounded, _ = gradient_and_loss(8, 1, placement="sharded", gradient_dtype="bfloat16")
  assert 1e-4 < relative_difference(rounded, reference[0]) < 1e-2


@functools.cache
def on_one_device(**changes):
  return gradient_and_metrics(1, 1, **changes)


@pytest.mark.parametrize(
  ("micro_batches", "changes"),
  [
    (1, {"batch_size": 16}),
    (2, {"batch_size": 16}),
    (1, {"batch_size": 8, "variant": "sm"}),
    pytest.param(1, {"batch_size": 24, "guidance_parameters": "target"}, marks=pytest.mark.slow),
    pytest.param(1, {"batch_size": 16, **IDENTITY, "curriculum": 1.0}, marks=pytest.mark.slow),
  ],
)
def test_devices_that_lack_rows_of_some_losses_change_nothing(micro_batches, changes):
  """On 8 devices, one to three rows at a time of a pattern of four (eight: SM's)."""
  expected, expected_metrics = on_one_device(**changes, unroll=1)
  grad, metrics = gradient_and_metrics(8, micro_batches, **changes, unroll=1)
  assert relative_difference(grad, expected) < 1e-5
  assert metrics.keys() == expected_metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_nor_do_they_change_the_gradient_norm_of_each_loss():
  exp, (online, target, x0, x1, _) = problem(batch_size=8, unroll=1)
  state = state_lib.TrainState(jnp.int32(5), online, None, online, target)
  pool = {"x0": x0[None], "x1": x1[None], "c": jnp.arange(8)[None]}

  def norms(devices):
    function = steps.gradient_norms_function(exp, sharding.data_mesh(jax.devices()[:devices]))
    return function(state, pool, steps.base_keys(0), 0)

  on_one, on_eight = norms(1), norms(8)
  assert len(on_one) == 3 and on_one.keys() == on_eight.keys()
  for name, value in on_one.items():
    np.testing.assert_allclose(on_eight[name], value, rtol=1e-5, err_msg=name)


def test_leaving_the_sum_over_devices_to_jax_too_would_be_noticed(reference, monkeypatch):
  """The classic error: replicated parameters make jax.grad sum over devices, before ours."""
  monkeypatch.setattr(jax.lax, "pcast", lambda x, *_, **__: x)
  grad, _ = gradient_and_loss(8, 1)
  assert relative_difference(grad, reference[0]) > 1


def test_the_gradient_is_that_of_the_loss_without_any_mesh(reference):
  exp, (online, target, *rest) = problem()
  velocity = lambda params: model.velocity_function(exp.network(), params)

  @jax.jit
  @jax.grad
  def expected(params):
    return objectives.losses(
      velocity(params), velocity(target), *rest, exp.objective, exp.wavelet, exp.null_class, 128
    )[0]

  assert relative_difference(jax.device_get(expected(online)), reference[0]) < 1e-5


def test_target_parameters_in_the_guidance_pair_change_the_gradient(reference):
  grad, _ = gradient_and_loss(1, 1, guidance_parameters="target")
  assert relative_difference(grad, reference[0]) > 1e-3


def test_the_gradient_norm_of_each_loss_is_that_of_its_loss():
  """Weighted, on 8 devices, against the gradient of each part without any mesh."""
  exp, (online, target, x0, x1, _) = problem(alpha=2.0, gamma=3.0)
  c = jnp.arange(128) % 10
  mesh, keys = sharding.data_mesh(), steps.base_keys(0)
  state = state_lib.TrainState(jnp.int32(5), online, None, online, target)
  pool = {name: jnp.stack([jnp.zeros_like(a), a]) for name, a in (("x0", x0), ("x1", x1))}
  pool["c"] = jnp.stack([c, c])
  norms = steps.gradient_norms_function(exp, mesh)(state, pool, keys, 1)
  conditions = steps.draw_conditions(exp, state, {"c": c}, keys)
  velocity = lambda params: model.velocity_function(exp.network(), params)

  settings = (exp.objective, exp.wavelet, exp.null_class, 128)

  @jax.jit
  @jax.jacrev
  def parts(params):
    _, parts = objectives.losses(velocity(params), velocity(target), x0, x1, conditions, *settings)
    return {name: parts[name] for name in ("velocity", "guidance", "consistency")}

  expected = {name: optax.tree.norm(tree) for name, tree in parts(online).items()}
  np.testing.assert_allclose(norms["gradient_norm/velocity"], 2 * expected["velocity"], rtol=1e-4)
  np.testing.assert_allclose(norms["gradient_norm/guidance"], expected["guidance"], rtol=1e-4)
  np.testing.assert_allclose(
    norms["gradient_norm/consistency"], 3 * expected["consistency"], rtol=1e-4
  )


@pytest.mark.parametrize(
  ("variant", "loss", "norm"),
  [("ism", 5.54225, 4.845316), ("sm", 2.148267, 1.710173)],
)
def test_the_gradients_of_the_papers_methods_stay_what_they_are(reference, variant, loss, norm):
  """Of weights and rows that are written down: another value is another method."""
  grad, now = reference if variant == "ism" else gradient_and_loss(1, 1, variant=variant)
  np.testing.assert_allclose(now, loss, rtol=1e-4)
  np.testing.assert_allclose(optax.tree.norm(grad), norm, rtol=1e-4)


BEYOND = {"rollout": {"rollout": True, "w_scaled": True}, "identity": IDENTITY}


@pytest.mark.slow
@pytest.mark.parametrize("changes", BEYOND.values(), ids=BEYOND)
def test_nor_do_devices_change_the_gradient_of_what_is_not_the_papers(changes):
  expected, loss = gradient_and_loss(1, 1, **changes, unroll=1)
  grad, split = gradient_and_loss(8, 2, **changes, unroll=1)
  np.testing.assert_allclose(split, loss, rtol=1e-5)
  assert relative_difference(grad, expected) < 1e-5
