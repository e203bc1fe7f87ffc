"""Compiles a config's training, coupling and sampling for TPUs that are not there, and reports.

  python -m ism_jax aot --config=configs/imagenet256.py --topology=v5e:8x8,v4:4x4x4 [--out=DIR]

Needs libtpu (`pip install "ism_jax[aot]"`) and no TPU. The functions are those that training runs,
with the shapes and shardings it gives them; minutes for each topology and SiT-XL/2. A topology is
v4:XxYxZ, v5e:XxY, v5p:XxYxZ or v6e:XxY, or several slices of one, 2xv5e:16x16.

For each topology: whether it fits a chip's memory, FLOPs, main-memory traffic by part of the step,
bytes between chips by kind of collective, and two estimates of the time and the utilisation, a
roofline and XLA's own; see `ASSUMPTIONS`. Printed, and with --out written to aot.json and aot.md. A
topology that fails has its error in the report, the others are still compiled, and the exit code is
1.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time

from absl import flags, logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags

from ism_jax import data, experiment, generate, model, steps
from ism_jax.experiment import Experiment
from ism_jax.performance import flops, hlo
from ism_jax.performance.topology import Topology, describe
from ism_jax.runtime import chips, commands, files, sharding

ASSUMPTIONS = """\
Compute: matrix products at the peak for bfloat16 (the cost matrix of the coupling, in float32, in
six passes), with what remat computes again; the coupling's element-wise arithmetic at 1/32 of it
(v5e: 1,024 lanes of 4 ALUs at 1.5 GHz). Memory: every instruction of the compiled program moves its
operands and results through main memory at full bandwidth, but for what XLA keeps on the chip.
These two overlap over the whole program, so that the roofline is a bound: no program is faster, but
for its links. Links: ring algorithms, all links busy of the axes along which a collective's chips
lie, those that wrap around only where the slice has them, 1 microsecond a hop, no overlap with the
rest; between slices the hosts' network cards. XLA's cycles: its own estimate, which it writes into
the program, of each instruction, one after another, and the links: nearer to the truth. Custom
calls (kernels), of which it estimates nothing, count there at the least they can take, so that it
is too short for them: operands and results in main memory at full bandwidth, or the FLOPs of their
own cost estimate, where they have one, at the peak, whichever is longer. Loops count as often as
they run; of a conditional every branch; Sinkhorn's and the greedy permutation's trip counts are
assumed.
Memory is what one program holds at its worst and, for the coupling and the sampler, what training
keeps meanwhile; the pool that is read ahead and the decoder of latents are not in it.
Utilisation: FLOPs of the model (none computed twice) over what the chips can do in that time."""

SINKHORN_ITERATIONS = 60  # 40 to 70 were seen with the config's momentum
GREEDY_ROUNDS = 10  # 8 were seen with 4,096 pairs
_VECTOR = 1 / 32  # of the peak, see ASSUMPTIONS
_HIGHEST = 6  # passes of bfloat16 products for a float32 product
_CHECKED_EVERY = 10  # iterations of Sinkhorn are a loop in ott's loop


def bytes_per_device(tree) -> int:
  """Bytes that shapes with shardings take on one device."""
  size = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
  return sum(map(size, jax.tree.leaves(tree)))


def out_of_memory(message: str) -> float | None:
  """The bytes that a program needs, from libtpu's refusal to compile it; None of another error.

  Arguments, results and temporaries together, whatever the message calls them.
  """
  size = re.search(r"Ran out of memory .*?([\d.]+)([KMGT])?\b.*?[\d.]+[KMGT]", message, re.DOTALL)
  return float(size[1]) * 1024 ** " KMGT".index(size[2] or " ") if size else None


def compile_one(function, arguments, devices: int, trips: dict[str, float]) -> dict:
  """Compiles a jitted function for shapes with shardings.

  Args:
    devices: of the mesh.
    trips: see `hlo.read`.
  Returns:
    {"seconds", "needed": bytes per chip} and, if it could be compiled, {"memory": its parts,
    "profile": hlo.Profile}.
  """
  start = time.perf_counter()
  lowered = function.lower(*arguments)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if (needed := out_of_memory(str(error))) is None:
      raise
    return {"seconds": time.perf_counter() - start, "needed": needed}
  analysis = compiled.memory_analysis()
  memory = {
    "arguments": analysis.argument_size_in_bytes,
    "results": analysis.output_size_in_bytes,
    "results_in_place_of_arguments": analysis.alias_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
    "program": analysis.generated_code_size_in_bytes,
  }
  return {
    "seconds": time.perf_counter() - start,
    "needed": sum(memory.values()) - 2 * memory["results_in_place_of_arguments"],
    "memory": memory,
    "profile": hlo.read(compiled.as_text(), devices, trips),
  }


def estimate(top: Topology, profile: hlo.Profile, at_peak: float, elementwise: float = 0) -> dict:
  """Estimated seconds of a call; see ASSUMPTIONS.

  Args:
    at_peak: FLOPs of all chips together, at the peak rate.
    elementwise: those at the slower rate.
  Returns:
    Of the roofline {"compute", "memory", "links", "total"}; {"custom_calls_at_least"}; and
    {"cycles"}: XLA's own estimate, custom calls and links.
  """
  chip = top.chip
  compute = (at_peak + elementwise / _VECTOR) / len(top.devices) / chip.flops
  memory = profile.hbm_bytes / chip.bandwidth
  links = sum(map(top.seconds, profile.collectives))
  kernels = [kernel for part in profile.parts.values() for kernel in part.kernels]
  custom = sum(kernel.seconds(chip.bandwidth, chip.flops) for kernel in kernels)
  seconds = {"compute": compute, "memory": memory, "links": links}
  seconds |= {"total": max(compute, memory) + links, "custom_calls_at_least": custom}
  return seconds | {"cycles": profile.cycles / chip.clock + custom + links}


def by_part(chip: chips.Chip, profile: hlo.Profile, calls: int) -> dict[str, dict]:
  """{"hbm_bytes", "custom_calls", "seconds"} by part of a program, of one of the `calls` it holds.

  The seconds are those of XLA's cycles and the custom calls.
  """
  parts = {}
  for name, part in profile.parts.items():
    custom = sum(kernel.seconds(chip.bandwidth, chip.flops) for kernel in part.kernels)
    parts[name] = {
      "hbm_bytes": part.bytes / calls,
      "custom_calls": sum(kernel.times for kernel in part.kernels) / calls,
      "seconds": (part.cycles / chip.clock + custom) / calls,
    }
  return parts


def analyse(exp: Experiment, top: Topology, iterations: int, rounds: int) -> dict:
  """The report of one topology: of train_steps, couple and sample."""
  mesh = sharding.data_mesh(top.devices)
  top = dataclasses.replace(top, devices=tuple(mesh.devices.flat))
  everywhere = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.replicated(mesh))
  whole = lambda tree: jax.tree.map(lambda a: everywhere(a.shape, a.dtype), tree)
  state, pool = steps.abstract_state(exp, mesh), steps.abstract_pool(exp, mesh)
  keys, index = whole(jax.eval_shape(steps.base_keys, 0)), everywhere((), jnp.int32)
  couple = steps.couple_function(exp, mesh)
  paired = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.rows(mesh, axis=1)),
    jax.eval_shape(couple, pool, keys, index)[0],
  )
  at_once = -(-exp.evaluation.batch_size // mesh.size) * mesh.size  # as `generate` rounds it
  x0 = jax.ShapeDtypeStruct((at_once, *exp.image_shape), jnp.float32, sharding=sharding.rows(mesh))
  per_sample = [everywhere((at_once,), kind) for kind in (jnp.int32, jnp.float32)]
  sample = generate.sample_function(exp, mesh, exp.sample.schedule)
  programs = {
    "train_steps": (steps.steps_function(exp, mesh), (state, paired, keys, index)),
    "couple": (couple, (pool, keys, index)),
    "sample": (sample, (whole(state.ema), x0, *per_sample)),
  }
  # A replicated state's average is the sampler's argument itself, a sharded one is gathered for it.
  average, resident = bytes_per_device(state.ema), bytes_per_device(state)
  is_argument = bytes_per_device(whole(state.ema)) == average
  meanwhile = {
    "train_steps": 0,
    "couple": resident,
    "sample": resident + bytes_per_device(paired) - is_argument * average,
  }
  trips = {"sinkhorn": math.ceil(iterations / _CHECKED_EVERY), "greedy_permutation": rounds}
  attention = exp.network(sharding.device_kind(mesh)).attention_for(exp.image_shape)
  step, pairing = flops.step(exp, attention), flops.couple(exp, iterations, rounds)
  work = {  # FLOPs of a call: at the peak, element by element
    "train_steps": ((step.model + step.recomputed) * exp.scan_steps, 0),
    "couple": (_HIGHEST * pairing.matrix, pairing.elementwise),
    "sample": (at_once * flops.sample(exp, exp.sample.schedule), 0),
  }
  calls = {"train_steps": exp.scan_steps, "couple": 1, "sample": 1}
  reports = {}
  for name, (function, arguments) in programs.items():
    logging.info("Compiling %s for %s ...", name, top.name)
    one = compile_one(function, arguments, mesh.size, trips)
    one["meanwhile"] = meanwhile[name]
    one["spare"] = top.chip.memory - one["needed"] - meanwhile[name]
    if profile := one.pop("profile", None):
      n, seconds = calls[name], estimate(top, profile, *work[name])
      one |= {
        "hbm_bytes": profile.hbm_bytes / n,
        "parts": by_part(top.chip, profile, n),
        "collective_bytes": {kind: size / n for kind, size in profile.payload().items()},
        "sent_bytes": sum(c.times * c.sent for c in profile.collectives) / n,
        "largest_collective_bytes": max((c.payload for c in profile.collectives), default=0),
        "assumed_loops": profile.assumed,
        "unknown_loops": list(profile.unknown),
        "estimate": {part: s / n for part, s in seconds.items()},
      }
    reports[name] = one
  report = {
    "topology": top.name,
    "chip": top.chip.name,
    "chips": mesh.size,
    "memory": top.chip.memory,
    "placement": steps.placement(exp, mesh),
    "attention": attention,
    "fits": all(one["spare"] >= 0 for one in reports.values()),
    "needed": max(one["needed"] + one["meanwhile"] for one in reports.values()),
    "state": {
      field: bytes_per_device(getattr(state, field))
      for field in ("params", "opt_state", "ema", "target_ema", "others")
      if getattr(state, field)
    },
    "flops": {**step._asdict(), "model": step.model, "per_chip": step.model / mesh.size},
    "programs": reports,
  }
  if all("estimate" in reports[name] for name in ("train_steps", "couple")):
    a_step, a_pool = reports["train_steps"], reports["couple"]
    seconds, pool_size = a_step["estimate"]["total"], exp.coupling.pool_size
    share = lambda pool, step: pool / (pool + pool_size * step) if pool else 0.0
    at_best = step.model / mesh.size / top.chip.flops
    report["utilisation"] = at_best / seconds
    report["utilisation_by_cycles"] = at_best / a_step["estimate"]["cycles"]
    report["images_per_second"] = exp.batch_size / seconds
    report["coupling_share"] = {
      "flops": share(sum(pairing), step.model),
      "hbm_bytes": share(a_pool["hbm_bytes"], a_step["hbm_bytes"]),
      "sent_bytes": share(a_pool["sent_bytes"], a_step["sent_bytes"]),
      "seconds": share(a_pool["estimate"]["total"], seconds),
    }
  return report


def report(exp: Experiment, name: str, iterations: int, rounds: int) -> dict:
  """`analyse` of the topology of this name, or {"topology", "error"}."""
  try:
    top = describe(name)
    experiment.check_devices(exp, len(top.devices))
    return analyse(exp, top, iterations, rounds)
  except ValueError as error:
    reason = str(error)
  except jax.errors.JaxRuntimeError as error:  # hours of other topologies are not lost for it
    reason = f"XLA fails: {str(error).splitlines()[0]}"
  logging.error("%s: %s", name, reason)
  return {"topology": name, "error": reason}


def setting(exp: Experiment, iterations: int, rounds: int) -> dict:
  """The part of aot.json that all topologies share.

  Raises:
    ValueError: for iterations or rounds that cannot be, or without libtpu.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError('libtpu is not installed: pip install "ism_jax[aot]".')
  if not 0 < iterations <= exp.coupling.max_iterations:
    raise ValueError(
      f"--sinkhorn_iterations={iterations}: give 1 to coupling.max_iterations="
      f"{exp.coupling.max_iterations}."
    )
  if rounds < 1:
    raise ValueError(
      f"--greedy_rounds={rounds}: a permutation takes at least one round: give 1 or more."
    )
  initialise = lambda key: model.init_params(key, exp.network(), exp.image_shape)
  parameters = jax.eval_shape(initialise, jax.random.key(0))
  return {
    "model": exp.model.size,
    "parameters": sum(a.size for a in jax.tree.leaves(parameters)),
    "remat": exp.model.remat,
    "batch_size": exp.batch_size,
    "micro_batches": exp.micro_batches,
    "pool_size": exp.coupling.pool_size,
    "pool_bytes": 4 * exp.coupling.pool_size * exp.batch_size * math.prod(exp.image_shape),
    "forward_flops": flops.forward(exp).total,
    "forward_equivalents": flops.forward_equivalents(exp),
    "sample_steps": str(exp.sample.steps),
    "sinkhorn_iterations": iterations,
    "greedy_rounds": rounds,
    "assumptions": ASSUMPTIONS.replace("\n", " "),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
  }


