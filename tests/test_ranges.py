"""Every value of a config is in the range that is declared beside it, or refused in one line."""

import importlib
import math
import pathlib
from typing import Union, get_args, get_origin

from examples import tiny_config
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import couplings, experiment, generate, objectives, paths, ranges, state, steps
from ism_jax.data import recipe
from ism_jax.runtime import sharding

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("[!_]*.py"))
CONFIGS.remove("base")
ODD = [math.nan, math.inf, -math.inf, -1, -1e-8, 0, 1.5, 1e300, 10**20, 2**32, True, "1", None, ()]


def examples(count: int):
  """The same examples always, as many as are affordable."""
  checks = {"suppress_health_check": list(HealthCheck), "deadline": None, "database": None}
  phases = Phase.explicit, Phase.generate  # to shrink one takes minutes
  return settings(derandomize=True, max_examples=count, phases=phases, **checks)


def inside(kind):
  """Values of a declared kind, often at the ends of its range."""
  kind, declared = ranges.split(kind)
  if get_origin(kind) is Union:
    return st.one_of(*map(inside, get_args(kind)))
  if get_origin(kind) is tuple:
    first, *_ = kinds = get_args(kind)
    if kinds[-1] is not Ellipsis:
      return st.tuples(*map(inside, kinds))
    unique = declared is not None
    return st.lists(inside(first), min_size=unique, max_size=4, unique=unique).map(tuple)
  if isinstance(declared, tuple):
    return st.sampled_from(declared)
  if kind in (bool, str):
    return st.booleans() if kind is bool else st.text(max_size=3)
  least, most = ranges.bounds(declared)
  if kind is int:
    least, most = math.ceil(least), math.floor(most) - (declared[-1] == ")")
    return st.sampled_from([least, most]) | st.integers(least, min(most, least + 100))
  ends = {"exclude_min": declared[0] == "(", "exclude_max": declared[-1] == ")"}
  at_ends = [end for end in (least, most) if ranges.contains(declared, end)]
  return st.floats(least, most, **ends) | st.sampled_from(at_ends or [1.0])


def numbers_of(kind) -> bool:
  kind, _ = ranges.split(kind)
  return any(map(numbers_of, get_args(kind)[:1])) if get_args(kind) else kind in (int, float)


NUMBERS = {key: marks.kind for key, marks in experiment.MARKS.items() if numbers_of(marks.kind)}


def changed(changes: dict) -> dict:
  """The config of the tests, as a checkpoint has it, with these values {"section.key": value}."""
  config = tiny_config().to_dict()
  for key, value in changes.items():
    *section, name = key.split(".")
    (config[section[0]] if section else config)[name] = value
  return config


