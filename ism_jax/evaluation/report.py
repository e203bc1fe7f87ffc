"""The report of an evaluation: evaluation.json, and evaluation.md with a table that people read."""

import json
import os

from ism_jax.evaluation import reference, summary
from ism_jax.metrics import spectra
from ism_jax.runtime import files

SETTING = ("steps", "w", "seed")  # what a result of a checkpoint's samples is of
# {(network, metric): (name in the field, format)}, in the order of the tables.
_COLUMNS = {
  ("inception", "frechet_distance"): ("FID", "{:.2f}"),
  ("inception", "spatial_frechet_distance"): ("sFID", "{:.2f}"),
  ("inception", "inception_score"): ("IS", "{:.1f}"),
  ("inception", "kid"): ("KID", "{:.5f}"),
  ("inception", "precision"): ("precision", "{:.3f}"),
  ("inception", "recall"): ("recall", "{:.3f}"),
  ("dinov2", "frechet_distance"): ("FD-DINOv2", "{:.1f}"),
  ("dinov2", "kid"): ("KD-DINOv2", "{:.4f}"),
  ("dinov2", "precision"): ("precision, DINOv2", "{:.3f}"),
  ("dinov2", "recall"): ("recall, DINOv2", "{:.3f}"),
  ("random", "frechet_distance"): ("FD, random network", "{:.3f}"),
  ("random", "times_floor"): ("FD, random network, in floors", "{:.2f}"),
  ("random", "precision"): ("precision, random network", "{:.3f}"),
  ("random", "recall"): ("recall, random network", "{:.3f}"),
  ("classifier", "frechet_distance"): ("FD, classifier", "{:.3f}"),
  ("classifier", "times_floor"): ("FD, classifier, in floors", "{:.2f}"),
  ("classifier", "accuracy"): ("accuracy", "{:.3f}"),
  ("classifier", "precision"): ("precision, classifier", "{:.3f}"),
  ("classifier", "recall"): ("recall, classifier", "{:.3f}"),
}


def title_of(network: str, metric: str) -> str | None:
  """What tables call a network's metric: "FID"; None of what they do not show."""
  return _COLUMNS.get((network, metric), (None,))[0]


def in_path(tree: str) -> str:
  """The name of a parameter tree in the names of files: "ema-0.999" of "ema:0.999"."""
  return tree.replace(":", "-")


def folder_of(workdir: str, tree: str) -> str:
  """Where an evaluation of a tree goes by default: the workdir is the inference EMA's alone."""
  return workdir if tree == "ema" else os.path.join(workdir, in_path(tree))


def write_report(workdir: str, report: dict) -> None:
  """Writes evaluation.json and evaluation.md."""
  files.write_whole(os.path.join(workdir, "evaluation.json"), json.dumps(report, indent=2))
  files.write_whole(os.path.join(workdir, "evaluation.md"), as_markdown(report))


def format_scores(scores: dict[str, dict]) -> str:
  """The scores {network: {metric: value}} in a line, for the log."""
  return ", ".join(
    f"{column} {form.format(values[metric])}"
    for network, values in scores.items()
    for (name, metric), (column, form) in _COLUMNS.items()
    if name == network and metric in values
  )


def as_markdown(report: dict) -> str:
  """The report as a table, with the protocol above it."""
  of_checkpoint = "step" in report
  title = f"{report['variant']}, step {report['step']}" if of_checkpoint else report["samples"]
  unreadable = report.get("unreadable")
  left_out = f" ({len(unreadable)} more could not be read)" if unreadable else ""
  lines = [f"# {title}", "", f"{report['num_images']} samples{left_out}, against:", ""]
  lines += [_describe_network(network) for network in report["networks"]]
  protocol = [f"{name}: {how}" for name, how in report["metrics"].items()]
  if of_checkpoint:
    protocol += [f"labels: {report['labels']}", f"rounding: {report['rounding']}"]
  lines += ["", "; ".join(protocol) + "."]
  lines += [
    "",
    "Fréchet distances, as they are or in floors, compare only with those of as many samples: "
    "by chance alone fewer are farther away.",
  ]
  if report["reference_spectrum"]:
    lines += [
      "",
      f"Nearest neighbour: mean distance of the first {reference.NEIGHBOURS} samples to the "
      "nearest training image; far below that of real images means copying (a little below, "
      "samples that are more typical than real ones, as class means are). High frequencies: power "
      "of the finest octave of frequencies over that of the real images. Accuracy alone says "
      "little: over-guided samples reach 1.",
    ]
    if any(result.get("copying") for result in report["results"]):
      lines += [
        "",
        "Copying: of pairs of a sample and a held-out image, the share in which the sample is "
        "nearer to a training image (Meehan et al. 2020), in pixels and to a network: 0.5 where "
        "samples are as near as images that were not trained on, 1 of copies. nearest.png shows "
        "some.",
      ]
  rows = [_row(report, result) for result in report["results"]]
  rows += [_row(report, result, name) for name, result in report["yardsticks"].items()]
  names = dict.fromkeys(column for row in rows for column in row)
  columns = sorted(names, key=lambda column: column != "samples")  # which come first
  cells = [[row.get(column, "–") for column in columns] for row in rows]
  lines += ["", *files.markdown_table(columns, cells)]
  if of_checkpoint:
    headline, _ = _COLUMNS[report["networks"][0]["name"], "frechet_distance"]
    lines += [f"The best w for each number of steps, by {headline}:", ""]
    runs = [summary.as_run(report)]
    counts = summary.step_counts(runs)
    lines += [*(f"- NFE {n}: w = {summary.best_w(runs, n):g}" for n in counts), ""]
  return "\n".join(lines)


def _describe_network(network: dict) -> str:
  source, floor = network["reference"], network["floor"]
  where = source.get("file") or f"{source['images']} images of split {source['split']}"
  line = f"- {network['name']}: {network['features']}. Reference: {where}."
  if floor:
    line += (
      f" Floor: the Fréchet distance of {floor['is']}, {floor['mean']:.3f} ± {floor['sd']:.3f} "
      f"(mean and standard deviation of {reference.FLOOR_REPEATS})."
    )
  return line


def _row(report: dict, result: dict, name: str = "") -> dict[str, str]:
  """{column: cell} of a result."""
  if (count := result.get("num_images", report["num_images"])) != report["num_images"]:
    name += f" ({count} images)"
  row = {"samples": name} if name or "steps" not in result else {}
  row |= {k: f"{result[k]:g}" for k in SETTING if k in result}
  for (network, metric), (column, form) in _COLUMNS.items():
    values = result["scores"].get(network, {})
    if metric in values:
      row[column] = form.format(values[metric])
      if f"{metric}_sd" in values:
        row[column] += f" ± {form.format(values[f'{metric}_sd'])}"
  if "spectrum" in result:
    octave = spectra.finest_octave(result["spectrum"])
    row["nearest neighbour"] = f"{result['nearest_neighbour']:.3f}"
    for space, share in result.get("copying", {}).items():
      row[f"copying, {space}"] = f"{share:.2f}"
    if real := spectra.finest_octave(report["reference_spectrum"]):  # 0 of images of one grey each
      row["high frequencies"] = f"{octave / real:.2f}"
  if speed := result.get("images_per_second"):
    row["images/s"] = f"{speed['drawn']:.4g}"
    if report["vae"]:
      row["images/s, decoded"] = f"{speed['decoded']:.4g}"
  return row
