"""Trains, evaluates or samples.

  python -m ism_jax.main --config=configs/digits.py --workdir=W
  python -m ism_jax.main --mode=evaluate --workdir=W
  python -m ism_jax.main --mode=sample --workdir=W --out=FILE.npz --config.sample.steps=4

--config.KEY=VALUE overrides a value of --config; without --config, which only training needs, of
the config in the newest checkpoint. The same training command continues a run. Several processes
are one run, on the same --workdir: see `multihost`. Exit codes: 0 done, 1 an error, 143 training
that SIGTERM stopped after saving a checkpoint.
"""

import re

from absl import app, flags
import ml_collections
from ml_collections import config_flags

from ism_jax.runtime import commands, multihost

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, with a variant behind a colon: configs/digits.py:sm.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, logs and results.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "sample"], "What to do.")
_OUT = flags.DEFINE_string("out", None, "With --mode=sample: the npz file to write.")
_SAMPLES = flags.DEFINE_string(
  "samples",
  None,
  "With --mode=evaluate: images to judge instead of the checkpoint's, an npz or a folder.",
)
flags.mark_flag_as_required("workdir")
_PLACE = multihost.define_flags()


def main(argv):
  """Runs the mode; without --config, `argv` holds the overrides of the checkpoint's config."""
  if _CONFIG.value is not None and len(argv) > 1:
    raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}.")
  if (_MODE.value == "sample") != (_OUT.value is not None):
    raise app.UsageError("--mode=sample needs --out=FILE.npz, and no other mode takes it.")
  if _SAMPLES.value is not None and _MODE.value != "evaluate":
    raise app.UsageError("--samples goes with --mode=evaluate.")
  if _CONFIG.value is None and _MODE.value == "train":
    raise SystemExit("Error: --mode=train needs --config, such as --config=configs/digits.py.")
  commands.quiet_libraries()

  # Behind the flags: these import JAX, and a wrong flag should not wait for it.
  from ism_jax import generate, restore, train
  from ism_jax.evaluation import evaluate

  with multihost.shared_fate(), commands.one_line_errors():
    multihost.initialize(*_PLACE(), preemption=_MODE.value == "train")
    config = _CONFIG.value
    if config is None:
      config = override(restore.read_config(_WORKDIR.value), argv)
    if _MODE.value == "train":
      if config.evaluation.at_end:
        evaluate.check(config)  # what is missing is missed now
      train.train(config, _WORKDIR.value)
    if _SAMPLES.value is not None:
      evaluate.evaluate_samples(config, _WORKDIR.value, _SAMPLES.value)
    elif _MODE.value == "evaluate" or (_MODE.value == "train" and config.evaluation.at_end):
      evaluate.evaluate(config, _WORKDIR.value)
    elif _MODE.value == "sample":
      generate.write_samples(config, _WORKDIR.value, _OUT.value)


def override(saved: dict, argv) -> ml_collections.ConfigDict:
  """A checkpoint's config with the --config.KEY=VALUE of `argv`, as a --config of these values."""
  as_tuples = lambda v: tuple(map(as_tuples, v)) if isinstance(v, list) else v  # JSON has lists
  nested = lambda d: {k: nested(v) if isinstance(v, dict) else as_tuples(v) for k, v in d.items()}
  values = flags.FlagValues()
  with commands.one_line_flag_errors():
    config = config_flags.DEFINE_config_dict(
      "config", ml_collections.ConfigDict(nested(saved)), flag_values=values, sys_argv=argv
    )
    if rest := values(argv)[1:]:
      raise flags.Error(f"Unknown arguments: {' '.join(rest)}.")
  return config.value


def parse_flags(argv):
  """The flags; what is wrong with them is one line.

  Returns:
    The arguments that are no flags. Without --config, the flags that are unknown are among them,
    since overrides are.
  """
  has_config = any(re.match("--?config(=|$)", argument) for argument in argv)
  return commands.parse_flags(argv, known_only=not has_config)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
