"""The notebooks: run from top to bottom on a reduced scale, and as they are committed."""

import ast
import base64
import io
import json
import os
import pathlib
import re
import types

import jax
import numpy as np
from PIL import Image
import pytest

from ism_jax.export import pytorch

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "launch" / "colab"
NAMES = ("train_digits", "own_images", "sample", "imagenet_tpu")
OVERRIDES = {  # of the cell with the parameters
  "train_digits": "STEPS, SCHEDULES, JUMPS, EXAMPLES = 16, (1, 2), (1 / 32,), 16",
  "own_images": "SIZE, STEPS, SCHEDULES, OUT = (16, 24), 8, (1,), 'out'",
  "sample": "SOURCE, SCHEDULES, OUT = 'digits', (1, 4), 'out'",
  "imagenet_tpu": (
    "SIZE, VAE, MODEL, STEPS, POOL = 64, 'random-small', 'SiT-XXS/2', 4, 2\n"
    "TOPOLOGIES, REPORTED = 'v5e:2x2', 'check'"
  ),
}
FOUND = "found.json"


def read(name):
  return json.loads((FOLDER / f"{name}.ipynb").read_text())


def source(cell):
  return "".join(cell["source"])


def pictures(cells):
  """Pixels [H, W, 3] of the PNGs in the outputs of code cells."""
  outputs = [output for cell in cells for output in cell.get("outputs", [])]
  pngs = [
    output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
  ]
  return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) for png in pngs]


def text(cells):
  return "".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))


def run(name, folder, parameters, values):
  """Executes a notebook in a folder.

  Args:
    parameters: a cell behind that of the parameters. values: {name: expression}, JSON in the end.
  Returns:
    (its code cells, the values)
  """
  import nbclient
  import nbformat

  notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
  (place,) = (i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ()))
  notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
  asked = ", ".join(f"{key!r}: {value}" for key, value in values.items())
  dump = (
    f"import json, pathlib, PIL.Image\npathlib.Path({FOUND!r}).write_text(json.dumps({{{asked}}}))"
  )
  notebook.cells.append(nbformat.v4.new_code_cell(dump))
  folder.mkdir(exist_ok=True)
  nbclient.NotebookClient(
    notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
  ).execute()
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  return cells, json.loads((folder / FOUND).read_text())


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
  """What the kernels inherit: one CPU, little optimisation, and folders of their own."""
  folder = tmp_path_factory.mktemp("kernels")
  changes = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    # Compiling takes most of the time.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "TFDS_DATA_DIR": str(folder / "data"),
    "IPYTHONDIR": str(folder / "ipython"),
    "PYTHONPATH": str(ROOT),
    "TPU_SKIP_MDS_QUERY": "1",
  }
  before = dict(os.environ)
  os.environ.update(changes)
  yield folder
  os.environ.clear()
  os.environ.update(before)


@pytest.fixture(scope="module")
def trained(kernels):
  """(folder, code cells, values) of the notebook that trains."""
  values = {
    "scales": "scales",
    "images": "[len(images), len(set(labels.tolist()))]",
    "in_steps": "[a.tolist() for a in in_steps(ism).values()]",
  }
  folder = kernels / "train_digits"
  return folder, *run("train_digits", folder, OVERRIDES["train_digits"], values)


@pytest.mark.slow
def test_the_notebook_that_trains_shows_digits_grids_and_guidance(trained):
  folder, cells, values = trained
  assert values["images"] == [1797, 10]
  for variant in ("ism", "sm_compounding"):
    assert (folder / "runs" / variant / "checkpoints" / "16").is_dir()
    assert {"steps1_00000016.png", "steps4_00000016.png"} <= {
      path.name for path in (folder / "runs" / variant / "grids").iterdir()
    }
  shown = pictures(cells)
  # Data, four grids while it trained, steps, w twice, sm_compounding, guidance.
  assert len(shown) == 10
  for picture in shown:
    assert min(picture.shape[:2]) >= 80 and picture.std() > 20
  # 20 real digits, five pixels each and two between them: ink on black.
  assert shown[0].shape == (82, 418, 3) and 30 < shown[0].mean() < 130
  # Six pixels each and three between them, behind the captions.
  in_steps = np.array(values["in_steps"])
  assert in_steps.shape == (2, 10, 8, 8, 1) and (in_steps[0] != in_steps[1]).any()
  for row, column in np.ndindex(2, 10):
    y, x = 51 * row, shown[5].shape[1] + 3 - 51 * (10 - column)
    tile = shown[5][y : y + 48 : 6, x : x + 48 : 6, :1]
    np.testing.assert_array_equal(tile, in_steps[row, column])
  for name, (found,) in values["scales"].items():
    assert f"{name}: {found:.2f}" in text(cells)
  losses = [
    line for line in text(cells).splitlines() if line.startswith("step ") and "loss" in line
  ]
  assert any(line.startswith("step 16/16: loss ") for line in losses)


