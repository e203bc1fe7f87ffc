"""The set-up check: raw photographs to decoded samples, by the command that users run first."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_set_up_check_goes_from_photographs_to_decoded_samples(tmp_path):
  out = tmp_path / "check"
  environment = os.environ | {"ISM_JAX_VENV": sys.prefix, "JAX_PLATFORMS": "cpu"}
  check = subprocess.run(
    ["bash", ROOT / "launch" / "check.sh", out], env=environment, capture_output=True, text=True
  )
  assert check.returncode == 0, check.stderr[-2000:]
  assert "The set-up works." in check.stdout
  assert "60 images of 15 classes" in check.stderr
  lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  assert lines[-1]["step"] == 16 and np.isfinite([e["loss"] for e in lines if "loss" in e]).all()
  with np.load(out / "samples.npz") as samples:
    assert samples["arr_0"].shape == (30, 256, 256, 3)
    assert samples["arr_0"].std((1, 2, 3)).min() > 5
    np.testing.assert_array_equal(samples["arr_1"], np.arange(30) % 15)
  report = json.loads((out / "evaluation.json").read_text())
  (network,) = report["networks"]
  assert network["reference_images"] == 60 and report["step"] == 16
  assert [(r["steps"], r["w"]) for r in report["results"]] == [(1, 0.5), (2, 0.5)]
  for result in report["results"]:
    scores = result["scores"]["inception"]
    assert np.isfinite(list(scores.values())).all() and scores["frechet_distance"] > 0
    assert {"spatial_frechet_distance", "inception_score", "kid", "precision"} <= scores.keys()
  assert Image.open(out / "grids" / "steps1_00000016.png").size[0] > 10 * 256
