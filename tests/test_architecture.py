"""Imports point down, through the rooms in their order, and importing touches no device."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "ism_jax"
PAPER = ["ranges", "paths", "guidance", "wavelets", "couplings", "objectives", "state", "sampling"]
PAPER += ["attention", "model"]
# From the bottom up: each may import those on the lines before it, and from its own.
ORDER = [
  PAPER,
  ["runtime"],
  ["pretrained"],
  ["data"],
  ["metrics"],
  ["protocol", "experiment"],
  ["steps", "restore", "generate"],
  ["evaluation"],
  ["export", "performance", "train"],
  ["api", "main"],
  ["demo"],
]
# Copied into exports; nothing here imports them.
IN_PYTORCH = PACKAGE / "export" / "ism_pytorch.py"
COPIED = {IN_PYTORCH: {"torch"}, PACKAGE / "export" / "pipeline.py": {"torch", "diffusers"}}
PAGE = PACKAGE / "demo" / "page.py"  # copied too, and the demo's; runs beside Gradio
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def name_of(path) -> str:
  """ism_jax/data/latents.py -> "data.latents"."""
  return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in FILES if path.name != "__main__.py"}
ROOMS = {name.partition(".")[0] for name in MODULES}


def imports(path):
  """Dotted names of all that a file imports."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def imported_modules(path) -> set[str]:
  """The modules of ours that a file imports, by their names in `MODULES`."""
  names = {name.removeprefix("ism_jax.") for name in imports(path) if name.startswith("ism_jax.")}
  known = lambda name: (
    name if name in MODULES or "." not in name else known(name.rpartition(".")[0])
  )
  return set(map(known, names))


def rank(module: str) -> int:
  """The line of `ORDER` on which a module's room stands."""
  room = module.partition(".")[0]
  ranks = [i for i, rooms in enumerate(ORDER) if room in rooms]
  assert len(ranks) == 1, f"{room} has no place in ORDER"
  return ranks[0]


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_up(module):
  for imported in imported_modules(MODULES[module]):
    assert rank(imported) <= rank(module), f"{module} imports {imported}"


def test_no_imports_form_a_circle():
  graph = {module: imported_modules(path) for module, path in MODULES.items()}
  assert tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_top_of_the_package_can_be_taken_in_at_a_glance():
  assert len(list(PACKAGE.glob("*.py"))) <= 20
  assert not set(PAPER) - {path.stem for path in PACKAGE.glob("*.py")}


@pytest.mark.parametrize("module", [*PAPER, "metrics.diagnosis"])
def test_the_mathematics_knows_no_flags_files_configs_or_devices(module):
  for name in imports(MODULES[module]):
    top = name.partition(".")[0]
    assert top not in {"os", "pathlib", "io", "ml_collections", "orbax", "clu", "etils"}, name
    assert not name.startswith("absl.flags"), name
    if top == "ism_jax":
      assert name.split(".")[1] in PAPER, name


def test_what_judges_samples_or_exports_does_not_train():
  allowed = {"train", "steps"}
  graph = {module: imported_modules(path) for module, path in MODULES.items()}

  def reached(module, seen):
    for imported in graph.get(module, ()):
      if imported not in seen:
        seen.add(imported)
        reached(imported, seen)
    return seen

  for module in MODULES:
    if module in ("restore", "generate") or module.startswith(("evaluation.", "export.")):
      assert not reached(module, set()) & allowed, f"{module} reaches {allowed}"
    if module.startswith("performance."):
      assert "train" not in reached(module, set()), f"{module} reaches the training loop"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_tensorflow_or_torch(path):
  packages = {name.partition(".")[0] for name in imports(path)}
  assert not packages & {"tensorflow", "torch"} - (COPIED | {PAGE: {"torch"}}).get(path, set())
  assert not imported_modules(path) & {name_of(copied) for copied in COPIED}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_text_is_read_and_written_as_utf8_whatever_the_locale(path):
  """Of the calls of open, read_text and write_text, of whatever has such methods."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if not isinstance(node, ast.Call):
      continue
    function = ast.unparse(node.func)
    options = {keyword.arg for keyword in node.keywords}
    if function.endswith((".read_text", ".write_text")):
      assert "encoding" in options, f"line {node.lineno}: {ast.unparse(node)}"
    elif function == "open" or (function.endswith(".open") and "Path(" in function):
      arguments = [ast.unparse(argument) for argument in node.args]
      is_binary = any(f"'{mode}b'" in arguments for mode in "rwa")
      assert is_binary or "encoding" in options, f"line {node.lineno}: {ast.unparse(node)}"


def test_the_pytorch_module_needs_nothing_but_pytorch():
  packages = {name.partition(".")[0] for name in imports(IN_PYTORCH)}
  # diffusers where latents are decoded, and no sooner.
  assert packages - sys.stdlib_module_names == {"torch", "diffusers"}
  top = ast.parse(IN_PYTORCH.read_text(encoding="utf-8")).body
  assert not any(isinstance(node, ast.ImportFrom) and node.module == "diffusers" for node in top)


def test_the_pipeline_imports_nothing_of_ours():
  (path,) = COPIED.keys() - {IN_PYTORCH}
  packages = {name.partition(".")[0] for name in imports(path)}
  assert packages - sys.stdlib_module_names == COPIED[path]


def test_the_page_needs_only_gradio_and_what_it_brings():
  top = {name.partition(".")[0] for name in imports(PAGE)} - sys.stdlib_module_names
  assert top == {"gradio", "numpy", "PIL", "torch", "ism_pytorch"}  # the last two within a Space


def test_everything_is_imported_without_tensorflow_and_torch_and_touches_no_device():
  modules = [f"ism_jax.{name}" for name in MODULES if MODULES[name] not in {*COPIED, PAGE}]
  script = (
    # As where they are not installed: tensorboardX takes torch where it is.
    "import importlib, sys\n"
    "class Absent:\n"
    "  def find_spec(self, name, *_):\n"
    "    if name in ('tensorflow', 'torch'): raise ImportError(name)\n"
    "sys.meta_path.insert(0, Absent())\n"
    f"for m in {modules!r}: importlib.import_module(m)\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge._backends, 'a backend was initialised'\n"
  )
  subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)


def test_the_list_of_commands_imports_nothing_heavy():
  script = (
    "import sys, ism_jax.__main__ as door; door.main(['ism_jax']); assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)
