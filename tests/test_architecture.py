"""Imports point down, and importing touches no device."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "ism_jax"

# Each module may import those in the lines below its own.
LAYERS = [
    {"main", "compare", "encode", "aot", "statistics", "api", "benchmark"},
    {"summary", "stablehlo"},
    {"export"},
    {"evaluate"},
    {"report"},
    {"train"},
    {"monitor"},
    {"reference", "figures"},
    {"generate", "flops"},
    {"restore"},
    {"experiment", "scores"},
    {"features", "samples"},
    {"sampling", "diagnosis"},
    {"objectives", "state_dicts"},
    {"couplings", "guidance", "wavelets", "model", "state", "sharding", "data", "checkpoints",
     "metrics", "spectra", "judge", "logs", "commands"},
    {"pretrained"},
    {"paths", "files", "chips", "hlo", "multihost", "protocol", "pytorch"},
]  # fmt: skip
MATHEMATICS = {
  "paths",
  "guidance",
  "wavelets",
  "couplings",
  "objectives",
  "sampling",
  "diagnosis",
}


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def layer_of(module):
  return next((i for i, layer in enumerate(LAYERS) if module in layer), None)


IN_PYTORCH = PACKAGE / "pytorch.py"  # the one module that is; nothing here imports it
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
MODULES += ["data", "pretrained"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module):
  assert layer_of(module) is not None, f"{module} has no layer in this test"
  files = sorted((PACKAGE / module).glob("*.py")) or [PACKAGE / f"{module}.py"]
  for path in files:
    for name in imports(path):
      parts = name.split(".")
      if parts[0] == "ism_jax" and parts[1] != module:
        assert layer_of(parts[1]) > layer_of(module), f"{path.name} imports {name}"


@pytest.mark.parametrize("module", sorted(MATHEMATICS))
def test_the_mathematics_knows_no_flags_files_configs_or_devices(module):
  for name in imports(PACKAGE / f"{module}.py"):
    assert name.split(".")[0] not in {"os", "pathlib", "ml_collections", "orbax", "clu"}, name
    assert not name.startswith("absl.flags") and name != "absl.flags", name
    assert "sharding" not in name and "experiment" not in name and "TrainState" not in name, name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_imports_tensorflow_or_torch(path):
  found = {name.split(".")[0] for name in imports(path)}
  assert not found & {"tensorflow", "torch"} - ({"torch"} if path == IN_PYTORCH else set())
  assert "ism_jax.export.ism_pytorch" not in imports(path)


def test_the_pytorch_module_needs_nothing_but_pytorch():
  found = {name.split(".")[0] for name in imports(IN_PYTORCH)}
  # diffusers where latents are decoded, and no sooner.
  assert found - sys.stdlib_module_names == {"torch", "diffusers"}
  top = ast.parse(IN_PYTORCH.read_text()).body
  assert not any(isinstance(node, ast.ImportFrom) and node.module == "diffusers" for node in top)


def test_everything_is_imported_without_tensorflow_and_torch_and_touches_no_device():
  # Two commands in one process would define the flag --out twice.
  modules = [f"ism_jax.{m}" for m in MODULES if m not in ("compare", "pytorch")] + [
    "ism_jax.pretrained.vae"
  ]
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
