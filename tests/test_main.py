"""The command line, in processes of its own as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ("--config.steps=8", "--config.batch_size=16", "--config.log.every=4",
         "--config.evaluation.num_images=100", "--config.evaluation.steps=(1,)")  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """One device, and a data folder of its own."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "TFDS_DATA_DIR": str(tmp_path_factory.mktemp("data")),
  }


def ism(environment, *arguments, config="configs/digits.py", module="main"):
  """Runs a command of the package: (exit code, what it said)."""
  command = [sys.executable, "-m", f"ism_jax.{module}"]
  if module == "main":
    command.append(f"--config={config}")  # before the flags that override it
  command += arguments
  done = subprocess.run(
    command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )
  return done.returncode, done.stdout


def test_a_run_is_trained_continued_evaluated_sampled_and_compared(environment, tmp_path):
  work = tmp_path / "work"
  at = f"--workdir={work}"
  code, said = ism(environment, at, *SMALL)
  assert code == 0 and "step 8/8: " in said, said
  code, said = ism(environment, at, *SMALL, "--config.steps=12")
  assert code == 0 and "Continuing from step 8" in said and "step 12/12" in said, said
  code, said = ism(environment, at, *SMALL, "--mode=evaluate")
  assert code == 0, said
  assert json.loads((work / "evaluation.json").read_text())["step"] == 12
  out = tmp_path / "x.npz"
  code, said = ism(
    environment, at, *SMALL, "--mode=sample", f"--out={out}", "--config.sample.num_images=12"
  )
  assert code == 0, said
  assert np.load(out)["arr_0"].shape == (12, 8, 8, 1)
  code, said = ism(
    environment, f"--out={tmp_path / 'c'}", "--examples=8", str(work), module="compare"
  )
  assert code == 0, said
  assert "| `ism` |" in (tmp_path / "c" / "comparison.md").read_text()
  assert (tmp_path / "c" / "effective_guidance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--config.objective.alfa=2",), "names a key that the config does not have: \"'alfa'\""),
    (("--config.batch_size=126",), "the nearest is"),
    (("--config.data.name=cifar",), "known: digits"),
    (("--mode=sample",), "--mode=sample needs --out"),
    (("--mode=evaluate",), "--mode=train"),
  ],
)
def test_what_the_user_got_wrong_is_one_line_and_nothing_is_written(
  environment, tmp_path, arguments, message
):
  work = tmp_path / "work"
  code, said = ism(environment, f"--workdir={work}", *arguments)
  assert code != 0 and message in said, said
  assert "Traceback" not in said
  assert not work.exists()


def test_an_unknown_variant_lists_the_known_ones(environment, tmp_path):
  code, said = ism(environment, f"--workdir={tmp_path}", config="configs/digits.py:smm")
  assert code != 0 and "known are sm, sm_compounding, ig" in said and "Traceback" not in said


def test_a_workdir_that_cannot_be_written_is_said_first(environment):
  code, said = ism(environment, "--workdir=/proc/nowhere")
  assert code != 0 and "cannot be written" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_short_training_makes_digits_that_the_judge_recognises(environment, tmp_path):
  """A fifth of the demo's steps: far from done, and far beyond noise, in one step."""
  arguments = (f"--workdir={tmp_path}", "--config.steps=1500", "--config.evaluation.steps=(1,)",
               "--config.evaluation.w=(0.5,)")  # fmt: skip
  for mode in ("train", "evaluate"):
    code, said = ism(environment, f"--mode={mode}", *arguments)
    assert code == 0, said
  (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
  assert result["accuracy"] > 0.8
  assert result["times_floor"] < 30
