"""Configs: every variant builds and steps, and what is wrong is said before anything runs."""

import copy
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

from examples import tiny_config
import jax
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, digits, imagenet256, imagenet512
from ism_jax import experiment, main, protocol, state, steps, wavelets
from ism_jax.evaluation import summary
from ism_jax.metrics import features
from ism_jax.runtime import files, sharding

# Those less one technique take what the cumulative rows take.
# Those of split and imf are the programs of ism and meanflow with one number or call more.
VARIANTS = [
  pytest.param(v, marks=pytest.mark.slow) if v.startswith("no_") or v in base.OTHERS else v
  for v in base.VARIANTS
  if v not in ("split", "imf")
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_digits_takes_a_step_that_moves_every_tree(variant):
  config = tiny_config(variant)
  config.update(
    {"batch_size": 16, "scan_steps": 1, "coupling": {"pool_size": 1}, "ema": {"warmup": False}}
  )
  exp = experiment.parse(config)
  mesh = sharding.data_mesh(jax.devices()[:1])
  keys = steps.base_keys(0)
  s = steps.init_function(exp, mesh)(keys.init)
  before = jax.device_get(s)
  pool = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), steps.abstract_pool(exp, mesh))
  pool, _ = steps.couple_function(exp, mesh)(pool, keys, 0)
  train_steps = steps.steps_function(exp, mesh)
  for _ in range(3):  # Adam's warm-up starts at a learning rate of zero
    s, metrics = train_steps(s, pool, keys, 0)
  assert np.isfinite(metrics["loss"]).all()
  moved = lambda a, b: any(
    not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
  )
  for tree in ("params", "ema", "target_ema"):
    assert moved(getattr(s, tree), getattr(before, tree)), tree
  assert moved(s.ema, s.target_ema) == (exp.ema.inference_decay != exp.ema.target_decay)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_imagenet256_traces_on_eight_devices(variant):
  config = imagenet256.get_config(variant)
  exp = experiment.parse(config)
  mesh = sharding.data_mesh()
  experiment.check_devices(exp, mesh.size)
  keys = jax.eval_shape(lambda: steps.base_keys(0))
  pool, info = jax.eval_shape(
    steps.couple_function(exp, mesh), steps.abstract_pool(exp, mesh), keys, jnp.zeros((), int)
  )
  assert pool["x0"].shape == (32, 256, 32, 32, 4)
  assert ("attained_gain" in info) == (exp.coupling.coupling == "ot")
  like = steps.abstract_state(exp, mesh)
  out, metrics = jax.eval_shape(
    steps.steps_function(exp, mesh), like, pool, keys, jnp.zeros((), int)
  )
  assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, like)
  assert metrics["loss"].shape == (exp.scan_steps,)
  assert ("guidance" in metrics) == exp.objective.intrinsic


def test_the_step_for_a_gpu_has_its_fused_attention_forward_and_backward(monkeypatch):
  """As far as JAX checks shapes, types and layouts: lowered for CUDA where there is no GPU."""
  # What JAX would find on an H100.
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90_000)
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda least: True)
  config = imagenet256.get_config()
  exp, mesh = experiment.parse(config), sharding.data_mesh()
  keys, index = jax.eval_shape(lambda: steps.base_keys(0)), jnp.zeros((), int)
  couple = steps.couple_function(exp, mesh)
  pool, _ = jax.eval_shape(couple, steps.abstract_pool(exp, mesh), keys, index)
  arguments = (steps.abstract_state(exp, mesh), pool, keys, index)
  for device_kind, fused in (("NVIDIA H100 80GB HBM3", True), ("cpu", False)):
    monkeypatch.setattr(sharding, "device_kind", lambda mesh, kind=device_kind: kind)
    lowered = steps.steps_function(exp, mesh).trace(*arguments).lower(lowering_platforms=("cuda",))
    called = set(re.findall(r"@__cudnn\$(\w+)", lowered.as_text()))
    assert called == ({"fmhaSoftmax", "fmhaSoftmaxBackward"} if fused else set())


