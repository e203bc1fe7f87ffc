"""Measures training, pairing, reading and sampling on the devices that are there, in one run.

  python -m ism_jax benchmark --config=configs/imagenet256.py --out=DIR [--config.KEY=VALUE ...]
      [--rows=N] [--pools=1,2,4] [--repeats=5]

Any config, and any devices that JAX finds; several processes are one run. Latents
need no data and no autoencoder: without data.dir a folder of random ones is made and removed again,
and the decoder has random weights.

Everything is timed in turn, round after round (`timing.rounds`), so that what slows a shared
machine slows all alike; a ratio is the median of the rounds' ratios. The rate of a large matrix
product in the compute dtype is this machine's practical ceiling. FLOPs are those of the model, see
`flops`.

--rows trains on that many rows of the batch, where all are too much for the machine, and scales the
step's time (less that of the optimizer and the EMAs) to all of them; --pools also measures the
coupling at those pool sizes K.

Written to DIR: benchmark.json, benchmark.md, techniques.png (what each technique adds to flow
matching), and with --pools scaling.png.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from typing import Any

from absl import flags, logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from ism_jax import data, experiment, generate, model, objectives, paths, steps
from ism_jax import state as state_lib
from ism_jax.data import latents
from ism_jax.experiment import Experiment
from ism_jax.performance import benchmark_report, flops, timing
from ism_jax.performance.timing import quartiles
from ism_jax.pretrained.vae import SD_VAE
from ism_jax.runtime import chips, commands, files, multihost, sharding
from ism_jax.runtime.sharding import AXIS, P

STEPS = (1, 2, 4, 8, 128)  # of sampling
SHARES = (0.01, 0.04)  # of a pool's time: the report has the sizes at which pairing reaches them
SIZES = ("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2")  # of scaling.png
_PRODUCTS = 8  # in a timing of the ceiling
_POOLS_READ, _SECONDS_READ = 3, 1.0  # at least, in a timing of the input pipeline
_POOLS_TRAINED = 3  # in a timing of the training loop
_RECORDS = 4096  # random latents


def compiled(function, *arguments) -> tuple[Callable, dict]:
  """(program, cost): a jitted function compiled for arguments.

  The cost is {"compile_seconds": of tracing and XLA, "bytes": on each device while the program
  runs, with arguments and results; None where XLA does not say}.
  """
  start = time.perf_counter()
  program = function.lower(*arguments).compile()
  seconds = time.perf_counter() - start
  memory = program.memory_analysis()
  needed = memory and (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
  return program, {"compile_seconds": seconds, "bytes": needed}


def product(mesh, dtype: str):
  """(call, FLOPs): products of large square matrices, one chain of them on each device."""
  side = 2048 if mesh.devices.flat[0].platform == "cpu" else 8192
  on_device = lambda a, b: jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ b[0], a[0])[None]
  normal = lambda key: jax.random.normal(key, (mesh.size, side, side), dtype) / side**0.5
  draw = jax.jit(normal, out_shardings=sharding.rows(mesh))
  matrices = [draw(jax.random.key(i)) for i in range(2)]
  rows = P(AXIS)
  multiply = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=rows, out_specs=rows))
  return functools.partial(multiply, *matrices), 2.0 * side**3 * _PRODUCTS * mesh.size


FLOW_MATCHING = "flow matching"
GUIDANCE = "with guidance targets"
CONSISTENCY = "with consistency targets"
TARGETS = "with all targets"
WAVELET = "and the wavelet loss"
STEP = "and twin EMA: the step"
SQUARES, WAVELETS = "losses of squares", "losses with wavelets"
ONE_EMA, TWIN_EMA = "update with one EMA", "update with twin EMA"
# What each adds: the steps whose difference it is, or, where a difference of whole steps would
# drown in their noise, the parts of a step that are timed separately.
COSTS = {
  "guidance targets": (GUIDANCE, FLOW_MATCHING),
  "consistency targets": (CONSISTENCY, FLOW_MATCHING),
  "wavelet loss": (WAVELETS, SQUARES),
  "twin EMA": (TWIN_EMA, ONE_EMA),
}


UPDATES = {
  # Of the EMA that samples alone.
  ONE_EMA: lambda state, *rest: state_lib.update(state, *rest).replace(target_ema=state.target_ema),
  TWIN_EMA: state_lib.update,
}


def with_changes(exp: Experiment, section: str, **changes) -> Experiment:
  """The experiment with changes in one section of its config."""
  changed = dataclasses.replace(getattr(exp, section), **changes)
  return dataclasses.replace(exp, **{section: changed})


def techniques(exp: Experiment) -> dict[str, tuple[Experiment, str]]:
  """{name: (experiment, one of UPDATES)} of the training steps that are compared.

  From flow matching with one EMA to the step of `exp`; all of the same network and batch.
  """
  v, g, k = exp.objective.shares
  l2 = with_changes(exp, "wavelet", form="l2")
  compared = {
    FLOW_MATCHING: (l2, (v + g + k, 0, 0), ONE_EMA),
    GUIDANCE: (l2, (v + k, g, 0), ONE_EMA),
    CONSISTENCY: (l2, (v + g, 0, k), ONE_EMA),
    TARGETS: (l2, (v, g, k), ONE_EMA),
    WAVELET: (exp, (v, g, k), ONE_EMA),
    STEP: (exp, (v, g, k), TWIN_EMA),
  }
  rows = {GUIDANCE: g, CONSISTENCY: k}  # a technique without rows is none of the experiment's
  return {
    name: (with_changes(one, "objective", shares=shares), update)
    for name, (one, shares, update) in compared.items()
    if rows.get(name, True)
  }


def random_pool(exp: Experiment, mesh) -> dict:
  """A pool of random numbers on the devices, as it is read."""
  shapes = steps.abstract_pool(exp, mesh)

  def draw(key):
    key_images, key_classes = jax.random.split(key)
    nothing = lambda a: jnp.zeros(a.shape, a.dtype)
    draw_one = {
      "c": lambda a: jax.random.randint(key_classes, a.shape, 0, exp.data.num_classes),
      "seed": nothing,
      "mirror": nothing,
    }
    draw_image = lambda a: jax.random.normal(key_images, a.shape, a.dtype)
    return {name: draw_one.get(name, draw_image)(a) for name, a in shapes.items()}

  placed = {name: a.sharding for name, a in shapes.items()}
  return jax.jit(draw, out_shardings=placed)(jax.random.key(1))


def step_calls(exp: Experiment, mesh) -> tuple[dict[tuple, Callable], dict[str, tuple]]:
  """{("step", name) or ("part", name): call}, and {name: what `compiled` returns} of the steps.

  A call is `exp.scan_steps` of the `techniques`' steps, or only one of the `UPDATES`, with
  the parameters for a gradient. All of them use one state, each the one before's.
  """
  keys = steps.base_keys(0)
  independent = with_changes(exp, "coupling", coupling="independent")
  pool, _ = steps.couple_function(independent, mesh)(random_pool(independent, mesh), keys, 0)
  state = steps.init_function(exp, mesh)(keys.init)
  placed = jax.tree.map(lambda a: a.sharding, state)
  calls, programs = {}, {}

  def call(program, *arguments):
    nonlocal state
    state, result = program(state, *arguments)
    return result

  for name, (one, update) in techniques(exp).items():
    train_steps = steps.steps_function(one, mesh, UPDATES[update])
    program, _ = programs[f"train_steps: {name}"] = compiled(train_steps, state, pool, keys, 0)
    calls["step", name] = functools.partial(call, program, pool, keys, 0)
  for name, update in UPDATES.items():
    apply = steps.update_function(exp, mesh, update)
    # Wait for another array than the state, which is donated to the next call.
    stepped = jax.jit(
      lambda state, apply=apply: (new := apply(state, state.params), new.step + 0),
      donate_argnums=0,
      out_shardings=(placed, sharding.replicated(mesh)),
    )
    calls["part", name] = functools.partial(call, stepped.lower(state).compile())
  return calls, programs


def loss_calls(exp: Experiment, mesh) -> dict[tuple, Callable]:
  """{("part", name): call}: one device's losses and their gradient, without the network.

  A call takes the rows of a micro-batch, or a few more where these are not dealt to all losses; the
  velocity is a multiple of x_t.
  """
  period = sum(exp.objective.shares)
  rows = -(-exp.batch_size // (exp.micro_batches * mesh.size * period)) * period
  keys = jax.random.split(jax.random.key(3), 4)
  x0, x1 = (jax.random.normal(key, (rows, *exp.image_shape)) for key in keys[:2])
  c = jax.random.randint(keys[2], (rows,), 0, exp.data.num_classes)
  conditions = objectives.draw_conditions(keys[3], c, exp.objective, exp.null_class)
  settings = {"null_class": exp.null_class, "batch_size": exp.batch_size}

  def loss(scale, wavelet_cfg, *rows):
    velocity = lambda x_t, t, c, d, w: scale * x_t
    return objectives.losses(velocity, velocity, *rows, exp.objective, wavelet_cfg, **settings)

  squares = dataclasses.replace(exp.wavelet, form="l2")
  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  return {
    ("part", name): functools.partial(gradient, 1.0, cfg, x0, x1, conditions)
    for name, cfg in ((SQUARES, squares), (WAVELETS, exp.wavelet))
  }


def couple_calls(exp: Experiment, mesh, sizes) -> tuple[dict[tuple, Callable], dict[str, tuple]]:
  """{("couple", coupling, K): call}, and {name: what `compiled` returns}."""
  keys = steps.base_keys(0)
  calls, programs = {}, {}
  for size in sizes:
    for coupling in dict.fromkeys(("independent", exp.coupling.coupling)):
      one = with_changes(exp, "coupling", coupling=coupling, pool_size=size)
      pool = random_pool(one, mesh)
      couple, name = steps.couple_function(one, mesh), f"couple: {coupling}, K = {size}"
      program, _ = programs[name] = compiled(couple, pool, keys, 0)
      # The pool is donated to the program, so that each call needs a copy.
      call = lambda program=program, pool=pool: program(jax.tree.map(jnp.copy, pool), keys, 0)
      calls["couple", coupling, size] = call
  return calls, programs


def sample_calls(exp: Experiment, mesh, n: int) -> tuple[dict[tuple, Callable], dict[str, tuple]]:
  """{("sample", steps) or ("decode",): call} for n images, and {name: what `compiled` returns}."""
  numbers = np.arange(n, dtype=np.int32)
  x0 = generate.noise_function(exp.image_shape, mesh)(jax.random.key(0), numbers)
  initialise = lambda key: model.init_params(key, exp.network(), exp.image_shape)
  params = jax.jit(initialise, out_shardings=sharding.replicated(mesh))(jax.random.key(0))
  inputs = (params, x0, numbers % exp.data.num_classes, np.full(n, exp.sample.w, np.float32))
  pixels = generate.pixels_function(exp.data, mesh, exp.evaluation.rounding)
  calls, programs = {("decode",): functools.partial(pixels, x0)}, {}
  for count in STEPS:
    sample = generate.sample_function(exp, mesh, paths.parse_schedule(count))
    program, _ = programs[f"sample: {count} steps"] = compiled(sample, *inputs)
    calls["sample", count] = functools.partial(program, *inputs)
  return calls, programs


@contextlib.contextmanager
def source_of(exp: Experiment) -> Iterator[Any]:
  """The config's dataset; of latents without a folder, random ones while the block runs."""
  cfg = exp.data
  with tempfile.TemporaryDirectory(prefix="ism_jax-benchmark-") as folder:
    if cfg.vae and not cfg.dir:
      write_random_latents(cfg, folder)
      cfg = dataclasses.replace(cfg, dir=folder)
    yield data.load_source(cfg)


