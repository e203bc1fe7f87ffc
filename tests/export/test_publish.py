"""Publishing, to a stand-in of the hub."""

import json

from examples import random_params, tiny_config
import hub_stand_in
import huggingface_hub
import jax
import numpy as np
import pytest

from ism_jax import experiment, restore
from ism_jax.export import publish as publish_lib
from ism_jax.export import pytorch
from ism_jax.export.publish import publish
from ism_jax.pretrained import hub as hub_lib
from ism_jax.pretrained import sit
from ism_jax.runtime import files


@pytest.fixture
def hub(tmp_path, monkeypatch):
  with hub_stand_in.serve(tmp_path / "cache") as hub:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    yield hub


@pytest.fixture
def export(tmp_path):
  """An export of random parameters, written as the command does."""
  config = tiny_config()
  exp = experiment.parse(config)
  params = random_params(exp.network(), exp.image_shape)
  trained = restore.Trained(exp, files.as_dict(config), 8, "ema", params)
  pytorch.write(trained, str(tmp_path / "export"), dtype="float32")
  return tmp_path / "export"


def scores(distance):
  return {
    "classifier": {"frechet_distance": distance, "times_floor": 5 * distance, "accuracy": 0.9}
  }


def report(**others):
  """An evaluation.json: two numbers of steps, two w, two seeds."""
  network = {"name": "classifier", "features": "64 features", "weights_sha256": "abc"}
  network |= {"reference": {"split": "train", "images": 1797}, "reference_images": 1797}
  settings = [(n, w, seed) for n in (1, 8) for w in (0.0, 0.5) for seed in (0, 1)]
  keys = ("steps", "w", "seed")
  distance = lambda n, w, seed: 10 / n + (w == 0) + seed / 4
  return {
    "variant": "ism",
    "step": 8,
    "parameters": "inference EMA",
    "vae": "",
    "num_images": 100,
    "labels": "balanced",
    "rounding": "nearest",
    "networks": [network | {"floor": None}],
    "metrics": {"frechet_distance": "float64"},
    "reference_spectrum": None,
    "results": [
      dict(zip(keys, s, strict=True)) | {"scores": scores(distance(*s))} for s in settings
    ],
    "yardsticks": {},
    "config": files.as_dict(tiny_config()),
  } | others


def header(folder):
  return huggingface_hub.ModelCard.load(folder / "README.md").data


def test_what_is_published_loads_by_its_name(hub, export):
  (export / "evaluation_partial.json").write_text("{}")
  (export / "samples_seed0.npz").write_bytes(b"large")
  page = publish(str(export), "someone/digits")
  assert page.endswith("/someone/digits") and hub.revision("someone/digits", "step-8")
  there = hub.repositories["someone/digits"]["main"]
  here = {p.relative_to(export).as_posix(): p for p in export.rglob("*") if p.is_file()}
  assert set(here) - set(there) == {"evaluation_partial.json", "samples_seed0.npz"}
  assert all(here[name].read_bytes() == content for name, content in there.items())
  loaded, local = restore.read("someone/digits@step-8"), restore.read(str(export))
  jax.tree.map(np.testing.assert_array_equal, loaded.params, local.params)
  puts = lambda: sum(method == "PUT" for method, _ in hub.requests)
  before = puts()
  publish(str(export), "someone/digits")  # again: the weights are there
  assert puts() == before == 1


def test_nothing_of_this_machine_goes_up(hub, export):
  judged = report()
  judged["config"]["data"]["dir"] = "/home/me/latents"
  protocol = {"source": "/home/me/images", "unreadable": {"/home/me/1.png": "cut"}, "crop": "adm"}
  judged["networks"][0]["reference"] = {
    "file": "/home/me/statistics.npz",
    "sha256": "1",
    "protocol": protocol,
  }
  (export / "transformer" / "__pycache__").mkdir()
  (export / "transformer" / "__pycache__" / "x.pyc").write_bytes(b"/home/me")
  (export / "evaluation.json").write_text(json.dumps(judged))
  (export / "evaluation.md").write_text("against /home/me/statistics.npz")
  publish(str(export), "someone/digits")
  there = hub.repositories["someone/digits"]["main"]
  assert not [name for name, content in there.items() if b"/home" in content]
  assert b"statistics.npz" in there["evaluation.json"] and b"statistics.npz" in there["README.md"]