_gib = lambda n: f"{n / 2**30:.2f}"
_mb = lambda n: f"{n / 1e6:,.1f}"
_ms = lambda s: "–" if s is None else f"{1e3 * s:,.2f}"
_percent = lambda share: "–" if share is None else f"{100 * share:.2g} %"


def _table(rows: list[dict[str, str]]) -> list[str]:
  """A Markdown table of rows that are {heading: cell}; a row may lack cells. Nothing of none."""
  header = list(max(rows, key=len, default={}))
  lines = [[row.get(name, "–") for name in header] for row in rows]
  return files.markdown_table(header, lines) if rows else []


def as_markdown(content: dict) -> str:
  """aot.md of the contents of aot.json."""
  versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
  topologies = content["topologies"]
  lines = [
    f"# {content['model']} compiled ahead of time",
    "",
    f"{content['parameters']:,} parameters, {content['batch_size']} images per step in "
    f"{content['micro_batches']} micro-batches, remat {content['remat']!r}, pools of "
    f"{content['pool_size']} batches. One forward pass: {content['forward_flops'] / 1e9:.1f} GFLOP "
    f"an image; one step: {content['forward_equivalents']:.2f} of them an image. {versions}.",
    "",
    content["assumptions"],
    f"Here: {content['sinkhorn_iterations']} iterations, {content['greedy_rounds']} rounds.",
    "",
    *_table([_row(one) for one in topologies]),
  ]
  for one in topologies:
    lines += [] if "error" in one else _details(one, content)
  return "\n".join(lines)


