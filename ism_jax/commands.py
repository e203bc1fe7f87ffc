"""What every command shares: its messages, one-line errors, and flags."""

import contextlib
import os
import traceback

from absl import flags, logging

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def quiet_libraries() -> None:
  """Lets the project's own messages through, and of libraries their warnings: Orbax says a lot."""
  ours = lambda record: record.pathname.startswith(_PACKAGE)
  logging.set_verbosity(logging.INFO)
  # It also warns that a checkpoint opened for reading is opened for reading.
  expected = lambda record: any(s in str(record.msg) for s in ("read_only=True", "read only"))
  logging.get_absl_handler().addFilter(
    lambda record: ours(record) or (record.levelno >= 30 and not expected(record))
  )


@contextlib.contextmanager
def one_line_errors():
  """Ends the process in one line for our own errors; those of libraries keep their trace."""
  try:
    yield
  except (ValueError, OSError, FloatingPointError) as error:
    if traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE):
      raise SystemExit(f"Error: {error}") from None
    raise


@contextlib.contextmanager
def one_line_flag_errors():
  """Ends the process in one line for a wrong flag."""
  try:
    yield
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


def parse_flags(argv, known_only: bool = False) -> list[str]:
  """Parses a command's flags and returns the other arguments; what is wrong is one line.

  Args:
    known_only: whether unknown flags are among those arguments instead of an error.
  """
  with one_line_flag_errors():
    return flags.FLAGS(argv, known_only=known_only)
