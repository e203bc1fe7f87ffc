"""FLOPs counted by hand, against published numbers, JAX's own program and XLA's count of it."""

import dataclasses

from examples import tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet256
from ism_jax import couplings, experiment, model, objectives, paths, steps
from ism_jax.performance import flops
from ism_jax.runtime import sharding


def small(variant="ism", remat="none", unroll=1):
  """SiT-XS/2 on 16x16 images; unroll=6 leaves no loop, of which XLA would count one iteration."""
  config = tiny_config(variant)
  config.update({"batch_size": 8, "model": {"size": "SiT-XS/2", "remat": remat, "unroll": unroll}})
  config.data.update({"image_size": 16, "channels": 4})
  return experiment.parse(config)


def forward(exp):
  """A forward pass of a batch, and its abstract arguments."""
  network = exp.network()
  x, t = jnp.zeros((exp.batch_size, *exp.image_shape)), jnp.zeros(exp.batch_size)
  apply = lambda params: model.velocity_function(network, params)(x, t, t.astype(int), t, t)
  return jax.jit(apply), [abstract_parameters(exp)]


def gradient(exp):
  """A step's gradient and targets on one device, as training runs them, and their arguments."""
  n, shaped = exp.batch_size, jax.ShapeDtypeStruct
  images, numbers = shaped((n, *exp.image_shape), jnp.float32), shaped((n,), jnp.float32)
  labels, params = shaped((n,), jnp.int32), abstract_parameters(exp)
  conditions = objectives.Conditions(numbers, labels, numbers, numbers)
  function = steps.gradient_function(exp, sharding.data_mesh(jax.devices()[:1]))
  return jax.jit(function), [params, params, images, images, conditions]


def abstract_parameters(exp):
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(lambda k: model.init_params(k, exp.network(), exp.image_shape), key)


def matrix_products(function, arguments):
  """FLOPs of the matrix products in JAX's program, loops counted."""

  def count(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        total += 2 * eqn.outvars[0].aval.size * np.prod([shape[i] for i in contracted], dtype=int)
      inner = (getattr(value, "jaxpr", value) for value in eqn.params.values())
      times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
      total += times * sum(count(j) for j in inner if hasattr(j, "eqns"))
    return total

  return count(jax.make_jaxpr(function)(*arguments).jaxpr)


# DiT's Table 4 gives multiply-adds of the same transformer, without our embedders of d and w.
@pytest.mark.parametrize(
  ("size", "giga_multiply_adds"),
  [("SiT-S/2", 6.06), ("SiT-B/2", 23.01), ("SiT-L/2", 80.71), ("SiT-XL/2", 118.64)],
)
def test_a_forward_pass_costs_what_is_published(size, giga_multiply_adds):
  config = imagenet256.get_config()
  config.model.size = size
  total = flops.forward(experiment.parse(config)).total
  np.testing.assert_allclose(total / 2e9, giga_multiply_adds, rtol=2e-3)


@pytest.mark.parametrize("variant", ["ism", "sm"])
def test_a_forward_pass_has_exactly_these_matrix_products(variant):
  exp = small(variant)
  assert matrix_products(*forward(exp)) == exp.batch_size * flops.forward(exp).total


def test_a_forward_pass_costs_what_xla_counts():
  """XLA also counts element by element, at this width 2 % of all."""
  exp = small(unroll=6)
  function, arguments = forward(exp)
  counted = function.lower(*arguments).cost_analysis()["flops"]
  assert 1 < counted / (exp.batch_size * flops.forward(exp).total) < 1.03


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ism", "sm"])
def test_a_step_costs_what_xla_counts_of_the_compiled_program(variant):
  exp = small(variant, unroll=6)
  function, arguments = gradient(exp)
  counted = function.lower(*arguments).compile().cost_analysis()["flops"]
  assert 1 < counted / flops.step(exp).model < 1.03


def test_a_step_has_these_matrix_products_and_remat_those_again():
  """Less the gradients of the network's inputs, which nobody asks for: 0.2 %."""
  exp = small()
  products = matrix_products(*gradient(exp))
  np.testing.assert_allclose(products, flops.step(exp).model, rtol=5e-3)
  for remat in ("names", "dots", "full"):
    exp = small(remat=remat)
    again = matrix_products(*gradient(exp)) - products
    np.testing.assert_allclose(again, flops.step(exp).recomputed, rtol=5e-3)


@pytest.mark.parametrize(
  ("variant", "rollout"),
  [
    *((name, False) for name in ("ism", "sm", "sm_compounding", "no_ig", "fm", "meanflow", "imf")),
    ("ism", True),
  ],
)
def test_the_calls_of_the_network_are_those_that_the_losses_make(variant, rollout):
  exp = small(variant)
  exp = dataclasses.replace(exp, objective=dataclasses.replace(exp.objective, rollout=rollout))
  n, rows = exp.batch_size, []

  def velocity(x_t, t, c, d, w):
    rows.append(len(x_t))
    return x_t

  def losses(x, t, c):
    conditions = objectives.Conditions(t, c, t, t)
    return objectives.losses(
      velocity, velocity, x, x, conditions, exp.objective, exp.wavelet, exp.null_class, n
    )

  jax.eval_shape(losses, jnp.zeros((n, *exp.image_shape)), jnp.zeros(n), jnp.zeros(n, int))
  *others, with_gradient = rows
  assert with_gradient == n
  consistency = exp.objective.shares[2] / sum(exp.objective.shares)
  # Of the others a derivative in forward mode costs two calls, and one with gradient three.
  more = consistency * (exp.objective.target == "identity") + consistency * rollout
  assert flops.forward_equivalents(exp) == 3 + sum(others) / n + more


def test_sampling_with_fixed_guidance_takes_two_passes_at_the_finest_steps():
  intrinsic, fixed = small(), small("sm")
  assert flops.sample(intrinsic, paths.parse_schedule(128)) == 128 * flops.forward(intrinsic).total
  assert flops.sample(fixed, paths.parse_schedule(128)) == 2 * 128 * flops.forward(fixed).total
  assert flops.sample(fixed, paths.parse_schedule(4)) == 4 * flops.forward(fixed).total
  two_pass = small("fm")
  assert flops.sample(two_pass, paths.parse_schedule(4)) == 8 * flops.forward(two_pass).total


def test_the_coupling_costs_what_xla_counts():
  """The cost matrix; and Sinkhorn per iteration, of log-sum-exps written out here."""
  exp = small()
  n, d = exp.coupling.pool_size * exp.batch_size, 16 * 16 * 4
  ten, twenty = (flops.couple(exp, iterations, rounds=1) for iterations in (10, 20))
  x = jnp.zeros((n, d))
  assert matrix_products(couplings.transport_cost, (x, x)) == ten.matrix

  @jax.jit
  def iteration(cost, f, g):
    def soft_minimum(f, g, axis):
      kernel = (f[:, None] + g[None, :] - cost) / 0.1
      top = kernel.max(axis)
      return -0.1 * (top + jnp.log(jnp.exp(kernel - jnp.expand_dims(top, axis)).sum(axis)))

    f = f + soft_minimum(f, g, 1)
    return f, g + soft_minimum(f, g, 0)

  counts = iteration.lower(jnp.zeros((n, n)), x[:, 0], x[:, 0]).cost_analysis()
  once = counts["flops"] + counts["transcendentals"]
  np.testing.assert_allclose((twenty.elementwise - ten.elementwise) / 10, once, rtol=0.1)
