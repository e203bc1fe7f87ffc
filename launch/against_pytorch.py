"""Times the network in JAX against PyTorch in eager mode on this CPU, in turn, in one run.

  python launch/against_pytorch.py [--size=SiT-S/2] [--rows=8] [--repeats=7] [--sit=MODELS_PY]
      [--steps=8] [--devices=CORES] [--unroll=1] [--remat=dots|none|full]

Training is the forward and backward passes of a mean squared error on --steps batches, one after
another: in JAX one program, as `scan_steps` of a config are. Sampling is one step of one batch.
Both in float32, with all cores of this process, on latents 32x32x4. JAX splits a batch over
--devices, which share the cores' threads and keep them busier than one device does: by default
the most that divide --rows, up to one for each core. PyTorch runs
ism_jax/export/ism_pytorch.py, or the official SiT code where --sit names its models.py
(github.com/willisma/SiT; it needs timm).
"""

import functools
import importlib.util
import os
import sys

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import torch

from configs import imagenet256
from ism_jax import experiment, generate, model, paths
from ism_jax.export import ism_pytorch
from ism_jax.performance import timing
from ism_jax.performance.timing import format_quartiles, quartiles
from ism_jax.pretrained import sit
from ism_jax.runtime import commands, files, sharding
from ism_jax.runtime.sharding import AXIS, P


def define_flags() -> None:
  """Defines the flags of the command."""
  positive = functools.partial(flags.DEFINE_integer, lower_bound=1)
  flags.DEFINE_string("sit", None, "models.py of the official SiT code.")
  flags.DEFINE_string("size", "SiT-S/2", "Of the network.")
  positive("rows", 8, "Images at a time.")
  positive("repeats", 7, "Rounds.")
  positive("steps", 8, "Training steps at a time.")
  positive("devices", None, "Of JAX; default: the most that divide --rows, up to one a core.")
  positive("unroll", 1, "model.unroll of JAX.")
  flags.DEFINE_enum("remat", "dots", model.REMATS, "model.remat of JAX.")
  flags.register_validator(
    "sit", lambda path: path is None or os.path.isfile(path), "There is no such file."
  )
  flags.register_multi_flags_validator(
    ["rows", "devices"],
    lambda values: values["rows"] % (values["devices"] or 1) == 0,
    "--rows cannot be split evenly over --devices.",
  )


def most_devices(rows: int, cores: int) -> int:
  """The most devices, one for a core, over which rows can be split."""
  return max(n for n in range(1, cores + 1) if rows % n == 0)


def batch(exp, rows: int, seed: int) -> dict[str, np.ndarray]:
  """Inputs of the network and a target, float32; images [B, H, W, C]."""
  rng = np.random.default_rng(seed)
  normal = lambda: rng.standard_normal((rows, *exp.image_shape), np.float32)
  return {
    "x": normal(),
    "t": rng.random(rows, np.float32),
    "c": rng.integers(exp.data.num_classes, size=rows),
    "d": np.full(rows, 0.25, np.float32),
    "w": np.full(rows, 0.5, np.float32),
    "target": normal(),
  }


def in_jax(exp, params, batches: list[dict], mesh):
  """(training, sampling): calls that return (loss, gradient) and images [B, H, W, C].

  Training takes a step on each batch, and returns those of the last; sampling takes the first.
  Batches are split over the mesh by rows.
  """
  network = exp.network()

  def loss(params, x, t, c, d, w, target):
    return jnp.mean((network.apply({"params": params}, x, t, c, d, w) - target) ** 2)

  def on_device(params, batches):
    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    varying = jax.tree.map(lambda p: jax.lax.pcast(p, AXIS, to="varying"), params)
    mean = lambda tree: jax.lax.pmean(tree, AXIS)
    step = lambda _, batch: (mean(jax.value_and_grad(loss)(varying, **batch)), None)
    return jax.lax.scan(step, start, batches)[0]

  rows = P(None, AXIS)
  train = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(P(), rows), out_specs=P()))
  sample = generate.sample_function(exp, mesh, paths.parse_schedule(1))
  first = jax.device_put(batches[0], sharding.replicated(mesh))
  x0 = jax.device_put(first["x"], sharding.rows(mesh))
  batches = jax.device_put(
    jax.tree.map(lambda *each: np.stack(each), *batches), sharding.rows(mesh, 1)
  )
  params = jax.device_put(params, sharding.replicated(mesh))
  return (
    functools.partial(train, params, batches),
    lambda: sample(params, x0, first["c"], first["w"])[0],
  )


