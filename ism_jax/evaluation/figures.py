"""Figures of a comparison, as PNG files, from plain numbers: rows by name, in the same style each.

Colours are Okabe and Ito's, which the colour-blind tell apart; markers and dashes tell more.
"""

import io
import os
import re

from etils import epath
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullFormatter
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ism_jax import paths
from ism_jax.evaluation import summary
from ism_jax.evaluation.summary import Run
from ism_jax.generate import LETTERS, as_png
from ism_jax.runtime import files

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX*"  # one more than colours: none comes with the same colour twice
_DASHES = ("-", "--", ":")
_DPI = 120


def style(number: int) -> dict:
  """Colour, marker and dashes of the line of this number."""
  return {
    "color": _COLOURS[number % len(_COLOURS)],
    "marker": _MARKERS[number % len(_MARKERS)],
    "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    "ms": 5,
  }


def styles(names) -> dict[str, dict]:
  """The style of each row, the same in every figure, with its label."""
  return {name: style(i) | {"label": name.replace("`", "")} for i, name in enumerate(names)}


def _panels(size, rows: int = 1, columns: int = 1, **sharing):
  """A figure of `size` inches, and its axes [rows, columns]."""
  return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **sharing)


def save_figure(fig, path: str) -> None:
  """Writes a figure as PNG, whole or not at all."""
  png = io.BytesIO()
  fig.savefig(png, format="png", dpi=_DPI)
  plt.close(fig)
  files.write_whole(path, png.getvalue())


def _save_with_legend(fig, path: str) -> None:
  """Writes a figure with one legend for all axes, to their right."""
  handles = {}
  for ax in fig.axes:
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  look = {"loc": "outside right upper", "fontsize": 8, "frameon": False, "handlelength": 3.5}
  fig.legend(handles.values(), handles.keys(), **look)
  save_figure(fig, path)


def _log2(axis, ticks=None, labels=None) -> None:
  """A logarithmic axis labelled with plain numbers, at `ticks` or at least four round ones."""
  getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=2)
  low, high = axis.get_view_interval()
  if ticks is None:
    if high < 10 * low:  # too few powers to read from
      ticks = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    else:
      decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high))
      sparse = 1 + len(decades) // 8
      ticks = np.outer(decades[::sparse], (1, 2, 5) if len(decades) < 4 else (1,)).ravel()
    ticks = [t for t in ticks if low <= t <= high]
  axis.set_ticks(ticks, labels or [f"{tick:.3g}" for tick in ticks])
  axis.set_minor_formatter(NullFormatter())


def effective_guidance(scales: dict[str, list[list[float]]], jumps, w: float, path: str) -> None:
  """Effective guidance {row: [run][jump]} against the jump, a line a run."""
  fig, ((ax,),) = _panels((7, 4))
  for name, look in styles(scales).items():
    for i, run in enumerate(scales[name]):
      ax.plot(jumps, run, **(look | {"label": None} if i else look))
  levels = np.log2(np.array(jumps) * paths.FINEST)
  ax.plot(jumps, (1 + w) ** levels, "k:", lw=1, label=f"{1 + w:g}^level")
  ax.axhline(1 + w, color="k", lw=0.5, label=f"asked for: {1 + w:g}")
  _log2(ax.yaxis)
  _log2(ax.xaxis, jumps, [f"1/{1 / d:.0f}" for d in jumps])
  ax.set(xlabel="jump d", ylabel="effective CFG scale")
  _save_with_legend(fig, path)


def spectra(by_steps: dict[int, dict], names, w: float, path: str) -> None:
  """Power and band energies over the real images', {NFE: summary.spectra(..)}: a column an NFE.

  Ratios above 4 or below 1/8 leave the panels.
  """
  fig, axes = _panels((3.6 * len(by_steps) + 2, 7), 2, len(by_steps), sharey="row")
  looks = styles(names)
  for column, (steps, ratios) in zip(axes.T, by_steps.items(), strict=True):
    for ax, lines in zip(column, (ratios["spectrum"], ratios["bands"]), strict=True):
      for name, ratio in lines.items():
        ax.plot(np.arange(1, len(ratio) + 1), ratio, **looks[name])
      ax.axhline(1, color="k", lw=0.5)
      ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    column[0].set(title=f"NFE {steps}, w = {w:g}", xlabel="cycles per image")
    column[1].set(xlabel="wavelet level (1 is the finest)")
  for ax, what in zip(axes[:, 0], ("power", "energy"), strict=True):
    ax.set_yscale("log", base=2)
    low, high = ax.get_ylim()
    ax.set(ylim=(max(low, 1 / 8), min(high, 4)), ylabel=f"{what}, samples / real")
    _log2(ax.yaxis)
  _save_with_legend(fig, path)