def changes(values, most: int, of=("",)):
  """A strategy of {"section.key": value} of some numbers of the config, whose keys begin so."""
  names = sorted(key for key in NUMBERS if key.startswith(of))
  keys = st.lists(st.sampled_from(names), min_size=1, max_size=most, unique=True)
  return keys.flatmap(lambda names: st.fixed_dictionaries({k: values(NUMBERS[k]) for k in names}))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_of_every_config_has_a_declared_range(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  sizes = {"image_size": (32, 48), "channels": 3, "num_classes": 2}
  autoencoder = {"vae": "random-small", "vae_scale": 1.0, "vae_shift": 0.0}
  values = {f"data.{key}": value for key, value in (sizes | autoencoder).items()}
  config = recipe.fill(config, recipe.Facts(20_000, (32, 48, 3), 2, values)).to_dict()
  for key, value in experiment.flatten(config).items():
    elements = value if isinstance(value, tuple) else (value,)
    if any(isinstance(v, int | float) and not isinstance(v, bool) for v in elements):
      kind, _ = ranges.split(NUMBERS[key])
      for element in get_args(kind)[:1] if get_args(kind) else (NUMBERS[key],):
        least, most = ranges.bounds(ranges.split(element)[1])
        assert math.isfinite(least) and math.isfinite(most), key
  experiment.parse(config)


@examples(300)
@given(changes(lambda kind: inside(kind) | st.sampled_from(ODD), most=2))
@example({"optimizer.eps": -1e-8})
@example({"evaluation.w": ()})
@example({"log": 3})
def test_a_config_is_accepted_or_refused_in_one_line_with_key_value_and_remedy(values):
  try:
    experiment.parse(changed(values))
  except ValueError as error:
    said = str(error)
    assert "\n" not in said and said.endswith(".")
    named = [key for key in values if key.rpartition(".")[2] in said]
    assert named, said
    shown = lambda v: v if isinstance(v, tuple) and v else (v,)
    assert any(str(v) in said for key in named for v in shown(values[key])), said
    assert any(word in said.lower() for word in ("give ", "set ", "known are", "use ", "choose "))


def accepted(values: dict):
  """The experiment of a config with these values, at a batch size that splits; or no example."""
  config = changed(values)
  try:
    unit = math.lcm(config["micro_batches"], sum(config["objective"]["shares"]))
    config["batch_size"] = max(1, config["batch_size"] // unit) * unit
    exp = experiment.parse(config)
    experiment.check_devices(exp, 1)
  except (ValueError, ZeroDivisionError):
    assume(False)
  return exp


@examples(4)
@given(changes(inside, most=16))
def test_what_is_accepted_is_traced(values):
  exp, mesh = accepted(values), sharding.data_mesh(jax.devices()[:1])
  keys, index = jax.eval_shape(lambda: steps.base_keys(exp.seed)), jnp.zeros((), int)
  pool = steps.abstract_pool(exp, mesh)
  pool, _ = jax.eval_shape(steps.couple_function(exp, mesh), pool, keys, index)
  like = steps.abstract_state(exp, mesh)
  after, metrics = jax.eval_shape(steps.steps_function(exp, mesh), like, pool, keys, index)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, like)
  assert metrics["loss"].shape == (exp.scan_steps,)
  n, x0 = jnp.zeros(2), jnp.zeros((2, *exp.image_shape))
  sample = generate.sampler(exp, paths.parse_schedule(exp.evaluation.steps[0]))
  assert jax.eval_shape(sample, like.ema, x0, n.astype(int), n).shape == x0.shape


# Of a step, the numbers that its arithmetic has; the network knows none of them.
ARITHMETIC = ("objective.", "wavelet.", "optimizer.", "ema.", "seed")


@examples(3)
@given(changes(inside, most=10, of=ARITHMETIC))
def test_what_is_accepted_makes_numbers(values):
  exp = accepted(values | {"batch_size": 8})
  rng, null = np.random.default_rng(0), exp.null_class
  x0, x1 = jnp.float32(rng.standard_normal((2, exp.batch_size, 8, 8, 1)))
  c, tx = jnp.arange(exp.batch_size) % null, state.optimizer(exp.optimizer, exp.total_steps)
  toy = lambda a: lambda x, t, c, d, w: a["x"] * x + paths.expand(d + w, x) * a["w"]

  def loss(params, ema):
    conditions = objectives.draw_conditions(jax.random.key(exp.seed), c, exp.objective, null)
    settings = (exp.objective, exp.wavelet, null, exp.batch_size)
    return objectives.losses(toy(params), toy(ema), x0, x1, conditions, *settings)[0]

  @jax.jit
  def step(s):
    value, gradient = jax.value_and_grad(loss)(s.params, s.target_ema)
    return value, gradient, state.update(s, gradient, tx, exp.ema)

  s = state.create({name: jnp.ones(()) for name in ("x", "w", "still")}, tx, exp.ema.decays)
  for _ in range(2):
    value, gradient, s = step(s)
    for a in jax.tree.leaves((value, gradient, s)):
      assert np.isfinite(a).all(), values


@examples(2)
@given(changes(inside, most=4, of=("coupling.",)))
def test_what_is_accepted_is_paired(values):
  cfg = accepted(values | {"coupling.pool_size": 4}).coupling
  x0, x1 = jax.random.normal(jax.random.key(0), (2, 16, 4, 4, 1))
  pair = jax.jit(lambda *a: couplings.pair(*a, cfg, 3))
  paired, info = pair(x0, x1, jnp.arange(16) % 3, jax.random.key(1))
  for a in (paired, *info.values()):
    assert np.isfinite(a).all(), info
