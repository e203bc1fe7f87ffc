"""Tables and figures of several evaluated runs of one dataset.

  python -m ism_jax compare --out=DIR [--against=CONFIG_KEY] [--pools=1,2,4] WORKDIR [WORKDIR ...]

Runs whose configs differ only in the seed are one row. Writes comparison.md, the numbers of all
tables and figures as comparison.json, and

  spectrum.png            power and band energies of the samples over the real images'
  frechet_against_w.png   Fréchet distance against the guidance
  frechet_against_steps.png   the same against the number of steps, each at its best w
  grids.png               samples
  effective_guidance.png  see `diagnosis`; takes the checkpoints and minutes, --guidance=false: none
  against_KEY.png         with --against: rows that differ only in this key of the config
  pools.png               with --pools: what pairing over larger pools gains, without training
"""

import dataclasses
import functools
import json
import os

from absl import flags, logging
import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np
import scipy.optimize

from ism_jax import couplings, data, experiment, model, restore
from ism_jax.evaluation import figures, summary
from ism_jax.evaluation.summary import Run
from ism_jax.metrics import diagnosis
from ism_jax.runtime import commands, files

ARGUMENTS = "WORKDIR [WORKDIR ...], of evaluated runs"
JUMPS = tuple(2.0**-k for k in range(6, 0, -1))  # d = 1/64 ... 1/2
POOLS = 3  # of each size
LARGEST_ASSIGNMENT = 2048  # pairs whose optimum is computed: a minute at most


def effective_guidance(run: Run, w: float, examples: int) -> list[float]:
  """The effective CFG scale of the jumps `JUMPS` of a run's inference EMA at w."""
  config = ml_collections.ConfigDict(run.config)
  trained = restore.read(run.workdir, config=config)
  exp, params = trained.exp, trained.params
  images, labels = data.all_images(data.load_source(exp.data))
  chosen = np.random.default_rng(0).permutation(len(images))[:examples]
  key_noise, key_start = jax.random.split(jax.random.key(0))
  x1 = jnp.asarray(data.to_unit_range(images[chosen]))
  x0 = jax.random.normal(key_noise, x1.shape)
  network = model.at_interval(exp.network(), params, exp.objective.t_interval)
  jumps = model.velocity_function(*network), x0, x1, jnp.asarray(labels[chosen])
  training = {"null_class": exp.null_class, "t_interval": exp.objective.t_interval}
  scales = []
  for d in JUMPS:
    scale, residual = diagnosis.effective_scale(*jumps, key_start, d=d, w=w, **training)
    message = "%s: a jump of %g has effective CFG scale %.2f (residual %.4f)."
    logging.info(message, run.workdir, d, scale, residual)
    if not 1.01 * diagnosis.SCALES[0] < scale < diagnosis.SCALES[1] / 1.01:
      logging.warning(
        "That is an end of the scales that are searched: no guidance matches the jump."
      )
    scales.append(scale)
  return scales


def pool_gain(x0, x1, c, key, cfg: couplings.CouplingConfig, num_classes: int) -> dict:
  """What `couplings.pair` gains on a pool of n noises and images [N, ...] of classes c [N].

  "gain": (mean cost of random pairs - mean cost of the pairs) / D: half of what pairing takes off
  the mean squared distance, per dimension. "optimal_gain": that of SciPy's best assignment under
  the same cost with its class penalty, or None where n is too large. (With a penalty, `gain` can
  exceed it: pairs that cross classes are cheaper.) "attained_gain", "class_shift": see `couplings`.
  """
  pair = jax.jit(couplings.pair, static_argnames=("cfg", "num_classes"))
  paired, info = pair(x0, x1, c, key, cfg=cfg, num_classes=num_classes)
  flat0, flat1, flat_paired = (np.asarray(x).reshape(len(c), -1) for x in (x0, x1, paired))
  dot = couplings.transport_cost(flat1, flat0)
  random = float(jnp.mean(dot))
  per_dimension = lambda cost: (random - float(cost)) / flat0.shape[1]
  optimal = None
  if len(c) <= LARGEST_ASSIGNMENT:
    penalty = cfg.class_penalty * couplings.centred_deviation(dot)
    pairs = scipy.optimize.linear_sum_assignment(dot + couplings.crossing_penalty(c, penalty))
    optimal = per_dimension(np.mean(np.asarray(dot)[pairs]))
  return {
    "gain": per_dimension(-np.mean(np.sum(flat1 * flat_paired, axis=1))),
    "optimal_gain": optimal,
    "attained_gain": float(info["attained_gain"]),
    "class_shift": float(info["class_shift"]),
  }