def sweep(run: Run, path: str) -> None:
  """The distance of an evaluated run, means over the seeds: against the steps and against w.

  The best w of each number of steps has a ring.
  """
  counts, strengths = summary.step_counts([run]), summary.guidances([run])
  means = {
    (steps, w): values[0]
    for steps in counts
    for w in strengths
    if (values := summary.measured([run], "distance", steps, w))
  }
  best = [(n, summary.best_w([run], n)) for n in counts]
  ring = {"ls": "", "marker": "o", "ms": 12, "mfc": "none", "mec": "black"}
  fig, (axes,) = _panels((11, 4), columns=2, sharey=True)
  by_w = {f"w = {w:g}": [(n, (n, w)) for n in counts] for w in strengths}
  by_steps = {f"NFE {n}": [(w, (n, w)) for w in strengths] for n in counts}
  for ax, lines, rings in zip(axes, (by_w, by_steps), zip(*best, strict=True), strict=True):
    for number, (label, points) in enumerate(lines.items()):
      at, values = zip(*[(x, means[key]) for x, key in points if key in means], strict=True)
      ax.plot(at, values, label=label, **style(number))
    ax.plot(rings, [means[key] for key in best], **ring)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
  _log2(axes[0].xaxis, counts)
  axes[0].set(xlabel="NFE", ylabel=run.distance_is)
  axes[1].set(xlabel="w (rings: the best w of each NFE)")
  _log2(axes[0].yaxis)
  save_figure(fig, path)


def frechet_against_w(by_steps: dict[int, dict], names, distance_is: str, path: str) -> None:
  """`summary.frechet_by_w` against w: a panel an NFE, means and the range of the seeds."""
  fig, (axes,) = _panels((2.4 * len(by_steps) + 2, 4), columns=len(by_steps), sharey=True)
  looks = styles(names)
  for ax, (steps, rows) in zip(axes, by_steps.items(), strict=True):
    for name, by_w in rows.items():
      mean, low, high = ([f(v) for v in by_w.values()] for f in (np.mean, min, max))
      ax.plot(list(by_w), mean, **looks[name])
      ax.fill_between(list(by_w), low, high, color=looks[name]["color"], alpha=0.2, lw=0)
    ax.set(title=f"NFE {steps}", xlabel="w")
  _log2(axes[0].yaxis)
  axes[0].set_ylabel(distance_is)
  _save_with_legend(fig, path)


def frechet_against_steps(rows: dict[str, dict], distance_is: str, path: str) -> None:
  """`summary.frechet_by_steps` against the number of steps: means and the range of the seeds."""
  fig, ((ax,),) = _panels((7, 4))
  for name, look in styles(rows).items():
    mean, low, high = ([f(v) for v in rows[name].values()] for f in (np.mean, min, max))
    ax.plot(list(rows[name]), mean, **look)
    ax.fill_between(list(rows[name]), low, high, color=look["color"], alpha=0.2, lw=0)
  counts = sorted({steps for by_steps in rows.values() for steps in by_steps})
  _log2(ax.xaxis, counts, list(map(str, counts)))
  _log2(ax.yaxis)
  ax.set(xlabel="NFE, each at its best w", ylabel=distance_is)
  _save_with_legend(fig, path)


