"""Trains, evaluates or samples.

  python -m ism_jax train --config=configs/digits.py [--workdir=W]
  python -m ism_jax evaluate --workdir=W [--out=DIR] [--samples=FILE_OR_FOLDER] [--tree=ema]
  python -m ism_jax sweep --workdir=W [--out=DIR] [--first=N] [--trees=ema,target_ema]
  python -m ism_jax sample --workdir=W --out=OUT --config.sample.steps=4 --config.sample.label=tabby

`python -m ism_jax.main --mode=train`, which may be left out, `--mode=evaluate` and so on are the
same.

--config.KEY=VALUE overrides a value of --config; without --config, which only training needs, of
the config in the newest checkpoint. Without --workdir it is runs/ and the config's name and words,
runs/digits-sm for configs/digits.py:sm, and for images of your own the name of their folder. The
same training command continues a run. Several processes are one run, on the same --workdir: see
launch/README.md. Exit codes: 0 done, 1 an error; 143, 130 or 129 training that SIGTERM, Ctrl-C or
SIGHUP stopped after saving a checkpoint.

--tree chooses the parameters: ema, target_ema, params, or of the run's ema.others one such as
ema:0.999. An evaluation of other ones than ema goes to a folder of that name in the workdir.
--trees=all are all inference averages, ema among them.

Of weights alone, evaluate and sample take as --workdir a folder that python -m ism_jax export
wrote, or what the Hugging Face hub has: OWNER/NAME, OWNER/NAME@REVISION, the address of its page.
An evaluation then writes to --out, by default evaluations/OWNER-NAME.
"""

import os
import re
import sys

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from ism_jax.runtime import commands, multihost

ARGUMENTS = "without --config, --config.KEY=VALUE of the checkpoint's config"
MODES = ("train", "evaluate", "sweep", "sample")


def define_flags(mode: str | None = None) -> None:
  """Defines the flags of a mode; without one, those of all."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file, with a variant behind a colon: configs/digits.py:sm."
  )
  exports = "" if mode == "train" else " Or, not to train: an export, or its name on the hub."
  flags.DEFINE_string("workdir", None, f"Folder of checkpoints, logs and results.{exports}")
  flags.DEFINE_enum("mode", mode or "train", [mode] if mode else MODES, "What to do.")
  if mode != "train":
    purposes = {
      "sample": "When sampling: an npz, png or gif to write, or a folder for PNGs.",
      "evaluate": "When evaluating: folder of the results, by default the workdir; see --tree.",
      "sweep": "When sweeping: the same, by default sweep/ there.",
    }
    about = purposes[mode] if mode else " ".join(purposes.values())
    flags.DEFINE_string("out", None, about)
  if mode in (None, "evaluate", "sample"):
    flags.DEFINE_string("tree", "ema", "When evaluating or sampling: which parameters of a run.")
  if mode in (None, "evaluate"):
    flags.DEFINE_string(
      "samples",
      None,
      "When evaluating: images to judge instead of the checkpoint's, an npz or a folder.",
    )
  if mode in (None, "sweep"):
    flags.DEFINE_integer(
      "first", 0, "When sweeping: samples of each setting before the best is judged.", lower_bound=0
    )
    about = "When sweeping: the parameters that are tried; all for all inference averages."
    flags.DEFINE_list("trees", ["ema"], about)
  multihost.define_flags()


def main(arguments):
  """Runs the mode; without --config, `arguments` holds the overrides of the checkpoint's config."""
  args = flags.FLAGS
  value = lambda name: args[name].value if name in args else None  # a mode has not all flags
  mode, config, workdir, out, samples = map(value, ("mode", "config", "workdir", "out", "samples"))
  if config is not None and len(arguments) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(arguments[1:])}.")
  if mode == "sample" and out is None:
    raise app.UsageError("sample needs --out: an npz, png or gif, or a folder for PNGs.")
  if mode == "train" and out is not None:
    raise app.UsageError("--out goes with sample and evaluate: leave it out.")
  if mode != "evaluate" and samples is not None:
    raise app.UsageError("--samples goes with evaluate: leave it out.")
  tree = value("tree") or "ema"
  if tree != "ema" and (mode not in ("evaluate", "sample") or samples is not None):
    raise app.UsageError("--tree goes with sample and evaluate, without --samples: leave it out.")
  if mode == "train" and config is None:
    raise app.UsageError("train needs --config, such as --config=configs/digits.py.")
  if workdir is None:
    if config is None:
      raise app.UsageError("--workdir is missing: name the folder of a run, or its --config.")
    workdir = default_workdir(args["config"].config_filename, config)
  source = workdir if args["workdir"].present else os.path.abspath(workdir)  # no name of the hub

  # Behind the flags: these import JAX, and a wrong flag should not wait for it.
  from ism_jax import data, generate, restore, train
  from ism_jax.evaluation import evaluate, report, sweep

  with multihost.shared_fate(), commands.one_line_errors():
    multihost.initialize_from_flags(preemption=mode == "train")
    logging.info("Workdir: %s", workdir)
    if mode in ("evaluate", "sweep") and out is None:
      # Whoever brings a config and samples needs no checkpoints.
      own = restore.is_run(source) or (config is not None and samples is not None)
      out = report.folder_of(workdir, tree) if own else default_results(source)
      out = os.path.join(out, "sweep") if mode == "sweep" else out
      if not own:
        logging.info("Results: %s", out)
    if config is None:
      config = override(restore.read_config(source), arguments)
    else:
      config = data.resolve(config)
    if mode == "train":
      if config.evaluation.at_end:
        evaluate.check(config)  # what is missing is missed now
      train.train(config, workdir)
    if samples is not None:
      evaluate.evaluate_samples(config, out, samples)
    elif mode == "evaluate" or (mode == "train" and config.evaluation.at_end):
      evaluate.evaluate(config, source, out=out or workdir, tree=tree)
    elif mode == "sweep":
      sweep.sweep(config, source, out, first=args["first"].value, trees=args["trees"].value)
    elif mode == "sample":
      generate.write_samples(config, source, out, tree=tree)


