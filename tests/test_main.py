"""The command line, in processes of its own as a user runs it."""

import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ism_jax import main
from ism_jax.runtime import checkpoints

ROOT = pathlib.Path(__file__).parent.parent
SMALL = (
  "--config.steps=8",
  "--config.batch_size=16",
  "--config.scan_steps=2",
  "--config.optimizer.schedule=constant",  # so that runs of any length compile once
  "--config.log.every=4",
  "--config.evaluation.num_images=100",
  "--config.evaluation.steps=(1,)",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """One device, and a data folder of its own."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "TFDS_DATA_DIR": str(tmp_path_factory.mktemp("data")),
  }


def ism(environment, *arguments, config="configs/digits.py", command="train"):
  """Runs a command of the package: (exit code, what it said). config=None leaves --config out."""
  words = ["-m", "ism_jax.main"] if command == "train" else ["-m", "ism_jax", command]
  if command == "train" and config is not None:
    words.append(f"--config={config}")  # before the flags that override it
  done = subprocess.run(
    [sys.executable, *words, *arguments],
    cwd=ROOT,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  return done.returncode, done.stdout


def test_a_run_is_trained_continued_evaluated_sampled_and_compared(environment, tmp_path):
  work = tmp_path / "work"
  at = f"--workdir={work}"
  code, said = ism(environment, at, *SMALL)
  assert code == 0 and "step 8/8: " in said and "learning rate reaches 4 %" in said, said
  code, said = ism(environment, at, *SMALL, "--config.steps=12")
  assert code == 0 and "Continuing from step 8" in said and "step 12/12" in said, said
  # Without --config, the checkpoint's is used, with what is overridden.
  once = ("--mode=evaluate", "--config.evaluation.w=(0.5,)")
  code, said = ism(environment, at, *once, config=None)
  assert code == 0, said
  report = json.loads((work / "evaluation.json").read_text())
  assert report["step"] == 12 and report["num_images"] == 100
  assert [(r["steps"], r["w"]) for r in report["results"]] == [(1, 0.5)]
  out = tmp_path / "x.npz"
  sample = (at, "--mode=sample", f"--out={out}", "--config.sample.num_images")
  code, said = ism(environment, *sample, "12", config=None)
  assert code == 0, said
  assert np.load(out)["arr_0"].shape == (12, 8, 8, 3)
  code, said = ism(environment, *sample, "12", "--config.sample.seeds=1", config=None)
  assert code != 0 and "a key that the config does not have" in said and "Traceback" not in said
  code, said = ism(
    environment, f"--out={tmp_path / 'c'}", "--examples=8", str(work), command="compare"
  )
  assert code == 0, said
  assert "| `ism` |" in (tmp_path / "c" / "comparison.md").read_text()
  assert (tmp_path / "c" / "effective_guidance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("config", "workdir", "folder"),
  [
    ("configs/imagenet256.py", "runs/imagenet256", "/data/latents"),
    ("configs/digits.py:sm", "runs/digits-sm", ""),
    ("configs/imagenet256.py:wavelet,b2,250k", "runs/imagenet256-wavelet-b2-250k", ""),
    ("configs/images.py", "runs/images-my-cats", "/data/my cats/"),
    ("configs/latents.py:sm", "runs/latents-sm-猫", "猫"),
  ],
)
def test_a_workdir_is_by_default_named_after_the_config_and_its_words(config, workdir, folder):
  path, _, words = config.partition(":")
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  values = module.get_config(*filter(None, [words]))
  values.data.dir = folder
  assert main.default_workdir(config, values) == workdir


def test_the_default_workdir_is_said_first(environment, tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "ism_jax", "evaluate", f"--config={ROOT}/configs/digits.py:sm"],
    cwd=tmp_path,
    env=environment | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  first, *_, last = done.stderr.splitlines()
  assert first.endswith("Workdir: runs/digits-sm")
  assert (
    "no trained network under" in last and "runs/digits-sm" in last and not list(tmp_path.iterdir())
  )


def saved_state(work, step):
  """The arrays of a checkpoint, read only by Orbax."""
  with checkpoints.open_manager(work, keep=1, read_only=True) as manager:
    assert manager.latest_step() == step
    args = ocp.args.Composite(state=ocp.args.StandardRestore())
    return manager.restore(step, args=args).state


def entries(work):
  """metrics.jsonl without what depends on the clock."""
  clock = ("steps_per_second", "data_wait")
  lines = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in line.items() if k not in clock} for line in lines]


@pytest.mark.slow
def test_a_run_that_is_killed_then_terminated_and_continued_is_the_same_run(environment, tmp_path):
  """Bit for bit, with all cores: the same computation on XLA's CPU threads gives the same bits."""
  work, whole, log = tmp_path / "work", tmp_path / "whole", tmp_path / "log"
  small = (*SMALL, "--config.monitor.every=0", "--config.log.gradients_every=0")

  def stop(number, when, *arguments):
    """Trains without end until when(), then sends a signal: (exit code, what it said)."""
    command = [
      sys.executable,
      "-m",
      "ism_jax.main",
      "--config=configs/digits.py",
      *small,
      f"--workdir={work}",
      "--config.steps=1000000",
      *arguments,
    ]
    with open(log, "w") as file:
      process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
      while not when():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
      process.send_signal(number)
      return process.wait(timeout=60), log.read_text()
    finally:
      process.kill()
      process.wait()

  folders = lambda: [p.name for p in work.glob("checkpoints/*")]
  saving = lambda: "8" in folders() and any("tmp" in name for name in folders())
  code, _ = stop(signal.SIGKILL, saving, "--config.checkpoint.every=4")
  assert code == -signal.SIGKILL
  code, said = stop(
    signal.SIGTERM,
    lambda: re.search(r"step \d+/", log.read_text()),
    "--config.checkpoint.every=100000",
  )
  assert code == 143 and "the same command continues" in said, said
  before, last = (int(re.search(rf"{x} step (\d+)", said)[1]) for x in ("from", "after"))
  assert 8 <= before < last, said
  assert saved_state(work, last)["step"] == last
  total = last // 4 * 4 + 8
  for folder in (work, whole):
    code, said = ism(environment, *small, f"--workdir={folder}", f"--config.steps={total}")
    assert code == 0, said
  jax.tree.map(np.testing.assert_array_equal, saved_state(work, total), saved_state(whole, total))
  assert entries(work) == entries(whole)
  assert len(entries(whole)) == total // 4


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--config.objective.alfa=2",), "names a key that the config does not have: alfa. "),
    (("--config.batch_size=126",), "the nearest is"),
    (("--config.data.name=cifar",), "known: digits"),
    (("--mode=sample",), "sample needs --out"),
    (("--mode=evaluate",), "ism_jax train"),
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


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "train needs --config"),
    (("--mode=evaluate", "--config.sample.w=1"), "no trained network under"),
  ],
)
def test_what_needs_a_config_or_a_checkpoint_says_so(environment, tmp_path, arguments, message):
  work = tmp_path / "work"
  code, said = ism(environment, f"--workdir={work}", *arguments, config=None)
  assert code != 0 and message in said and "Traceback" not in said, said
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
  code, said = ism(
    environment,
    f"--workdir={tmp_path}",
    "--config.steps=1500",
    "--config.evaluation.at_end=True",
    "--config.evaluation.steps=(1,)",
    "--config.evaluation.w=(0.5,)",
  )
  assert code == 0, said
  (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
  scores = result["scores"]["classifier"]
  assert scores["accuracy"] > 0.8
  assert scores["times_floor"] < 30


def test_an_evaluation_at_the_end_is_checked_at_the_beginning(environment, tmp_path):
  code, said = ism(
    environment,
    f"--workdir={tmp_path}",
    *SMALL,
    "--config.evaluation.at_end=True",
    "--config.evaluation.networks=inception",
    "--config.evaluation.weights=nowhere.pth",
  )
  assert code == 1 and "Error: no FID Inception weights: there is no file 'nowhere.pth'" in said
  assert "Traceback" not in said and not (tmp_path / "checkpoints").exists()