def pool_gains(config: dict, sizes: list[int]) -> list[dict]:
  """`pool_gain` for each number of batches K, with the config's class penalty and none.

  Means over `POOLS` pools, the first of a training with this config, with noise of their own.
  """
  exp = experiment.parse(ml_collections.ConfigDict(config))
  source, gains = data.load_source(exp.data), []
  drawing = {"batch_size": exp.batch_size, "seed": exp.data.seed, "flip": exp.data.flip}
  for size in sizes:
    stream = data.pools(source, pool_size=size, num_threads=0, **drawing)
    pools, n = [next(stream) for _ in range(POOLS)], size * exp.batch_size
    for penalty in dict.fromkeys((exp.coupling.class_penalty, 0.0)):
      cfg = dataclasses.replace(exp.coupling, coupling="ot", pool_size=size, class_penalty=penalty)
      each = []
      for number, pool in enumerate(pools):
        key_noise, key_pairing = jax.random.split(jax.random.key(number))
        x1, c = pool["x1"].reshape(-1, *exp.image_shape), pool["c"].reshape(-1)
        x0 = jax.random.normal(key_noise, x1.shape)
        each.append(pool_gain(x0, x1, c, key_pairing, cfg, exp.data.num_classes))
      mean = lambda name: None if each[0][name] is None else float(np.mean([e[name] for e in each]))
      means = {name: mean(name) for name in each[0]}
      gains.append({"K": size, "n": n, "class_penalty": penalty} | means)
      logging.info("A pool of %d, class penalty %g: gain %.4f.", n, penalty, means["gain"])
  return gains


def format_spread(values: list, form: str = ".2f") -> str:
  """Mean ± standard deviation, or the one value, or "–" for none."""
  if not values:
    return "–"
  deviation = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
  return f"{np.mean(values):{form}}{deviation}"


def frechet_table(rows: dict[str, list[Run]], w: float | None) -> list[str]:
  """Distance and accuracy: a row a config, a column an NFE.

  Args:
    w: guidance, or None for each row's best at each NFE, which is then shown.
  """
  counts = summary.step_counts([run for runs in rows.values() for run in runs])

  def cell(runs, name, steps, form=".2f"):
    at = summary.best_w(runs, steps) if w is None else w
    values = summary.measured(runs, name, steps, at)
    return format_spread(values, form) + (f" ({at:g})" if w is None and values else "")

  lines = []
  for name, runs in rows.items():
    ema = runs[0].config["ema"]
    decays = dict.fromkeys((ema["inference_decay"], ema["target_decay"]))
    distances = (cell(runs, "distance", n) for n in counts)
    accuracy = cell(runs, "accuracy", 1, ".3f")
    lines.append([name, " / ".join(map(str, decays)), *distances, accuracy])
  header = ["", "EMA decay", *(f"NFE {n}" for n in counts), "accuracy, NFE 1"]
  return files.markdown_table(header, lines)


def coverage_table(rows: dict[str, list[Run]]) -> list[str]:
  """Precision and recall of each row's samples in one step and in the most, at its best w."""
  counts = summary.step_counts([run for runs in rows.values() for run in runs])
  ends = list(dict.fromkeys((counts[0], counts[-1])))
  names = ("precision", "recall")
  header = ["", *(f"{name}, NFE {n}" for n in ends for name in names)]
  cell = lambda runs, name, n: format_spread(
    summary.measured(runs, name, n, summary.best_w(runs, n)), ".3f"
  )
  lines = [
    [row, *(cell(runs, name, n) for n in ends for name in names)] for row, runs in rows.items()
  ]
  return files.markdown_table(header, lines)


def spectrum_table(rows: dict[str, list[Run]], w: float) -> list[str]:
  """High frequencies and wavelet bands of one-step and of the finest samples, over the real."""
  counts = summary.step_counts([run for runs in rows.values() for run in runs])
  header, lines = [""], [[name] for name in rows]
  for n in dict.fromkeys((counts[0], counts[-1])):
    header += [f"finest octave, NFE {n}", f"bands, finest first, NFE {n}"]
    for line, runs in zip(lines, rows.values(), strict=True):
      bands = np.mean(summary.measured(runs, "bands", n, w) or [[]], axis=0)
      line.append(format_spread(summary.measured(runs, "finest_octave", n, w)))
      line.append(", ".join(f"{b:.2f}" for b in bands) or "–")
  return files.markdown_table(header, lines)