def write_random_latents(cfg: data.DataConfig, folder: str) -> None:
  """A dataset as `encode` writes it, of random moments."""
  settings = latents.Settings(
    vae=cfg.vae,
    vae_sha256="",
    size=tuple(n * latents.DOWNSAMPLING for n in cfg.image_shape[:2]),
    latent_channels=cfg.channels,
    crop="",
    listing="",
    listed=_RECORDS,
    scaling_factor=cfg.vae_scale,
    shift_factor=cfg.vae_shift,
    images_per_shard=_RECORDS // 8,
  )
  rng = np.random.default_rng(0)
  moments = rng.standard_normal((64, latents.VIEWS, *settings.moments_shape)).astype(np.float16)
  for shard in range(settings.shards):
    with latents.ShardWriter(folder, settings, shard) as writer:
      for i in settings.images_of(shard):
        writer.add(i % cfg.num_classes, moments[i % len(moments)])
  classes = [str(c) for c in range(cfg.num_classes)]
  manifest = latents.manifest(settings, classes, latents.finished_shards(folder, settings))
  files.write_here(os.path.join(folder, latents.MANIFEST), manifest)


def read_rates(exp: Experiment, source, mesh, repeats: int) -> dict[int, np.ndarray]:
  """{threads: images per second}, [repeats], at which a process reads its rows of pools."""

  def rate(num_threads):
    start, images = time.perf_counter(), 0
    with contextlib.closing(read_pools(exp, source, mesh, num_threads)) as pools:
      for number, pool in enumerate(pools, 1):
        images, seconds = images + pool["c"].size, time.perf_counter() - start
        if number >= _POOLS_READ and seconds >= _SECONDS_READ:
          return images / seconds

  most = exp.data.num_threads
  threads = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
  return timing.in_turn(rate, threads, repeats)


