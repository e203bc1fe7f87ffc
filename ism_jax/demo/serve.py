"""Serves a page to try a trained network in a browser.

  python -m ism_jax demo --source=runs/digits [--port=7860] [--host=127.0.0.1]

--source is what `ism_jax.load` takes: the workdir of a run, a folder that `python -m ism_jax
export` wrote, or the name of one on the Hugging Face hub. Needs Gradio (`pip install
"ism_jax[demo]"`). The page is for this machine alone, unless --host=0.0.0.0 opens it to others.
"""

import importlib.util

from absl import flags, logging
import numpy as np

from ism_jax import api
from ism_jax.data import pipeline
from ism_jax.runtime import commands


def sampler(model: api.Model):
  """What the page needs of a network.

  Raises:
    ValueError: Gradio is not installed.
  """
  if importlib.util.find_spec("gradio") is None:
    raise ValueError('the page needs Gradio, which is not installed: pip install "ism_jax[demo]".')
  from ism_jax.demo import page

  exp = model.experiment
  any_w, names = exp.objective.any_w, model.names or pipeline.class_names(exp.data)

  def draw(noise, labels, steps, w):
    n = len(noise)
    enough = 1 << (n - 1).bit_length()  # few sizes, as each compiles
    noise, labels, w = (np.resize(a, (enough, *a.shape[1:])) for a in (noise, labels, w))
    return model.sample(noise=noise, labels=labels, steps=steps, w=w, batch_size=enough)[0][:n]

  return page.Sampler(
    title=f"{exp.model.size} on {exp.data.name}",
    about=f"`{exp.variant}`, the {model.about} ({page.PAPER}).",
    noise=model.noise,
    draw=draw,
    classes=page.class_labels(exp.data.num_classes, names),
    w=exp.sample.w if any_w else exp.objective.fixed_w,
    w_max=exp.objective.w_max if any_w else exp.objective.fixed_w,
  )


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("source", None, "A workdir, an export, or an export's name on the hub.")
  flags.DEFINE_string("host", "127.0.0.1", "Address to serve on; 0.0.0.0 for all of the machine.")
  flags.DEFINE_integer("port", 7860, "Port to serve on.", lower_bound=1, upper_bound=65_535)
  flags.mark_flags_as_required(["source"])


def main(argv):
  """Serves the page until it is interrupted."""
  args = flags.FLAGS
  with commands.one_line_errors():
    model = api.load(args.source)
    network = sampler(model)
    from ism_jax.demo import page

    blocks = page.page(network)
    try:
      _, url, _ = blocks.launch(
        server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True
      )
    except OSError as error:
      raise ValueError(
        f"--host={args.host} --port={args.port} cannot be served ({error}): give another --port."
      ) from error
    logging.info("%s: open %s (Ctrl-C ends it).", model.about, url)
    blocks.block_thread()
