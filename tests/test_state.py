import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ism_jax import state

ADAM = state.OptimizerConfig(
  learning_rate=0.1,
  schedule="constant",
  warmup_steps=0,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  clip_norm=0.0,
)
EMA = state.EmaConfig(inference_decay=0.9, target_decay=0.5, warmup=False)


def run(ema, steps=20, clip_norm=0.0):
  """Steps with gradient +1: the state, and the parameter after each step."""
  tx = state.optimizer(dataclasses.replace(ADAM, clip_norm=clip_norm), steps)
  s = state.create({"a": jnp.zeros(3)}, tx, ema.decays)
  update = jax.jit(lambda s: state.update(s, {"a": jnp.ones(3)}, tx, ema))
  trail = []
  for _ in range(steps):
    s = update(s)
    trail.append(float(s.params["a"][0]))
  return s, np.array(trail)


def test_each_average_weighs_the_past_by_powers_of_its_decay():
  s, trail = run(dataclasses.replace(EMA, others=(0.99, 0.7)))
  others = (s.others["ema:0.99"], 0.99), (s.others["ema:0.7"], 0.7)
  for tree, decay in ((s.ema, 0.9), (s.target_ema, 0.5), *others):
    weights = (1 - decay) * decay ** np.arange(20)[::-1]
    np.testing.assert_allclose(tree["a"], np.full(3, weights @ trail), rtol=1e-5)
  assert s.step == 20
  without, _ = run(EMA)
  assert without.others == {}
  jax.tree.map(np.testing.assert_array_equal, without, s.replace(others={}))


def test_the_warm_up_forgets_the_initialisation():
  slow = state.EmaConfig(inference_decay=0.9999, target_decay=0.9999, warmup=True)
  s, trail = run(slow)
  expected = 0.0
  for n, value in enumerate(trail):
    decay = (1 + n) / (10 + n)
    expected = decay * expected + (1 - decay) * value
  np.testing.assert_allclose(s.ema["a"][0], expected, rtol=1e-5)
  np.testing.assert_allclose(state.decay_at(0.95, 1e6, True), 0.95)


def test_equal_decays_are_one_average():
  s, _ = run(state.EmaConfig(inference_decay=0.9, target_decay=0.9, warmup=True))
  np.testing.assert_array_equal(s.ema["a"], s.target_ema["a"])


def test_no_two_trees_of_a_new_state_share_a_buffer():
  s = state.create({"a": jnp.zeros(3)}, optax.sgd(0.1), ["ema:0.9", "ema:0.99"])
  trees = (s.params, s.ema, s.target_ema, *s.others.values())
  assert len({t["a"].unsafe_buffer_pointer() for t in trees}) == 5


def test_the_schedules_are_their_formulas():
  cosine = dataclasses.replace(ADAM, schedule="cosine", warmup_steps=10)
  lr = state.learning_rate(cosine, 110)
  np.testing.assert_allclose(lr(5), 0.05, rtol=1e-6)
  for step in (10, 35, 60, 110):
    np.testing.assert_allclose(lr(step), 0.05 * (1 + np.cos(np.pi * (step - 10) / 100)), atol=1e-7)
  np.testing.assert_allclose(state.learning_rate(ADAM, 110)(70), 0.1, rtol=1e-6)


def test_clipping_bounds_the_norm_before_adam():
  tx = state.optimizer(dataclasses.replace(ADAM, clip_norm=1.0, b1=0.0), 10)
  _, opt_state = tx.update(
    {"a": jnp.full(4, 10.0)}, tx.init({"a": jnp.zeros(4)}), {"a": jnp.zeros(4)}
  )
  (mu,) = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape == (4,) and leaf[0] > 0.1]
  np.testing.assert_allclose(mu, 0.5, rtol=1e-5)


def test_a_first_moment_in_bfloat16_moves_the_parameters_nearly_as_one_in_float32():
  params, gradient = {"a": jnp.zeros(64)}, {"a": jnp.linspace(0.1, 1.0, 64)}

  def after_three_steps(dtype):
    tx = state.optimizer(dataclasses.replace(ADAM, mu_dtype=dtype), 10)
    s = state.create(params, tx)
    for _ in range(3):
      s = state.update(s, gradient, tx, state.EmaConfig(0.9, 0.9, False))
    return s.params["a"], next(part.mu for part in s.opt_state[1] if hasattr(part, "mu"))["a"]

  (exact, moment), (rounded, half) = map(after_three_steps, ("float32", "bfloat16"))
  assert (moment.dtype, half.dtype) == (jnp.float32, jnp.bfloat16)
  assert 0 < np.abs(rounded - exact).max() < 0.01 * np.abs(exact).max()


@pytest.mark.parametrize(
  "change",
  [{"schedule": "step"}, {"learning_rate": 0.0}, {"clip_norm": -1.0}, {"mu_dtype": "float16"}],
)
def test_optimizer_values_that_mean_nothing_are_refused(change):
  with pytest.raises(ValueError, match=f"optimizer.{next(iter(change))}"):
    dataclasses.replace(ADAM, **change)


def test_a_decay_of_one_is_refused():
  with pytest.raises(ValueError, match=r"ema\.target_decay=1"):
    state.EmaConfig(inference_decay=0.9, target_decay=1.0, warmup=False)


@pytest.mark.parametrize(
  ("others", "message"),
  [
    ((0.5, 0.99, 0.5), "give each decay once, and without inference_decay=0.9"),
    ((0.9,), "give each decay once, and without inference_decay=0.9"),
    ((0.5, 1.0), r"others\[1\]=1.0: give a number in \[0, 0.999999\]"),
    (0.5, r"others=0.5: give values in parentheses, such as \(1,\)"),
    (tuple(n / 10 for n in range(9)), "are 9 decays, and 8 the most: give fewer"),
  ],
)
def test_averages_that_are_there_twice_or_too_many_are_refused(others, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(EMA, others=others)