def against(panels: dict[str, dict], labels, key: str, path: str) -> None:
  """`summary.panels`: points, a line through their means, the values of `key` evenly spaced.

  Panels whose values are positive and far apart have a logarithmic axis.
  """
  columns = 2 if len(panels) == 4 else min(3, len(panels))
  rows = -(-len(panels) // columns)
  fig, _ = _panels((4.2 * columns, 3.2 * rows), rows, columns)
  ticks = [label.replace("independent", "inde-\npendent") for label in labels]
  for ax, (title, lines) in zip(fig.axes, panels.items(), strict=False):
    shown = []
    for number, (name, points) in enumerate(lines.items()):
      look, colour = style(number), style(number)["color"]
      for label, values in points.items():
        x = [labels.index(label)] * len(values)
        ax.plot(x, values, look["marker"], color=colour, ms=4, alpha=0.6)
        shown += values
      means = {label: np.mean(values) for label, values in points.items()}
      independent = means.pop("independent", None)
      ax.plot(list(map(labels.index, means)), means.values(), color=colour, label=name or None)
      if independent is not None:
        ax.axhline(independent, color=colour, lw=0.8, linestyle="--")
    if min(shown) > 0 and max(shown) > 4 * min(shown):
      _log2(ax.yaxis)
    ax.set_xticks(range(len(labels)), ticks, fontsize=7)
    ax.set_xlim(-0.4, len(labels) - 0.6)
    ax.set_title(title, fontsize=10)
    if any(lines):
      ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
  for ax in fig.axes[len(panels) :]:
    ax.set_visible(False)
  fig.supxlabel(key)
  save_figure(fig, path)


def neighbours(samples, nearest: dict[str, tuple], enlarge: int, path: str) -> None:
  """A row of samples uint8 [N, H, W, C]; below them their nearest images, with the distances.

  Args:
    nearest: {space: (distances [N, k], uint8 [N, k, H, W, C])}, see `reference.neighbours`.
    enlarge: pixels of the picture per image pixel; small images have more, to leave room for text.
  """
  rows = [("samples", samples, None)]
  for space, (distances, images) in nearest.items():
    for i in range(distances.shape[1]):
      rows.append((f"{i + 1} in {space}", images[:, i], distances[:, i]))
  height, width = samples.shape[1:3]
  enlarge = max(enlarge, -(-5 * LETTERS // width))
  font = ImageFont.load_default(LETTERS)
  margin = LETTERS + max(round(font.getlength(name)) for name, _, _ in rows)
  across, down = width * enlarge + LETTERS // 2, height * enlarge + 2 * LETTERS
  paper = Image.new("RGB", (margin + across * len(samples), down * len(rows)), "white")
  draw = ImageDraw.Draw(paper)
  for y, (name, images, distances) in enumerate(rows):
    draw.text((0, y * down + down // 2 - LETTERS), name, "black", font, anchor="lm")
    for x, image in enumerate(images):
      tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
      tile = tile.resize((width * enlarge, height * enlarge), Image.Resampling.NEAREST)
      paper.paste(tile, (margin + x * across, y * down))
      if distances is not None:
        place = margin + x * across, y * down + height * enlarge
        draw.text(place, f"{distances[x]:.3g}", "black", font)
  files.write_whole(path, as_png(paper))


def pools(gains: list[dict], path: str) -> None:
  """`compare.pool_gains` against the pool's size n: a line a class penalty."""
  titles = {
    "gain": "less transport cost than random pairs",
    "attained_gain": "attained gain (of the dual bound)",
    "class_shift": "class shift",
  }
  fig, (axes,) = _panels((11, 3.4), columns=len(titles))
  for number, penalty in enumerate(dict.fromkeys(gain["class_penalty"] for gain in gains)):
    line = [gain for gain in gains if gain["class_penalty"] == penalty]
    n, look, label = [gain["n"] for gain in line], style(number), f"class penalty {penalty:g}"
    for ax, name in zip(axes, titles, strict=True):
      ax.plot(n, [gain[name] for gain in line], **look, label=label)
    optimal = np.array([gain["optimal_gain"] for gain in line], float)  # None is NaN: not drawn
    axes[0].plot(n, optimal, color=look["color"], linestyle="--", lw=1, label=f"{label}, optimal")
  sizes = sorted({gain["n"] for gain in gains})
  for ax, title in zip(axes, titles.values(), strict=True):
    _log2(ax.xaxis, sizes, [str(n) for n in sizes])
    ax.set_xlabel("pool size n = K M")
    ax.set_title(title, fontsize=10)
  axes[0].set_ylabel("per pair and dimension")
  _save_with_legend(fig, path)


def technique_costs(techniques: dict, path: str) -> None:
  """`benchmark`'s steps, from flow matching to iSM's, and by their forward passes."""
  fig, ((ax,),) = _panels((7, 3.2))
  measured = techniques["over_flow_matching"]
  places = np.arange(len(measured))
  medians = np.array([speed["median"] for speed in measured.values()])
  errors = np.abs(np.array([speed["quartiles"] for speed in measured.values()]).T - medians)
  passes = np.array([techniques["forward_passes"][name] for name in measured])
  ax.barh(places, medians, xerr=errors, color=_COLOURS[0], height=0.6, label="measured")
  ax.plot(passes / passes[0], places, "D", color=_COLOURS[1], label="by its forward passes")
  ax.set_yticks(places, measured)
  ax.invert_yaxis()
  ax.set_xlabel("time of a step over that of flow matching (quartiles)")
  _save_with_legend(fig, path)


def pairing_shares(report: dict, path: str) -> None:
  """What pairing takes over the pool's K steps, against its pairs: a line a size of the network.

  Measured, and dashed onward to four times the largest pool by the square of the pairs, which is
  the least that pairing grows.
  """
  fig, ((ax,),) = _panels((7, 3.6))
  by_size, rows = report["pool"]["by_size"], report["config"]["batch_size"]
  sizes = np.array(sorted(by_size))
  pairing = np.array([by_size[k]["median"] for k in sizes])
  larger = sizes[-1] * np.array([1, 2, 4])
  for number, (name, seconds) in enumerate(report["pool"]["step_seconds"].items()):
    label = name if name == report["config"]["model"] else f"{name}, by its FLOPs"
    shares = 100 * pairing / sizes / seconds
    ax.plot(sizes, shares, **style(number), label=label)
    ax.plot(larger, shares[-1] * larger / sizes[-1], "--", color=style(number)["color"])
  for share in report["pool"]["pairs_at"]:
    ax.axhline(100 * share, color="0.8", zorder=0)
  ticks = [*sizes, *larger[1:]]
  _log2(ax.xaxis, ticks, [f"{k}\n{k * rows:,}" for k in ticks])
  ax.tick_params(axis="x", labelsize="x-small")
  _log2(ax.yaxis)
  ax.set(xlabel="batches in a pool, K, and pairs", ylabel="pairing, % of the pool's steps")
  _save_with_legend(fig, path)


def find_grids(workdir: str, w: float) -> dict[int, str]:
  """{NFE: file} of the sample grids that evaluations at w left in a workdir."""
  pattern = re.compile(rf"samples_steps(\d+)_w{re.escape(f'{w:g}')}\.png")
  matches = filter(None, map(pattern.fullmatch, os.listdir(workdir)))
  return {int(match[1]): os.path.join(workdir, match[0]) for match in matches}


def grids(rows: dict[str, dict[int, str]], path: str) -> None:
  """Sample grids side by side, from {row: {NFE: file}}: a row a variant or a w, a column an NFE.

  They are shrunk by whole numbers, so that enlarged pixels stay sharp.
  """
  pictures = {
    (name, nfe): _shrunk(file) for name, files_of in rows.items() for nfe, file in files_of.items()
  }
  if not pictures:
    return
  nfes = sorted({nfe for _, nfe in pictures})
  labels = [name.replace("`", "").replace(", ", "\n") for name in rows]
  height, width = np.max([picture.shape[:2] for picture in pictures.values()], axis=0) + 8
  left, top = 36 * (1 + max(label.count("\n") for label in labels)), 40
  centred = {"ha": "center", "va": "center", "multialignment": "center", "fontsize": 16}
  size = np.array([left + width * len(nfes), top + height * len(rows)])
  fig = plt.figure(figsize=size / _DPI, dpi=_DPI)
  for x, nfe in enumerate(nfes):
    at = (left + (x + 0.5) * width) / size[0], 1 - top / 2 / size[1]
    fig.text(*at, f"NFE {nfe}", **centred)
  for y, (name, label) in enumerate(zip(rows, labels, strict=True)):
    at = left / 2 / size[0], 1 - (top + (y + 0.5) * height) / size[1]
    fig.text(*at, label, rotation="vertical", **centred)
    for x, nfe in enumerate(nfes):
      if (name, nfe) in pictures:
        fig.figimage(pictures[name, nfe], left + x * width, height * (len(rows) - 1 - y) + 8)
  save_figure(fig, path)


def _shrunk(file: str) -> np.ndarray:
  """The picture [H, W, 3] in a file, at a width of about 360 pixels if it is larger."""
  with Image.open(io.BytesIO(epath.Path(file).read_bytes())) as image:
    return np.asarray(image.convert("RGB").reduce(max(1, round(image.width / 360))))
