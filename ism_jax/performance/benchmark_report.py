"""The report of a benchmark, from the contents of benchmark.json: Markdown and plots."""

import json
import os

from ism_jax.evaluation import figures
from ism_jax.performance.timing import format_quartiles
from ism_jax.runtime.files import markdown_table, write_whole


def write(report: dict, out: str, *, scaling: bool) -> None:
  """Writes what `benchmark.measure` returns as benchmark.json, benchmark.md and plots into `out`.

  Args:
    scaling: whether pools of several sizes were paired, and scaling.png is drawn.
  """
  write_whole(os.path.join(out, "benchmark.json"), json.dumps(report, indent=2) + "\n")
  write_whole(os.path.join(out, "benchmark.md"), as_markdown(report))
  figures.technique_costs(report["techniques"], os.path.join(out, "techniques.png"))
  if scaling and report["pool"]["pairs_at"]:
    figures.pairing_shares(report, os.path.join(out, "scaling.png"))


def as_markdown(report: dict) -> str:
  """The contents of benchmark.md."""
  sections = (_summary, _techniques, _pool, _input, _sampling, _programs)
  return "\n".join(line for section in sections for line in section(report))


def _summary(report: dict) -> list[str]:
  cfg, devices = report["config"], report["devices"]
  ceiling, train = report["ceiling"], report["train"]
  scaled, datasheet, of_datasheet = "", ".", "."
  if cfg["rows"] != cfg["batch_size"]:
    scaled = (
      f" The step was timed on {cfg['rows']} rows, and its time, but for the update's, is scaled "
      f"to {cfg['batch_size']}."
    )
  if peak := ceiling["datasheet"]:
    datasheet = f", of {peak / 1e12:.4g} by the datasheet."
    share = format_quartiles(train["utilisation_of_datasheet"], 100)
    of_datasheet = f", {share} % of the datasheet's."
  return [
    f"# {cfg['model']} ({cfg['variant']}) on {devices['count']} x {devices['kind']}",
    "",
    f"{cfg['dtype']}, remat {cfg['remat']!r}, {cfg['batch_size']} images per step, pools of "
    f"{cfg['pool_size']} batches, images {'x'.join(map(str, cfg['image_shape']))}; "
    f"{devices['cores']} CPU cores, jax {devices['jax']}.{scaled} Medians of {report['repeats']} "
    "rounds, in which everything is timed in turn, and in brackets their quartiles.",
    "",
    f"- Matrix products: {format_quartiles(ceiling['flops_per_second'], 1e-12)} TFLOP/s{datasheet}",
    f"- Training: {format_quartiles(train['images_per_second'], form='.4g')} images/s, "
    f"{format_quartiles(train['steps_per_second'], form='.4g')} steps/s, "
    f"{format_quartiles(train['seconds_per_step'], 1e3, '.4g')} ms per step. Model FLOPs: "
    f"{train['model_flops_per_step'] / 1e12:.4g} T per step, "
    f"{format_quartiles(train['utilisation'], 100)} % of what matrix products reach{of_datasheet}",
    "",
  ]


def _techniques(report: dict) -> list[str]:
  techniques = report["techniques"]
  ratios, passes = techniques["over_flow_matching"], techniques["forward_passes"]
  ratio = lambda name: format_quartiles(ratios[name], form=".3f")
  steps = [
    [name, format_quartiles(seconds, 1e3, ".4g"), ratio(name), f"{passes[name] / 3:.3f}"]
    for name, seconds in techniques["seconds_per_step"].items()
  ]
  costs = [[name, format_quartiles(cost, 100)] for name, cost in techniques["costs"].items()]
  parts = techniques["seconds_alone"].items()
  return [
    "## What each technique costs",
    "",
    *markdown_table(["step", "ms", "over flow matching", "by its forward passes"], steps),
    *markdown_table(["technique", "% of a flow matching step"], costs),
    "Parts of a step that were timed separately, on a device:",
    "",
    *markdown_table(["part", "ms"], [[name, format_quartiles(s, 1e3)] for name, s in parts]),
  ]


def _pool(report: dict) -> list[str]:
  pool, m = report["pool"], report["config"]["batch_size"]
  step = report["train"]["seconds_per_step"]["median"]
  parts = [
    [name, format_quartiles(seconds), format_quartiles(pool["shares"][name], 100, ".2g")]
    for name, seconds in pool["parts"].items()
  ]
  sizes = [
    [str(k), f"{k * m:,}", format_quartiles(seconds), f"{100 * seconds['median'] / k / step:.2g}"]
    for k, seconds in pool["by_size"].items()
  ]
  lines = [
    "## A pool",
    "",
    f"{format_quartiles(pool['seconds'], form='.4g')} s on the devices:",
    "",
    *markdown_table(["part", "s", "% of the pool"], parts),
    "By the size of the pool:",
    "",
    *markdown_table(["K", "pairs", "pairing, s", "% of K steps"], sizes),
  ]
  if pool["pairs_at"]:
    shares = [
      [f"{100 * share:g} %", *(f"{pairs:,.0f}" for pairs in by_network.values())]
      for share, by_network in pool["pairs_at"].items()
    ]
    lines += [
      "Pairing grows at least as the square of its pairs, K steps as K. From the largest pool, and "
      "with steps of other networks by their FLOPs, pairing reaches these shares of K steps at the "
      "latest with so many pairs:",
      "",
      *markdown_table(["share", *pool["step_seconds"]], shares),
    ]
  return lines


def _input(report: dict) -> list[str]:
  reading, loop = report["input"], report["input"]["loop"]
  rates = reading["images_per_second"].items()
  rows = [[str(threads), format_quartiles(rate, form=",.0f")] for threads, rate in rates]
  return [
    "## Input",
    "",
    f"The steps above take {reading['needed']:,.0f} images/s. The loop of training waits "
    f"{100 * loop['waited'] / loop['seconds']:.2g} % of its time for data and their transfer, "
    "while the devices still do the work that was queued before.",
    "",
    *markdown_table(["threads", "images/s read by a process"], rows),
  ]


def _sampling(report: dict) -> list[str]:
  rows = [
    [str(steps), *(format_quartiles(speed[key], form=".4g") for key in ("drawn", "decoded"))]
    for steps, speed in report["sampling"].items()
  ]
  together = report["config"]["sampled_together"]
  table = markdown_table(["steps", "images/s", "with decoding"], rows)
  return ["## Sampling", "", f"{together} at a time:", "", *table]


def _programs(report: dict) -> list[str]:
  rows = []
  for name, program in report["programs"].items():
    needed = "–" if program["bytes"] is None else f"{program['bytes'] / 1e6:,.0f}"
    rows.append([name, f"{program['compile_seconds']:.1f}", needed])
  lines = ["## Programs", "", *markdown_table(["program", "compile, s", "MB per device"], rows)]
  if report["peak_bytes"]:
    lines += [f"Most memory in use on a device: {report['peak_bytes'] / 1e9:.2f} GB.", ""]
  return lines