@pytest.mark.slow
def test_the_notebook_that_samples_exports_what_samples_the_same(kernels):
  values = OF_SAMPLE | {"difference": "int(np.abs(np.int32(others) - images).max())"}
  cells, values = run("sample", kernels / "sample", OVERRIDES["sample"], values)
  assert values["difference"] == 0
  (exports,) = (kernels / "sample" / "out").glob("exports-*")
  assert {p.name for p in (exports / "pytorch").iterdir()} >= {
    "config.json",
    "transformer",
    "README.md",
  }
  check_of_sample(cells, values, rows=8)


@pytest.mark.slow
def test_the_notebook_that_samples_takes_an_exported_shortcut_model(trained, kernels):
  exported = str(kernels / "exported")
  workdir = str(trained[0] / "runs" / "sm_compounding")
  pytorch.export(workdir, exported, tree="ema", dtype="float32")
  before = sorted(p.name for p in pathlib.Path(exported).iterdir())
  parameters = OVERRIDES["sample"].replace("'digits'", repr(exported))
  cells, values = run("sample", kernels / "sample_export", parameters, OF_SAMPLE)
  assert sorted(p.name for p in pathlib.Path(exported).iterdir()) == before
  check_of_sample(cells, values, rows=1)


OF_SAMPLE = {
  "alone": "int(np.abs(np.int32(alone) - live).max())",
  "path": "[float(p.std()) for p in path]",
  "labels": "labels.tolist()",
  # Moves the sliders.
  "slid": "[sliders['steps'].set_trait('value', 4), sliders['seed'].set_trait('value', 1), "
  "np.asarray(PIL.Image.open(io.BytesIO(shown.value))).tolist()][-1]",
  "slid_to": "model.sample(20, steps=4, w=strengths[0], seed=1)[0].tolist()",
}