def _row(one: dict) -> dict[str, str]:
  """A topology's line of the table."""
  if "error" in one:
    return {"topology": one["topology"], "chips": f"error: {one['error']}"}
  spare = (one["memory"] - one["needed"]) / 2**30
  step = one["programs"]["train_steps"]
  seconds = step.get("estimate", {})
  parts = ", ".join(_ms(seconds.get(part)) for part in ("compute", "memory", "links"))
  speed, share = one.get("images_per_second"), one.get("coupling_share", {})
  return {
    "topology": one["topology"],
    "chips": str(one["chips"]),
    "state": one["placement"],
    "GiB per chip, of": f"{_gib(one['needed'])} of {_gib(one['memory'])}",
    "spare": f"{spare:.2f}" if one["fits"] else f"**does not fit**: {-spare:.2f} too much",
    "ms per step by the roofline, a bound: compute, memory, links": (
      f"{_ms(seconds['total'])}: {parts}" if seconds else "–"
    ),
    "ms by XLA's cycles": _ms(seconds.get("cycles")),
    "utilisation at most, by cycles": ", ".join(
      _percent(one.get(key)) for key in ("utilisation", "utilisation_by_cycles")
    ),
    "images/s at most": f"{speed:,.0f}" if speed else "–",
    "coupling, of a pool's time": _percent(share.get("seconds")),
  }


