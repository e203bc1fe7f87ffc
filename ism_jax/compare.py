"""One table and one figure of several evaluated runs.

  python -m ism_jax.compare --out=DIR WORKDIR [WORKDIR ...]

Runs whose configs differ in the seed alone are one row. Writes comparison.md (Fréchet distance and
accuracy over NFE and w), comparison.json, effective_guidance.png (see `compounding`) and grids.png,
the samples.
"""

import collections
import io
import json
import os
import re

from absl import app, flags, logging
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import ml_collections
import numpy as np
from PIL import Image

from ism_jax import compounding, data, evaluate, logs, paths
from ism_jax import experiment as experiment_lib
from ism_jax import model as model_lib

_OUT = flags.DEFINE_string("out", None, "Folder to write to.")
_W = flags.DEFINE_float("w", 0.5, "Guidance of the jumps whose effective guidance is measured.")
_EXAMPLES = flags.DEFINE_integer("examples", 256, "Jumps per size whose guidance is measured.")

JUMPS = tuple(2.0**-k for k in range(6, 0, -1))  # d = 1/64 ... 1/2


def read_report(workdir: str) -> dict:
  """evaluation.json of a run."""
  path = os.path.join(workdir, "evaluation.json")
  if not os.path.exists(path):
    raise FileNotFoundError(f"{path} is missing; make it with --mode=evaluate --workdir={workdir}.")
  with open(path) as f:
    return json.load(f)


def effective_guidance(workdir: str, report: dict, w: float, examples: int) -> list[float]:
  """The effective CFG scale of the jumps `JUMPS` of a run's inference EMA, told w."""
  config = ml_collections.ConfigDict(report["config"])
  exp, _, _, params = evaluate.restore_ema(config, workdir, jax.devices()[:1])
  images, labels = data.all_images(data.load_source(exp.data))
  chosen = np.random.default_rng(0).permutation(len(images))[:examples]
  key_noise, key_start = jax.random.split(jax.random.key(0))
  x1 = jnp.asarray(data.to_unit_range(images[chosen]))
  x0 = jax.random.normal(key_noise, x1.shape)
  velocity = model_lib.velocity_function(exp.network(), params)
  scales = []
  for d in JUMPS:
    scale, residual = compounding.effective_scale(
        velocity, x0, x1, jnp.asarray(labels[chosen]), key_start,
        d=d, w=w, null_class=exp.null_class, t_interval=exp.objective.t_interval,
    )  # fmt: skip
    logging.info(
        "%s: a jump of %g has effective CFG scale %.2f (residual %.4f).",
        workdir, d, scale, residual,
    )  # fmt: skip
    scales.append(scale)
  return scales


def row_names(reports: list[dict]) -> list[str]:
  """A name for each run: its variant and decays, and what sets it apart within its variant."""
  results_only = ("seed", "steps", "log.", "checkpoint.", "sample.", "evaluation.")
  flat = [
    {k: v for k, v in experiment_lib.flatten(r["config"]).items() if not k.startswith(results_only)}
    for r in reports
  ]
  names = []
  for config in flat:
    kin = [other for other in flat if other["variant"] == config["variant"]]
    apart = [k for k in config if any(other[k] != config[k] for other in kin)]
    overrides = "".join(f", {k.rpartition('.')[2]}={config[k]}" for k in apart)
    names.append(f"`{config['variant']}`{overrides}")
  return names


def decays(report: dict) -> str:
  """The decays of a run's averages: of inference and target, or of the one EMA."""
  ema = report["config"]["ema"]
  both = dict.fromkeys([ema["inference_decay"], ema["target_decay"]])
  return " / ".join(map(str, both))


