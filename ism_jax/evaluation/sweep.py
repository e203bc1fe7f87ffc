"""The best guidance for each number of steps: all by a small protocol, the best by the full one.

Published few-step numbers rest on a w that is tuned for each NFE. The best of many looks better
than it is, so it is judged again, on seeds that it was not chosen by.
"""

import itertools
import json
import os

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from ism_jax import experiment, restore
from ism_jax.evaluation import evaluate, figures, summary
from ism_jax.evaluation.report import in_path
from ism_jax.runtime import files

LEAST = 500  # samples of the small protocol, where it is not given
REPORTS = ("sweep.json", "sweep.md")


def sweep(config, source: str, out: str, *, first: int = 0, trees=("ema",)) -> dict | None:
  """Judges a network at every w and number of steps, and the best w of each again.

  Writes sweep.md, sweep.json and sweep.png, `first-TREE/` with the small evaluation and
  `best-TREE/` with the full one, which is config.evaluation's. Interrupted, it continues.

  Args:
    config: a ConfigDict of the run; `evaluation.w` and `evaluation.steps` are what is swept.
    source: see `restore.read`.
    out: a folder.
    first: samples of each setting in the small protocol; 0 for a tenth of the full one, at least
      500.
    trees: the parameters that are tried, see `restore.trees_of`; "all" are the inference averages
      of a run. With an export "ema".
  Returns:
    The contents of sweep.json; None in processes but the first.
  Raises:
    ValueError: as `evaluate`.
  """
  exp, ev = experiment.parse(config), config.evaluation
  averages = ("ema", *exp.ema.decays) if restore.is_run(source) else ("ema",)
  trees = dict.fromkeys(t for tree in trees for t in (averages if tree == "all" else (tree,)))
  restore.check_trees(exp, trees)
  first = min(first or max(LEAST, ev.num_images // 10), ev.num_images)
  small = config.copy_and_resolve_references()
  # A seed that the full protocol does not have.
  seed = next(s for s in itertools.count() if s not in ev.seeds)
  small.evaluation.update({"num_images": first, "seeds": (seed,), "save_samples": False})
  chosen = {}  # {steps: (distance, w, tree)}
  reports = {tree: _evaluated(small, source, out, f"first-{in_path(tree)}", tree) for tree in trees}
  for tree, report in reports.items():
    run = summary.as_run(report)
    for steps in summary.step_counts([run]):
      w = summary.best_w([run], steps)
      (distance,) = summary.measured([run], "distance", steps, w)
      chosen[steps] = min(chosen.get(steps, (np.inf,)), (float(distance), w, tree))
    name = "sweep.png" if len(trees) == 1 else f"sweep_{in_path(tree)}.png"
    if jax.process_index() == 0:
      figures.sweep(run, os.path.join(out, name))
  for steps, (_, w, tree) in sorted(chosen.items()):
    logging.info("%d steps: the best w is %g, of the %s.", steps, w, restore.name_of(tree))
  best = []
  for tree in trees:
    settings = [(steps, w) for steps, (_, w, of_tree) in sorted(chosen.items()) if of_tree == tree]
    if not settings:
      continue
    report = _evaluated(config, source, out, f"best-{in_path(tree)}", tree, settings)
    run = summary.as_run(report)
    for steps, w in settings:
      again = [r["distance"] for r in run.results if (r["steps"], r["w"]) == (steps, w)]
      best.append(
        {
          "steps": steps,
          "w": w,
          "parameters": tree,
          "first": chosen[steps][0],
          "again": float(np.mean(again)),
          "sd": float(np.std(again, ddof=1)) if len(again) > 1 else None,
        }
      )
  result = {
    "distance": run.distance_is,
    "first": {"num_images": first, "seeds": [seed]},
    "again": {"num_images": ev.num_images, "seeds": list(ev.seeds)},
    "best": sorted(best, key=lambda row: row["steps"]),
    "all": {tree: _distances(report) for tree, report in reports.items()},
  }
  if jax.process_index() != 0:
    return None
  for name, text in zip(REPORTS, (json.dumps(result, indent=2), as_markdown(result)), strict=True):
    files.write_whole(os.path.join(out, name), text)
  logging.info("%s\n%s", os.path.join(out, REPORTS[1]), as_markdown(result))
  return result


def _evaluated(config, source, out, name, tree, settings=None) -> dict:
  """The report of an evaluation in a folder of `out`, which is made unless it is there."""
  folder = os.path.join(out, name)
  wanted = {"evaluation": files.as_dict(config)["evaluation"], "settings": settings}
  wanted = json.loads(json.dumps(wanted | {"checksum": restore.read(source, tree).checksum}))
  mark, report = os.path.join(folder, "sweep_of.json"), None
  if jax.process_index() == 0:
    try:
      if files.read_json(mark, {}, "") == wanted:
        report = summary.read_report(folder)
    except (OSError, ValueError):
      pass  # not there yet, or of another sweep
  done = report is not None
  if jax.process_count() > 1:
    done = bool(multihost_utils.broadcast_one_to_all(np.array(done)))
  if not done:
    report = evaluate.evaluate(config, source, out=folder, tree=tree, settings=settings)
    if jax.process_index() == 0:
      files.write_whole(mark, json.dumps(wanted))
  return _broadcast(report)


def _broadcast(report: dict | None) -> dict:
  """The report of the first process, in every one."""
  if jax.process_count() == 1:
    return report
  content = np.frombuffer(json.dumps(report).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.array(len(content))))
  padded = np.zeros(length, np.uint8)
  if jax.process_index() == 0:
    padded[:] = content
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def _distances(report: dict) -> list[dict]:
  keys = ("steps", "w", "distance")
  return [{key: r[key] for key in keys} for r in summary.as_run(report).results]


def as_markdown(result: dict) -> str:
  """The sweep as tables: the best w of each number of steps, and all that was tried."""
  count = lambda p: f"{p['num_images']} samples of seed {', '.join(map(str, p['seeds']))}"
  lines = ["# Guidance and steps", "", f"{result['distance']}, lower is better."]
  lines += [
    f"Every setting with {count(result['first'])}; the best w of each number of steps again with "
    f"{count(result['again'])}. Distances of other numbers of samples do not compare.",
    "",
  ]
  row = lambda b: [
    f"{b['steps']}",
    f"{b['w']:g}",
    restore.name_of(b["parameters"]),
    f"{b['first']:.4g}",
    f"{b['again']:.4g}" + (f" ± {b['sd']:.2g}" if b["sd"] is not None else ""),
  ]
  columns = ["NFE", "best w", "parameters", "when chosen", "judged again"]
  lines += files.markdown_table(columns, [row(b) for b in result["best"]])
  for tree, distances in result["all"].items():
    by_setting = {(d["steps"], d["w"]): f"{d['distance']:.4g}" for d in distances}
    counts, strengths = (sorted({key[i] for key in by_setting}) for i in range(2))
    cells = [[f"{n}", *(by_setting.get((n, w), "–") for w in strengths)] for n in counts]
    lines += [f"All, {restore.name_of(tree)}:", ""]
    lines += files.markdown_table(["NFE", *(f"w = {w:g}" for w in strengths)], cells)
  return "\n".join(lines)
