"""The network that comes with the package."""

import json

import hub_stand_in
import jax
import numpy as np
import pytest

import ism_jax
from ism_jax import api, experiment, restore
from ism_jax.evaluation import evaluate
from ism_jax.pretrained import hub
from ism_jax.runtime import sharding

FOLDER = hub.SHIPPED["digits"]
STEPS = (1, 8)


@pytest.fixture(scope="module")
def report():
  return json.loads((FOLDER / "evaluation.json").read_text(encoding="utf-8"))


def distance(report, steps, w):
  """The Fréchet distance in the random network, as the report has it."""
  (result,) = [r for r in report["results"] if (r["steps"], r["w"]) == (steps, w)]
  return result["scores"]["random"]["frechet_distance"]


def test_it_is_of_the_config_of_digits_and_small():
  from configs import digits

  trained = restore.read("digits")
  assert trained.exp.model == experiment.parse(digits.get_config()).model
  assert (trained.exp.variant, trained.exp.total_steps) == ("ism", trained.step)
  assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 3.5e6


def test_it_scores_what_its_card_says_without_training_and_without_a_network(
  tmp_path, report, monkeypatch
):
  monkeypatch.setattr(api, "_log_as_commands_do", lambda: None)
  devices, w = jax.devices()[:1], 0.5
  with hub_stand_in.in_place_of_the_hub("http://127.0.0.1:9", tmp_path):
    model = ism_jax.load("digits", devices=devices)
  config = dict(report["config"])
  config["evaluation"] = config["evaluation"] | {"networks": "random"}
  reference = evaluate.load_reference(
    experiment.parse(config), sharding.data_mesh(devices), report["num_images"]
  )
  card = (FOLDER / "README.md").read_text(encoding="utf-8")
  for steps in STEPS:
    images, labels = model.sample(report["num_images"], steps=steps, w=w, seed=0)
    scores = reference.score(images, labels)["random"]
    # Sums in another order move it by less.
    np.testing.assert_allclose(
      scores["frechet_distance"], distance(report, steps, w), rtol=2e-2, err_msg=str(steps)
    )
    assert f"{distance(report, steps, w):.3f}" in card
  assert f"{report['num_images']:d} samples" in card
