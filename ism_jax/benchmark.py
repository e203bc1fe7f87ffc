"""Measures training, pairing, reading and sampling on the devices that are there, in one run.

  python -m ism_jax.benchmark --config=configs/imagenet256.py --out=DIR [--config.KEY=VALUE ...]
      [--rows=N] [--pools=1,2,4] [--repeats=5]

Any config, and any devices that JAX finds; several processes are one run, see `multihost`. Latents
need no data and no autoencoder: without data.dir a folder of random ones is made and removed again,
and what decodes has random weights.

Everything is timed in turn, round after round (`rounds`), so that what slows a shared machine slows
all alike; a ratio is the median of the rounds' ratios. The rate of a large matrix product in the
compute dtype is this machine's practical ceiling. FLOPs are those of the model, see `flops`.

--rows trains on that many rows of the batch, where all are too much for the machine, and scales the
step's time to all of them, but for the time of the optimizer and the EMAs; --pools measures the
coupling at those pool sizes K too.

Written to DIR: benchmark.json, benchmark.md, techniques.png (what each technique adds to flow
matching), and with --pools scaling.png.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from typing import Any

from absl import app, flags, logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from ism_jax import (
  chips,
  commands,
  data,
  figures,
  files,
  flops,
  generate,
  multihost,
  objectives,
  sharding,
  steps,
  wavelets,
)
from ism_jax import experiment as experiment_lib
from ism_jax import model as model_lib
from ism_jax import state as state_lib
from ism_jax.data import latents
from ism_jax.experiment import Experiment
from ism_jax.sharding import AXIS, P

STEPS = (1, 2, 4, 8, 128)  # of sampling
SHORTEST = 0.2  # seconds of a timing: shorter calls are made several times
_LONG = 10.0  # seconds of a first call that cannot be a short one
SHARES = (0.01, 0.04)  # of a pool's time: the sizes are told at which pairing reaches them
SIZES = ("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2")  # of scaling.png
_PRODUCTS = 8  # in a timing of the ceiling
_POOLS_READ, _SECONDS_READ = 3, 1.0  # at least, in a timing of the input pipeline
_POOLS_TRAINED = 3  # in that of the loop
_RECORDS = 4096  # random latents
_RANDOM_VAE = "random"


# Timing.


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function.

  Attributes:
    call: takes the arguments it was compiled for. compile_seconds: tracing and XLA.
    bytes: on each device while it runs, with arguments and results; None where XLA does not say.
  """

  call: Callable
  compile_seconds: float
  bytes: int | None


def compiled(function, *arguments) -> Program:
  """Compiles a jitted function for arguments, or shapes with shardings."""
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
  return Program(program, seconds, needed)


def rounds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
  """Seconds of each call, [repeats], all in turn.

  Each returns what has to be ready when the clock stops. Of calls that are shorter than `SHORTEST`,
  several follow each other without waiting, as in training. All processes make the same calls.
  """
  together = {}
  for name, call in calls.items():
    seconds = _longest(_seconds(call, 1))  # with what is done once
    if seconds < _LONG:
      seconds = _longest(_seconds(call, 1))
    together[name] = math.ceil(SHORTEST / max(seconds, 1e-9))
  found = [{name: _seconds(call, together[name]) for name, call in calls.items()}
           for _ in range(repeats)]  # fmt: skip
  return {name: np.array([one[name] for one in found]) for name in calls}


def _seconds(call, times: int) -> float:
  start = time.perf_counter()
  for _ in range(times):
    result = call()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / times


def _longest(seconds: float) -> float:
  """Of all processes."""
  if jax.process_count() == 1:
    return seconds
  return float(multihost_utils.process_allgather(np.float64(seconds)).max())


def spread(values) -> dict[str, float]:
  """Median and quartiles."""
  low, median, high = np.percentile(values, (25, 50, 75))
  return {"median": float(median), "quartiles": [float(low), float(high)]}


# What is timed.


