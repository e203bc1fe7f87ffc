"""What every command shares: how it is run, its flags and its help, its messages, one-line errors.

A command is a module with a docstring, which is its help, `define_flags()` and `main(arguments)`.
If it takes arguments that are no flags, its `ARGUMENTS` says what they are.
"""

import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback

from absl import app, flags, logging

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EROFS  # which say nothing of the code
_HELP = ("-h", "-help", "--help", "--helpshort")
# What a person or a service asks a process to end by: a batch system, Ctrl-C, a terminal that went.
STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
_ONE_CAUSE = 0.5  # seconds between signals that one cause sends


def run(command, argv: list[str] | None = None, **options) -> None:
  """Runs a command, and ends the process.

  Args:
    command: the module, see above. With `parse_flags(argv)` of its own, that is used.
    argv: what it is called as, and its arguments; by default those of the process.
    options: of its `define_flags`.
  """
  argv = list(sys.argv if argv is None else argv)
  with contextlib.suppress(AttributeError):  # of a stream that is no file
    sys.stdout.reconfigure(errors="backslashreplace")  # no text is lost to the locale's encoding
  before = set(flags.FLAGS)
  command.define_flags(**options)
  names = [name for name in flags.FLAGS if name not in before]
  if any(argument in _HELP for argument in argv[1:]):
    print(describe(command, names))
    sys.exit()

  def main(arguments):
    if len(arguments) > 1 and not hasattr(command, "ARGUMENTS"):
      raise SystemExit(f"Error: unknown arguments: {' '.join(arguments[1:])}.")
    quiet_libraries()
    try:
      command.main(arguments)
    except app.UsageError as error:  # absl's own handler prints all help, too
      raise SystemExit(f"Error: {error}") from None

  with one_line_stops():
    app.run(main, argv=argv, flags_parser=getattr(command, "parse_flags", parse_flags))


def describe(command, names: list[str]) -> str:
  """The help of a command: its docstring, its own flags in their order, and absl's after them."""
  lines = [command.__doc__.strip(), ""]
  if hasattr(command, "ARGUMENTS"):
    lines += [f"Arguments: {command.ARGUMENTS}", ""]
  lines += ["Flags:"]
  for name in names:
    flag = flags.FLAGS[name]
    if name != flag.name:  # a short name
      continue
    value = "" if flag.default is None else f" (default: {flag.default_as_str})"
    lines += [f"  --{name}:", textwrap.indent(textwrap.fill(f"{flag.help}{value}", 90), "    ")]
  others = flags.FlagValues()
  for name in flags.FLAGS:
    if name not in names and flags.FLAGS[name].name == name:
      others[name] = flags.FLAGS[name]
  lines += ["", "Flags of absl and its libraries, mostly for logging:", others.get_help()]
  return "\n".join(lines)


def quiet_libraries() -> None:
  """Lets the project's own messages through, and of libraries their warnings: Orbax says a lot."""
  ours = lambda record: record.pathname.startswith(_PACKAGE)
  logging.set_verbosity(logging.INFO)
  # It also warns that a checkpoint opened for reading is opened for reading.
  expected = lambda record: any(s in str(record.msg) for s in ("read_only=True", "read only"))
  # What fails while Orbax writes, it and asyncio log often, with its trace; it is raised as well.
  raised = lambda record: record.exc_info and "orbax" in f"{record.pathname} {record.msg}"
  logging.get_absl_handler().addFilter(
    lambda record: (
      ours(record) or (record.levelno >= 30 and not expected(record) and not raised(record))
    )
  )
  # And TensorStore then tells a loop that is gone of every array it has not written.
  closed = lambda e: isinstance(e, RuntimeError) and str(e) == "Event loop is closed"
  report = sys.unraisablehook
  sys.unraisablehook = lambda error: None if closed(error.exc_value) else report(error)


def say(line: str) -> None:
  """Writes a line to stderr, also within a signal's handler, and though nobody reads it any more.

  No logging, in the middle of which the signal may have come. Ctrl-C ends the reader of a pipe too,
  and a terminal that hangs up is gone.
  """
  with contextlib.suppress(OSError):
    os.write(2, f"{line}\n".encode(errors="backslashreplace"))