def check_of_sample(cells, values, rows):
  assert values["alone"] <= 1
  slid, slid_to = np.array(values["slid"])[..., 0], np.array(values["slid_to"])[..., 0]
  assert slid.shape == (99, 507)
  for i, image in enumerate(slid_to):
    y, x = 51 * (i // 10), 51 * (i % 10)
    np.testing.assert_array_equal(slid[y : y + 48 : 6, x : x + 48 : 6], image)
  assert values["labels"] == [i % 10 for i in range(30)]
  # Between two noises in a straight line the deviation falls to 0.7.
  assert np.allclose(values["path"], 1, atol=0.15)
  shown = pictures(cells)
  assert len(shown) == 4  # besides those of the sliders
  for picture in shown:
    assert picture.std() > 20
  assert shown[1].shape[0] == 51 * rows - 3


@pytest.mark.slow
def test_the_notebook_of_own_images_trains_on_a_folder_and_shows_the_nearest(kernels):
  values = {
    "names": "model.names",
    "size": "list(real.shape[1:])",
    "counts": "[len(real), int((labels == 0).sum())]",
    "nearest": "distances.min(1).tolist()",
    "images": "[samples.tolist(), nearest.tolist()]",
  }
  cells, values = run("own_images", kernels / "own_images", OVERRIDES["own_images"], values)
  assert values["names"] == ["china", "flower"] and values["size"] == [16, 24, 3]
  assert values["counts"][0] == 900 and 440 <= values["counts"][1] <= 460  # a tenth is held out
  samples, nearest = np.array(values["images"], np.float64)
  np.testing.assert_allclose(((samples - nearest) ** 2).mean((1, 2, 3)), values["nearest"], 1e-3)
  assert len(pictures(cells)) == 3


@pytest.mark.slow
def test_the_notebook_for_tpus_encodes_trains_samples_and_reports(kernels):
  folder = kernels / "imagenet_tpu"
  values = {
    "moments": "list(moments.shape)",
    "crops": "pixels.tolist()",
    "samples": "[list(samples.shape), float(samples.std())]",
  }
  cells, values = run("imagenet_tpu", folder, OVERRIDES["imagenet_tpu"], values)
  manifest = json.loads((folder / "runs" / "latents" / "manifest.json").read_text())
  assert manifest["images"] == 64 and manifest["counts"] == [32, 32]
  assert values["moments"] == [4, 8, 8, 8]
  shape, deviation = values["samples"]
  assert shape == [4, 64, 64, 3] and deviation > 5
  shown = pictures(cells)
  assert len(shown) == 3  # photographs, decoded ones, samples
  for j, crop in enumerate(np.array(values["crops"])):
    np.testing.assert_array_equal(shown[0][:, 66 * j : 66 * j + 64], crop)
  steps = [line for line in text(cells).splitlines() if line.startswith("step 4: loss ")]
  assert len(steps) == 1 and float(steps[0].split()[3].rstrip(",")) < 4
  report = json.loads((folder / "runs" / "aot" / "aot.json").read_text())
  (topology,) = report["topologies"]
  assert topology["topology"] == "v5e:2x2" and topology["fits"] and topology["chips"] == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_opens_in_colab_and_has_no_errors_or_machine_in_it(name):
  content = (FOLDER / f"{name}.ipynb").read_text()
  notebook = json.loads(content)
  assert len(content) < 1_000_000
  badge = re.search(
    r"\]\(https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/launch/colab/"
    rf"{name}\.ipynb\)",
    source(notebook["cells"][0]),
  )
  assert badge and f'REPOSITORY = "https://github.com/{badge[1]}"' in source(notebook["cells"][1])
  code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code) == 1
  outputs = [output for cell in code for output in cell["outputs"]]
  assert not [output for output in outputs if output["output_type"] == "error"]
  for path in ("/tmp", "/root", "/home", "/work", "/usr", "site-packages"):
    assert path not in content, path


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_uses_public_names_alone(name):
  readme = (ROOT / "README.md").read_text().replace("\n", " ")
  for cell in read(name)["cells"]:
    if cell["cell_type"] != "code":
      continue
    lines = source(cell).splitlines()
    plain = "\n".join("  pass" if line.lstrip()[:1] in ("!", "%") else line for line in lines)
    for node in ast.walk(ast.parse(plain)):
      if isinstance(node, ast.Attribute):
        assert not node.attr.startswith("_"), node.attr
      if isinstance(node, ast.ImportFrom) and node.module.startswith("ism_jax"):
        for alias in node.names:
          module = f"{node.module}.{alias.name}".removeprefix("ism_jax.")
          assert f"`{module}." in readme.partition("## From Python")[2].partition("##")[0], module


def test_in_the_committed_outputs_guidance_compounds_in_the_one_and_not_in_the_other():
  code = [cell for cell in read("train_digits")["cells"] if cell["cell_type"] == "code"]
  lines = [line.strip().partition(": ") for line in text(code).splitlines()]
  scales = {
    name: [float(scale) for scale in found.split(", ")]
    for name, _, found in lines
    if name in ("ism", "sm_compounding")
  }
  assert max(scales["sm_compounding"]) > 3 * scales["sm_compounding"][0]
  assert max(scales["ism"]) < 1.3 * min(scales["ism"])
  assert len(pictures(code)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["checkout", "repository", "nowhere"])
def test_the_first_cell_installs_from_where_the_notebook_is(name, place, tmp_path, monkeypatch):
  from IPython.core.inputtransformer2 import TransformerManager

  cell = source(read(name)["cells"][1])
  folder = FOLDER if place == "checkout" else tmp_path
  name_there = "jane/ism" if place == "repository" else "_OWNER_/_REPOSITORY_"
  cell = re.sub(r"github\.com/[^\"]+", f"github.com/{name_there}", cell)
  monkeypatch.chdir(folder)
  monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
  calls = []
  shell = types.SimpleNamespace(run_line_magic=lambda *call: calls.append(call))
  variables = {"get_ipython": lambda: shell}
  code = TransformerManager().transform_cell(cell)
  if place == "nowhere":
    with pytest.raises(RuntimeError, match="put its address there, or install ism_jax first"):
      exec(code, variables)
    assert not calls
    return
  exec(code, variables)
  ((magic, arguments),) = calls
  source_of = {"checkout": ROOT.as_uri(), "repository": "git+https://github.com/jane/ism"}
  extra = f"[{variables['EXTRA']}]" if name == "imagenet_tpu" else ""
  arguments = arguments.format(**variables)  # as IPython does
  assert (magic, arguments) == ("pip", f'install --quiet "ism_jax{extra} @ {source_of[place]}"')
