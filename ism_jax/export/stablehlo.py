"""Exports the sampler of a checkpoint as StableHLO, which samples without this package.

  python -m ism_jax stablehlo --workdir=W --out=DIR [--steps=1 --steps=1/2,1/4,1/4 ...]
      [--tree=ema|target_ema|params|ema:DECAY] [--step=N]

DIR is written whole or not at all, and replaces nothing:

  sampler_STEPS.stablehlo   one for each schedule: sample(parameters, x0, c, w) -> x1
  parameters.npz            beside the programs, not in them: one file for all schedules
  decoder.stablehlo, .npz   of latents: decode(parameters, x1) -> images
  sampler.json              shapes and settings
  README.md                 the few lines of Python that run it

The programs take any batch size, and run on CPUs, TPUs and NVIDIA GPUs, with JAX, NumPy and
flatbuffers. JAX promises to read them for six months after the version that wrote them.
"""

import functools
import json

from absl import flags, logging
from flax import traverse_util
import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from ism_jax import experiment, generate, paths, restore
from ism_jax.experiment import Experiment
from ism_jax.export import pytorch as export_lib
from ism_jax.pretrained import vae as vae_lib
from ism_jax.runtime import commands, files

PLATFORMS = ("cpu", "tpu", "cuda")
DETAILS = "sampler.json"
_PARAMETERS, _DECODER = "parameters.npz", "decoder"


def write(exp: Experiment, params, out: str, schedules, *, about: str) -> None:
  """Writes the folder of a sampler.

  Args:
    params: those that sample.
    out: a folder that is empty or not there.
    schedules: one or more counts or schedules, each as `paths.parse_schedule` takes it.
    about: which parameters these are, for the reader.
  Raises:
    ValueError: the network cannot sample a schedule, or there is none.
    OSError: `out` is not empty or cannot be written.
  """
  names = {}
  for steps in (schedules,) if isinstance(schedules, (str, int)) else schedules:
    names.setdefault(paths.parse_schedule(steps), str(steps).replace(" ", ""))
  if not names:
    raise ValueError("there are no schedules: name numbers of steps, such as (1, 4).")
  for schedule in names:
    experiment.check_guidance(exp, schedule, exp.sample.w)
  (b,) = export.symbolic_shape("b")
  of_batch = lambda shape, dtype: jax.ShapeDtypeStruct((b, *shape), dtype)
  x1 = of_batch(exp.image_shape, jnp.float32)
  inputs = (x1, of_batch((), jnp.int32), of_batch((), jnp.float32))
  programs = {}
  with files.whole_folder(out) as folder:
    flat = _flat(params)
    for schedule, name in names.items():
      sample = generate.sampler(exp, schedule)
      programs[name] = f"sampler_{name.replace('/', '_').replace(',', '-')}.stablehlo"
      of_flat = lambda flat, *rest: sample(_nested(flat), *rest)
      _write_program(folder / programs[name], of_flat, flat, *inputs)
    np.savez(folder / _PARAMETERS, **flat)
    if exp.data.vae:
      vae = generate.autoencoder(exp.data)
      flat = _flat(vae.params)
      # One by one: a large image takes about 0.3 GB while it is decoded.
      one = lambda flat, z: vae_lib.decode(vae.cfg, _nested(flat), z[None])[0]
      to_uint8 = functools.partial(generate.to_uint8, rounding=exp.evaluation.rounding)
      decode = lambda flat, x1: jax.lax.map(lambda z: to_uint8(one(flat, z)), x1)
      _write_program(folder / f"{_DECODER}.stablehlo", decode, flat, x1)
      np.savez(folder / f"{_DECODER}.npz", **flat)
    details = {
      "about": about,
      "variant": exp.variant,
      "programs": programs,
      "platforms": PLATFORMS,
      "x0": ["b", *exp.image_shape],
      "classes": exp.data.num_classes,
      "null_class": exp.null_class,
      "w_max": exp.objective.w_max if exp.objective.any_w else exp.objective.fixed_w,
      "vae": export_lib.public_vae(exp.data.vae),
      "jax": jax.__version__,
    }
    (folder / DETAILS).write_text(json.dumps(details, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(exp, programs, about), encoding="utf-8")


def _write_program(path, function, *arguments):
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
  exported = export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
  path.write_bytes(exported.serialize())


def _flat(params) -> dict[str, np.ndarray]:
  return {k: np.asarray(a) for k, a in traverse_util.flatten_dict(params, sep="/").items()}


_nested = functools.partial(traverse_util.unflatten_dict, sep="/")


def _readme(exp: Experiment, programs: dict[str, str], about: str) -> str:
  program = next(iter(programs.values()))
  listing = ", ".join(f"`{file}` (steps={name})" for name, file in programs.items())
  w = exp.sample.w
  guided = (
    f"`w` is the guidance, 0 to {exp.objective.w_max:g}, for each image (a CFG scale of 1 + w)"
    if exp.objective.any_w
    else f"the guidance is the fixed one of training, w = {exp.objective.fixed_w:g}, and only 128 "
    "steps take any other"
  )
  if exp.data.vae:
    images = f"""\
decode = export.deserialize(bytearray(pathlib.Path("{_DECODER}.stablehlo").read_bytes()))
images = np.asarray(decode.call(dict(np.load("{_DECODER}.npz")), x1))
"""
  else:
    rounding = {"nearest": "round", "truncate": "floor"}[exp.evaluation.rounding]
    images = f"images = np.uint8(np.clip(np.{rounding}(127.5 * (np.asarray(x1) + 1)), 0, 255))\n"
  return f"""\
# Few-step sampler, as StableHLO

{exp.model.size} on {exp.data.name}, {exp.variant}: {about}. Written by ism_jax, and run without it.
With `pip install jax=={jax.__version__} flatbuffers` (later versions of JAX read these programs for
six months), in this folder:

```python
import pathlib

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

sample = export.deserialize(bytearray(pathlib.Path("{program}").read_bytes()))
parameters = dict(np.load("{_PARAMETERS}"))

n, seed = 8, 0
# As ism_jax draws noise: image i depends only on the seed and on i. Any normal numbers will do.
draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), {exp.image_shape})
x0 = jax.vmap(draw)(jnp.arange(n))
c = jnp.arange(n) % {exp.data.num_classes}  # classes
w = jnp.full(n, {w:g}, jnp.float32)  # guidance
x1 = sample.call(parameters, x0, c, w)
{images}```

`images` are uint8 `[n, H, W, C]`; {guided}.
There is a program for each schedule: {listing}.
They run on {", ".join(PLATFORMS)} with any batch size, and `jax.jit` takes them.
"""


def define_flags() -> None:
  """Defines the flags of the command."""
  export_lib.define_common_flags()
  flags.DEFINE_multi_string("steps", ["1", "4"], "A schedule; may be given several times.")


def main(argv):
  """Exports; see the module's docstring."""
  args = flags.FLAGS
  with commands.one_line_errors():
    files.check_empty(args.out)
    trained = restore.read(args.workdir, args.tree, step=args.step)
    generate.check_decoder(trained)
    write(trained.exp, trained.params, args.out, args.steps, about=trained.about)
    logging.info("Wrote the sampler of the %s to %s.", trained.about, args.out)
