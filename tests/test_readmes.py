"""Every command, flag, config value, link and picture of the READMEs exists."""

import importlib
import importlib.util
import pathlib
import re
import shlex
import subprocess

from examples import flags_of
import pytest

from configs import base
from ism_jax import __main__ as door

ROOT = pathlib.Path(__file__).parent.parent

# Commands that are also modules which users run.
MODULES = {"ism_jax.main": None, "ism_jax.export": "export"}

README = ROOT / "README.md"
READMES = sorted(
  ROOT / line
  for line in subprocess.check_output(
    ["git", "ls-files", "*README.md", "CONTRIBUTING.md"], cwd=ROOT, text=True
  ).splitlines()
)


SCRIPTS = [
  path
  for pattern in ("launch/*.sh", "launch/colab/*.ipynb", "configs/*.py")
  for path in sorted(ROOT.glob(pattern))
]


def name_of(path) -> str:
  return str(path.relative_to(ROOT))


def prose(text: str) -> str:
  """The text without its fenced blocks."""
  return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(text: str) -> list[list[str]]:
  """The words of every command in fenced blocks of a shell, and in inline code."""
  fenced = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```$", text, flags=re.M | re.S)
  lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
  lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]
  runs = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if runs_ours(line)]
  return [words for words in runs if words]


def runs_ours(line: str) -> bool:
  return re.search(r"python3? (-m ism_jax|launch/)|bash launch/", line) is not None


def check_config_key(key: str) -> None:
  value = base.get_base()
  for part in key.split("."):
    assert part in value, f"--config.{key} is no value of configs/base.py"
    value = value[part]


def check_config_file(value: str) -> None:
  path, _, words = value.partition(":")
  spec = importlib.util.spec_from_file_location("config_of_a_readme", ROOT / path)
  config = importlib.util.module_from_spec(spec)
  assert (ROOT / path).is_file(), f"there is no {path}"
  spec.loader.exec_module(config)
  config.get_config(*([words] if words else []))


def check_command(words: list[str]) -> None:
  """Raises unless the scripts, the command, its flags and its config values exist."""
  for word in words:
    if word.startswith(("launch/", "tests/")) and "*" not in word:
      assert (ROOT / word).exists(), f"there is no {word}"
  if "-m" not in words:
    for word in words:  # launch/study.sh hands these on
      for key in re.findall(r"--config\.([\w.]+)=", word):
        check_config_key(key)
    return
  module, *arguments = words[words.index("-m") + 1 :]
  if module == "ism_jax":
    if not arguments:
      return
    command, *arguments = arguments
  else:
    assert module in MODULES, f"python -m {module} is no command: python -m ism_jax COMMAND is"
    command = MODULES[module]
  assert command in door.COMMANDS, f"{command} is no command: {', '.join(door.COMMANDS)}"
  with flags_of(command) as names:
    known = set(names)
  for argument in arguments:
    if not argument.startswith("--"):
      continue
    name, _, value = argument.removeprefix("--").partition("=")
    if name == "help":
      continue
    if name.startswith("config."):
      assert "config" in known, f"{command} takes no --config"
      check_config_key(name.removeprefix("config."))
      continue
    assert name in known, f"{command} has no --{name}: it has {', '.join(sorted(known))}"
    if name == "config" and "..." not in value:
      check_config_file(value)


def anchors(path: pathlib.Path) -> set[str]:
  """The anchors that GitHub makes of a README's headings."""
  headings = re.findall(r"^#+ (.*)$", prose(path.read_text()), flags=re.M)
  plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def links(text: str) -> list[str]:
  text = prose(text)
  targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img[^>]*\ssrc=\"([^\"]+)\"", text)
  return [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]


def check_link(readme: pathlib.Path, target: str) -> None:
  path, _, anchor = target.partition("#")
  file = (readme.parent / path).resolve() if path else readme
  assert file.exists(), f"{name_of(readme)} links to {path}, which is not there"
  if anchor:
    assert anchor in anchors(file), f"{name_of(readme)}: {name_of(file)} has no heading #{anchor}"


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_every_command_and_its_flags_exist(readme):
  for words in commands(readme.read_text()):
    check_command(words)


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_links_anchors_and_pictures_are_there(readme):
  for target in links(readme.read_text()):
    check_link(readme, target)


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_python_blocks_are_python(readme):
  for block in re.findall(r"^```python\n(.*?)^```$", readme.read_text(), flags=re.M | re.S):
    assert compile(block, name_of(readme), "exec")


@pytest.mark.parametrize("file", SCRIPTS, ids=name_of)
def test_scripts_notebooks_and_configs_name_commands_and_modules_that_exist(file):
  text = file.read_text()
  for module, command in re.findall(r"-m (ism_jax[\w.]*)(?: ([a-z]+)\b)?", text):
    check_command(["python", "-m", module, *filter(None, [command])])
  for module, name in re.findall(r"from (ism_jax[\w.]*) import (\w+)", text):
    parent = importlib.import_module(module)
    assert hasattr(parent, name) or importlib.util.find_spec(f"{module}.{name}"), name


def test_the_first_readme_is_short_and_has_its_picture_in_the_first_screen():
  lines = README.read_text().splitlines()
  assert len(lines) < 200
  assert any("<img" in line for line in lines[:12])


EQUATIONS = re.findall(
  r"^\| (E\d+) \|.*?\| \[`(\w+)\.(\w+)`\]",
  (ROOT / "ism_jax" / "README.md").read_text(),
  flags=re.M,
)


def test_the_map_has_all_equations_in_order():
  assert [label for label, *_ in EQUATIONS] == [f"E{i}" for i in range(1, 17)]


@pytest.mark.parametrize(("label", "module", "function"), EQUATIONS)
def test_an_equation_of_the_map_is_labelled_in_its_function(label, module, function):
  about = getattr(importlib.import_module(f"ism_jax.{module}"), function).__doc__
  assert re.search(rf"\b{label}:", about), f"{module}.{function} does not name {label}"


# A model card begins with the hub's header, and the export writes its lines.
WRITTEN_BY_HAND = [readme for readme in READMES if not readme.read_text().startswith("---\n")]


@pytest.mark.parametrize("readme", WRITTEN_BY_HAND, ids=name_of)
def test_lines_outside_of_tables_are_short(readme):
  for line in readme.read_text().splitlines():
    assert len(line) <= 110 or line.startswith("|"), line


def test_the_readmes_hold_commands():
  """Otherwise the tests above could pass by finding none."""
  assert len(commands(README.read_text())) >= 10
  assert sum(len(commands(readme.read_text())) for readme in READMES) >= 25


@pytest.mark.parametrize(
  "line",
  [
    "python -m ism_jax trian --config=configs/digits.py",
    "python -m ism_jax.encode --images=I --out=O",
    "python -m ism_jax train --config=configs/digit.py",
    "python -m ism_jax train --config=configs/digits.py:isn",
    "python -m ism_jax train --config=configs/digits.py --config.sample.step=4",
    "python -m ism_jax encode --image=I --out=O",
    "bash launch/tpu.sh run -- python -m ism_jax train --configs=configs/digits.py",
    "bash launch/tests.sh",
    "bash launch/test.sh tests/test_sharding.py",
  ],
)
def test_a_command_that_does_not_exist_is_noticed(line):
  with pytest.raises((AssertionError, ValueError, FileNotFoundError)):
    check_command(shlex.split(line))


@pytest.mark.parametrize("target", ["no.md", "#no-such-heading", "configs/README.md#no"])
def test_a_link_to_nothing_is_noticed(target):
  with pytest.raises(AssertionError):
    check_link(README, target)
