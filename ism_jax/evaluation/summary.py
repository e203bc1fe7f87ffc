"""The numbers of several evaluated runs side by side, without a picture or a table of them.

Runs whose configs differ only in the seed are one row. A number of a row is a list: one value for
each run that has it, so that means and spreads are over trainings; a run that was evaluated with
several seeds of noise counts once, with their mean.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import os

import numpy as np

from ism_jax import experiment
from ism_jax.metrics.spectra import finest_octave
from ism_jax.runtime import files, logs

# The shape of a checkpoint's evaluation.json, see `files.parse_json`.
_SCORES = {"scores": {str: {str: float}}}
REPORT = {
  "networks": [{"name": str, "features": str, "floor": dict | None}],
  "results": [_SCORES | {"steps": int, "w": float}],
  "yardsticks": {str: _SCORES},
  "reference_spectrum": list | None,
  "config": {
    "variant": str,
    "batch_size": int,
    "data": {"name": str},
    "coupling": {"coupling": str},
    "ema": {"inference_decay": float, "target_decay": float},
    "evaluation": {},
  },
}
# What decides whether Fréchet distances of two runs are distances to the same thing.
COMPARABLE = (
  "data.name",
  "evaluation.networks",
  "evaluation.weights",
  "evaluation.reference",
  "evaluation.reference_split",
  "evaluation.num_images",
)


@dataclasses.dataclass(frozen=True)
class Run:
  """An evaluated run.

  Attributes:
    config: nested, as it was evaluated.
    results: those of evaluation.json as `over_real` has them.
    straightness: [{"w", "deviation_from_chord"}].
    training: means over the run of the couplings' diagnostics and of the gradient norms of the
      losses, and the median of the steps per second, under their names in metrics.jsonl.
    jumps: {"1/64": consistency loss of this d}, over the last quarter of the run.
  """

  workdir: str
  config: dict
  results: list[dict]
  distance_is: str
  straightness: list[dict]
  training: dict[str, float]
  jumps: dict[str, float]


def read_report(workdir: str) -> dict:
  """evaluation.json of a run."""
  path = os.path.join(workdir, "evaluation.json")
  if not os.path.exists(path):
    raise FileNotFoundError(
      f"{path} is missing; `python -m ism_jax evaluate --workdir={workdir}` makes it."
    )
  remedy = f"`python -m ism_jax evaluate --workdir={workdir}` makes it again."
  return files.read_json(path, REPORT, remedy)


def read_run(workdir: str, report: dict) -> Run:
  """A run from its evaluation.json and metrics.jsonl."""
  path = os.path.join(workdir, "metrics.jsonl")
  if not os.path.exists(path):
    raise FileNotFoundError(f"{path} is missing: name the folder where the run was trained.")
  return as_run(report, workdir, logs.read_entries(path))


def as_run(report: dict, workdir: str = "", entries: Sequence[dict] = ()) -> Run:
  """A run from the contents of its evaluation.json and of its metrics.jsonl."""
  rates = [entry["steps_per_second"] for entry in entries if "steps_per_second" in entry]
  rate = {"steps_per_second": float(np.median(rates))} if rates else {}
  return Run(
    workdir=workdir,
    config=report["config"],
    results=[over_real(result, report) for result in report["results"]],
    distance_is=distance_is(report),
    straightness=report.get("straightness", []),
    training=_means(entries, lambda name: name.startswith(("coupling/", "gradient_norm/"))) | rate,
    jumps=jump_losses(entries),
  )


def over_real(result: dict, report: dict) -> dict:
  """A result of evaluation.json: its setting, "distance" (see `distance_is`), "precision" and
  "recall" of the same network if it has them, "accuracy" if a classifier judged it, and if the real
  images were at hand "spectrum", "bands" and "finest_octave" as ratios to theirs.
  """
  scores = result["scores"]
  headline = scores[report["networks"][0]["name"]]
  metrics = {k: v for k, v in result.items() if k != "scores"}
  metrics["distance"] = headline.get("times_floor", headline["frechet_distance"])
  metrics |= {name: headline[name] for name in ("precision", "recall") if name in headline}
  if "accuracy" in scores.get("classifier", {}):
    metrics["accuracy"] = scores["classifier"]["accuracy"]
  # Images of one grey each have no power to compare with.
  if "spectrum" in result and min(report["reference_spectrum"] + report["reference_bands"]) > 0:
    for name in ("spectrum", "bands"):
      metrics[name] = (np.array(result[name]) / np.array(report[f"reference_{name}"])).tolist()
    octave, real = map(finest_octave, (result["spectrum"], report["reference_spectrum"]))
    metrics["finest_octave"] = octave / real
  return metrics


def distance_is(report: dict) -> str:
  """What "distance" is: the first network's Fréchet distance, in floors where it has one."""
  network = report["networks"][0]
  return f"Fréchet distance, {'in floors' if network['floor'] else network['name']}"