def training_table(rows: dict[str, list[Run]], w: float) -> list[str]:
  """How straight the paths are, what the coupling did, and how hard the consistency loss pulls."""
  strengths = dict.fromkeys((0.0, w))
  header = ["", *(f"1000 × deviation from the chord, w = {s:g}" for s in strengths)]
  header += ["attained gain of OT", "class shift", "gradient norm of the consistency loss"]
  header += ["steps/s"]
  means = {"coupling/attained_gain": ".3f", "coupling/class_shift": "z.4f"}
  means |= {"gradient_norm/consistency": ".3f", "steps_per_second": ".1f"}
  lines = []
  for name, runs in rows.items():
    line = [format_spread([1000 * v for v in summary.straightness(runs, s)]) for s in strengths]
    line += [format_spread(summary.trained(runs, n), form) for n, form in means.items()]
    lines.append([name, *line])
  return files.markdown_table(header, lines)


def as_markdown(content: dict, rows: dict[str, list[Run]]) -> str:
  """comparison.md of the contents of comparison.json."""
  w, yardsticks, network = content["w"], content["yardsticks"], content["network"]
  lines = [
    f"# {content['dataset']}",
    "",
    f"{content['distance_is']}, on {network['features']}. Mean ± standard deviation over training "
    f"seeds. All are of {content['num_images']} samples; distances of other numbers do not compare "
    "with them.",
    "",
  ]
  for s in dict.fromkeys((0.0, w)):
    lines += [f"w = {s:g} (CFG {1 + s:g}):", "", *frechet_table(rows, s)]
  lines += ["The best w (in parentheses) of each row and NFE, by the mean over the seeds:", ""]
  lines += frechet_table(rows, None)
  if any("precision" in result for runs in rows.values() for run in runs for result in run.results):
    lines += ["Precision and recall at the best w:", "", *coverage_table(rows)]
  if floor := network["floor"]:
    value = f"{floor['mean']:.3f} ± {floor['sd']:.3f}"
    lines += [f"The floor is the distance of {floor['is']}, {value}.", ""]
  if yardsticks:
    others = lambda score: (
      f" ({count} images)"
      if (count := score.get("num_images", content["num_images"])) != content["num_images"]
      else ""
    )
    distances = (f"{name} {s['distance']:.2f}{others(s)}" for name, s in yardsticks.items())
    lines += [
      f"Yardsticks: {', '.join(distances)}.",
      "",
      "Power of the highest octave of frequencies, and energy of each wavelet band, w = "
      f"{w:g}, over those of the real images:",
      "",
      *spectrum_table(rows, w),
    ]
  lines += [
    "Straightness (mean squared distance of 128-step paths to their chords), and means over the "
    "training; gradient norms are of the weighted loss:",
    "",
    *training_table(rows, w),
  ]
  if scales := content["effective_scale"]:
    lines += [f"Effective CFG scale of a jump at w = {w:g}, a line a seed:", ""]
    each = [[name, *(f"{s:.2f}" for s in run)] for name, runs in scales.items() for run in runs]
    lines += files.markdown_table(["", *(f"d = 1/{1 / d:.0f}" for d in JUMPS)], each)
  if content["pools"]:
    lines += [
      "Pairing of real images with noise, without training. Gain: transport cost of random pairs "
      "less that of the pairs, per pair and dimension (half of what the mean squared distance "
      f"loses); optimal: of an exact assignment under the same class penalty. Means of {POOLS} "
      "pools.",
      "",
    ]
    forms = {"K": "d", "n": "d", "class_penalty": "g"}
    forms |= dict.fromkeys(("gain", "optimal_gain", "attained_gain", "class_shift"), "z.4f")
    lines += files.markdown_table(
      [name.replace("_", " ") for name in forms],
      [
        ["–" if pool[name] is None else format(pool[name], form) for name, form in forms.items()]
        for pool in content["pools"]
      ],
    )
  return "\n".join(lines)


