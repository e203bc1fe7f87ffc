"""A page to try a network in a browser, with Gradio: steps, guidance, class, seed, interpolation.

`python -m ism_jax demo` serves it for a workdir, an export or a name of the hub. As `app.py` in the
folder of an export it is a Space of the Hugging Face hub: the file imports nothing of this package,
and runs on PyTorch with `ism_pytorch.py` beside it.

Axes: N images, H/W size, C channels.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
import zipfile

import gradio
import numpy as np
from PIL import Image

PAPER = "[arXiv:2510.21250](https://arxiv.org/abs/2510.21250)"
STEPS = tuple(2**k for k in range(8))
MOST = 64  # images at a time
FRAMES = 9  # of an interpolation
_LEAST_SIDE = 112  # of an image on the page, in screen pixels
_GAP = 4
_SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Sampler:
  """What the page needs of a network.

  Attributes:
    title, about: Markdown above the page.
    noise: (count, seed) -> float32 [N, ...], standard normal.
    draw: (noise [N, ...], labels int [N], steps, w float [N]) -> uint8 [N, H, W, C]. Raises
      ValueError for what the network cannot sample, with words for the user.
    classes: a name each; the number after the last is no class.
    w: the guidance to begin with.
    w_max: the largest it was trained at; `w` itself where guidance is fixed.
  """

  title: str
  about: str
  noise: Callable
  draw: Callable
  classes: tuple[str, ...]
  w: float
  w_max: float


def page(sampler: Sampler) -> gradio.Blocks:
  """The page, to be launched."""
  fixed = sampler.w_max == sampler.w
  kinds = ["each class in turn", *sampler.classes, "no class"]
  # Compiles, so that what is timed afterwards is sampling.
  warm = functools.cache(lambda count, steps: _drawn(sampler, _noise(sampler, count, 0), 0, steps))
  controls = {
    "steps": lambda: gradio.Dropdown(
      [str(n) for n in STEPS],
      value="4",
      label="steps",
      info='or step lengths: "1/2,1/4,1/4"',
      allow_custom_value=True,
    ),
    "w": lambda: gradio.Slider(
      0,
      max(sampler.w_max, 0.1),
      value=sampler.w,
      step=0.05,
      label="w",
      info="fixed in training: only 128 steps take another" if fixed else "guidance: CFG 1 + w",
    ),
    "kind": lambda first=1: gradio.Dropdown(kinds[first:], value=kinds[first], label="class"),
    "seed": lambda label="seed", value=0: gradio.Number(value, label=label, precision=0),
  }
  with gradio.Blocks(
    title=sampler.title, analytics_enabled=False, delete_cache=(3600, 3600)
  ) as blocks:
    gradio.Markdown(f"# {sampler.title}\n\n{sampler.about}")
    with gradio.Tab("Samples"):
      with gradio.Row():
        inputs = [
          controls["steps"](),
          controls["w"](),
          controls["kind"](0),
          controls["seed"](),
          gradio.Slider(1, MOST, value=16, step=1, label="images"),
          gradio.Textbox("", label="w of each image", placeholder="0, 0.5, 1, 2: as many images"),
        ]
      image, said, save = (
        _picture("samples"),
        gradio.Markdown(),
        gradio.DownloadButton("PNGs, zipped"),
      )
      _connect(blocks.load, functools.partial(_samples, sampler), inputs, [image, said, save])
    with gradio.Tab("Between two noises") as between:
      with gradio.Row():
        inputs = [
          controls["steps"](),
          controls["w"](),
          controls["kind"](),
          controls["seed"]("first seed"),
          controls["seed"]("second seed", 1),
        ]
      row = _picture("interpolation")
      _connect(between.select, functools.partial(_interpolation, sampler), inputs, [row])
    with gradio.Tab("One step beside 128"):
      with gradio.Row():
        inputs = [controls["w"](), controls["kind"](), controls["seed"]()]
      with gradio.Row():
        outputs = [_picture("one step"), _picture("128 steps")]
      said = gradio.Markdown()
      both = functools.partial(_one_beside_many, sampler, warm)
      gradio.Button("Draw both").click(_told(both), inputs, [*outputs, said])
  return blocks


def _picture(label: str) -> gradio.Image:
  return gradio.Image(label=label, format="png", buttons=["download", "fullscreen"])


def _connect(opens, function, inputs, outputs) -> None:
  """Draws when the page or its tab opens, and whenever an input changes, the newest change last."""
  gradio.on(
    [opens, *(one.change for one in inputs)],
    _told(function),
    inputs,
    outputs,
    trigger_mode="always_last",
  )


def _told(function):
  """Shows the user why something cannot be drawn."""

  @functools.wraps(function)
  def call(*arguments):
    try:
      return function(*arguments)
    except (ValueError, FloatingPointError) as error:
      raise gradio.Error(str(error), print_exception=False) from None

  return call


def _noise(sampler, count: int, seed) -> np.ndarray:
  if seed is None or not 0 <= int(seed) < _SEEDS:
    raise ValueError(f"The seed is {seed}; give a whole number from 0 to {_SEEDS - 1}.")
  return sampler.noise(count, int(seed))


def _drawn(sampler, noise, labels, steps, w=None) -> np.ndarray:
  n = len(noise)
  labels = np.broadcast_to(labels, (n,)).astype(np.int64)
  w = np.broadcast_to(sampler.w if w is None else w, (n,)).astype(np.float32)
  return sampler.draw(noise, labels, str(steps), w)


def _label(sampler, kind: str, count: int = 1) -> np.ndarray:
  if kind == "each class in turn":
    return np.arange(count) % len(sampler.classes)
  return np.full(count, [*sampler.classes, "no class"].index(kind))


def _strengths(text: str) -> list[float]:
  try:
    return [float(part) for part in text.split(",")]
  except ValueError:
    raise ValueError(f"w of each image is {text!r}; give numbers: 0, 0.5, 1.") from None


def _samples(sampler, steps, w, kind, seed, count, each):
  """(grid, sentence, path of a zip of PNGs)."""
  strengths = _strengths(each) if each.strip() else [w] * int(count)
  if not 1 <= len(strengths) <= MOST:
    raise ValueError(f"{len(strengths)} images; the page draws 1 to {MOST}.")
  labels = _label(sampler, kind, len(strengths))
  images = _drawn(sampler, _noise(sampler, len(strengths), seed), labels, steps, strengths)
  names = [*sampler.classes, "no class"]
  archive = _new_archive()
  with zipfile.ZipFile(archive, "w") as file:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
      with file.open(f"{i:03}_{names[label].replace('/', '_')}.png", "w") as png:
        _pil(image).save(png, "png")
  about = f"{len(images)} images, classes {_in_words(names[k] for k in labels)}"
  return _grid(images, math.ceil(math.sqrt(len(images)))), f"{about}.", str(archive)


def _new_archive() -> pathlib.Path:
  """A file in a folder of its own; Gradio has copied those of a minute ago."""
  folder = pathlib.Path(tempfile.gettempdir(), f"page_{os.getpid()}")
  folder.mkdir(exist_ok=True)
  for old in folder.iterdir():
    if time.time() - old.stat().st_mtime > 60:
      shutil.rmtree(old, ignore_errors=True)
  return pathlib.Path(tempfile.mkdtemp(dir=folder), "samples.zip")


def _in_words(names) -> str:
  """a, b, c, ... of names, each once."""
  names = list(dict.fromkeys(names))
  return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _interpolation(sampler, steps, w, kind, seed, other) -> Image.Image:
  """From one noise to the other on a great circle: each noise between is standard normal too."""
  first, second = _noise(sampler, 1, seed), _noise(sampler, 1, other)
  angle = np.linspace(0, np.pi / 2, FRAMES).reshape(-1, *[1] * (first.ndim - 1))
  noise = (np.cos(angle) * first + np.sin(angle) * second).astype(np.float32)
  return _grid(_drawn(sampler, noise, _label(sampler, kind), steps, w), FRAMES)


def _one_beside_many(sampler, warm, w, kind, seed):
  """(image of one step, of 128, sentence with times)."""
  noise, pictures, times = _noise(sampler, 1, seed), [], []
  for steps in (1, 128):
    warm(1, steps)
    start = time.perf_counter()
    pictures.append(_grid(_drawn(sampler, noise, _label(sampler, kind), steps, w), 1, 3))
    times.append(1_000 * (time.perf_counter() - start))
  ratio = times[1] / times[0]
  return *pictures, f"{times[0]:.0f} ms and {times[1]:.0f} ms, {ratio:.0f} times as long."


def _pil(image: np.ndarray) -> Image.Image:
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _grid(images: np.ndarray, columns: int, scale: int = 1) -> Image.Image:
  """Images uint8 [N, H, W, C] in rows, small ones enlarged by whole pixels."""
  larger = max(1, scale * _LEAST_SIDE // max(images.shape[1:3]))
  height, width = (larger * side + _GAP for side in images.shape[1:3])
  rows = math.ceil(len(images) / columns)
  grid = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
  for i, image in enumerate(images):
    one = _pil(image).convert("RGB").resize((width - _GAP, height - _GAP), Image.Resampling.NEAREST)
    grid.paste(one, (i % columns * width, i // columns * height))
  return grid


def class_labels(count: int, names=None) -> tuple[str, ...]:
  """A text for each class, by its number and the names, if it has them: "tench (0)"."""
  if not names:
    return tuple(map(str, range(count)))
  return tuple(f"{name.partition(',')[0]} ({i})" for i, name in enumerate(names))


def of_export(folder) -> Sampler:
  """The network of an export, in PyTorch: what a Space runs."""
  import ism_pytorch
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = ism_pytorch.load(folder, device)
  config = model.config
  settings = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
  names = settings.get("id2label")

  def draw(noise, labels, steps, w):
    x0 = torch.as_tensor(noise, device=device)
    x1 = ism_pytorch.sample(model, x0, torch.as_tensor(labels), torch.as_tensor(w), steps)
    return ism_pytorch.to_pixels(model, x1).cpu().numpy()

  any_w = config.guided or config.two_pass
  return Sampler(
    title="Few-step samples",
    about=f"A network trained with ism_jax ({PAPER}), in PyTorch.",
    noise=lambda count, seed: ism_pytorch.draw_noise(model, count, seed).cpu().numpy(),
    draw=draw,
    classes=class_labels(config.num_classes, names and [names[str(i)] for i in range(len(names))]),
    w=min(0.5, config.w_max) if any_w else config.fixed_w,
    w_max=config.w_max if any_w else config.fixed_w,
  )


if __name__ == "__main__":
  page(of_export(pathlib.Path(__file__).parent)).launch()
