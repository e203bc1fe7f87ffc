"""Trains, evaluates or samples: python -m ism_jax.main --config=configs/digits.py --workdir=W."""

import traceback

from absl import app, flags
from ml_collections import config_flags

from ism_jax import logs

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with a variant behind a colon: configs/digits.py:sm.",
    lock_config=True,
)  # fmt: skip
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, logs and results.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "sample"], "What to do.")
_OUT = flags.DEFINE_string("out", None, "With --mode=sample: the npz file to write.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
  """Runs the mode."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}.")
  if (_MODE.value == "sample") != (_OUT.value is not None):
    raise app.UsageError("--mode=sample needs --out=FILE.npz, and no other mode takes it.")
  logs.only_ours()

  # Behind the flags: these import JAX, and a wrong flag should not wait for it.
  from ism_jax import evaluate, train

  with logs.one_line_errors():
    if _MODE.value == "train":
      train.train(_CONFIG.value, _WORKDIR.value)
    elif _MODE.value == "evaluate":
      evaluate.evaluate(_CONFIG.value, _WORKDIR.value)
    else:
      evaluate.sample(_CONFIG.value, _WORKDIR.value, _OUT.value)


def parse_flags(argv):
  """The flags; what is wrong with them is one line."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    # A config file's own error, such as an unknown variant, comes with its trace: its last line.
    raise SystemExit(f"Error: {str(error).strip().splitlines()[-1].strip()}") from None
  except (AttributeError, KeyError) as error:
    if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
      raise
    reason = str(error.args[0]).replace("\n", " ")
    raise SystemExit(
      f"Error: a --config.KEY=VALUE names a key that the config does not have: {reason} "
      "The keys are in configs/base.py."
    ) from None


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
