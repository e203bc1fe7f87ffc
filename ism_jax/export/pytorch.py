"""Exports the parameters of a checkpoint to PyTorch.

  python -m ism_jax export --workdir=W --out=DIR [--tree=ema|target_ema|params|ema:DECAY]
      [--dtype=float32|bfloat16] [--step=N] [--space]

DIR works without this project. It gets `transformer/`, with a state dict that has the keys of SiT's
code; `config.json`; `ism_pytorch.py`, the network and its sampler, which need only PyTorch; and
`README.md`, a model card, with the evaluation in the workdir where that is of the same parameters.
For diffusers there are `model_index.json`, `pipeline.py`, `scheduler/`, and of latents `vae/`, the
autoencoder. It is written whole or not at all, and replaces nothing. Training begins with it by
--config.init_from=DIR. With --space it is a Space of the Hugging Face hub too: `python app.py`
serves the page of `python -m ism_jax demo` on PyTorch alone.
"""

import dataclasses
import json
import os
import pathlib

from absl import flags, logging
from etils import epath
from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from ism_jax import generate, model, ranges, restore
from ism_jax.data import pipeline
from ism_jax.evaluation import summary
from ism_jax.evaluation.report import as_markdown, folder_of
from ism_jax.experiment import MARKS
from ism_jax.pretrained import hub, sit
from ism_jax.pretrained import vae as vae_lib
from ism_jax.restore import Trained
from ism_jax.runtime import commands, files

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
CODE = "ism_pytorch.py"
PIPELINE = "pipeline.py"
CARD = "README.md"
_GRADIO = "6.31.0"  # that a Space gets; the tests run the page on it
_NEEDED = "torch>=2.13\ndiffusers>=0.38,<0.43\n"  # by a Space besides; the extra "torch"
EVALUATION, PICTURE = "evaluation.json", "samples.png"  # where there was an evaluation
_VAE = "vae"  # the folder, and what names an autoencoder that is known on one machine only
_CLASS = "ISMTransformer2DModel"
_AUTO_MAP = {"auto_map": {"AutoModel": f"ism_pytorch.{_CLASS}"}}
_INDEX = _AUTO_MAP | {
  "_class_name": ["pipeline", "ISMPipeline"],
  "transformer": ["ism_pytorch", _CLASS],
  "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}


def export(
  workdir: str, out: str, *, tree: str, dtype: str, step: int | None = None, space: bool = False
) -> None:
  """Writes a checkpoint's parameters to a new folder; see the module's docstring.

  Args:
    out: a folder that is empty or not there.
    tree: one of `restore.trees_of` the run.
    dtype: one of `DTYPES`, of the file.
    step: of the checkpoint; None for the newest that is whole.
    space: whether it is a Space of the hub, too.
  Raises:
    OSError: `out` is not empty or cannot be written. Otherwise as `restore.read`.
  """
  files.check_empty(out)
  trained = restore.read(workdir, tree, step=step)
  is_run = restore.is_run(workdir)
  folder = folder_of(workdir, tree) if is_run else restore.find_export(workdir)[0]
  evaluation, picture = read_evaluation(folder, trained), epath.Path(folder) / PICTURE
  write(
    trained,
    out,
    dtype=dtype,
    space=space,
    evaluation=evaluation,
    picture=picture.read_bytes() if evaluation and picture.exists() else None,
  )
  logging.info("Wrote the %s to %s.", trained.about, out)


def write(
  trained: Trained,
  out: str,
  *,
  dtype: str,
  evaluation: dict | None = None,
  picture: bytes | None = None,
  space: bool = False,
) -> None:
  """Writes a new folder, as `export`.

  Args:
    evaluation: that `read_evaluation` returns.
    picture: its samples, as PNG.
    space: whether it is a Space too, see `export`.
  """
  trained = _at_interval(trained)
  exp, vae = trained.exp, _autoencoder(trained)
  names = trained.names or pipeline.class_names(exp.data)
  state = sit.from_params(jax.device_get(trained.params), exp.network(), exp.image_shape)
  state = {k: np.ascontiguousarray(a, DTYPES[dtype]) for k, a in state.items()}
  with files.whole_folder(out) as folder:
    settings = describe(trained, dtype) | _labels(names)
    _write_json(folder / sit.CONFIG, settings)
    (folder / CARD).write_text(card(trained, dtype, evaluation, names), encoding="utf-8")
    _write_weights(folder / sit.WEIGHTS, state)
    if evaluation is not None:
      _write_json(folder / EVALUATION, for_others(evaluation))
    if picture is not None:
      (folder / PICTURE).write_bytes(picture)
    _copy_code(folder)
    _write_for_diffusers(folder, settings, vae)
    if space:
      _make_space(folder)


def _at_interval(trained: Trained) -> Trained:
  """The network whose guidance begins at the config's `t_interval`, which is no input of it."""
  exp = trained.exp
  if not exp.objective.t_interval_max:
    return trained
  _, params = model.at_interval(exp.network(), trained.params, exp.objective.t_interval)
  objective = dataclasses.replace(exp.objective, t_interval_max=0.0)
  config = trained.config | {"objective": trained.config["objective"] | {"t_interval_max": 0.0}}
  exp = dataclasses.replace(exp, objective=objective)
  return dataclasses.replace(trained, exp=exp, config=config, params=params)


def _autoencoder(trained: Trained):
  """The autoencoder of latents; None where there are none, or it is not to be had."""
  cfg = trained.exp.data
  try:
    generate.check_decoder(trained)
    return generate.autoencoder(cfg) if cfg.vae else None
  except FileNotFoundError as error:
    remedy = "whoever samples in PyTorch has to pass the autoencoder to to_pixels or the pipeline."
    logging.warning("The export has no %s/: %s Without it, %s", _VAE, error, remedy)
    return None


def _write_for_diffusers(folder, settings: dict, vae) -> None:
  """What diffusers reads beside the weights; `vae` is None where the export has none."""
  _write_json((folder / sit.WEIGHTS).with_name(sit.CONFIG), _network_config(settings))
  scheduler = {"_class_name": _INDEX["scheduler"][1], "num_train_timesteps": 1000, "shift": 1.0}
  _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
  index = _INDEX | {"vae": ["diffusers", "AutoencoderKL"] if vae else [None, None]}
  labels = {key: settings[key] for key in settings if key == "id2label"}
  _write_json(folder / "model_index.json", index | labels)
  if vae:
    _write_weights(folder / _VAE / vae_lib.WEIGHTS, vae_lib.state_dict(vae.params))
    _write_json(folder / _VAE / sit.CONFIG, vae_lib.diffusers_config(vae.cfg))


def _make_space(folder) -> None:
  """Adds the page, what it needs, and the header by which the hub knows a Space."""
  page = pathlib.Path(__file__).parent.parent / "demo" / "page.py"
  (folder / "app.py").write_bytes(page.read_bytes())
  (folder / "requirements.txt").write_text(_NEEDED, encoding="utf-8")
  header, body = "---\n", (folder / CARD).read_text(encoding="utf-8")
  space = f"title: Few-step samples\nsdk: gradio\nsdk_version: {_GRADIO}\napp_file: app.py\n"
  (folder / CARD).write_text(header + space + body.removeprefix(header), encoding="utf-8")


def _copy_code(folder) -> None:
  # diffusers takes the network from its own folder, and no file that this one would import.
  for path in (folder / CODE, (folder / sit.WEIGHTS).with_name(CODE), folder / PIPELINE):
    path.write_bytes(pathlib.Path(__file__).with_name(path.name).read_bytes())


def _write_json(path, values: dict) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_weights(path, state: dict) -> None:
  path.parent.mkdir(exist_ok=True)
  # Other readers ask the metadata whose arrays these are.
  safetensors.numpy.save_file(state, path, {"format": "pt"})
  path.chmod(path.parent.stat().st_mode & 0o666)  # which is for the owner's eyes only


def _labels(names: list[str] | None) -> dict:
  """The entry of JSON that names classes, as diffusers' DiT has it."""
  return {"id2label": {str(i): name for i, name in enumerate(names)}} if names else {}


def describe(trained: Trained, dtype: str) -> dict:
  """config.json: the network, where the parameters are from, and their config."""
  exp = trained.exp
  vae = public_vae(exp.data.vae)
  return {
    "architecture": exp.model.size,
    **dict(zip(("depth", "width", "heads"), exp.model.dimensions, strict=True)),
    "patch": exp.model.patch,
    "image_size": ranges.size_as_json(exp.data.image_size),
    **{name: getattr(exp.data, name) for name in ("channels", "num_classes")},
    "guided": exp.objective.intrinsic,
    **{name: getattr(exp.objective, name) for name in ("w_max", "fixed_w", "t_interval")},
    "vae": vae,
    **{name: getattr(exp.data, name) for name in ("vae_scale", "vae_shift")},
    "two_pass": exp.objective.guidance == "two_pass",
    "w_scaled": exp.objective.w_scaled,
    "step": trained.step,
    "tree": trained.tree,
    "checksum": trained.checksum,
    "dtype": dtype,
    "config": _public_config(trained.config),
  }


def public_vae(name: str) -> str:
  """The autoencoder's name as others may read it: no path of this machine."""
  return name if not name or vae_lib.is_public(name) else _VAE


def _network_config(settings: dict) -> dict:
  """transformer/config.json: what `ism_pytorch.Config` has, of `describe`'s."""
  others = ("architecture", "step", "tree", "checksum", "dtype", "config", "id2label")
  return (
    {"_class_name": _CLASS}
    | _AUTO_MAP
    | {key: value for key, value in settings.items() if key not in others}
  )


def read_evaluation(workdir: str, trained: Trained) -> dict | None:
  """The report of `evaluate.evaluate` in a workdir, if it is of these parameters."""
  path = epath.Path(workdir) / EVALUATION
  if not path.exists():
    return None
  try:
    report = files.read_json(path, {}, "")
    # Older reports have none.
    checksum = report.get("parameters_checksum") or trained.checksum
    measured = report.get("step"), report.get("parameters"), checksum
    if measured == (trained.step, restore.name_of(trained.tree), trained.checksum):
      needed = {"variant": str, "labels": str, "rounding": str, "metrics": {str: str}, "vae": str}
      files.check_shape(report, summary.REPORT | needed | {"num_images": int}, str(path))
      return report
  except (OSError, ValueError) as error:
    logging.warning("The model card has no evaluation: %s", error)
    return None
  logging.warning("%s is no evaluation of the %s: the model card has none.", path, trained.about)
  return None


def card(
  trained: Trained, dtype: str, evaluation: dict | None, names: list[str] | None = None
) -> str:
  """The model card, in Markdown with the hub's header.

  Args:
    evaluation: as `read_evaluation` has it.
    names: of the classes.
  """
  exp, module = trained.exp, pathlib.Path(CODE).stem
  guided, null = exp.objective.intrinsic, exp.null_class
  vae = public_vae(exp.data.vae)
  title = pipeline.title(exp.data, names)
  w = exp.sample.w if exp.objective.any_w else exp.objective.fixed_w
  sees = "x".join(map(str, exp.image_shape)) + (
    " images" if not vae else f" latents of `{vae}`" + ("/" if vae == _VAE else "")
  )
  guidance = (
    f"`w` is the guidance, one number or one for each sample: 0 is none, {exp.objective.w_max:g} "
    "the most it was trained at."
    if guided
    else "`w` is the guidance, one number or one for each sample: 0 is none, and every step takes "
    "two passes."
    if exp.objective.any_w
    else f"The guidance is fixed at `w` = {w:g}; only 128 steps take any other."
  )
  decoding = (
    f"The latents are {exp.data.vae_scale:g} (z - {exp.data.vae_shift:g}) of that autoencoder's z: "
    f"`to_pixels` undoes that and decodes with it, from `{_VAE}/` or else from the hub, through "
    "diffusers (`pip install diffusers`), or with the AutoencoderKL passed as `vae`, if it has the "
    "same factors."
    if vae
    else "Images come from the network as they are: `to_pixels` only rounds them."
  )
  of = f"the {exp.data.num_classes} classes of {title}" if null > 1 else f"{title}, of one class"
  embedders = "`d_embedder.*` and `w_embedder.*`" if guided else "`d_embedder.*`"
  lines = [
    "---",
    "library_name: diffusers",
    "tags: [shortcut-models, flow-matching, class-conditional]",
    "---",
    f"# {exp.model.size} on {title}, {exp.variant}",
    "",
    f"A few-step sampler of {of}. The network, "
    f"{exp.model.size}, sees {sees}. It was trained for {trained.step:,} steps of "
    f"{exp.batch_size} images with ism_jax, a "
    'JAX implementation of "Improved Training Technique for Shortcut Models" '
    "([arXiv:2510.21250](https://arxiv.org/abs/2510.21250)) that is not its authors', as the "
    f"variant `{exp.variant}`. The parameters are the {restore.name_of(trained.tree)}, in {dtype}.",
    "",
    "## Use",
    "",
    "With diffusers (`pip install diffusers accelerate`), in this folder or by its name on the "
    "hub:",
    "",
    "```python",
    "from diffusers import DiffusionPipeline",
    "",
    'pipe = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)',
    f"images = pipe([{', '.join(_some_labels(names, null))}], num_inference_steps=4, "
    f"guidance_scale={1 + w:g}).images",
    "```",
    "",
    "With PyTorch alone, in this folder:",
    "",
    "```python",
    "import torch",
    f"from {module} import draw_noise, load, sample, to_pixels",
    "",
    'model = load(".")',
    "x0 = draw_noise(model, 8, seed=0)",
    f"x1 = sample(model, x0, c=torch.arange(8) % {null}, w={w:g}, steps=4)",
    "pixels = to_pixels(model, x1)  # uint8 [8, H, W, C]",
    "```",
    "",
    f'`steps` is 1, 2, 4, ... or 128, or a schedule such as "1/2,1/4,1/4". {guidance} `c` are '
    f"classes, and {null} is none. {decoding}",
    "",
    "## Files",
    "",
    f"- `{sit.WEIGHTS}`: a state dict with the keys of the official SiT code, and "
    f"{embedders}, added to its conditioning.",
    f"- `{sit.CONFIG}`: the network, and under `config` all that it was trained with.",
    f"- `{CODE}`: the network and its sampler, in one file that needs only PyTorch.",
    f"- `{PIPELINE}` and the rest: for diffusers.",
    "",
    "ism_jax trains on from them with `--config.init_from=FOLDER`.",
    "",
    "## Evaluation",
    "",
    *measured(evaluation),
  ]
  return "\n".join(lines) + "\n"


def _some_labels(names, classes: int) -> list[str]:
  """Two classes as the pipeline takes them, in Python."""
  some = dict.fromkeys((0, classes - 1))
  return [json.dumps(names[i].partition(",")[0]) if names else str(i) for i in some]


def for_others(report: dict) -> dict:
  """An evaluation without what other people's have not: folders, speeds, distances in floors."""
  networks = []
  for network in report["networks"]:
    reference = dict(network["reference"])
    if "file" in reference:
      reference["file"] = pathlib.PurePath(reference["file"]).name
    if "protocol" in reference:  # of `statistics`: where the images lie, and which are damaged
      of_here = ("source", "unreadable")
      reference["protocol"] = {k: v for k, v in reference["protocol"].items() if k not in of_here}
    networks.append(network | {"reference": reference, "floor": None})
  plain = lambda values: {k: v for k, v in values.items() if k != "times_floor"}
  scores = lambda result: {name: plain(values) for name, values in result["scores"].items()}
  row = lambda result: {k: v for k, v in result.items() if k != "images_per_second"}
  rows = lambda results: [row(result) | {"scores": scores(result)} for result in results]
  yardsticks = report["yardsticks"]
  return report | {
    "vae": public_vae(report["vae"]),
    "networks": networks,
    "results": rows(report["results"]),
    "yardsticks": dict(zip(yardsticks, rows(yardsticks.values()), strict=True)),
    "config": _public_config(report["config"]),
  }


def _public_config(config: dict) -> dict:
  """A config, nested, without the paths of the machine that trained."""
  flat = traverse_util.flatten_dict(config, sep=".")
  paths = {key: "" for key, marks in MARKS.items() if marks.path}
  if (began := flat.get("init_from")) and not os.path.exists(began) and hub.parse(began):
    del paths["init_from"]  # a repository, the same for everyone
  return traverse_util.unflatten_dict(
    flat | paths | {"data.vae": public_vae(flat.get("data.vae", ""))}, sep="."
  )


def measured(evaluation: dict | None) -> list[str]:
  """The card's lines on an evaluation, as `read_evaluation` has it."""
  if evaluation is None:
    return ["Not measured for these parameters."]
  table = as_markdown(for_others(evaluation)).partition("\n")[2].strip()  # without its title
  return ["Measured on the JAX network with these parameters in float32.", "", table]


def define_flags() -> None:
  """Defines the flags of the command."""
  define_common_flags()
  flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the file.")
  flags.DEFINE_bool("space", False, "Adds the page, so that it is a Space of the hub too.")


def define_common_flags() -> None:
  """Defines the flags that say which parameters go where."""
  flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints; or an export, or its name on the hub."
  )
  flags.DEFINE_string("out", None, "Folder to make.")
  flags.DEFINE_string("tree", "ema", "Which parameters of a run.")
  flags.DEFINE_integer("step", None, "Of the checkpoint; the newest.", lower_bound=0)
  flags.mark_flags_as_required(["workdir", "out"])


def main(argv):
  """Exports; see the module's docstring."""
  args = flags.FLAGS
  with commands.one_line_errors():
    options = {name: args[name].value for name in ("tree", "dtype", "step", "space")}
    export(args.workdir, args.out, **options)