def test_imagenet256_has_the_papers_values():
  exp = experiment.parse(imagenet256.get_config())
  assert (exp.model.size, exp.steps, exp.coupling.pool_size) == ("SiT-XL/2", 800_000, 32)
  assert (exp.ema.inference_decay, exp.ema.target_decay) == (0.9999, 0.95)
  assert (exp.objective.w_max, exp.objective.t_interval) == (3.5, 0.3)
  assert exp.wavelet.levels == -1 and exp.image_shape == (32, 32, 4)
  assert (exp.objective.alpha, exp.objective.beta, exp.objective.gamma) == (1, 1, 1)


def test_imagenet_names_variants_sizes_and_the_length_of_the_ablation():
  exp = experiment.parse(imagenet256.get_config("b2,wavelet,250k"))
  assert (exp.model.size, exp.variant, exp.steps) == ("SiT-B/2", "wavelet", 250_000)
  exp = experiment.parse(imagenet512.get_config("l2"))
  assert (exp.model.size, exp.variant, exp.steps) == ("SiT-L/2", "ism", 800_000)
  assert exp.image_shape == (64, 64, 4)
  assert wavelets.depth(exp.wavelet, exp.image_shape[:2]) == 6
  with pytest.raises(ValueError, match=r"'b3' is no variant, .*known are sm, .* b2, "):
    imagenet256.get_config("ism,b3")
  with pytest.raises(ValueError, match="names 2 variants"):
    imagenet256.get_config("ism,sm")


def test_fine_tuning_begins_with_sits_own_file_and_composes_with_other_words():
  for module, file in ((imagenet256, "SiT-XL-2-256.pt"), (imagenet512, "SiT-XL-2-512.pt")):
    exp = experiment.parse(module.get_config("finetune"))
    assert (exp.init_from, exp.init_time, exp.variant) == (file, "noise_to_data", "ism")
    assert exp.total_steps == exp.steps == 10 * exp.checkpoint.keep_every
    assert (exp.objective.curriculum, exp.objective.w_ramp) == (0.5, 0.25)
  exp = experiment.parse(imagenet256.get_config("b2,250k,finetune,sm"))
  assert (exp.model.size, exp.steps, exp.variant) == ("SiT-B/2", 250_000, "sm")
  assert (exp.optimizer.b2, exp.optimizer.clip_norm) == (0.95, 1.0)
  assert (exp.objective.curriculum, exp.objective.w_ramp) == (0.5, 0.0)  # sm draws no w
  assert experiment.parse(imagenet256.get_config("fm,finetune")).objective.curriculum == 0
  new = experiment.parse(imagenet256.get_config())
  assert (new.init_from, new.optimizer.clip_norm, new.objective.curriculum) == ("", 0, 0)


def test_rows_of_the_ablation_differ_by_the_techniques_they_are_named_for():
  rows = {v: digits.get_config(v).to_dict() for v in base.VARIANTS}

  def differences(a, b, prefix=""):
    changed = set()
    for name in a:
      if isinstance(a[name], dict):
        changed |= differences(a[name], b[name], f"{prefix}{name}.")
      elif a[name] != b[name] and name != "variant":
        changed.add(prefix + name)
    return changed

  assert differences(rows["interval"], rows["ig"]) == {"objective.t_interval"}
  assert differences(rows["wavelet"], rows["interval"]) == {"wavelet.form"}
  assert differences(rows["sot"], rows["wavelet"]) == {"coupling.coupling"}
  assert differences(rows["ism"], rows["sot"]) <= {"ema.target_decay", "ema.inference_decay"}
  assert differences(rows["sm"], rows["sm_compounding"]) == {"objective.guidance"}
  assert differences(rows["ism"], rows["no_interval"]) == {"objective.t_interval"}
  assert differences(rows["ism"], rows["no_wavelet"]) == {"wavelet.form"}
  assert differences(rows["ism"], rows["no_sot"]) == {"coupling.coupling"}
  assert differences(rows["ism"], rows["no_ig"]) == {
    "objective.guidance",
    "objective.shares",
    "evaluation.w",
  }


def test_the_length_of_a_run_rounds_up_to_whole_pools():
  config = tiny_config()
  config.steps = 9
  assert experiment.parse(config).total_steps == 12


