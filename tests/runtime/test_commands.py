"""The door to all commands: what it lists, the flags that help tells first, one-line errors."""

import io
import pathlib
import signal
import subprocess
import sys
import time
import types

from absl import flags
from examples import flags_of
import pytest

from ism_jax import __main__ as door
from ism_jax import main
from ism_jax.runtime import commands

ROOT = pathlib.Path(__file__).parent.parent.parent


def ism_jax(*arguments):
  """(exit code, stdout, stderr) of python -m ism_jax."""
  command = [sys.executable, "-m", "ism_jax", *arguments]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


def test_without_a_command_each_is_listed_in_a_line(capsys):
  door.main(["ism_jax"])
  lines = capsys.readouterr().out.splitlines()
  for name in door.COMMANDS:
    assert sum(line.strip().startswith(f"{name} ") for line in lines) == 1


@pytest.mark.parametrize("name", door.COMMANDS)
def test_help_tells_the_flags_of_the_command_before_those_of_absl(name, capsys):
  command = door.COMMANDS[name]
  with flags_of(name) as names:
    pass
  with pytest.raises(SystemExit) as leaving:
    door.main(["ism_jax", name, "--help"])
  try:
    assert not leaving.value.code
    text = capsys.readouterr().out
    absl = text.index("--[no]alsologtostderr")
    places = [text.index(f"\n  --{flag}") for flag in names]
    assert places == sorted(places) and max(places) < absl
    assert f"python -m ism_jax {name}" in text[:absl] and command.module
  finally:
    for flag in names:
      delattr(flags.FLAGS, flag)


# A command that says that it is up, and then does something with a temporary folder, as all that
# write a file do.
SAYS = """
import hashlib, sys, tempfile, time, types
from ism_jax.runtime import commands

def main(_):
  with tempfile.TemporaryDirectory(dir={folder!r}):
    print("up", flush=True)
    {what}

command = types.SimpleNamespace(__doc__="", define_flags=lambda: None, main=main)
commands.run(command, [sys.argv[0]])
"""


def stopped(folder, what, *stops, gap=commands._ONE_CAUSE + 0.2):
  """(exit code, what it said) of such a command that gets these signals, `gap` seconds apart."""
  process = subprocess.Popen(
    [sys.executable, "-c", SAYS.format(folder=str(folder), what=what)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "up\n"
    time.sleep(0.2)  # it has begun what it does
    for i, stop in enumerate(stops):
      time.sleep(gap if i else 0)
      process.send_signal(stop)
    return process.wait(timeout=60), process.communicate()[1]
  finally:
    process.kill()


@pytest.mark.parametrize("stop", commands.STOPS)
def test_a_command_that_is_stopped_ends_in_one_line_and_leaves_no_half_file(tmp_path, stop):
  code, said = stopped(tmp_path, "time.sleep(600)", stop)
  assert code == -stop and said.count("\n") == 1
  assert said.startswith(f"Stopped by {stop.name}: no file is half-written")
  assert not list(tmp_path.iterdir())


def test_a_second_signal_kills_where_python_has_not_heard_of_the_first(tmp_path):
  """Inside of one long instruction, as XLA's compilation is."""
  endless = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
  code, said = stopped(tmp_path, endless, signal.SIGINT, signal.SIGTERM)
  assert code in (130, 143) and said == ""


def test_two_signals_of_one_cause_are_one(tmp_path):
  """As systemd sends them, here within one instruction of Python."""
  slow = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**6); time.sleep(60)"  # signals may be late
  code, said = stopped(tmp_path, slow, signal.SIGTERM, signal.SIGHUP, gap=0)
  assert code in (-signal.SIGTERM, -signal.SIGHUP) and said.startswith("Stopped by ")
  assert said.count("\n") == 1


def test_a_full_disk_is_one_line_wherever_it_was_met():
  said = r"^Error: .*No space left on device\. Make room, or name an"
  with pytest.raises(SystemExit, match=said), commands.one_line_errors():
    pathlib.Path("/dev/full").write_bytes(b"x")
  with pytest.raises(IsADirectoryError), commands.one_line_errors():
    pathlib.Path("/dev").write_bytes(b"x")


def test_a_locale_without_a_letter_loses_no_text(monkeypatch):
  stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", stdout)
  command = types.SimpleNamespace(__doc__="Fréchet distances.", define_flags=lambda: None)
  with pytest.raises(SystemExit) as leaving:
    commands.run(command, ["ism_jax compare", "--help"])
  stdout.flush()
  assert not leaving.value.code and b"Fr\\xe9chet distances." in stdout.buffer.getvalue()


def test_every_word_of_a_command_line_has_its_path_by_the_same_rule(monkeypatch):
  monkeypatch.setenv("HOME", "/home/of")
  with flags_of("encode"):
    words = ["--images=~/i", "--out", "~/o", "--vae=file:///v", "--size=8", "~/more", "no~"]
    rest = commands.parse_flags(["encode", *words])
    values = {name: flags.FLAGS[name].value for name in ("images", "out", "vae", "size")}
  assert rest == ["encode", "/home/of/more", "no~"]
  assert values == {"images": "/home/of/i", "out": "/home/of/o", "vae": "/v", "size": 8}
  with flags_of("evaluate"):
    words = ["--workdir=~/w", "--config.data.dir=~/d"]  # of the checkpoint's config
    assert main.parse_flags(["evaluate", *words]) == ["evaluate", "--config.data.dir=/home/of/d"]
    with pytest.raises(SystemExit, match=r"Error: --workdir=~not-a-user/w: there is no home ~not-"):
      main.parse_flags(["evaluate", "--workdir=~not-a-user/w"])


@pytest.mark.parametrize(
  ("arguments", "error"),
  [
    (("evalute",), "Error: 'evalute' is no command. Did you mean evaluate?"),
    (("train", "--config=configs/digits.py", "--workdri=W"), "Did you mean --workdir?"),
    (("evaluate", "--workdir=W", "--sampels=S"), "Did you mean --samples?"),
    (("encode", "--images=I", "--oute=O"), "Did you mean --out?"),
    (("compare", "--outt=O", "W"), "Did you mean --out?"),
    (("encode", "--images=I"), "Error: --out is missing"),
    (("export", "--workdir=W", "--out=O", "more"), "Error: unknown arguments: more."),
    (("train", "--config=configs/digit.py"), "--config=configs/digit.py: there is no such file"),
    (
      ("train", "--config=configs/digits.py", "--config.objectiv.gamma=2"),
      'objectiv. Did you mean "objective"',
    ),
    (("sample", "--config=configs/digits.py"), "Error: sample needs --out"),
    (
      ("train", "--config=configs/digits.py", "--config.variant=sm"),
      "only rename the run: a variant sets many values, and is chosen behind a colon, "
      "--config=configs/digits.py:sm.",
    ),
    (
      ("encode", "--images=I", "--out=O", "--size=99999999999"),
      "give pixels in [1, 8192]",
    ),
    (("train", "--config=configs/digits.py", "--config.steps=1.5"), "configs/base.py has one."),
  ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(arguments, error):
  code, out, err = ism_jax(*arguments)
  assert code == 1 and out == ""
  assert error in err and err.startswith("Error: ") and err.count("\n") == 1