def product(mesh, dtype: str):
  """(call, FLOPs): products of large square matrices, on each device its own."""
  side = 2048 if mesh.devices.flat[0].platform == "cpu" else 8192

  def on_device(a, b):
    a, b = a[0], b[0]
    return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: (x @ b).astype(dtype), a)[None]

  place = sharding.rows(mesh)
  draw = jax.jit(
    lambda key: jax.random.normal(key, (mesh.size, side, side), dtype) / side**0.5,
    out_shardings=place,
  )
  matrices = [draw(jax.random.key(i)) for i in range(2)]
  rows = P(AXIS)
  multiply = jax.jit(
    jax.shard_map(on_device, mesh=mesh, in_specs=(rows, rows), out_specs=rows), out_shardings=place
  )
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
# drown in their noise, the parts of a step that are timed alone.
COSTS = {
  "guidance targets": (GUIDANCE, FLOW_MATCHING),
  "consistency targets": (CONSISTENCY, FLOW_MATCHING),
  "wavelet loss": (WAVELETS, SQUARES),
  "twin EMA": (TWIN_EMA, ONE_EMA),
}


def one_ema(state, gradient, tx, ema):
  """`state.update` with the EMA that samples alone."""
  new = state_lib.update(state, gradient, tx, ema)
  return new.replace(target_ema=state.target_ema)


UPDATES = {ONE_EMA: one_ema, TWIN_EMA: state_lib.update}


def squares(exp: Experiment) -> wavelets.WaveletConfig:
  """Mean squared errors in place of the experiment's wavelet loss."""
  return dataclasses.replace(exp.wavelet, form="l2")


def techniques(exp: Experiment) -> dict[str, tuple[Experiment, str]]:
  """{name: (experiment, one of UPDATES)} of the training steps that are compared.

  From flow matching with one EMA to the step of `exp`; all of the same network and batch.
  """
  v, g, k = exp.objective.shares

  def step(shares, update, **changes):
    objective = dataclasses.replace(exp.objective, shares=shares)
    return dataclasses.replace(exp, objective=objective, **changes), update

  l2 = {"wavelet": squares(exp)}
  found = {FLOW_MATCHING: step((v + g + k, 0, 0), ONE_EMA, **l2)}
  if g:
    found[GUIDANCE] = step((v + k, g, 0), ONE_EMA, **l2)
  if k:
    found[CONSISTENCY] = step((v + g, 0, k), ONE_EMA, **l2)
  found[TARGETS] = step((v, g, k), ONE_EMA, **l2)
  found[WAVELET] = step((v, g, k), ONE_EMA)
  found[STEP] = step((v, g, k), TWIN_EMA)
  return found


def random_pool(exp: Experiment, mesh):
  """A pool on the devices, paired: {"x0", "x1": [K, M, ...], "c": [K, M]}."""
  rows = (exp.coupling.pool_size, exp.batch_size)

  def draw(key):
    keys = jax.random.split(key, 3)
    return {
      "x0": jax.random.normal(keys[0], (*rows, *exp.image_shape)),
      "x1": jax.random.normal(keys[1], (*rows, *exp.image_shape)),
      "c": jax.random.randint(keys[2], rows, 0, exp.data.num_classes),
    }

  return jax.jit(draw, out_shardings=sharding.rows(mesh, axis=1))(jax.random.key(1))