def test_a_config_from_a_checkpoint_is_the_same_experiment():
  import json

  config = tiny_config()
  assert experiment.parse(json.loads(config.to_json())) == experiment.parse(config)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"scan_steps": 3}, "scan_steps=3 does not divide"),
    ({"steps": 0}, "steps=0"),
    ({"placement": "zero1"}, "known are auto, replicated, sharded"),
    ({"wavelet": {"levels": 4}}, "at most 3"),
    ({"data": {"image_size": 10}}, "do not split into the 4x4 patches"),
    ({"data": {"image_size": (8, 10)}}, "8x10 images do not split into the 4x4 patches"),
    ({"data": {"image_size": (8, 0)}}, r"data.image_size\[1\]=0: give a whole number in \[1, 1024"),
    ({"data": {"image_size": (8, 8, 1)}}, r"data.image_size=\(8, 8, 1\): give 2 values"),
    ({"data": {"image_size": -1}}, r"image_size=-1: .* in \[1, 1024\], or 2 of them: \(24, 32\)\."),
    ({"data": {"image_size": "8x4"}}, "image_size='8x4': give a whole number"),
    ({"evaluation": {"steps": (1, 3)}}, "off the trained grid"),
    ({"evaluation": {"w": (-1.0,)}}, r"evaluation.w\[0\]=-1.0: give a number in \[0, 100\]"),
    ({"checkpoint": {"keep": 0}}, "keep=0"),
    ({"evaluation": {"seeds": ("(0,)",)}}, r"evaluation.seeds\[0\]='\(0,\)': give a whole"),
    ({"checkpoint": {"keep_every": -1}}, "keep_every=-1"),
    ({"profile_steps": -1}, "profile_steps=-1"),
  ],
)
def test_what_is_wrong_with_a_config_is_said_with_the_remedy(change, message):
  config = tiny_config()
  config.update(change)
  with pytest.raises(ValueError, match=message):
    experiment.parse(config)


@pytest.mark.parametrize(
  ("size", "shape"), [(8, (8, 8, 1)), ((8, 16), (8, 16, 1)), ([16, 8], (16, 8, 1))]
)
def test_a_size_is_one_number_or_height_and_width(size, shape):
  """Also as a checkpoint's JSON has it, and set by a flag."""
  saved = json.loads(json.dumps(tiny_config().to_dict()))
  saved["data"]["image_size"] = size
  assert experiment.parse(saved).image_shape == shape
  config = experiment.as_config(saved)
  assert experiment.parse(config).image_shape == shape
  experiment.check_continues(saved, files.as_dict(config))
  for text, expected in (("16", (16, 16, 1)), ("(24, 8)", (24, 8, 1))):
    flag = main.override(saved, ["ism_jax", f"--config.data.image_size={text}"])
    assert experiment.parse(flag).image_shape == expected


def test_paths_of_a_config_are_what_their_user_means(monkeypatch):
  """Wherever they are in it, and with commas."""
  monkeypatch.setenv("HOME", "/home/of")
  config = tiny_config()
  config.update({"init_from": "~/sit.pt", "data": {"dir": "file:///data"}})
  names = ("inception", "dinov2")
  config.evaluation.update({"networks": ",".join(names), "weights": "dinov2=~/a,b.pt"})
  config.evaluation.reference = "inception=~/x=1,y.npz,dinov2=file:///z%20.npz"
  exp = experiment.parse(config)
  assert (exp.init_from, exp.data.dir) == ("/home/of/sit.pt", "/data")
  assert exp.evaluation.weight_files() == {"dinov2": "/home/of/a,b.pt"}
  assert exp.evaluation.reference_files() == {
    "inception": "/home/of/x=1,y.npz",
    "dinov2": "/z .npz",
  }
  assert protocol.parse_files("--weights", "~/a,b.pt", ["dinov2"]) == {"dinov2": "/home/of/a,b.pt"}
  config.data.dir = "~not-a-user/data"
  with pytest.raises(ValueError, match="there is no home ~not-a-user"):
    experiment.parse(config)


def test_unknown_and_missing_keys_are_named_with_the_known_ones():
  config = tiny_config().to_dict()
  config["objective"]["alfa"] = 1.0
  with pytest.raises(ValueError, match=r"unknown key objective.alfa; objective has alpha, beta"):
    experiment.parse(config)
  del config["objective"]["alfa"], config["ema"]["warmup"]
  with pytest.raises(ValueError, match=r"lacks ema.warmup"):
    experiment.parse(config)


def test_a_config_from_before_a_key_takes_its_default():
  config = tiny_config().to_dict()
  before = experiment.parse(config)
  del config["profile_steps"]
  assert experiment.parse(config) == before


