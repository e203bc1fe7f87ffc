import io

from examples import draw_samples, tiny_config
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from ism_jax import experiment, generate, guidance, model, paths, sampling
from ism_jax.pretrained import vae
from ism_jax.runtime import sharding


def test_steps_of_the_mean_velocity_reach_the_exact_solution_of_an_ode(key):
  """x' = a x has the mean velocity x (e^{a h} - 1) / h over a step h: any schedule is exact."""
  a = -1.3

  def velocity(x, t, c, d, w):
    h = paths.expand(paths.length(d), x)
    return x * jnp.expm1(a * h) / h

  x0, zero = jax.random.normal(key, (5, 4, 4, 1)), jnp.zeros(5)
  for steps in (1, 2, 8, 128, "1/2,1/4,1/8,1/8"):
    x1 = sampling.sample(velocity, x0, zero, zero, paths.parse_schedule(steps))
    np.testing.assert_allclose(x1, np.exp(a) * x0, rtol=1e-4)


def test_every_step_is_one_call_with_its_own_time_size_and_guidance():
  calls = []

  def velocity(x, t, c, d, w):
    jax.debug.callback(lambda *a: calls.append(a), t, d, w, c, ordered=True)
    return jnp.zeros_like(x)

  w = jnp.array([0.0, 1.5])
  sampling.sample(
    velocity, jnp.zeros((2, 1, 1, 1)), jnp.array([3, 4]), w, paths.parse_schedule("1/2,1/4,1/4")
  )
  jax.effects_barrier()
  assert [(float(t[0]), float(d[0])) for t, d, *_ in calls] == [(0, 0.5), (0.5, 0.25), (0.75, 0.25)]
  for _, _, w_of_call, c in calls:
    np.testing.assert_array_equal(w_of_call, w)
    np.testing.assert_array_equal(c, [3, 4])


def test_fixed_guidance_is_two_passes_at_the_finest_step_and_none_at_jumps():
  velocity = lambda x, t, c, d, w: (
    jnp.ones_like(x) * paths.expand(jnp.where(c == 10, 1.0, 3.0) + 0 * w, x)
  )
  guided = guidance.fixed(velocity, null_class=10, t_interval=0.3, every_level=False)
  x, c, w = jnp.zeros((4, 1, 1, 1)), jnp.zeros(4, int), jnp.full(4, 0.5)
  t, d = jnp.array([0.5, 0.2, 0.5, 0.5]), jnp.array([0.0, 0.0, 0.5, 0.25])
  np.testing.assert_allclose(guided(x, t, c, d, w).ravel(), [1 + 1.5 * 2, 3, 3, 3])
  every = guidance.fixed(velocity, null_class=10, t_interval=0.0, every_level=True)
  np.testing.assert_allclose(every(x, t, c, d, w).ravel(), [4, 4, 4, 4])


def test_a_sample_depends_on_its_number_not_on_batch_size_or_devices():
  exp = experiment.parse(tiny_config())
  params = model.init_params(jax.random.key(0), exp.network(), exp.image_shape)
  # Adam-free weights: the final layer starts at zero, which would sample its noise back.
  params["final_linear"]["kernel"] += 0.1
  eight = sharding.data_mesh()
  one = sharding.data_mesh(jax.devices()[:1])
  draw = lambda mesh, n, batch: draw_samples(
    exp, mesh, params, num_images=n, steps=2, w=0.5, seed=7, batch_size=batch
  )
  images, labels = draw(one, 21, 21)
  np.testing.assert_array_equal(labels, np.arange(21) % 10)
  for mesh, n, batch in ((one, 21, 5), (eight, 21, 16), (eight, 9, 100)):
    others, _ = draw(mesh, n, batch)
    # One grey value of 255 either way: float sums differ in order.
    assert np.abs(others.astype(int) - images[:n].astype(int)).max() <= 1
  assert len(np.unique(images.reshape(21, -1), axis=0)) == 21


def test_samples_of_latents_are_decoded_on_all_devices():
  config = tiny_config()
  config.data.update({"name": "latents", "vae": "random-small", "channels": 4})
  exp, mesh = experiment.parse(config), sharding.data_mesh()
  params = model.init_params(jax.random.key(0), exp.network(), exp.image_shape)
  images, _ = draw_samples(exp, mesh, params, num_images=10, steps=1, w=0.5, seed=3, batch_size=16)
  assert images.shape == (10, 64, 64, 3)
  # At its initialisation the network is zero, so one step samples the noise itself.
  latents = sampling.draw_noise(jax.random.key(3), np.arange(10), exp.image_shape)
  decoder = vae.load("random-small")
  decoded = np.asarray(vae.decode(decoder.cfg, decoder.params, latents))
  expected = np.clip(np.round(127.5 * (decoded + 1)), 0, 255)
  assert np.abs(images - expected).max() <= 1
  assert expected.std() > 10


def test_samples_that_are_not_finite_are_reported_and_not_drawn_black():
  exp = experiment.parse(tiny_config())
  params = model.init_params(jax.random.key(0), exp.network(), exp.image_shape)
  params["final_linear"]["bias"] += jnp.nan
  with pytest.raises(FloatingPointError, match="2 steps at w="):
    draw_samples(
      exp, sharding.data_mesh(), params, num_images=4, steps=2, w=0.5, seed=0, batch_size=8
    )


@pytest.mark.parametrize("n", [3, 25, 100])
def test_a_grid_shows_images_in_rows_of_ten(n):
  images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
  with Image.open(io.BytesIO(generate.grid_png(images, enlarge=2))) as grid:
    pixels = np.asarray(grid)
  rows, columns = min(8, max(1, n // 10)), min(10, n)
  assert pixels.shape == (rows * 10, columns * 10)  # 4 pixels and a line, enlarged twice
  for row in range(rows):
    for column in range(columns):
      assert pixels[row * 10 + 5, column * 10 + 5] == row * 10 + column


def test_unit_range_maps_to_grey_values_as_the_data_does():
  grey = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(generate.to_uint8(grey / 127.5 - 1), grey)
  np.testing.assert_array_equal(generate.to_uint8(jnp.array([-9.0, 9.0])), [0, 255])


@pytest.mark.parametrize(
  ("variant", "steps", "w", "message"),
  [
    ("ism", 3, 0.5, "off the trained grid"),
    ("ism", 4, -0.5, r"w=-0\.5: give a number in \[0, 100\]"),
    ("sm", 4, 1.0, "fixed guidance w=0.5"),
  ],
)
def test_what_a_network_cannot_sample_is_refused(variant, steps, w, message):
  with pytest.raises(ValueError, match=message):
    experiment.check_guidance(
      experiment.parse(tiny_config(variant)), paths.parse_schedule(steps), w
    )


def test_sm_takes_any_guidance_in_its_finest_steps():
  experiment.check_guidance(experiment.parse(tiny_config("sm")), paths.parse_schedule(128), 2.0)


def test_guidance_beyond_training_is_a_warning(caplog):
  experiment.check_guidance(experiment.parse(tiny_config()), paths.parse_schedule(4), 9.0)
  assert "beyond the trained maximum" in caplog.text