def read_pools(exp: Experiment, source, mesh, num_threads: int):
  seeds = None
  if exp.coupling.coupling == "classwise":  # any noises take the same time
    seeds = np.zeros((len(source), exp.coupling.class_rounds), np.int32)
  return data.pools(
    source,
    batch_size=exp.batch_size,
    pool_size=exp.coupling.pool_size,
    flip=exp.data.flip,
    seed=0,
    rows=sharding.local_rows(mesh, exp.batch_size),
    num_threads=num_threads,
    seeds=seeds,
  )


def training_loop(exp: Experiment, source, mesh, train_steps, pools: int) -> dict[str, float]:
  """Trains for some pools as `train` does: its seconds, and those in which it waited for data."""
  keys, couple = steps.base_keys(0), steps.couple_function(exp, mesh)
  state, waited, pending = steps.init_function(exp, mesh)(keys.init), 0.0, None
  read = read_pools(exp, source, mesh, exp.data.num_threads)
  for index in range(pools + 2):
    if index == 2:  # all is compiled, and the pools that were read meanwhile are used up
      jax.block_until_ready(state)
      start, waited = time.perf_counter(), 0.0
    before = time.perf_counter()
    pool = sharding.global_arrays(sharding.rows(mesh, axis=1), next(read))
    waited += time.perf_counter() - before
    pool, _ = couple(pool, keys, index)
    for first in range(0, exp.coupling.pool_size, exp.scan_steps):
      state, metrics = train_steps(state, pool, keys, first)
      pending, ready = metrics, pending
      jax.block_until_ready(ready)
  jax.block_until_ready(state)
  return {"seconds": time.perf_counter() - start, "waited": waited}