def test_an_unknown_variant_lists_the_known_ones():
  with pytest.raises(ValueError, match="known are sm, sm_compounding, ig"):
    digits.get_config("smm")


def test_a_batch_that_does_not_split_names_the_nearest_that_does():
  config = tiny_config()
  config.batch_size = 100
  with pytest.raises(ValueError, match="multiple of 8 and of 4; the nearest is 96"):
    experiment.check_devices(experiment.parse(config), 8)
  config.batch_size = 6  # rows of each loss at their shares
  with pytest.raises(ValueError, match="multiple of 2 and of 4; the nearest is 8"):
    experiment.check_devices(experiment.parse(config), 2)


def test_a_config_is_validated_without_importing_a_feature_network():
  script = (
    "import sys\n"
    "from configs import digits\n"
    "from ism_jax import experiment\n"
    "experiment.parse(digits.get_config())\n"
    "networks = {f'ism_jax.{m}' for m in "
    "('metrics.features', 'metrics.classifier', 'pretrained.inception', 'pretrained.dinov2')}\n"
    "assert not networks & set(sys.modules), networks & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", script], check=True, cwd=pathlib.Path(__file__).parents[1])
  assert tuple(features.PUBLISHED) == protocol.PUBLISHED


def keys_marked(mark):
  return {key for key, marks in experiment.MARKS.items() if getattr(marks, mark)}


def test_a_config_older_than_a_key_has_its_default():
  config = tiny_config().to_dict()
  older = copy.deepcopy(config)
  del older["gradient_dtype"], older["optimizer"]["mu_dtype"], older["model"]["attention"]
  del older["ema"]["others"]
  experiment.check_continues(older, config)
  assert summary.row_names([older, config]) == ["`ism`", "`ism`"]
  config["optimizer"]["mu_dtype"] = "bfloat16"
  with pytest.raises(ValueError, match=r"optimizer\.mu_dtype='float32', now 'bfloat16'"):
    experiment.check_continues(older, config)


def test_every_key_says_what_it_means_to_a_run():
  assert experiment.MARKS.keys() == experiment.flatten(tiny_config().to_dict()).keys()
  assert keys_marked("fixed") == {
    *("variant", "seed", "batch_size", "coupling.pool_size", "model.size"),
    *("objective.guidance", "objective.fixed_w", "optimizer.mu_dtype", "ema.others"),
    *("objective.t_interval_max", "objective.w_scaled"),
    *("data.name", "data.seed", "data.flip"),
    *("data.image_size", "data.channels", "data.num_classes"),
    *("data.vae_scale", "data.vae_shift"),
    *("data.crop", "data.orient", "data.background", "data.held_out"),
  }
  assert keys_marked("path") == {
    *("init_from", "data.dir", "evaluation.weights", "evaluation.reference"),
  }
  watching = ("log.", "checkpoint.", "sample.", "monitor.", "evaluation.")
  watching = {key for key in experiment.MARKS if key.startswith(watching)}
  assert experiment.MARKS.keys() - keys_marked("learnt") - watching == {
    *("seed", "micro_batches", "scan_steps", "placement", "profile_steps", "ema.others"),
    *(
      "data.dir",
      "data.title",
      "data.num_threads",
      "data.max_pixels",
      "model.remat",
      "model.unroll",
      "model.attention",
    ),
  }
  assert not keys_marked("learnt") & watching


def test_runs_that_are_computed_and_watched_in_other_ways_are_one_row():
  config, other = tiny_config().to_dict(), tiny_config().to_dict()
  other |= {"seed": 1, "placement": "sharded", "profile_steps": 8, "micro_batches": 2}
  other["monitor"]["every"] = 3
  assert len(set(summary.row_names([config, other]))) == 1
  other["steps"] = 9
  assert len(set(summary.row_names([config, other]))) == 2


def test_a_key_without_a_mark_is_an_error():
  unmarked = dataclasses.make_dataclass("Unmarked", [("seed", int)])
  with pytest.raises(TypeError, match="learnt"):
    experiment._marks(unmarked)


def test_equal_decays_make_one_ema():
  exp = experiment.parse(tiny_config("sot"))
  assert exp.ema.inference_decay == exp.ema.target_decay
  assert isinstance(exp.ema, state.EmaConfig)