def _means(entries: Sequence[dict], wanted: Callable[[str], bool]) -> dict[str, float]:
  """The mean of each wanted name, over the entries that have it."""
  series = collections.defaultdict(list)
  for entry in entries:
    for name in filter(wanted, entry):
      series[name].append(entry[name])
  return {name: float(np.mean(values)) for name, values in series.items()}


def jump_losses(entries: Sequence[dict]) -> dict[str, float]:
  """{"1/64": mean consistency loss of this d} over the last quarter of the training's entries."""
  trained = [entry for entry in entries if "loss" in entry]
  prefix = "consistency/d_"
  means = _means(trained[-max(1, len(trained) // 4) :], lambda name: name.startswith(prefix))
  return {name.removeprefix(prefix).replace("_", "/"): value for name, value in means.items()}


def check_comparable(reports: dict[str, dict]) -> None:
  """Raises ValueError if the runs {workdir: report} are not judged against the same images.

  Or if one's distances are in floors of another number of images, as they once were.
  """
  for workdir, report in reports.items():
    network = report["networks"][0]
    floor = network["floor"] or {}
    is_of_all = "count" not in floor and "bootstrap" in floor.get("is", "")
    if is_of_all and network["reference_images"] != report["num_images"]:
      raise ValueError(
        f"{workdir} has distances of {report['num_images']} samples in floors of "
        f"{network['reference_images']} images, by an earlier version: evaluate it again with "
        f"python -m ism_jax evaluate --workdir={workdir}."
      )
  for key in COMPARABLE:
    by_value = collections.defaultdict(list)
    for workdir, report in reports.items():
      by_value[experiment.flatten(report["config"]).get(key)].append(workdir)
    if len(by_value) > 1:
      groups = "; ".join(f"{value}: {', '.join(workdirs)}" for value, workdirs in by_value.items())
      raise ValueError(
        f"the runs differ in {key}, so their distances do not compare ({groups}). Compare the runs "
        "of each value in a call of their own."
      )


def learnt(config: dict) -> dict:
  """A nested config as a flat one, of the keys that change what is learnt."""
  unlearnt = {key for key, marks in experiment.MARKS.items() if not marks.learnt}
  return {k: v for k, v in experiment.flatten(config).items() if k not in unlearnt}


def row_names(configs: list[dict]) -> list[str]:
  """A name for each config: its variant, and what sets it apart within its variant."""
  flat = [learnt(config) for config in configs]
  names = []
  for config in flat:
    siblings = [other for other in flat if other["variant"] == config["variant"]]
    differing = [k for k in config if any(other.get(k) != config[k] for other in siblings)]
    last = lambda key: key.rpartition(".")[2]
    # The last part says which key it is, unless another section has one of that name too.
    short = lambda key: last(key) if sum(last(k) == last(key) for k in config) == 1 else key
    names.append(f"`{config['variant']}`" + "".join(f", {short(k)}={config[k]}" for k in differing))
  return names


def group(runs: list[Run]) -> dict[str, list[Run]]:
  """The runs of each row, rows in the order of the command line."""
  rows = {}
  for name, run in zip(row_names([run.config for run in runs]), runs, strict=True):
    rows.setdefault(name, []).append(run)
  return rows


def measured(runs: list[Run], name: str, steps: int, w: float | None) -> list:
  """The results `name` of runs at this number of steps and w: a number or an array each."""
  each = [
    [r[name] for r in run.results if (r["steps"], r["w"]) == (steps, w) and name in r]
    for run in runs
  ]
  return [np.mean(values, axis=0) for values in each if values]


def straightness(runs: list[Run], w: float) -> list[float]:
  """The runs' deviations from the chord at w."""
  return [s["deviation_from_chord"] for run in runs for s in run.straightness if s["w"] == w]


def trained(runs: list[Run], name: str) -> list[float]:
  """The runs' means over training of `name`."""
  return [run.training[name] for run in runs if name in run.training]


def step_counts(runs: list[Run]) -> list[int]:
  """Every number of sampling steps that a run was evaluated at."""
  return sorted({r["steps"] for run in runs for r in run.results})


def guidances(runs: list[Run]) -> list[float]:
  """The strengths w that every one of the runs was evaluated at."""
  return sorted(set.intersection(*({r["w"] for r in run.results} for run in runs)))


def best_w(runs: list[Run], steps: int) -> float | None:
  """The w of the lowest Fréchet distance in `steps` steps, by the mean over the runs."""
  means = {w: measured(runs, "distance", steps, w) for w in guidances(runs)}
  means = {w: np.mean(values) for w, values in means.items() if values}
  return min(means, key=means.get, default=None)


def spectra(rows: dict[str, list[Run]], steps: int, w: float) -> dict[str, dict[str, list[float]]]:
  """{"spectrum": {row: ratio to the real images' [H / 2]}, "bands": {row: [levels]}}, means."""
  return {
    name: {
      row: np.mean(values, axis=0).tolist()
      for row, runs in rows.items()
      if (values := measured(runs, name, steps, w))
    }
    for name in ("spectrum", "bands")
  }


def frechet_by_steps(rows: dict[str, list[Run]]) -> dict[str, dict[int, list[float]]]:
  """{row: {steps: distances at the best w}}."""
  return {
    row: {steps: measured(runs, "distance", steps, best_w(runs, steps)) for steps in counts}
    for row, runs in rows.items()
    if (counts := [n for n in step_counts(runs) if best_w(runs, n) is not None])
  }


def frechet_by_w(rows: dict[str, list[Run]]) -> dict[int, dict[str, dict[float, list[float]]]]:
  """{steps: {row: {w: distances}}}, of the rows with more than one w."""
  several = {row: runs for row, runs in rows.items() if len(guidances(runs)) > 1}
  return {
    steps: {
      row: {w: v for w in guidances(runs) if (v := measured(runs, "distance", steps, w))}
      for row, runs in several.items()
    }
    for steps in step_counts([run for runs in several.values() for run in runs])
  }


def against(runs: list[Run], key: str) -> dict[str, list[Run]]:
  """The runs that differ only in the config's `key`, {its value as a label: runs}, ascending.

  Where several sets of runs do, the largest. If the key is one of the coupling's, runs that differ
  from these by independent pairing come first, as "independent".
  """
  flat = [learnt(run.config) for run in runs]
  if missing := [run.workdir for run, config in zip(runs, flat, strict=True) if key not in config]:
    raise ValueError(
      f"--against={key} is not a key of {missing[0]}'s config that changes what is learnt; there "
      f"are {', '.join(sorted(flat[0]))}."
    )
  of_coupling = key.startswith("coupling.") and key != "coupling.coupling"
  without = lambda config, dropped: frozenset(
    (k, v)
    for k, v in config.items()
    if k not in ("variant", dropped) and not k.startswith(f"{dropped}.")
  )
  families, independent = collections.defaultdict(lambda: collections.defaultdict(list)), []
  for run, config in zip(runs, flat, strict=True):
    if of_coupling and config["coupling.coupling"] == "independent":
      independent.append(run)
    else:
      families[without(config, key)][config[key]].append(run)
  family = max(families.values(), key=len, default={})
  if len(family) < 2:
    raise ValueError(f"no two of the runs differ only in {key}; leave --against={key} out.")
  some_run = next(iter(family.values()))[0]
  rest = lambda run: without(learnt(run.config), "coupling")
  beside = [run for run in independent if rest(run) == rest(some_run)]
  label = lambda value: (
    f"K={value}\nn={value * some_run.config['batch_size']}"
    if key == "coupling.pool_size"
    else f"{value:g}"
    if isinstance(value, float)
    else str(value)
  )
  in_order = sorted(family) if all(isinstance(v, (int, float)) for v in family) else family
  points = {label(value): family[value] for value in in_order}
  return ({"independent": beside} if beside else {}) | points


def panels(
  points: dict[str, list[Run]], key: str, w: float
) -> dict[str, dict[str, dict[str, list[float]]]]:
  """What a figure of `against` shows: {panel: {line: {label: a value a run}}}; no empty ones.

  What the coupling attains is shown for its own keys; it does not depend on others.
  """
  runs = [run for at in points.values() for run in at]
  counts, strengths, distance = step_counts(runs), dict.fromkeys((0.0, w)), runs[0].distance_is
  few = next((n for n in (4, 2) if n in counts), 1)
  counts = [n for n in dict.fromkeys((1, few, counts[-1])) if n in counts]
  per_point = lambda value: {label: v for label, runs in points.items() if (v := value(runs))}
  shown = {
    f"{distance}, w = {s:g}": {
      f"NFE {n}": per_point(lambda runs: measured(runs, "distance", n, s)) for n in counts
    }
    for s in strengths
  }
  shown["deviation from the chord"] = {
    f"w = {s:g}": per_point(lambda runs: straightness(runs, s)) for s in strengths
  }
  if key.startswith("coupling."):
    for title, name in (("attained gain of OT", "attained_gain"), ("class shift", "class_shift")):
      shown[title] = {"": per_point(lambda runs: trained(runs, f"coupling/{name}"))}
  shown["consistency loss, end of training"] = {
    f"d = {d}": per_point(lambda runs: [run.jumps[d] for run in runs if d in run.jumps])
    for d in dict.fromkeys(d for run in runs for d in run.jumps)
  }
  filled = {title: {n: at for n, at in lines.items() if at} for title, lines in shown.items()}
  return {title: lines for title, lines in filled.items() if lines}