def _details(one: dict, content: dict) -> list[str]:
  """A topology's section."""
  state = ", ".join(f"{name} {_gib(n)}" for name, n in one["state"].items())
  work = {name: f"{n / 1e12:.3g}" for name, n in one["flops"].items()}
  memory, traffic, places = [], [], []
  for name, program in one["programs"].items():
    sizes = program.get("memory", {}) | {n: program[n] for n in ("needed", "meanwhile", "spare")}
    row = {"GiB per chip": name} | {n.replace("_", " "): _gib(size) for n, size in sizes.items()}
    memory.append(row | {"seconds to compile": f"{program['seconds']:.0f}"})
    if "estimate" in program:
      per = {"train_steps": "step", "couple": "pool", "sample": "batch"}[name]
      kinds = ", ".join(f"{kind} {_mb(n)}" for kind, n in program["collective_bytes"].items())
      row = {
        "per chip": f"{name}, a {per}",
        "memory, GB": f"{program['hbm_bytes'] / 1e9:.2f}",
        "collectives, MB": kinds or "none",
        "sent, MB": _mb(program["sent_bytes"]),
        "largest, MB": _mb(program["largest_collective_bytes"]),
        "custom calls": f"{sum(n['custom_calls'] for n in program['parts'].values()):,.0f}",
      }
      seconds = {f"ms {n.replace('_', ' ')}": _ms(s) for n, s in program["estimate"].items()}
      traffic.append(row | seconds)
  step = one["programs"]["train_steps"]
  for part, n in step.get("parts", {}).items():
    row = {"a step's part, per chip": part, "memory, GB": f"{n['hbm_bytes'] / 1e9:.2f}"}
    row["of it"] = _percent(n["hbm_bytes"] / step["hbm_bytes"])
    places.append(row | {"ms by XLA's cycles and custom calls": _ms(n["seconds"])})
  lines = [
    f"## {one['topology']}",
    "",
    f"{one['chips']} chips {one['chip']}, attention {one['attention']!r}. State, "
    f"{one['placement']}, GiB per chip: {state}. A "
    f"step, TFLOP: {work['model']} ({work['per_chip']} per chip), gradient {work['gradient']}, "
    f"targets {work['targets']}; computed again: {work['recomputed']}.",
    "",
    *_table(memory),
    *_table(traffic),
    *_table(places),
  ]
  if "coupling_share" in one:
    shares = ", ".join(f"{_percent(n)} of {k}" for k, n in one["coupling_share"].items())
    lines += [
      f"The coupling, of a pool of {content['pool_size']} steps: {shares}. A pool's noise is "
      f"{_mb(content['pool_bytes'])} MB.".replace("_", " "),
      "",
    ]
  if unknown := sorted({u for p in one["programs"].values() for u in p.get("unknown_loops", [])}):
    lines += [f"Loops of unknown length, counted once: {', '.join(unknown)}.", ""]
  return lines


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file("config", None, "What is compiled.", lock_config=True)
  flags.DEFINE_list("topology", None, "TPU topologies: v5e:8x8,v4:4x4x4,2xv5e:16x16")
  flags.DEFINE_string("out", None, "Folder to write aot.json and aot.md to.")
  number = functools.partial(flags.DEFINE_integer, upper_bound=10**6)
  number("sinkhorn_iterations", SINKHORN_ITERATIONS, "Assumed of a solve.")
  number("greedy_rounds", GREEDY_ROUNDS, "Assumed of a permutation.")
  flags.mark_flags_as_required(["config", "topology"])


def main(argv):
  """Reports on the topologies of the flags."""
  jax.config.update("jax_platforms", "cpu")
  args = flags.FLAGS
  with commands.one_line_errors():
    exp = experiment.parse(data.resolve(args.config))
    if args.out is not None:
      files.check_writable(args.out)
    assumed = args.sinkhorn_iterations, args.greedy_rounds
    content = setting(exp, *assumed) | {"topologies": []}
    for name in args.topology:
      content["topologies"].append(report(exp, name, *assumed))
      if args.out is not None:  # each time: a topology takes minutes
        files.write_whole(os.path.join(args.out, "aot.json"), json.dumps(content, indent=2))
        files.write_whole(os.path.join(args.out, "aot.md"), as_markdown(content))
  print(as_markdown(content))
  if errors := sum("error" in one for one in content["topologies"]):
    raise SystemExit(f"Error: {errors} of {len(content['topologies'])} topologies; see above.")