def measure(exp: Experiment, mesh, source, *, rows: int, pools: list[int], repeats: int) -> dict:
  """benchmark.json, of reading the dataset `source`; otherwise as `benchmark` takes it."""
  # Decoding needs no more than shapes.
  if exp.data.vae and not exp.data.vae.startswith("random"):
    factors = {"vae_scale": SD_VAE.scale, "vae_shift": SD_VAE.shift}
    exp = with_changes(exp, "data", vae="random", **factors)
  fewer = dataclasses.replace(exp, batch_size=rows)
  size, sizes = exp.coupling.pool_size, sorted({exp.coupling.pool_size, *pools})
  images = -(-exp.sample.batch_size // mesh.size) * mesh.size

  multiply, products = product(mesh, exp.model.dtype)
  of_steps, programs = step_calls(fewer, mesh)
  train_steps, _ = programs[f"train_steps: {STEP}"]
  calls = {("product",): multiply} | of_steps | loss_calls(exp, mesh)
  for more_calls, more in (couple_calls(exp, mesh, sizes), sample_calls(exp, mesh, images)):
    calls, programs = calls | more_calls, programs | more
  logging.info("Compiled; now %d rounds.", repeats)
  seconds = timing.rounds(calls, repeats)
  rates = read_rates(exp, source, mesh, repeats)
  loop = training_loop(fewer, source, mesh, train_steps, _POOLS_TRAINED)

  times = dict.fromkeys(UPDATES, 1) | dict.fromkeys((SQUARES, WAVELETS), exp.micro_batches)
  parts = {name: seconds["part", name] * n for name, n in times.items()}
  step = {}  # of the whole batch; the update's time does not grow with the rows
  for name, (_, update) in techniques(exp).items():
    of_rows = seconds["step", name] / exp.scan_steps - parts[update]
    step[name] = of_rows * exp.batch_size / rows + parts[update]
  couple = {k: seconds["couple", exp.coupling.coupling, k] for k in sizes}
  pairing = {k: couple[k] - seconds["couple", "independent", k] for k in sizes}
  return {
    **setting(exp, mesh, rows=rows, images=images),
    "repeats": repeats,
    **utilisation(exp, mesh, step[STEP], products / seconds["product",]),
    "techniques": technique_costs(fewer, step, parts, pairing[size] / size),
    "pool": pool_costs(exp, couple[size], step[STEP], pairing),
    "input": {
      "images_per_second": {n: quartiles(rate) for n, rate in rates.items()},
      "needed": float(np.median(exp.batch_size / step[STEP])),
      "loop": loop,
    },
    "sampling": {
      n: {
        "drawn": quartiles(images / seconds["sample", n]),
        "decoded": quartiles(images / (seconds["sample", n] + seconds["decode",])),
      }
      for n in STEPS
    },
    "programs": {name: cost for name, (_, cost) in programs.items()},
    "peak_bytes": (mesh.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
  }


def setting(exp: Experiment, mesh, *, rows: int, images: int) -> dict:
  """What was measured, and on what; `images` are sampled together."""
  return {
    "config": {
      "variant": exp.variant,
      "data": exp.data.name,
      "model": exp.model.size,
      "dtype": exp.model.dtype,
      "remat": exp.model.remat,
      "batch_size": exp.batch_size,
      "rows": rows,
      "scan_steps": exp.scan_steps,
      "pool_size": exp.coupling.pool_size,
      "image_shape": exp.image_shape,
      "sampled_together": images,
    },
    "devices": {
      "kind": mesh.devices.flat[0].device_kind,
      "count": mesh.size,
      "cores": timing.cores(),
      "jax": jax.__version__,
    },
  }


def utilisation(exp: Experiment, mesh, step, ceiling) -> dict:
  """The rate of training, and its share of what the devices could do.

  Args:
    step: seconds, [repeats].
    ceiling: FLOPs per second of matrix products, [repeats].
  """
  work = flops.step(exp).model
  peak = chips.peak(mesh.devices.flat[0].device_kind, exp.model.dtype)
  return {
    "ceiling": {"flops_per_second": quartiles(ceiling), "datasheet": peak and peak * mesh.size},
    "train": {
      "seconds_per_step": quartiles(step),
      "steps_per_second": quartiles(1 / step),
      "images_per_second": quartiles(exp.batch_size / step),
      "model_flops_per_step": work,
      "utilisation": quartiles(work / step / ceiling),
      "utilisation_of_datasheet": peak and quartiles(work / step / (peak * mesh.size)),
    },
  }


def technique_costs(exp: Experiment, step: dict, parts: dict, pairing) -> dict:
  """What each technique adds to a step of flow matching, as a share of it.

  Args:
    step: seconds of each of `techniques`, [repeats].
    parts: seconds of the parts of a step, [repeats].
    pairing: seconds for a step, [repeats].
  """
  plain, timed = step[FLOW_MATCHING], step | parts
  costs = {
    name: quartiles((timed[more] - timed[less]) / plain)
    for name, (more, less) in COSTS.items()
    if more in timed
  }
  costs["pairing"] = quartiles(pairing / plain)
  costs["all"] = quartiles((step[STEP] + pairing) / plain - 1)
  return {
    "seconds_per_step": {name: quartiles(values) for name, values in step.items()},
    "seconds_alone": {name: quartiles(values) for name, values in parts.items()},
    "over_flow_matching": {name: quartiles(values / plain) for name, values in step.items()},
    "forward_passes": {
      name: flops.forward_equivalents(one) for name, (one, _) in techniques(exp).items()
    },
    "costs": costs,
  }


def pool_costs(exp: Experiment, couple, step, pairing: dict[int, np.ndarray]) -> dict:
  """Seconds of a pool, of pairing pools of each size, and where pairing stops being cheap.

  Args:
    couple: seconds to make a pool of the config's size, [repeats].
    step: seconds of a step, [repeats].
    pairing: {K: seconds}, over those of the independent coupling.
  """
  size, largest = exp.coupling.pool_size, max(pairing)
  pool, noise = couple + size * step, couple - pairing[size]
  parts = {"noise and latents": noise, "pairing": pairing[size], "steps": size * step}
  # Other networks at the utilisation that was measured.
  work = {
    name: flops.step(with_changes(exp, "model", size=name)).model
    for name in (exp.model.size, *SIZES)
  }
  step_seconds = {name: np.median(step) * n / work[exp.model.size] for name, n in work.items()}
  # Pairing's time grows as (K M)^2 and that of K steps as K, so their ratio grows as K; faster
  # where larger problems take Sinkhorn more iterations or outgrow a cache.
  longest = float(np.median(pairing[largest]))
  return {
    "seconds": quartiles(pool),
    "parts": {name: quartiles(seconds) for name, seconds in parts.items()},
    "shares": {name: quartiles(seconds / pool) for name, seconds in parts.items()},
    "by_size": {k: quartiles(values) for k, values in pairing.items()},
    "step_seconds": step_seconds,
    "pairs_at": {
      share: {
        name: share * seconds * largest**2 / longest * exp.batch_size
        for name, seconds in step_seconds.items()
      }
      for share in SHARES
      if longest > 0  # the coupling pairs, and its time stands out from the noise
    },
  }


def benchmark(config, out: str, *, rows: int, pools: list[int], repeats: int, devices=None) -> dict:
  """Measures a ConfigDict, writes the report into `out`, and returns what is in benchmark.json.

  Args:
    rows: of the batch, that the timed step trains on; 0 for all.
    pools: sizes K that are paired besides the config's.
    repeats: rounds.
    devices: default all.
  """
  exp, mesh = experiment.parse(data.resolve(config)), sharding.data_mesh(devices)
  rows = rows or exp.batch_size
  if repeats < 1:
    raise ValueError(f"--repeats={repeats} must be at least 1: give more.")
  if not 0 < rows <= exp.batch_size:
    raise ValueError(f"--rows={rows}: give 1 to batch_size={exp.batch_size}.")
  if bad := [k for k in pools if k < 1]:
    raise ValueError(f"--pools={bad}: a pool has at least one batch: give 1 or more.")
  for size in pools:
    experiment.check_pairs(size, exp.batch_size)
  if pools and exp.coupling.coupling != "ot":
    raise ValueError(
      f"--pools={pools}: there is no pairing with coupling.coupling={exp.coupling.coupling!r}, "
      "leave --pools out."
    )
  for size in (exp.batch_size, rows):
    experiment.check_devices(dataclasses.replace(exp, batch_size=size), mesh.size)
  files.check_writable(out)
  with source_of(exp) as source:
    report = measure(exp, mesh, source, rows=rows, pools=pools, repeats=repeats)
  if jax.process_index() == 0:
    benchmark_report.write(report, out, scaling=bool(pools))
  return report


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file("config", None, "What is measured.", lock_config=True)
  flags.DEFINE_string("out", None, "Folder for the report.")
  flags.DEFINE_integer("rows", 0, "Rows of the batch that the timed step trains on; 0 for all.")
  flags.DEFINE_list("pools", [], "Pool sizes K that are paired besides the config's.")
  flags.DEFINE_integer("repeats", 5, "Rounds.", upper_bound=10_000)
  flags.mark_flags_as_required(["config", "out"])
  multihost.define_flags()


def main(argv):
  """Measures; see the module's docstring."""
  jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
  args = flags.FLAGS
  with multihost.shared_fate(), commands.one_line_errors():
    multihost.initialize_from_flags()
    try:
      pools = [int(k) for k in args.pools]
    except ValueError:
      raise ValueError(f"--pools={','.join(args.pools)} must be whole numbers.") from None
    report = benchmark(args.config, args.out, rows=args.rows, pools=pools, repeats=args.repeats)
    if jax.process_index() == 0:
      print(benchmark_report.as_markdown(report))