def step_calls(exp: Experiment, mesh) -> tuple[dict[tuple, Callable], dict[str, Program]]:
  """({("step", name) or ("alone", name): call}, {name: Program} of the steps).

  A call is `exp.scan_steps` of the `techniques`' steps, or one of the `UPDATES` alone, with the
  parameters for a gradient. All hand one state on to each other.
  """
  keys = steps.base_keys(0)
  pool = random_pool(exp, mesh)
  state = steps.init_function(exp, mesh)(keys.init)
  calls, programs = {}, {}

  def call(program, *arguments):
    nonlocal state
    state, result = program(state, *arguments)
    return result

  for name, (one, update) in techniques(exp).items():
    train_steps = steps.steps_function(one, mesh, UPDATES[update])
    programs[name] = compiled(train_steps, state, pool, keys, 0)
    calls["step", name] = functools.partial(call, programs[name].call, pool, keys, 0)
  placed = jax.tree.map(lambda a: a.sharding, state)
  for name, update in UPDATES.items():
    apply = steps.update_function(exp, mesh, update)
    # What is waited for is an array of its own: the state is donated to the next call.
    alone = jax.jit(
      lambda state, apply=apply: (new := apply(state, state.params), new.step + 0),
      donate_argnums=0,
      out_shardings=(placed, sharding.replicated(mesh)),
    )
    calls["alone", name] = functools.partial(call, compiled(alone, state).call)
  return calls, programs


def loss_calls(exp: Experiment, mesh) -> dict[tuple, Callable]:
  """{("alone", name): call}: one device's losses and their gradient, without the network.

  Of the rows of a micro-batch, around a velocity that is a multiple of x_t.
  """
  rows = exp.batch_size // exp.micro_batches // mesh.size
  keys = jax.random.split(jax.random.key(3), 4)
  x0, x1 = (jax.random.normal(key, (rows, *exp.image_shape)) for key in keys[:2])
  c = jax.random.randint(keys[2], (rows,), 0, exp.data.num_classes)
  given = objectives.draw_conditions(keys[3], c, exp.objective, exp.null_class)

  def loss(scale, wavelet_cfg, x0, x1, c, given):
    velocity = lambda x_t, t, c, d, w: scale * x_t
    return objectives.losses(
      velocity, velocity, x0, x1, c, given,
      cfg=exp.objective, wavelet_cfg=wavelet_cfg, null_class=exp.null_class,
      batch_size=exp.batch_size,
    )  # fmt: skip

  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  return {
    ("alone", name): functools.partial(gradient, 1.0, cfg, x0, x1, c, given)
    for name, cfg in ((SQUARES, squares(exp)), (WAVELETS, exp.wavelet))
  }


def couple_calls(exp: Experiment, mesh, sizes) -> tuple[dict, dict[str, Program]]:
  """{(coupling, K): call}, {(coupling, K): Program}."""
  keys = steps.base_keys(0)
  calls, programs = {}, {}
  for size in sizes:
    for coupling in dict.fromkeys(("independent", exp.coupling.coupling)):
      cfg = dataclasses.replace(exp.coupling, coupling=coupling, pool_size=size)
      one = dataclasses.replace(exp, coupling=cfg)
      shapes = steps.abstract_pool(one, mesh)
      draw = lambda key, shapes=shapes: {
        name: jax.random.normal(key, a.shape).astype(a.dtype) for name, a in shapes.items()
      }
      placed = {name: a.sharding for name, a in shapes.items()}
      pool = jax.jit(draw, out_shardings=placed)(jax.random.key(2))
      program = compiled(steps.couple_function(one, mesh), pool, keys, 0)
      # It takes its argument's memory.
      call = lambda program=program, pool=pool: program.call(jax.tree.map(jnp.copy, pool), keys, 0)
      calls[coupling, size], programs[coupling, size] = call, program
  return calls, programs


