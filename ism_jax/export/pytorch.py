"""Exports the parameters of a checkpoint to PyTorch.

  python -m ism_jax export --workdir=W --out=DIR [--tree=ema|target_ema|params]
      [--dtype=float32|bfloat16] [--step=N]

DIR works without this project. It gets `model.safetensors`, a state dict with the keys of SiT's
code; `config.json`; `ism_pytorch.py`, the network and its sampler, which need only PyTorch; and
`README.md`, a model card, with the evaluation in the workdir where that is of the same parameters.
It is written whole or not at all, and replaces nothing. Training begins with it by
--config.init_from=DIR.
"""

import json
import os
import pathlib
import re

from absl import flags, logging
from etils import epath
from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from ism_jax import restore
from ism_jax.evaluation.report import as_markdown
from ism_jax.experiment import MARKS
from ism_jax.pretrained import sit
from ism_jax.pretrained import vae as vae_lib
from ism_jax.restore import TREES, Trained
from ism_jax.runtime import commands, files

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
CODE = "ism_pytorch.py"
CARD = "README.md"


def export(workdir: str, out: str, *, tree: str, dtype: str, step: int | None = None) -> None:
  """Writes a checkpoint's parameters to a new folder; see the module's docstring.

  Args:
    out: a folder that is empty or not there.
    tree: one of `restore.TREES`.
    dtype: one of `DTYPES`, of the file.
    step: of the checkpoint; None for the newest that is whole.
  Raises:
    OSError: `out` is not empty or cannot be written. Otherwise as `restore.read`.
  """
  files.check_empty(out)
  trained = restore.read(workdir, tree, step=step)
  exp, vae = trained.exp, trained.exp.data.vae
  if vae and (not re.fullmatch(r"[\w.-]+/[\w.-]+", vae) or os.path.exists(vae)):
    remedy = "whoever samples in PyTorch has to pass the autoencoder to to_pixels."
    logging.warning("data.vae=%s is no name on the Hugging Face hub: %s", vae, remedy)
  state = sit.from_params(jax.device_get(trained.params), exp.network(), exp.image_shape)
  state = {k: np.ascontiguousarray(a, DTYPES[dtype]) for k, a in state.items()}
  with files.whole_folder(out) as folder:
    settings = json.dumps(describe(trained, dtype), indent=2) + "\n"
    (folder / sit.CONFIG).write_text(settings, encoding="utf-8")
    (folder / CODE).write_bytes(pathlib.Path(__file__).with_name(CODE).read_bytes())
    about = card(trained, dtype, read_evaluation(workdir, trained))
    (folder / CARD).write_text(about, encoding="utf-8")
    weights = folder / sit.WEIGHTS
    # Other readers ask the metadata whose arrays these are.
    safetensors.numpy.save_file(state, weights, {"format": "pt"})
    weights.chmod((folder / CARD).stat().st_mode)  # which is for the owner's eyes only
  logging.info("Wrote the %s to %s.", trained.about, out)


def describe(trained: Trained, dtype: str) -> dict:
  """config.json: what `pytorch.Config` reads, where the parameters are from, and their config."""
  exp = trained.exp
  config = traverse_util.flatten_dict(trained.config, sep=".")
  config |= {key: "" for key, marks in MARKS.items() if marks.path}
  return {
    "architecture": exp.model.size,
    **dict(zip(("depth", "width", "heads"), exp.model.dimensions, strict=True)),
    "patch": exp.model.patch,
    **{name: getattr(exp.data, name) for name in ("image_size", "channels", "num_classes")},
    "guided": exp.objective.intrinsic,
    **{name: getattr(exp.objective, name) for name in ("w_max", "fixed_w", "t_interval")},
    "vae": exp.data.vae,
    "vae_scale": vae_lib.SD_VAE.scale,
    "step": trained.step,
    "tree": trained.tree,
    "dtype": dtype,
    "config": traverse_util.unflatten_dict(config, sep="."),
  }


def read_evaluation(workdir: str, trained: Trained) -> dict | None:
  """The report of `evaluate.evaluate` in a workdir, if it is of these parameters."""
  path = epath.Path(workdir) / "evaluation.json"
  if not path.exists():
    return None
  report = json.loads(path.read_text(encoding="utf-8"))
  measured = report.get("step"), report.get("parameters")
  if measured == (trained.step, TREES[trained.tree]) and "networks" in report:
    return report
  logging.warning("%s is no evaluation of the %s: the model card has none.", path, trained.about)
  return None


def card(trained: Trained, dtype: str, evaluation: dict | None) -> str:
  """The model card, in Markdown with the hub's header; `evaluation` as `read_evaluation` has it."""
  exp, module = trained.exp, pathlib.Path(CODE).stem
  guided, vae, null = exp.objective.intrinsic, exp.data.vae, exp.null_class
  w = exp.sample.w if guided else exp.objective.fixed_w
  sees = "x".join(map(str, exp.image_shape)) + (f" latents of `{vae}`" if vae else " images")
  guidance = (
    f"`w` is the guidance, one number or one for each sample: 0 is none, {exp.objective.w_max:g} "
    "the most it was trained at."
    if guided
    else f"The guidance is fixed at `w` = {w:g}; only 128 steps take any other."
  )
  decoding = (
    "`to_pixels` decodes with that autoencoder, which it gets through diffusers (`pip install "
    "diffusers`), or with the AutoencoderKL passed as `vae`."
    if vae
    else "Images come from the network as they are: `to_pixels` only rounds them."
  )
  embedders = "`d_embedder.*` and `w_embedder.*`" if guided else "`d_embedder.*`"
  measured = ["Not measured for these parameters."]
  if evaluation is not None:
    table = as_markdown(evaluation).partition("\n")[2].strip()  # without its title
    measured = ["Measured on the JAX network with these parameters in float32.", "", table]
  lines = [
    "---",
    "library_name: pytorch",
    "tags: [shortcut-models, flow-matching, class-conditional]",
    "---",
    f"# {exp.model.size} on {exp.data.name}, {exp.variant}",
    "",
    f"A few-step sampler of {exp.data.num_classes} classes. The network, {exp.model.size}, sees "
    f"{sees}. It was trained for {trained.step:,} steps of {exp.batch_size} images with ism_jax, a "
    'JAX implementation of "Improved Training Technique for Shortcut Models" '
    "([arXiv:2510.21250](https://arxiv.org/abs/2510.21250)) that is not its authors', as the "
    f"variant `{exp.variant}`. The parameters are the {TREES[trained.tree]}, in {dtype}.",
    "",
    "## Use",
    "",
    "With PyTorch, in this folder:",
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
    "",
    "ism_jax trains on from them with `--config.init_from=FOLDER`.",
    "",
    "## Evaluation",
    "",
    *measured,
  ]
  return "\n".join(lines) + "\n"


def define_flags() -> None:
  """Defines the flags of the command."""
  define_common_flags()
  flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the file.")


def define_common_flags() -> None:
  """Defines the flags that say which parameters go where."""
  flags.DEFINE_string("workdir", None, "Folder of checkpoints, logs and results.")
  flags.DEFINE_string("out", None, "Folder to make.")
  flags.DEFINE_enum("tree", "ema", list(TREES), "Which parameters.")
  flags.DEFINE_integer("step", None, "Of the checkpoint; the newest.", lower_bound=0)
  flags.mark_flags_as_required(["workdir", "out"])


def main(argv):
  """Exports; see the module's docstring."""
  args = flags.FLAGS
  with commands.one_line_errors():
    export(args.workdir, args.out, tree=args.tree, dtype=args.dtype, step=args.step)