def test_a_card_has_what_the_hub_shows(export):
  (export / "evaluation.json").write_text(json.dumps(report()))
  (export / "samples.png").write_bytes(b"\x89PNG")
  folder, details = restore.find_export(str(export))
  text = publish_lib.card(folder, details, base_model="someone/sit", dataset="someone/digits")
  card = huggingface_hub.ModelCard(text)
  data = card.data
  assert (data.license, data.pipeline_tag) == ("apache-2.0", "unconditional-image-generation")
  assert (data.base_model, data.datasets) == ("someone/sit", ["someone/digits"])
  assert {"ism_jax", "shortcut-models", "class-conditional"} <= set(data.tags)
  by_name = {result.metric_name: result for result in data.eval_results}
  # The mean over seeds at the better w.
  assert by_name["FD, classifier, 1 step, w = 0.5"].metric_value == 10.125
  assert by_name["FD, classifier, 8 steps, w = 0.5"].metric_value == 1.375
  assert by_name["accuracy, 8 steps, w = 0.5"].metric_value == 0.9
  assert len(by_name) == 4  # none in floors, none at another w
  result = by_name["FD, classifier, 8 steps, w = 0.5"]
  assert result.dataset_args == {"num_images": 100, "labels": "balanced", "rounding": "nearest"}
  assert (result.metric_args["steps"], result.metric_args["seeds"]) == (8, 2)
  assert card.text.count("(samples.png)") == 1 and "Not measured" not in card.text
  assert "| 8 | 0.5 | 1 |" in card.text
  # Made again from itself, it is the same, and keeps what was written behind it.
  (export / "README.md").write_text(text)
  assert publish_lib.card(folder, details) == text
  (export / "README.md").write_text(text + "\n## Mine\n\nMore.\n")
  assert publish_lib.card(folder, details) == text + "\n## Mine\n\nMore.\n"


def test_what_the_card_says_already_stays(export):
  path = export / "README.md"
  text = path.read_text().replace("---\n", "---\nlicense: cc-by-4.0\nlanguage: en\n", 1)
  path.write_text(text.replace("## Use", "More of mine.\n\n## Use"))
  card = huggingface_hub.ModelCard(publish_lib.card(*restore.find_export(str(export))))
  assert (card.data.license, card.data.language) == ("cc-by-4.0", "en")
  assert card.data.eval_results is None and "More of mine." in card.text
  text = publish_lib.card(*restore.find_export(str(export)), license="mit")
  assert huggingface_hub.ModelCard(text).data.license == "mit"


def test_the_hubs_names_of_what_it_was_trained_on_and_from_are_known(export):
  folder, details = restore.find_export(str(export))
  details["config"]["data"]["title"] = "ImageNet"
  details["config"]["init_from"] = "https://huggingface.co/someone/sit/tree/v1"
  data = huggingface_hub.ModelCard(publish_lib.card(folder, details)).data
  assert (data.base_model, data.datasets) == ("someone/sit", ["ILSVRC/imagenet-1k"])


def test_a_dry_run_asks_nobody_and_changes_nothing(hub, export, monkeypatch):
  monkeypatch.delenv("HF_TOKEN")
  before = {path: path.stat().st_mtime_ns for path in export.rglob("*")}
  lines = []
  monkeypatch.setattr(publish_lib.logging, "info", lambda text, *args: lines.append(text % args))
  publish(str(export), "someone/digits", dry_run=True)
  assert not hub.requests and {p: p.stat().st_mtime_ns for p in export.rglob("*")} == before
  said = "\n".join(lines)
  assert sit.WEIGHTS in said and "license: apache-2.0" in said and "/someone/digits" in said


@pytest.mark.parametrize(
  ("repo", "message"),
  [
    ("digits", "is no OWNER/NAME"),
    ("someone/digits@v1", "is no OWNER/NAME"),
    ("stranger/digits", "this token is of someone, who may write to someone, lab"),
    ("someone/open", "is public already: name another, or leave --private out"),
  ],
)
def test_what_cannot_be_published_is_refused_before_anything_goes_up(hub, export, repo, message):
  hub.repositories["someone/open"]["main"] = {}
  before = (export / "README.md").read_text()
  with pytest.raises((ValueError, OSError), match=message):
    publish(str(export), repo, private=True)
  assert not [r for r in hub.requests if "commit" in r[1]] and not hub.lfs
  assert (export / "README.md").read_text() == before


def test_private_is_private_and_nobody_logged_in_is_told_how(hub, export, monkeypatch):
  publish(str(export), "lab/digits", private=True)
  assert hub.private == {"lab/digits"}
  monkeypatch.setenv("HF_TOKEN", "hf_old")
  with pytest.raises(OSError, match=r"did not say whose token this is .* log in again"):
    publish(str(export), "lab/digits")
  monkeypatch.delenv("HF_TOKEN")
  with pytest.raises(OSError, match=r"nobody is logged in.*hf auth login"):
    publish(str(export), "lab/digits")
  monkeypatch.setattr(hub_lib, "SECONDS", 0.1)
  monkeypatch.setenv("HF_TOKEN", hub.token)
  with (
    hub_stand_in.serve_silence(export.parent / "cache"),
    pytest.raises(OSError, match=r"did not say .*no answer within"),
  ):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    publish(str(export), "lab/digits")


def test_an_evaluation_of_other_parameters_is_refused(export):
  for other, message in ((report(step=4), "step 4, and the export of the inf"), ({}, "KeyError")):
    (export / "evaluation.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=message):
      publish(str(export), "someone/digits", dry_run=True)
  with pytest.raises(FileNotFoundError, match="export makes one"):
    publish("someone/digits", "someone/digits")
