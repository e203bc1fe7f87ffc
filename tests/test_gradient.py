"""The gradient over devices and micro-batches, before clipping and Adam could hide an error."""

from conftest import tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import experiment, model, objectives, sharding, train


def randomised(params, key):
  """Weights that are nowhere zero: at SiT's initialisation most gradients are."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  noise = [0.05 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, [a + n for a, n in zip(leaves, noise, strict=True)])


def gradient_and_loss(devices, micro_batches, **overrides):
  """Gradient of one fixed global batch of 128 rows, on some devices."""
  config = tiny_config()
  config.batch_size, config.micro_batches = 128, micro_batches
  for name, value in overrides.items():
    config.objective[name] = value
  exp = experiment.parse(config)
  mesh = sharding.data_mesh(jax.devices()[:devices])
  keys = jax.random.split(jax.random.key(1), 6)
  params = model.init_params(keys[0], exp.network(), exp.image_shape)
  online, target = randomised(params, keys[1]), randomised(params, keys[2])
  x0, x1 = (jax.random.normal(k, (128, *exp.image_shape)) for k in keys[3:5])
  c = jnp.arange(128) % 10
  given = objectives.draw_conditions(keys[5], c, exp.objective, exp.null_class)
  everywhere = sharding.replicated(mesh)
  gradient = jax.jit(train.gradient_function(exp, mesh), in_shardings=everywhere)
  (loss, _), grad = jax.device_get(gradient(online, target, x0, x1, c, given))
  return grad, loss


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


def test_a_gradient_eight_times_too_large_would_be_noticed(reference):
  eightfold = jax.tree.map(lambda g: 8 * g, reference[0])
  assert relative_difference(eightfold, reference[0]) > 1


def test_target_parameters_in_the_guidance_pair_change_the_gradient(reference):
  grad, _ = gradient_and_loss(1, 1, guidance_parameters="target")
  assert relative_difference(grad, reference[0]) > 1e-3


def test_the_gradient_is_that_of_the_loss_by_finite_differences():
  """An oracle outside automatic differentiation: the loss along one direction, in float64."""
  config = tiny_config()
  config.batch_size = 8
  exp = experiment.parse(config)
  keys = jax.random.split(jax.random.key(2), 6)
  with jax.enable_x64(True):
    to64 = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
    params = model.init_params(keys[0], exp.network(), exp.image_shape)
    online, target = to64(randomised(params, keys[1])), to64(randomised(params, keys[2]))
    x0, x1 = (jax.random.normal(k, (8, *exp.image_shape)) for k in keys[3:5])
    c = jnp.arange(8)
    given = objectives.draw_conditions(keys[5], c, exp.objective, exp.null_class)
    velocity = lambda p: model.velocity_function(exp.network(), p)

    def loss(p, frozen):
      return objectives.losses(
          velocity(p), velocity(target), x0, x1, c, given, exp.objective, exp.wavelet,
          exp.null_class, 8,
      )[0]  # fmt: skip

    grad = jax.grad(loss)(online, None)
    # Stopped gradients are part of the method, so the finite difference holds the targets fixed.
    y = objectives.regression_targets(
        velocity(online), velocity(target), x0, x1,
        objectives.paths.interpolate(x0, x1, given.t), given, c, exp.objective, exp.null_class,
    )  # fmt: skip
    x_t = objectives.paths.interpolate(x0, x1, given.t)
    rows = objectives.deal_rows(8, exp.objective.shares)

    def loss_at_fixed_targets(p):
      e = velocity(p)(x_t, *given) - y
      return sum(
        objectives.wavelets.distance(e[r], exp.wavelet, name).mean()
        for name, r in zip(rows._fields, rows, strict=True)
      )

    direction = jax.tree.map(lambda a: jnp.sign(a), grad)
    h = 1e-4
    shifted = [
      loss_at_fixed_targets(jax.tree.map(lambda p, v, s=s: p + s * h * v, online, direction))
      for s in (1, -1)
    ]
    numeric = (shifted[0] - shifted[1]) / (2 * h)
    analytic = sum(
      jnp.sum(g * v) for g, v in zip(*map(jax.tree.leaves, (grad, direction)), strict=False)
    )
  np.testing.assert_allclose(analytic, numeric, rtol=1e-2)
