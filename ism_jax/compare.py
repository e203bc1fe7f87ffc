"""One table and one figure of several evaluated runs.

  python -m ism_jax.compare --out=DIR WORKDIR [WORKDIR ...]

Runs of one variant are seeds of it. Writes comparison.md (Fréchet distance and accuracy over NFE
and w), comparison.json, effective_guidance.png (see `compounding`) and grids.png, the samples.
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

from ism_jax import compounding, data, evaluate, logs, paths, sharding
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
  exp = experiment_lib.parse(ml_collections.ConfigDict(report["config"]))
  _, params = evaluate.restore_ema(workdir, exp, sharding.data_mesh(jax.devices()[:1]))
  images, labels = data.all_images(data.load_source(exp.data))
  chosen = np.random.default_rng(0).permutation(len(images))[:examples]
  key_noise, key_start = jax.random.split(jax.random.key(0))
  x1 = jnp.asarray(images[chosen] / 127.5 - 1, jnp.float32)
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


def table(reports: dict[str, list[dict]]) -> str:
  """Fréchet distance as multiples of the floor, and accuracy: rows variants, columns settings."""
  settings = sorted({(r["steps"], r["w"]) for runs in reports.values() for r in runs[0]["results"]})
  ws = sorted({w for _, w in settings})
  nfes = sorted({steps for steps, _ in settings})
  spread = lambda v: f"{np.mean(v):.2f}" + (f" ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "")
  lines = []
  for w in ws:
    lines += [
      f"w = {w:g} (CFG {1 + w:g})",
      "",
      "| variant | " + " | ".join(f"NFE {n}" for n in nfes) + " | accuracy, NFE 1 |",
      "|---" * (len(nfes) + 2) + "|",
    ]
    for variant, runs in reports.items():
      found = collections.defaultdict(list)
      for result in (r for run in runs for r in run["results"] if r["w"] == w):
        found[result["steps"]].append(result)
      if not found:
        continue
      cells = [spread([r["times_floor"] for r in found[n]]) if n in found else "–" for n in nfes]
      one = [r["accuracy"] for r in found.get(1, [])]
      accuracy = f"{np.mean(one):.3f}" if one else "–"
      lines.append(f"| `{variant}` | " + " | ".join(cells) + f" | {accuracy} |")
    lines.append("")
  return "\n".join(lines)


def figure(scales: dict[str, list[list[float]]], w: float, path: str) -> None:
  """Effective guidance against the jump, a line a run."""
  fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
  colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
  for (variant, runs), colour in zip(scales.items(), colours, strict=False):
    for i, run in enumerate(runs):
      ax.plot(JUMPS, run, "o-", color=colour, label=None if i else variant)
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
    variant: {int(m[1]): m[0] for m in map(pattern.fullmatch, os.listdir(workdir)) if m}
    for variant, workdir in workdirs.items()
  }
  nfes = sorted(set().union(*found.values()))
  if not nfes:
    return
  size = (2.2 * len(nfes), 1.9 * len(found))
  fig, axes = plt.subplots(len(found), len(nfes), figsize=size, layout="constrained", squeeze=False)
  for row, (variant, files) in zip(axes, found.items(), strict=True):
    for ax, nfe in zip(row, nfes, strict=True):
      ax.set(xticks=[], yticks=[], title=f"{variant}, NFE {nfe}")
      if nfe in files:
        with Image.open(os.path.join(workdirs[variant], files[nfe])) as image:
          ax.imshow(image.convert("RGB"))
  save_figure(fig, path)


def save_figure(fig, path: str) -> None:
  """Writes a figure as PNG, whole or not at all."""
  png = io.BytesIO()
  fig.savefig(png, format="png", dpi=120)
  plt.close(fig)
  logs.write_whole(path, png.getvalue())


def main(argv):
  """Reads the runs, then writes."""
  workdirs = argv[1:]
  if not workdirs:
    raise app.UsageError("name the workdirs of evaluated runs.")
  logs.only_ours()
  matplotlib.use("Agg")
  try:
    reports = [read_report(workdir) for workdir in workdirs]
  except FileNotFoundError as error:
    raise SystemExit(f"Error: {error}") from None
  by_variant, scales = collections.defaultdict(list), collections.defaultdict(list)
  for workdir, report in zip(workdirs, reports, strict=True):
    by_variant[report["variant"]].append(report)
    scales[report["variant"]].append(effective_guidance(workdir, report, _W.value, _EXAMPLES.value))
  os.makedirs(_OUT.value, exist_ok=True)
  path = lambda name: os.path.join(_OUT.value, name)
  lines = [table(by_variant), f"Effective CFG scale of a jump told w = {_W.value:g}:", ""]
  lines += ["| variant | " + " | ".join(f"d = 1/{1 / d:.0f}" for d in JUMPS) + " |"]
  lines += ["|---" * (len(JUMPS) + 1) + "|"]
  for variant, runs in scales.items():
    lines += [f"| `{variant}` | " + " | ".join(f"{s:.2f}" for s in run) + " |" for run in runs]
  logs.write_whole(path("comparison.md"), "\n".join(lines) + "\n")
  results = {
    v: [{"seed": r["config"]["seed"], "results": r["results"]} for r in runs]
    for v, runs in by_variant.items()
  }
  content = {"results": results, "jumps": JUMPS, "effective_scale": scales}
  logs.write_whole(path("comparison.json"), json.dumps(content, indent=2))
  figure(scales, _W.value, path("effective_guidance.png"))
  first = {
    report["variant"]: w for w, report in reversed(list(zip(workdirs, reports, strict=True)))
  }
  grids(dict(reversed(first.items())), _W.value, path("grids.png"))
  logging.info("Wrote %s.", path("comparison.md"))


if __name__ == "__main__":
  flags.mark_flag_as_required("out")
  app.run(main)