@contextlib.contextmanager
def stops_received_by(receive, stops=STOPS):
  """While the block lasts, receive(signal) is called for the first of these signals.

  The second one kills, but not one that comes so soon that it has the same cause: systemd sends
  SIGHUP after SIGTERM, and wrappers forward what the terminal has sent to all. A signal that is
  ignored, as under nohup, stays ignored. For the main thread; in others nothing is received.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {stop: signal.getsignal(stop) for stop in stops}
  before = {stop: handler for stop, handler in before.items() if handler != signal.SIG_IGN}

  def first(number, _):
    received = time.monotonic()

    def again(number, _):
      if time.monotonic() - received > _ONE_CAUSE:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for stop in before:
      signal.signal(stop, again)
    receive(signal.Signals(number))

  for stop in before:
    signal.signal(stop, first)
  try:
    yield
  finally:
    for stop, handler in before.items():
      signal.signal(stop, handler or signal.SIG_DFL)


@contextlib.contextmanager
def one_line_stops():
  """Ends the process in one line for the first of `STOPS`, once all contexts are left.

  It then dies of that signal, as shells expect it to.
  """
  received = []

  def interrupt(stop):
    received.append(stop)
    raise KeyboardInterrupt(f"stopped by {stop.name}")

  try:
    with stops_received_by(interrupt), _killed_by_the_second():
      yield
  except KeyboardInterrupt:
    if not received:
      raise
    say(
      f"Stopped by {received[0].name}: no file is half-written, and the same command begins again, "
      "or goes on where it was."
    )
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
    signal.signal(received[0], signal.SIG_DFL)
    os.kill(os.getpid(), received[0])
    os._exit(128 + received[0])  # the first process of a container does not die of signals


@contextlib.contextmanager
def _killed_by_the_second():
  """While the block lasts, a second signal kills although Python could not handle the first yet.

  Python handles signals between its own instructions, and XLA may compile for minutes in one.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  read, write = os.pipe()
  os.set_blocking(write, False)

  def watch():
    first = None
    while number := os.read(read, 1):
      if number[0] in STOPS:
        first = time.monotonic() if first is None else first
        if time.monotonic() - first > _ONE_CAUSE:
          os._exit(128 + number[0])
    os.close(read)

  threading.Thread(target=watch, daemon=True).start()
  before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(write)


@contextlib.contextmanager
def one_line_errors():
  """Ends the process in one line for our own errors; those of libraries keep their trace."""
  try:
    yield
  except (ValueError, OSError, FloatingPointError) as error:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
      remedy = "Name" if error.errno == errno.EROFS else "Make room, or name"
      raise SystemExit(
        f"Error: {error}. {remedy} another folder; what was written before is whole."
      ) from None
    if traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE):
      raise SystemExit(f"Error: {error}") from None
    raise


@contextlib.contextmanager
def one_line_flag_errors():
  """Ends the process in one line for a wrong flag, which names the flag that was probably meant."""
  try:
    yield
  except flags.UnrecognizedFlagError as error:
    close = suggest(error.flagname, flags.FLAGS, "--")
    raise SystemExit(f"Error: --{error.flagname} is no flag of this command.{close}") from None
  except flags.Error as error:
    if missing := re.search(r"Flag (--\w+) must have a value other than None", str(error)):
      raise SystemExit(f"Error: {missing[1]} is missing; --help tells what it is.") from None
    # A config file's own error, such as an unknown variant, comes with its trace: its last line.
    reason = str(error).strip().splitlines()[-1].strip()
    if value := re.match(r"flag --(config\.)?.*?=", reason):  # a value that absl refuses
      where = "configs/base.py has one" if value[1] else "--help tells what it is"
      reason = f"{reason.rstrip('.')}; {where}."
    raise SystemExit(f"Error: {reason}") from None
  except (AttributeError, KeyError) as error:
    if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
      raise
    # Quoted, once or twice: 'gama'\nDid you mean "gamma" instead of "gama"?
    reason = re.sub(r"^\W*(\w+)\W*?(\\n|\n|$)", r"\1. ", str(error.args[0])).strip("' ")
    raise SystemExit(
      f"Error: a --config.KEY=VALUE names a key that the config does not have: {reason} "
      "The keys are in configs/base.py."
    ) from None


def parse_flags(argv, known_only: bool = False) -> list[str]:
  """Parses a command's flags and returns the other arguments; what is wrong is one line.

  With `known_only`, unknown flags are among those arguments instead of an error.
  """
  with one_line_flag_errors():
    argv = [argv[0], *map(_packaged, map(_with_local_path, argv[1:]))]
    arguments = flags.FLAGS(argv, known_only=known_only)
    for flag in (flags.FLAGS[name] for name in flags.FLAGS if flags.FLAGS[name].present):
      # A file that is not there is no error of the flag's own before somebody reads the config.
      file = getattr(flag, "config_filename", None)
      if file is not None and not os.path.exists(file.partition(":")[0]):
        raise flags.Error(
          f"--{flag.name}={file}: there is no such file; those here are in configs/."
        )
      if variant := getattr(flag, "override_values", {}).get("variant"):
        raise flags.Error(
          f"--{flag.name}.variant={variant} would only rename the run: a variant sets many values, "
          f"and is chosen behind a colon, --{flag.name}={file.partition(':')[0]}:{variant}."
        )
    return arguments


def _packaged(argument: str) -> str:
  """Of configs/NAME.py, the one that came with the package, in a folder that has no such file."""
  form = re.fullmatch(r"(--?config=)?(configs/\w+\.py)(:.*)?", argument)
  if form is None or os.path.exists(form[2]):
    return argument
  file = os.path.join(os.path.dirname(_PACKAGE), form[2])
  return f"{form[1] or ''}{file}{form[3] or ''}" if os.path.exists(file) else argument


def _with_local_path(argument: str) -> str:
  """A word of the command line, with `files.local_path` of its value: of --out=~/x, of ~/x."""
  from ism_jax.runtime import files  # imports JAX, for which a misspelt command does not wait

  name, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
  try:
    return name + equals + files.local_path(value)
  except ValueError as error:
    raise flags.Error(f"{name}{equals}{error}") from None


def suggest(name: str, known, prefix: str = "") -> str:
  """ " Did you mean ...?" with the known name that is most like `name`, or "" where none is."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean {prefix}{close[0]}?" if close else ""