def in_pytorch(exp, params, batches: list[dict], official: str | None):
  """(training, sampling) as `in_jax`: calls that return a loss and images [B, C, H, W].

  Args:
    official: file of the official code, which takes no parameters of ours; None for our port.
  """
  batches = [{name: torch.from_numpy(a) for name, a in batch.items()} for batch in batches]
  for batch in batches:
    for name in ("x", "target"):
      batch[name] = batch[name].permute(0, 3, 1, 2).contiguous()
  targets = [batch.pop("target") for batch in batches]
  if official:
    spec = importlib.util.spec_from_file_location("sit_models", official)
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    network = models.SiT_models[exp.model.size](
      input_size=exp.data.image_size, num_classes=exp.data.num_classes
    )
    velocity = lambda x, t, c, **_: network(x, t, c)
  else:
    depth, width, heads = exp.model.dimensions
    network = ism_pytorch.SiT(
      ism_pytorch.Config(
        depth=depth,
        width=width,
        heads=heads,
        patch=exp.model.patch,
        image_size=exp.data.image_size,
        channels=exp.data.channels,
        num_classes=exp.data.num_classes,
        guided=True,
        w_max=exp.objective.w_max,
        fixed_w=0.0,
        t_interval=0.0,
        vae="",
        vae_scale=1.0,
      )
    )
    state = sit.from_params(params, exp.network(), exp.image_shape)
    network.load_state_dict({name: torch.tensor(a) for name, a in state.items()})
    velocity = network

  def train():
    network.train()
    for batch, target in zip(batches, targets, strict=True):
      network.zero_grad(set_to_none=True)
      loss = torch.mean((velocity(**batch) - target) ** 2)
      loss.backward()
    return loss

  @torch.inference_mode()
  def sample():
    network.eval()
    batch = batches[0]
    start = torch.zeros(len(batch["x"]))
    return batch["x"] + velocity(**batch | {"t": start, "d": start + 1})

  return train, sample


def main(_):
  """Prints a table; see the module's docstring."""
  args = flags.FLAGS
  cores = timing.cores()
  devices = args.devices or most_devices(args.rows, cores)
  with commands.one_line_errors():
    config = imagenet256.get_config()
    config.model.update(
      {"size": args.size, "dtype": "float32", "remat": args.remat, "unroll": args.unroll}
    )
    exp = experiment.parse(config)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)
  torch.set_num_threads(cores)
  batches = [batch(exp, args.rows, seed) for seed in range(args.steps)]
  init = jax.jit(lambda key: model.init_params(key, exp.network(), exp.image_shape))
  params = init(jax.random.key(0))
  calls = {}
  for name, (training, sampling) in (
    ("JAX", in_jax(exp, params, batches, sharding.data_mesh())),
    ("PyTorch", in_pytorch(exp, params, batches, args.sit)),
  ):
    calls |= {("training", name): training, ("one-step sampling", name): sampling}
  seconds = timing.rounds(calls, args.repeats)
  print(
    f"{exp.model.size}, float32, {args.rows} latents 32x32x4 at a time, {args.steps} steps "
    f"of training a call, {cores} CPU cores (JAX devices: {devices}), jax "
    f"{jax.__version__}, torch {torch.__version__} "
    f"({'official SiT code' if args.sit else 'ism_pytorch.py'}). Medians of {args.repeats} "
    "rounds, in which everything is timed in turn, and in brackets their quartiles.\n"
  )
  rows = []
  for part in dict.fromkeys(part for part, _ in calls):
    jax_seconds, torch_seconds = seconds[part, "JAX"], seconds[part, "PyTorch"]
    images = args.rows * (args.steps if part == "training" else 1)
    per_image = [format_quartiles(quartiles(s / images), 1e3) for s in (jax_seconds, torch_seconds)]
    ratio = format_quartiles(quartiles(torch_seconds / jax_seconds))
    rows.append([part, *per_image, ratio])
  header = ["ms per image", "JAX", "PyTorch", "PyTorch / JAX"]
  print("\n".join(files.markdown_table(header, rows)))


if __name__ == "__main__":
  commands.run(sys.modules[__name__])