def compare(
  workdirs: list[str], out: str, *, w: float, guidance: bool, examples: int, against, pools
) -> None:
  """Writes the comparison of these runs to the folder `out`; see the flags."""
  reports = {workdir: summary.read_report(workdir) for workdir in workdirs}
  summary.check_comparable(reports)
  runs = [summary.read_run(workdir, report) for workdir, report in reports.items()]
  rows, report = summary.group(runs), reports[workdirs[0]]
  path = functools.partial(os.path.join, out)
  if w not in (evaluated := sorted({r["w"] for run in runs for r in run.results})):
    raise ValueError(f"no run was evaluated at --w={w:g}; there are {evaluated}: give one of them.")
  for size in pools:
    experiment.check_pairs(size, report["config"]["batch_size"])
  files.check_writable(out)
  # Before what takes minutes: it may have nothing to show.
  points = summary.against(runs, against) if against else {}
  content = {
    "dataset": report["config"]["data"]["name"],
    "w": w,
    "num_images": report["config"]["evaluation"]["num_images"],
    "network": report["networks"][0],
    "distance_is": summary.distance_is(report),
    "yardsticks": {
      name: summary.over_real(score, report) for name, score in report["yardsticks"].items()
    },
    "rows": {name: [dataclasses.asdict(run) for run in runs] for name, runs in rows.items()},
    "against": {against: summary.panels(points, against, w)} if against else {},
    "pools": pool_gains(runs[0].config, pools) if pools else [],
    "jumps": JUMPS,
    "effective_scale": {
      name: [effective_guidance(run, w, examples) for run in runs]
      for name, runs in rows.items()
      if guidance and runs[0].config["objective"]["guidance"] != "two_pass"  # which has no jumps
    },
  }
  files.write_whole(path("comparison.json"), json.dumps(content, indent=2))
  files.write_whole(path("comparison.md"), as_markdown(content, rows))
  if report["reference_spectrum"]:
    counts = summary.step_counts(runs)
    few = [n for n in counts if n <= 8] or counts
    spectra = {n: summary.spectra(rows, n, w) for n in dict.fromkeys((few[0], few[-1]))}
    figures.spectra(spectra, rows, w, path("spectrum.png"))
  if by_w := summary.frechet_by_w(rows):
    figures.frechet_against_w(by_w, rows, content["distance_is"], path("frechet_against_w.png"))
  by_steps = summary.frechet_by_steps(rows)
  figures.frechet_against_steps(by_steps, content["distance_is"], path("frechet_against_steps.png"))
  if guidance:
    figures.effective_guidance(content["effective_scale"], JUMPS, w, path("effective_guidance.png"))
  if against:
    panels = content["against"][against]
    figures.against(panels, list(points), against, path(f"against_{against}.png"))
  if pools:
    figures.pools(content["pools"], path("pools.png"))
  grids = {name: figures.find_grids(runs[0].workdir, w) for name, runs in rows.items()}
  figures.grids(grids, path("grids.png"))
  logging.info("Wrote %s.", path("comparison.md"))


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("out", None, "Folder to write to.")
  flags.DEFINE_float("w", 0.5, "The guidance that is compared beside w = 0 and the best.")
  flags.DEFINE_bool("guidance", True, "Whether to measure the jumps' effective guidance.")
  text = "Jumps per size whose guidance is measured."
  flags.DEFINE_integer("examples", 256, text, lower_bound=1, upper_bound=2**20)
  flags.DEFINE_string("against", None, "A key of the config: ema.target_decay, ...")
  flags.DEFINE_list("pools", [], "Pool sizes K whose pairing is measured.")
  flags.register_validator(
    "pools",
    lambda sizes: all(size.isdecimal() and int(size) for size in sizes),
    "needed are numbers of batches, 1 or more, separated by commas: --pools=1,2,4.",
  )
  flags.mark_flags_as_required(["out"])


def main(argv):
  """Compares the runs named on the command line."""
  matplotlib.use("Agg")
  options = {name: flags.FLAGS[name].value for name in ("w", "guidance", "examples", "against")}
  pools = [int(size) for size in flags.FLAGS.pools]
  with commands.one_line_errors():
    if not argv[1:]:
      raise ValueError("no runs to compare: name the workdirs of evaluated runs.")
    compare(argv[1:], flags.FLAGS.out, pools=pools, **options)