def default_workdir(filename: str, config) -> str:
  """Where a run of --config=configs/imagenet256.py:sm,b2 is by default: runs/imagenet256-sm-b2.

  Of a config that leaves the classes to its data, the name of data.dir comes behind it.
  """
  path, _, words = filename.partition(":")
  name, _ = os.path.splitext(os.path.basename(path))
  folder = (
    os.path.basename(os.path.abspath(config.data.dir)) if config.data.num_classes == -1 else ""
  )
  folder = re.sub(r"[^\w.]+", "-", folder).strip("-")
  return os.path.join("runs", "-".join(filter(None, [name, *words.split(","), folder])))


def default_results(export: str) -> str:
  """Where an evaluation of an export goes: evaluations/OWNER-NAME, or evaluations/FOLDER."""
  from ism_jax.pretrained import hub

  path = os.path.abspath(os.path.expanduser(export))
  name = os.path.basename(path)
  if not os.path.exists(path) and (repository := hub.parse(export)):
    name = "-".join(filter(None, (*repository.name.split("/"), repository.revision)))
  return os.path.join("evaluations", name.replace("/", "-"))


def override(saved: dict, arguments) -> ml_collections.ConfigDict:
  """A checkpoint's config with the --config.KEY=VALUE of the arguments, as --config holds one."""
  from ism_jax import experiment  # imports JAX

  values = flags.FlagValues()
  with commands.one_line_flag_errors():
    config = config_flags.DEFINE_config_dict(
      "config", experiment.as_config(saved), flag_values=values, sys_argv=arguments
    )
    if rest := values(arguments)[1:]:
      raise flags.Error(f"Unknown arguments: {' '.join(rest)}.")
  return config.value


def parse_flags(argv):
  """The arguments that are no flags; without --config, with the overrides of the checkpoint's."""
  has_config = any(re.match("--?config(=|$)", argument) for argument in argv)
  arguments = commands.parse_flags(argv, known_only=not has_config)
  for argument in arguments[1:]:
    if match := re.match(r"--?(?!config\.)([a-z]\w*)", argument):
      with commands.one_line_flag_errors():
        raise flags.UnrecognizedFlagError(match[1])
  return arguments


if __name__ == "__main__":
  commands.run(sys.modules[__name__])
