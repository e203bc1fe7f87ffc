"""What TensorBoard and Weights & Biases read of a run, each read with its own code."""

import io
import json
import os
import struct
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from ism_jax.runtime import logs

pytestmark = pytest.mark.slow  # optional packages

CONFIG = {"variant": "ism", "evaluation.w": (0.0, 0.5), "seed": 3, "data.name": "a|b"}
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def write_run(workdir, start=0, **options):
  """An entry of training, later one of the monitor for an earlier step, and a picture."""
  png = io.BytesIO()
  Image.fromarray(PIXELS).save(png, "PNG")
  metrics = {"loss": np.full(2, 0.5, np.float32), "gradient_norm": np.full(2, 2.0, np.float32)}
  shown = {"config": CONFIG, "hyperparameters": ["variant", "seed"], "compared": ["fd", "loss"]}
  with logs.Writer(workdir, start=start, state=None, total=12, every=2, **shown, **options) as log:
    log.add(start + 2, metrics, {"gain": 0.75})
    log.write(start + 1, {"monitor/steps_1/random_kid": 0.25})
    log.image(start + 2, "samples/steps_1", png.getvalue())


def test_tensorboard_shows_groups_the_config_as_text_and_hyper_parameters(tmp_path):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.plugins.hparams import plugin_data_pb2

  write_run(tmp_path)
  read = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
  assert set(read.Tags()["scalars"]) == {
    "losses/loss", "norms/gradient_norm", "coupling/gain", "monitor/steps_1/random_kid",
    "speed/steps_per_second", "speed/data_wait",
  }  # fmt: skip
  (loss,) = read.Scalars("losses/loss")
  assert (loss.step, loss.value) == (2, 0.5)
  (picture,) = read.Images("samples/steps_1")
  np.testing.assert_array_equal(Image.open(io.BytesIO(picture.encoded_image_string)), PIXELS)
  (text,) = read.Tensors("config/text_summary")
  lines = text.tensor_proto.string_val[0].decode().splitlines()
  assert lines[2:] == [
    "| variant | `'ism'` |",
    "| evaluation.w | `(0.0, 0.5)` |",
    "| seed | `3` |",
    "| data.name | `'a\\|b'` |",
  ]
  contents = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
  values = plugin_data_pb2.HParamsPluginData.FromString(contents).session_start_info.hparams
  assert set(values) == {"variant", "seed"}
  assert (values["variant"].string_value, values["seed"].number_value) == ("ism", 3)
  contents = read.SummaryMetadata("_hparams_/experiment").plugin_data.content
  metrics = plugin_data_pb2.HParamsPluginData.FromString(contents).experiment.metric_infos
  assert [metric.name.tag for metric in metrics] == ["losses/fd", "losses/loss"]


def records_of(path):
  """The records of a file of W&B, in LevelDB's log format: one may be in several fragments."""
  data, record = path.read_bytes(), b""
  assert data[:4] == b":W&B"
  position = 7
  while position + 7 <= len(data):
    if 32_768 - position % 32_768 < 7:  # too little of a block for a header
      position += 32_768 - position % 32_768
      continue
    length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
    position += 7 + length
    record += data[position - length : position]
    if kind in (1, 4):  # whole, or the last fragment
      yield record
      record = b""


def test_wandb_has_the_same_values_and_a_run_that_continues_is_one(tmp_path, monkeypatch):
  from wandb.proto import wandb_internal_pb2

  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  write_run(tmp_path, wandb="team/project")
  write_run(tmp_path, start=2, wandb="team/project")
  runs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
  assert len(runs) == 2
  ids, entries = set(), []
  for path in runs:
    for record in map(wandb_internal_pb2.Record.FromString, records_of(path)):
      if record.WhichOneof("record_type") == "run":
        config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        ids.add((record.run.entity, record.run.project, record.run.run_id))
      if record.WhichOneof("record_type") == "history":
        key = lambda item: "/".join(item.nested_key) or item.key
        entries.append({key(i): json.loads(i.value_json) for i in record.history.item})
  assert ids == {("team", "project", (tmp_path / "wandb_id").read_text())}
  assert config.items() >= {"variant": "ism", "evaluation.w": [0.0, 0.5], "seed": 3}.items()
  losses = [entry for entry in entries if "losses/loss" in entry]
  assert [(e["step"], e["losses/loss"], e["coupling/gain"]) for e in losses] == [
    (2, 0.5, 0.75),
    (4, 0.5, 0.75),
  ]
  assert [e["step"] for e in entries if "monitor/steps_1/random_kid" in e] == [1, 3]
  picture, _ = (e["samples/steps_1/path"] for e in entries if "samples/steps_1/path" in e)
  with Image.open(runs[0].parent / "files" / picture) as image:
    np.testing.assert_array_equal(image, PIXELS)


def test_wandb_without_a_login_is_an_error_before_training(tmp_path):
  """In a process of its own: wandb reads the environment once."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
  environment |= {"HOME": str(tmp_path), "WANDB_SILENT": "true", "JAX_PLATFORMS": "cpu"}
  arguments = ("--config=configs/digits.py", "--config.log.wandb=p", f"--workdir={tmp_path}/run")
  command = [sys.executable, "-m", "ism_jax", "train", *arguments]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert last.startswith("Error: config.log.wandb='p': W&B cannot begin a run")
  assert "`wandb login` first, or WANDB_MODE=offline" in last