def sample_calls(exp: Experiment, mesh, params) -> tuple[dict[int, Callable], dict, Callable, int]:
  """({steps: call}, {steps: Program}, call that makes images of the samples, how many it makes)."""
  n = -(-exp.sample.batch_size // mesh.size) * mesh.size
  numbers = np.arange(n, dtype=np.int32)
  x0 = generate.noise_function(exp.image_shape, mesh)(jax.random.key(0), numbers)
  given = (params, x0, numbers % exp.data.num_classes, np.full(n, exp.sample.w, np.float32))
  programs, calls = {}, {}
  for count in STEPS:
    programs[count] = compiled(generate.sample_function(exp, mesh, count), *given)
    calls[count] = functools.partial(programs[count].call, *given)
  pixels = generate.pixels_function(exp.data.vae, mesh, exp.evaluation.rounding)
  return calls, programs, functools.partial(pixels, x0), n


@contextlib.contextmanager
def source_of(exp: Experiment) -> Iterator[Any]:
  """The config's dataset; of latents without a folder, random ones while the block runs."""
  if not exp.data.vae or exp.data.dir:
    yield data.load_source(exp.data)
    return
  with tempfile.TemporaryDirectory(prefix="ism_jax-benchmark-") as folder:
    write_random_latents(exp.data, folder)
    yield data.load_source(dataclasses.replace(exp.data, dir=folder))


def write_random_latents(cfg: data.DataConfig, folder: str) -> None:
  """A dataset as `encode` writes it, of random moments."""
  settings = latents.Settings(
      vae=cfg.vae, vae_sha256="", size=cfg.image_size * latents.DOWNSAMPLING,
      latent_channels=cfg.channels, crop="", listing="", listed=_RECORDS,
      images_per_shard=_RECORDS // 8,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  moments = rng.standard_normal((64, latents.VIEWS, *settings.moments_shape)).astype(np.float16)
  for shard in range(settings.shards):
    with latents.ShardWriter(folder, settings, shard) as writer:
      for i in settings.images_of(shard):
        writer.add(i % cfg.num_classes, moments[i % len(moments)])
  trailers = latents.finished_shards(folder, settings)
  classes = [str(c) for c in range(cfg.num_classes)]
  with open(os.path.join(folder, latents.MANIFEST), "w") as f:
    f.write(latents.manifest(settings, classes, trailers))


def read_rates(exp: Experiment, source, mesh, repeats: int) -> dict[int, np.ndarray]:
  """{threads: images per second}, [repeats], that a process reads of its rows of pools, in turn."""
  most = exp.data.num_threads
  threads = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
  found = [{n: _read_rate(exp, source, mesh, n) for n in threads} for _ in range(repeats)]
  return {n: np.array([one[n] for one in found]) for n in threads}


def _read_rate(exp, source, mesh, num_threads) -> float:
  start, read, seconds = time.perf_counter(), 0, 0.0
  with contextlib.closing(read_pools(exp, source, mesh, num_threads)) as pools:
    for number, pool in enumerate(pools, 1):
      read, seconds = read + pool["c"].size, time.perf_counter() - start
      if number >= _POOLS_READ and seconds >= _SECONDS_READ:
        return read / seconds


def read_pools(exp: Experiment, source, mesh, num_threads: int):
  return data.pools(
    source,
    batch_size=exp.batch_size,
    pool_size=exp.coupling.pool_size,
    flip=exp.data.flip,
    seed=0,
    rows=sharding.local_rows(mesh, exp.batch_size),
    num_threads=num_threads,
  )


def training_loop(exp: Experiment, source, mesh, train_steps, pools: int) -> dict[str, float]:
  """Trains for some pools as `train` does: seconds, and of them those that it waited for data.

  Args:
    train_steps: compiled.
  """
  keys, couple = steps.base_keys(0), steps.couple_function(exp, mesh)
  state, waited, pending = steps.init_function(exp, mesh)(keys.init), 0.0, None
  read = read_pools(exp, source, mesh, exp.data.num_threads)
  for index in range(pools + 2):
    if index == 2:  # compiled, and what was read meanwhile is used up
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
  """benchmark.json; see the module's docstring.

  Args:
    source: the dataset that is read. rows: of the batch that the timed step trains on. pools:
      sizes K that are paired besides.
  """
  if exp.data.vae and not exp.data.vae.startswith(_RANDOM_VAE):  # decoding takes shapes alone
    exp = dataclasses.replace(exp, data=dataclasses.replace(exp.data, vae=_RANDOM_VAE))
  fewer = dataclasses.replace(exp, batch_size=rows)
  size, own = exp.coupling.pool_size, exp.coupling.coupling
  sizes = sorted({size, *pools})

  multiply, products = product(mesh, exp.model.dtype)
  steps, step_programs = step_calls(fewer, mesh)
  couple, couple_programs = couple_calls(exp, mesh, sizes)
  params = jax.jit(
    lambda key: model_lib.init_params(key, exp.network(), exp.image_shape),
    out_shardings=sharding.replicated(mesh),
  )(jax.random.key(0))
  draw, draw_programs, decode, images = sample_calls(exp, mesh, params)
  logging.info("Compiled; now %d rounds.", repeats)
  seconds = rounds(
    {("product", ""): multiply, ("decode", ""): decode}
    | steps
    | loss_calls(exp, mesh)
    | {("couple", name): call for name, call in couple.items()}
    | {("sample", name): call for name, call in draw.items()},
    repeats,
  )
  rates = read_rates(exp, source, mesh, repeats)
  loop = training_loop(fewer, source, mesh, step_programs[STEP].call, _POOLS_TRAINED)

  alone = {name: seconds["alone", name] for name in UPDATES}
  for name in (SQUARES, WAVELETS):
    alone[name] = seconds["alone", name] * exp.micro_batches
  step = {}  # of the whole batch, of whose time the update's does not grow with the rows
  for name, (_, update) in techniques(exp).items():
    of_rows = seconds["step", name] / exp.scan_steps - alone[update]
    step[name] = of_rows * exp.batch_size / rows + alone[update]
  pairing = {k: seconds["couple", (own, k)] - seconds["couple", ("independent", k)] for k in sizes}
  programs = {f"train_steps: {name}": p for name, p in step_programs.items()}
  programs |= {f"couple: {name}, K = {k}": p for (name, k), p in couple_programs.items()}
  programs |= {f"sample: {n} steps": p for n, p in draw_programs.items()}
  return {
    **setting(exp, mesh, rows=rows, images=images),
    "repeats": repeats,
    **utilisation(exp, mesh, step[STEP], products / seconds["product", ""]),
    "techniques": technique_costs(fewer, step, alone, pairing[size] / size),
    "pool": pool_costs(exp, seconds["couple", (own, size)], step[STEP], pairing),
    "input": {
      "images_per_second": {n: spread(rate) for n, rate in rates.items()},
      "needed": float(np.median(exp.batch_size / step[STEP])),
      "loop": loop,
    },
    "sampling": {
      n: {
        "drawn": spread(images / seconds["sample", n]),
        "decoded": spread(images / (seconds["sample", n] + seconds["decode", ""])),
      }
      for n in draw
    },
    "programs": {
      name: {"compile_seconds": p.compile_seconds, "bytes": p.bytes} for name, p in programs.items()
    },
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
      "cores": cores(),
      "jax": jax.__version__,
    },
  }


def cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def utilisation(exp: Experiment, mesh, step, ceiling) -> dict:
  """The rate of training, and its share of what the devices could do.

  Args:
    step: seconds, [repeats]. ceiling: FLOPs per second of matrix products, [repeats].
  """
  work = flops.step(exp).model
  peak = chips.peak(mesh.devices.flat[0].device_kind, exp.model.dtype)
  return {
    "ceiling": {"flops_per_second": spread(ceiling), "datasheet": peak and peak * mesh.size},
    "train": {
      "seconds_per_step": spread(step),
      "steps_per_second": spread(1 / step),
      "images_per_second": spread(exp.batch_size / step),
      "model_flops_per_step": work,
      "utilisation": spread(work / step / ceiling),
      "utilisation_of_datasheet": peak and spread(work / step / (peak * mesh.size)),
    },
  }


def technique_costs(exp: Experiment, step: dict, alone: dict, pairing) -> dict:
  """What each technique adds to a step of flow matching, as a share of it.

  Args:
    step: seconds of each of `techniques`, [repeats]. alone: those of the parts of a step.
    pairing: seconds for a step, [repeats].
  """
  plain, timed = step[FLOW_MATCHING], step | alone
  costs = {
    name: spread((timed[more] - timed[less]) / plain)
    for name, (more, less) in COSTS.items()
    if more in timed
  }
  costs["pairing"] = spread(pairing / plain)
  costs["all"] = spread((step[STEP] + pairing) / plain - 1)
  return {
    "seconds_per_step": {name: spread(values) for name, values in step.items()},
    "seconds_alone": {name: spread(values) for name, values in alone.items()},
    "over_flow_matching": {name: spread(values / plain) for name, values in step.items()},
    "forward_passes": {
      name: flops.forward_equivalents(one) for name, (one, _) in techniques(exp).items()
    },
    "costs": costs,
  }


def pool_costs(exp: Experiment, couple, step, pairing: dict[int, np.ndarray]) -> dict:
  """Seconds of a pool, of pairing pools of each size, and where pairing stops being cheap.

  Args:
    couple: seconds to make a pool of the config's size, [repeats]. step: seconds of a step.
    pairing: {K: seconds}, over those of the independent coupling.
  """
  size = exp.coupling.pool_size
  pool = couple + size * step
  parts = {
    "noise and latents": couple - pairing[size],
    "pairing": pairing[size],
    "steps": size * step,
  }
  steps = step_seconds(exp, float(np.median(step)))
  largest = max(pairing)
  longest = float(np.median(pairing[largest]))
  return {
    "seconds": spread(pool),
    "parts": {name: spread(seconds) for name, seconds in parts.items()},
    "shares": {name: spread(seconds / pool) for name, seconds in parts.items()},
    "by_size": {k: spread(values) for k, values in pairing.items()},
    "step_seconds": steps,
    "pairs_at": {
      share: {
        name: pairs_at(share, largest, longest, seconds, exp.batch_size)
        for name, seconds in steps.items()
      }
      for share in SHARES
      if longest > 0  # the coupling pairs, and that is told from the noise
    },
  }


def step_seconds(exp: Experiment, measured: float) -> dict[str, float]:
  """{size of the network: seconds per step} at the utilisation that was measured."""
  own = flops.step(exp).model
  sized = lambda size: dataclasses.replace(exp, model=dataclasses.replace(exp.model, size=size))
  sizes = dict.fromkeys((exp.model.size, *SIZES))
  return {size: measured * flops.step(sized(size)).model / own for size in sizes}


def pairs_at(share: float, k: int, pairing: float, step: float, batch_size: int) -> float:
  """K M at which pairing takes `share` of the pool's K steps, at the latest.

  Pairing's time grows as (K M)^2 and that of K steps as K, so their ratio grows as K; faster where
  larger problems take Sinkhorn more iterations or outgrow a cache.

  Args:
    pairing: seconds that pairing a pool of `k` batches took. step: seconds.
  """
  return share * step * k**2 / pairing * batch_size


# The report.


def as_markdown(report: dict) -> str:
  """benchmark.md of the contents of benchmark.json."""
  lines = [*_about(report), *_techniques(report["techniques"]), *_pool(report), *_input(report)]
  cfg = report["config"]
  lines += ["## Sampling", "", f"{cfg['sampled_together']} at a time:", ""]
  lines += files.markdown_table(
    ["steps", "images/s", "with decoding"],
    [
      [str(n), told(one["drawn"], form=".4g"), told(one["decoded"], form=".4g")]
      for n, one in report["sampling"].items()
    ],
  )
  megabytes = lambda n: "–" if n is None else f"{n / 1e6:,.0f}"
  lines += ["## Programs", ""]
  lines += files.markdown_table(
    ["program", "compile, s", "MB per device"],
    [
      [name, f"{one['compile_seconds']:.1f}", megabytes(one["bytes"])]
      for name, one in report["programs"].items()
    ],
  )
  if report["peak_bytes"]:
    lines += [f"Most memory in use on a device: {report['peak_bytes'] / 1e9:.2f} GB.", ""]
  return "\n".join(lines)


def _about(report: dict) -> list[str]:
  cfg, devices, ceiling, found = (
    report[name] for name in ("config", "devices", "ceiling", "train")
  )
  scaled = (
    f" The step was timed on {cfg['rows']} rows, and its time, but for the update's, is scaled to "
    f"{cfg['batch_size']}."
    if cfg["rows"] != cfg["batch_size"]
    else ""
  )
  datasheet, of_datasheet = ".", "."
  if peak := ceiling["datasheet"]:
    datasheet = f", of {peak / 1e12:.4g} by the datasheet."
    of_datasheet = f", {told(found['utilisation_of_datasheet'], 100)} % of the datasheet's."
  return [
    f"# {cfg['model']} ({cfg['variant']}) on {devices['count']} x {devices['kind']}",
    "",
    f"{cfg['dtype']}, remat {cfg['remat']!r}, {cfg['batch_size']} images per step, pools of "
    f"{cfg['pool_size']} batches, images {'x'.join(map(str, cfg['image_shape']))}; "
    f"{devices['cores']} CPU cores, jax {devices['jax']}.{scaled} Medians of {report['repeats']} "
    "rounds, in which all is timed in turn, and in brackets their quartiles.",
    "",
    f"- Matrix products: {told(ceiling['flops_per_second'], 1e-12)} TFLOP/s{datasheet}",
    f"- Training: {told(found['images_per_second'], form='.4g')} images/s, "
    f"{told(found['steps_per_second'], form='.4g')} steps/s, "
    f"{told(found['seconds_per_step'], 1e3, '.4g')} ms per step. Model FLOPs: "
    f"{found['model_flops_per_step'] / 1e12:.4g} T per step, "
    f"{told(found['utilisation'], 100)} % of what matrix products reach{of_datasheet}",
    "",
  ]


def _techniques(found: dict) -> list[str]:
  return [
    "## What each technique costs",
    "",
    *files.markdown_table(
      ["step", "ms", "over flow matching", "by its forward passes"],
      [
        [
          name,
          told(seconds, 1e3, ".4g"),
          told(found["over_flow_matching"][name], form=".3f"),
          f"{found['forward_passes'][name] / 3:.3f}",
        ]
        for name, seconds in found["seconds_per_step"].items()
      ],
    ),
    *files.markdown_table(
      ["technique", "% of a flow matching step"],
      [[name, told(cost, 100)] for name, cost in found["costs"].items()],
    ),
    "Parts of a step that were timed alone, on a device:",
    "",
    *files.markdown_table(
      ["part", "ms"],
      [[name, told(seconds, 1e3)] for name, seconds in found["seconds_alone"].items()],
    ),
  ]


def _pool(report: dict) -> list[str]:
  pool, step = report["pool"], report["train"]["seconds_per_step"]["median"]
  lines = [
    "## A pool",
    "",
    f"{told(pool['seconds'], form='.4g')} s on the devices:",
    "",
    *files.markdown_table(
      ["part", "s", "% of the pool"],
      [
        [name, told(seconds), told(pool["shares"][name], 100, ".2g")]
        for name, seconds in pool["parts"].items()
      ],
    ),
    "By the size of the pool:",
    "",
    *files.markdown_table(
      ["K", "pairs", "pairing, s", "% of K steps"],
      [
        [
          str(k),
          f"{k * report['config']['batch_size']:,}",
          told(seconds),
          f"{100 * seconds['median'] / k / step:.2g}",
        ]
        for k, seconds in pool["by_size"].items()
      ],
    ),
  ]
  if not pool["pairs_at"]:
    return lines
  return [
    *lines,
    "Pairing grows at least as the square of its pairs, K steps as K. From the largest pool, and "
    "with steps of other networks by their FLOPs, pairing reaches these shares of K steps at the "
    "latest with so many pairs:",
    "",
    *files.markdown_table(
      ["share", *pool["step_seconds"]],
      [
        [f"{100 * share:g} %", *(f"{pairs:,.0f}" for pairs in by_network.values())]
        for share, by_network in pool["pairs_at"].items()
      ],
    ),
  ]


def _input(report: dict) -> list[str]:
  found, loop = report["input"], report["input"]["loop"]
  return [
    "## Input",
    "",
    f"The steps above take {found['needed']:,.0f} images/s. The loop of training waits "
    f"{100 * loop['waited'] / loop['seconds']:.2g} % of its time for data and their transfer, "
    "while devices still work on what they were given before.",
    "",
    *files.markdown_table(
      ["threads", "images/s read by a process"],
      [[str(n), told(rate, form=",.0f")] for n, rate in found["images_per_second"].items()],
    ),
  ]


def told(value: dict, scale: float = 1.0, form: str = ".3g") -> str:
  """ "1.2 [1.1, 1.4]": a median and quartiles, scaled."""
  low, high = (format(scale * v, form) for v in value["quartiles"])
  return f"{format(scale * value['median'], form)} [{low}, {high}]"


def benchmark(config, out: str, *, rows: int, pools: list[int], repeats: int, devices=None) -> dict:
  """Measures and writes; see the module's docstring.

  Args:
    rows: 0 for the whole batch. devices: default all.
  Returns:
    The contents of benchmark.json.
  """
  exp, mesh = experiment_lib.parse(config), sharding.data_mesh(devices)
  rows = rows or exp.batch_size
  if repeats < 1:
    raise ValueError(f"--repeats={repeats} must be at least 1.")
  if not 0 < rows <= exp.batch_size:
    raise ValueError(f"--rows={rows}: give 1 to batch_size={exp.batch_size}.")
  if bad := [k for k in pools if k < 1]:
    raise ValueError(f"--pools={bad}: a pool has at least one batch.")
  if pools and exp.coupling.coupling == "independent":
    raise ValueError(
      f"--pools={pools}: there is no pairing with coupling.coupling='independent', leave "
      "--pools out."
    )
  for size in (exp.batch_size, rows):
    experiment_lib.check_devices(dataclasses.replace(exp, batch_size=size), mesh.size)
  files.check_writable(out)
  with source_of(exp) as source:
    report = measure(exp, mesh, source, rows=rows, pools=pools, repeats=repeats)
  if jax.process_index() != 0:
    return report
  files.write_whole(os.path.join(out, "benchmark.json"), json.dumps(report, indent=2) + "\n")
  files.write_whole(os.path.join(out, "benchmark.md"), as_markdown(report))
  figures.technique_costs(report["techniques"], os.path.join(out, "techniques.png"))
  if pools and report["pool"]["pairs_at"]:
    figures.pairing_shares(report, os.path.join(out, "scaling.png"))
  return report


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file("config", None, "What is measured.", lock_config=True)
  flags.DEFINE_string("out", None, "Folder for the report.")
  flags.DEFINE_integer("rows", 0, "Rows of the batch that the timed step trains on; 0 for all.")
  flags.DEFINE_list("pools", [], "Pool sizes K that are paired besides the config's.")
  flags.DEFINE_integer("repeats", 5, "Rounds.")
  flags.mark_flags_as_required(["config", "out"])
  multihost.define_flags()


def main(argv):
  """Measures; see the module's docstring."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}.")
  commands.quiet_libraries()
  jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
  given = flags.FLAGS
  with multihost.shared_fate(), commands.one_line_errors():
    multihost.initialize(*multihost.define_flags()())
    try:
      pools = [int(k) for k in given.pools]
    except ValueError:
      raise ValueError(f"--pools={','.join(given.pools)} must be whole numbers.") from None
    report = benchmark(given.config, given.out, rows=given.rows, pools=pools, repeats=given.repeats)
    if jax.process_index() == 0:
      print(as_markdown(report))


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=commands.parse_flags)
