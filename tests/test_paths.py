import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import paths


def test_the_path_starts_at_noise_ends_at_data_and_moves_at_the_velocity(key):
  x0, x1 = jax.random.normal(key, (2, 3, 4, 4, 1))
  np.testing.assert_allclose(paths.interpolate(x0, x1, jnp.zeros(3)), x0)
  np.testing.assert_allclose(paths.interpolate(x0, x1, jnp.ones(3)), x1)
  derivative = jax.jvp(lambda t: paths.interpolate(x0, x1, t), (jnp.full(3, 0.3),), (jnp.ones(3),))[
    1
  ]
  np.testing.assert_allclose(derivative, paths.velocity(x0, x1), rtol=1e-6)


def test_the_eight_step_sizes_are_zero_and_the_powers_of_two_from_a_64th():
  d = paths.step_size(jnp.arange(paths.LEVELS))
  np.testing.assert_array_equal(d, [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
  np.testing.assert_array_equal(paths.level(d), np.arange(8))
  np.testing.assert_array_equal(paths.length(d), 2.0 ** np.arange(-7, 1))


def test_two_half_steps_are_as_long_as_the_step():
  d = paths.step_size(jnp.arange(1, paths.LEVELS))
  np.testing.assert_array_equal(2 * paths.length(paths.as_step_size(paths.split(d, 0.5)[0])), d)


def test_jumps_cover_every_level_alike_and_start_at_multiples_of_themselves(key):
  d = paths.draw_jump(key, (70_000,))
  t = paths.draw_start(jax.random.fold_in(key, 1), d)
  sizes, counts = np.unique(d, return_counts=True)
  np.testing.assert_array_equal(sizes, 2.0 ** np.arange(-6, 1))
  assert abs(counts - 10_000).max() < 500  # 5 standard deviations
  np.testing.assert_array_equal(np.asarray(t / d) % 1, 0)
  assert np.all(t + d <= 1)
  for size in sizes:  # every start is used
    np.testing.assert_array_equal(np.unique(t[d == size]), np.arange(0, 1, size))


@pytest.mark.parametrize(
  ("steps", "expected"),
  [
    (1, [(0, 1)]),
    ("4", [(0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25)]),
    ("1/2,1/4,1/4", [(0, 0.5), (0.5, 0.25), (0.75, 0.25)]),
  ],
)
def test_a_schedule_lists_when_each_step_starts_and_its_size(steps, expected):
  assert list(paths.parse_schedule(steps)) == expected


def test_the_finest_schedule_tells_the_network_zero():
  schedule = paths.parse_schedule(128)
  assert [t for t, _ in schedule] == [i / 128 for i in range(128)]
  assert {d for _, d in schedule} == {0.0}


@pytest.mark.parametrize(
  ("steps", "message"),
  [
    (3, "off the trained grid"),
    (256, "off the trained grid"),
    (0, "no schedule"),
    (10**20, "off the trained grid"),
    ("1e999999999,1/2", "no schedule"),
    (-4, "adds up to 0: give"),
    ("many", "no schedule"),
    ("1/2,1/4", "adds up to 3/4"),
    ("1/4,1/2,1/4", "multiples of 1/2"),
    ("1/2,1/2,1/2", "adds up to 3/2"),
  ],
)
def test_a_schedule_off_the_grid_is_refused_with_the_remedy(steps, message):
  with pytest.raises(ValueError, match=message):
    paths.parse_schedule(steps)