def table(reports: dict[str, list[dict]]) -> str:
  """Fréchet distance as multiples of the floor, and accuracy: a row a config, a column an NFE."""
  every = [r for runs in reports.values() for run in runs for r in run["results"]]
  nfes = sorted({r["steps"] for r in every})
  spread = lambda v: f"{np.mean(v):.2f}" + (f" ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "")
  lines = [
    "Fréchet distance, as a multiple of the floor: mean ± standard deviation over seeds.",
    "",
  ]
  for w in sorted({r["w"] for r in every}):
    lines += [
      f"w = {w:g} (CFG {1 + w:g})",
      "",
      f"| | EMA decay | {' | '.join(f'NFE {n}' for n in nfes)} | accuracy, NFE 1 |",
      "|---" * (len(nfes) + 3) + "|",
    ]
    for name, runs in reports.items():
      found = collections.defaultdict(list)
      for result in (r for run in runs for r in run["results"] if r["w"] == w):
        found[result["steps"]].append(result)
      if found:
        cells = [spread([r["times_floor"] for r in found[n]]) if n in found else "–" for n in nfes]
        accuracy = np.mean([r["accuracy"] for r in found[1]]) if 1 in found else np.nan
        cells = [name, decays(runs[0]), *cells, f"{accuracy:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
  return "\n".join(lines)


def figure(scales: dict[str, list[list[float]]], w: float, path: str) -> None:
  """Effective guidance against the jump, a line a run."""
  fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
  colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
  for n, (name, runs) in enumerate(scales.items()):
    for i, run in enumerate(runs):
      label = None if i else name.replace("`", "")
      ax.plot(JUMPS, run, "o-", color=colours[n % len(colours)], label=label)
  levels = np.log2(np.array(JUMPS) * paths.FINEST)
  ax.plot(JUMPS, (1 + w) ** levels, "k:", label=f"(1 + w)^level = {1 + w:g}^level")
  ax.axhline(1 + w, color="k", lw=0.5)
  ax.set_xscale("log", base=2)
  ax.set_yscale("log", base=2)
  ax.set_xlabel("jump d")
  ax.set_ylabel("effective CFG scale")
  ax.legend()
  save_figure(fig, path)


def grids(workdirs: dict[str, str], w: float, path: str) -> None:
  """The sample grids side by side: a row a variant, a column an NFE."""
  pattern = re.compile(rf"samples_steps(\d+)_w{w:g}\.png")
  found = {
    name: {int(m[1]): m[0] for m in map(pattern.fullmatch, os.listdir(workdir)) if m}
    for name, workdir in workdirs.items()
  }
  nfes = sorted(set().union(*found.values()))
  if not nfes:
    return
  size = (2.2 * len(nfes), 1.9 * len(found))
  fig, axes = plt.subplots(len(found), len(nfes), figsize=size, layout="constrained", squeeze=False)
  for row, (name, files) in zip(axes, found.items(), strict=True):
    row[0].set_ylabel(name.replace("`", "").replace(", ", "\n"))
    for ax, nfe in zip(row, nfes, strict=True):
      ax.set(xticks=[], yticks=[])
      if nfe in files:
        with Image.open(os.path.join(workdirs[name], files[nfe])) as image:
          ax.imshow(image.convert("RGB"))
  for ax, nfe in zip(axes[0], nfes, strict=True):
    ax.set_title(f"NFE {nfe}")
  save_figure(fig, path)


def save_figure(fig, path: str) -> None:
  """Writes a figure as PNG, whole or not at all."""
  png = io.BytesIO()
  fig.savefig(png, format="png", dpi=120)
  plt.close(fig)
  logs.write_whole(path, png.getvalue())


def compare(workdirs: list[str], out: str, w: float, examples: int) -> None:
  """Writes the comparison of these runs to the folder `out`."""
  reports = [read_report(workdir) for workdir in workdirs]
  rows, scales, first = collections.defaultdict(list), collections.defaultdict(list), {}
  for name, workdir, report in zip(row_names(reports), workdirs, reports, strict=True):
    rows[name].append(report)
    first.setdefault(name, workdir)
    scales[name].append(effective_guidance(workdir, report, w, examples))
  path = lambda name: os.path.join(out, name)
  lines = [
    table(rows),
    f"Effective CFG scale of a jump told w = {w:g}:",
    "",
    "| | " + " | ".join(f"d = 1/{1 / d:.0f}" for d in JUMPS) + " |",
    "|---" * (len(JUMPS) + 1) + "|",
  ]
  for name, runs in scales.items():
    lines += [f"| {name} | " + " | ".join(f"{s:.2f}" for s in run) + " |" for run in runs]
  logs.write_whole(path("comparison.md"), "\n".join(lines) + "\n")
  results = {
    name: [{"seed": r["config"]["seed"], "results": r["results"]} for r in runs]
    for name, runs in rows.items()
  }
  content = {"results": results, "jumps": JUMPS, "effective_scale": scales}
  logs.write_whole(path("comparison.json"), json.dumps(content, indent=2))
  figure(scales, w, path("effective_guidance.png"))
  grids(first, w, path("grids.png"))
  logging.info("Wrote %s.", path("comparison.md"))


def main(argv):
  """Compares the runs named on the command line."""
  if not argv[1:]:
    raise app.UsageError("Name the workdirs of evaluated runs.")
  logs.only_ours()
  matplotlib.use("Agg")
  with logs.one_line_errors():
    compare(argv[1:], _OUT.value, _W.value, _EXAMPLES.value)


if __name__ == "__main__":
  flags.mark_flag_as_required("out")
  app.run(main)
