"""What one call of a compiled program does, read from its optimised HLO: collectives and traffic.

XLA's own `cost_analysis` counts the body of a loop once. Here an instruction counts as often as it
runs: times the trip counts of the loops that hold it, which are in the text, or follow from
constants in it, or (a loop until convergence) are assumed by the caller, or else count once and are
named. Of a conditional every branch counts. All is per device, as the text is.

Where traffic belongs is read from JAX's name of an instruction, which holds the names of Flax's
modules: see `PARTS`. The network's parts hold its calls for the targets too.
"""

import collections
from collections.abc import Mapping
import dataclasses
import math
import operator
import re
from typing import NamedTuple

import numpy as np

# "send" is to another slice of TPUs: XLA splits what spans slices into these and collectives.
_COLLECTIVE = re.compile(
  "(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|send)"
  "(-start)?"
)
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
# Of XLA's own bookkeeping around the instructions that move something.
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollective", "ConcatBitcast")
_UPDATE = "dynamic-update-slice"
_MOST_TRIPS = 100_000  # of a loop that is counted by running its counter

# Instructions that move nothing, and the second half of what a "-start" began.
_FREE = re.compile(
  "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id|iota|"
  "async-update|opt-barrier|.*-done"
)
_OPERATORS = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_COMPARISONS = ("LT", "LE", "GT", "GE", "EQ", "NE")
_OPERATORS |= {name: getattr(operator, name.lower()) for name in _COMPARISONS}

# The parts of a training step, and the patterns of "opcode name" of what belongs to them: the first
# that matches counts. Beside them are "collectives", and "other".
PARTS = {
  "prefetches": r"^\S+-start ",  # and what is brought back, beside other work
  "qkv and proj": r"/attn/(qkv/|proj/|add$)",  # the bias of qkv
  "attention": r"/attn/",
  "MLP": r"/fc[12]/|/blocks/(tanh|integer_pow)",  # of gelu
  "adaLN": r"adaLN_modulation/|/blocks/(split|concatenate)",
  "norms and modulation": r"/blocks/|/norm_final/",
  "embedders and final layer": r"_embedder/|/final_linear/|^fusion .*SiT\)*/\w+$",
  "stacks of layers": r"SiT.*/dynamic_(update_)?slice$",  # kept activations, layers' weights
  "copies, casts and zeroing": r"^(broadcast|convert|copy|pad|slice|transpose) ",
  "sum of micro-batches": r"/shard_map/while/body/closed_call/add$",
  "losses": r"/shard_map/",
  "optimizer and EMAs": r" jit\(train_steps\)/",
}


class Array(NamedTuple):
  """An array of a result: bytes without padding, and whether in main memory, not on the chip."""

  bytes: int
  in_hbm: bool


class Instruction(NamedTuple):
  """A line of HLO."""

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  literal: str  # what stands in the parentheses: the value of a constant, a parameter's number
  attributes: str

  def find(self, pattern: str) -> str | None:
    """What the group of a pattern matches in the attributes, if it does."""
    match = re.search(pattern, self.attributes)
    return match and match[1]

  def called(self, attribute: str) -> list[str]:
    """The computations named by an attribute, such as body=%region_0 or calls={%a, %b}."""
    named = re.findall(rf"\b(?:{attribute})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
    return re.findall(r"[\w.\-]+", " ".join(named))

  @property
  def op_name(self) -> str | None:
    """JAX's name of it."""
    return self.find(r'op_name="([^"]*)"')

  @property
  def collective(self) -> str | None:
    """Which collective it is, if it is one."""
    match = _COLLECTIVE.fullmatch(self.opcode)
    return match and match[1]

  @property
  def is_free_call(self) -> bool:
    """Whether it is a custom call that moves nothing."""
    target = self.find(r'custom_call_target="([^"]*)"')
    return self.opcode == "custom-call" and target.startswith(_FREE_CALLS)


class Computation(NamedTuple):
  """Instructions by name, and the name of the result."""

  instructions: dict[str, Instruction]
  root: str


class Collective(NamedTuple):
  """A collective instruction.

  Attributes:
    payload: bytes of the whole array that is reduced, gathered (all of its parts) or passed on.
    group: places in the mesh of the devices of the first group that takes part together.
    times: how often a call runs it.
  """

  kind: str
  payload: int
  group: tuple[int, ...]
  times: float

  @property
  def devices(self) -> int:
    """How many devices take part together."""
    return len(self.group)

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, by the ring algorithm of each kind."""
    share = (self.devices - 1) / self.devices
    passes = {"all-gather": share, "reduce-scatter": share, "all-to-all": share}
    return self.payload * (passes | {"all-reduce": 2 * share}).get(self.kind, 1)


class Kernel(NamedTuple):
  """A custom call, of which XLA estimates no cycles.

  Attributes:
    bytes: of operands and results in main memory, each time.
    flops: those of its own cost estimate, each time; 0 where it has none.
    times: how often a call runs it.
  """

  bytes: float
  flops: float
  times: float

  def seconds(self, bandwidth: float, flops: float) -> float:
    """The least that all times take at these rates per second."""
    return self.times * max(self.bytes / bandwidth, self.flops / flops)


@dataclasses.dataclass
class Traffic:
  """What a part of a program does in a call.

  Attributes:
    bytes: read from and written to main memory, arrays without their padding.
    cycles: XLA's own estimate for all instructions but collectives and custom calls.
    kernels: the custom calls, whose bytes are among the bytes.
  """

  bytes: float = 0.0
  cycles: float = 0
  kernels: list[Kernel] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Profile:
  """What a call does on one device.

  Attributes:
    collectives: every collective instruction.
    parts: traffic by `PARTS`, the largest first.
    assumed: JAX's names of the loops whose trip counts the caller gave, and the counts.
    unknown: those of the loops whose trip counts nobody knows; they count once.
  """

  collectives: tuple[Collective, ...]
  parts: dict[str, Traffic]
  assumed: dict[str, float]
  unknown: tuple[str, ...]

  @property
  def hbm_bytes(self) -> float:
    """Bytes of all parts."""
    return sum(part.bytes for part in self.parts.values())

  @property
  def cycles(self) -> float:
    """Cycles of all parts."""
    return sum(part.cycles for part in self.parts.values())

  def payload(self) -> dict[str, float]:
    """Bytes by kind of collective, each as often as it runs."""
    total = collections.Counter()
    for c in self.collectives:
      total[c.kind] += c.times * c.payload
    return dict(total)


def _split(text: str, start: int) -> int:
  """The position after the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i + 1
  raise ValueError(f"the HLO line {text[:80]!r} ends within parentheses; it is not XLA's text.")


def _arrays(shape: str) -> tuple[Array, ...]:
  """The arrays of a shape such as f32[8,128]{1,0:T(8,128)S(1)}, or of a tuple of them."""
  arrays = []
  for kind, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
    bits = _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind)[0])
    elements = math.prod(int(n.removeprefix("<=")) for n in dims.split(",") if n)
    arrays.append(Array(math.ceil(elements * bits / 8), not re.search(r"S\([1-9]", layout)))
  return tuple(arrays)


_INSTRUCTION = re.compile(r" +(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
# Kernels print their metadata over several lines, which belong to the instruction's.
_LINE_END = re.compile(
  r"\n(?= +(?:ROOT )?%?[\w.\-]+ = |(?:ENTRY )?%?[\w.\-]+ \(|\}?$)", re.MULTILINE
)


def _instruction(line: str) -> tuple[Instruction, bool] | None:
  """A line's instruction and whether it is the root, or None for another line."""
  if not (head := _INSTRUCTION.match(line)):
    return None
  start = head.end()
  end = _split(line, start) if line[start] == "(" else line.index(" ", start)
  opcode = re.compile(r" ([\w\-]+)\(").match(line, end)
  close = _split(line, opcode.end() - 1)
  literal, attributes = line[opcode.end() : close - 1], line[close:]
  operands = tuple(re.findall(r"%([\w.\-]+)", literal))
  arrays = _arrays(line[start:end])
  return Instruction(head[2], arrays, opcode[1], operands, literal, attributes), bool(head[1])


def _parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations of a module by name, and the name of its entry."""
  computations, entry, instructions, root = {}, None, {}, None
  for line in _LINE_END.split(text):
    if line.endswith("{") and (head := _COMPUTATION.match(line)):
      name, instructions, root = head[2], {}, None
      entry = name if head[1] else entry
    elif line == "}" and instructions:
      computations[name] = Computation(instructions, root)
      instructions = {}
    elif parsed := _instruction(line):
      instruction, is_root = parsed
      instructions[instruction.name] = instruction
      root = instruction.name if is_root else root
  if entry not in computations:
    raise ValueError("the text holds no HLO module: give that of `compiled.as_text()`.")
  return computations, entry


def _hbm(arrays: tuple[Array, ...]) -> int:
  """Bytes that lie in main memory."""
  return sum(a.bytes for a in arrays if a.in_hbm)


def _parameters(computation: Computation) -> list[str]:
  """The names of a computation's parameters, in order."""
  parameters = [i for i in computation.instructions.values() if i.opcode == "parameter"]
  return [i.name for i in sorted(parameters, key=lambda i: int(i.literal))]


def _group(instruction: Instruction, mesh_size: int) -> tuple[int, ...]:
  """The first group of places that take part together; all of the mesh where none are named."""
  groups = instruction.find(r"replica_groups=(.*?)(?:, \w+=|$)") or ""
  integers = lambda listed: [int(n) for n in listed.split(",")]
  if listed := re.match(r"\{\{([\d,]+)\}", groups):
    return tuple(integers(listed[1]))
  if iota := re.match(r"\[\d+,(\d+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", groups):
    places = np.arange(math.prod(integers(iota[2]))).reshape(integers(iota[2]))
    places = places.transpose(integers(iota[4])) if iota[3] else places
    return tuple(places.reshape(-1, int(iota[1]))[0].tolist())
  if mesh := re.match(r"mesh\[(.*?)\] ?\{(.*?)\}", groups):
    sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    axes = re.findall(r"'(\w+)'", mesh[2])
    places = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    first = tuple(slice(None if axis in axes else 1) for axis in sizes)
    return tuple(places[first].ravel().tolist())
  return tuple(range(mesh_size))


class _Reader:
  """Adds up a module, from its entry down."""

  def __init__(self, computations, trips: Mapping[str, float], devices: int):
    self._computations, self._assumptions, self._devices = computations, trips, devices
    self.collectives = {}  # of each (Collective, bytes that it moves in main memory)
    self.parts, self.assumed, self.unknown = collections.defaultdict(Traffic), {}, []

  def run(self, name: str, times: float) -> None:
    """Counts a computation that runs `times` times."""
    computation = self._computations[name]
    for instruction in computation.instructions.values():
      opcode = instruction.opcode
      if instruction.collective:
        self._count_collective(computation, instruction, times)
      elif opcode == "while":
        trips = self._trips(computation, instruction)
        self.run(instruction.called("body")[0], times * trips)
        self.run(instruction.called("condition")[0], times * (trips + 1))
      elif opcode in ("conditional", "call", "async-start"):
        for called in instruction.called("(?:branch|true|false)_computations?|to_apply|calls"):
          self.run(called, times)
      elif not (_FREE.fullmatch(opcode) or instruction.is_free_call):
        self._count(computation, instruction, times)

  def _count(self, computation, instruction, times) -> None:
    label = f"{instruction.opcode} {self._name(computation, instruction)}"
    part = self.parts[next((p for p, known in PARTS.items() if re.search(known, label)), "other")]
    moved = self._traffic(computation, instruction, times)
    part.bytes += times * moved
    cycles = instruction.find(r'"estimated_cycles":"(\d+)"')
    part.cycles += times * int(cycles or 0)
    if instruction.opcode == "custom-call" and cycles is None:
      flops = instruction.find(r'"cost_estimate":\{"flops":"(\d+)"')
      part.kernels.append(Kernel(moved, int(flops or 0), times))

  def _name(self, computation, instruction) -> str:
    """JAX's name of an instruction; where XLA dropped it, that of the work it goes with.

    Of a fusion that of the largest array within; or else of what the instruction makes something
    of, such as the array that a copy lays out anew.
    """
    if name := instruction.op_name:
      return name
    if instruction.opcode == "fusion":
      fused = self._computations[instruction.called("calls")[0]]
      if named := [i for i in fused.instructions.values() if i.op_name]:
        return max(named, key=lambda i: sum(a.bytes for a in i.arrays)).op_name
    if instruction.opcode == "tuple" or not instruction.operands:
      return ""
    return self._name(computation, computation.instructions[instruction.operands[0]])

  def _trips(self, computation, loop) -> float:
    """How often a while loop runs: by the text, or else assumed, or else once."""
    trips = self._counted_trips(computation, loop)
    if trips is not None:
      return trips
    operation = loop.op_name or loop.name
    for part, assumed in self._assumptions.items():
      if part in operation:
        self.assumed[operation] = assumed
        return assumed
    self.unknown.append(operation)
    return 1

  def _counted_trips(self, computation, loop) -> int | None:
    """None where they depend on data."""
    if count := loop.find(r'"known_trip_count":\{"n":"(\d+)"\}'):
      return int(count)
    # What flows into the loop from its surroundings, whose own arguments are data.
    state = self._value(computation, loop.operands[0], [], {})
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    for trips in range(_MOST_TRIPS):
      goes_on = self._result(condition, [state])
      if not isinstance(goes_on, int):
        return None
      if not goes_on:
        return trips
      state = self._result(body, [state])
    return None

  # The integer arithmetic of loop counters, and nothing else: values are int, list or None, which
  # is whatever does not follow from the constants of the text.

  def _result(self, name: str, arguments: list):
    computation = self._computations[name]
    return self._value(computation, computation.root, arguments, {})

  def _value(self, computation, name, arguments, known):
    if name not in known:
      known[name] = None  # also ends what would never end
      known[name] = self._apply(computation, computation.instructions[name], arguments, known)
    return known[name]

  def _apply(self, computation, instruction, arguments, known):
    operand = lambda i: self._value(computation, instruction.operands[i], arguments, known)
    opcode = instruction.opcode
    if opcode == "constant":
      literal = {"true": "1", "false": "0"}.get(instruction.literal, instruction.literal)
      return int(literal) if re.fullmatch(r"-?\d+", literal) else None
    if opcode == "parameter":
      number = int(instruction.literal)
      return arguments[number] if number < len(arguments) else None
    operands = lambda: [operand(i) for i in range(len(instruction.operands))]
    if opcode == "tuple":
      return operands()
    if opcode == "get-tuple-element":
      index = int(instruction.find(r"index=(\d+)"))
      return values[index] if isinstance(values := operand(0), list) else None
    if opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
      return operand(0)
    if opcode == "fusion":
      return self._result(instruction.called("calls")[0], operands())
    if opcode in ("add", "subtract", "multiply", "compare"):
      a, b = operand(0), operand(1)
      if not (isinstance(a, int) and isinstance(b, int)):
        return None
      return int(_OPERATORS[instruction.find(r"direction=(\w+)") or opcode](a, b))
    return None

  def _count_collective(self, computation, instruction, times) -> None:
    operands = [computation.instructions[name] for name in instruction.operands]
    kind, payload = instruction.collective, sum(a.bytes for i in operands for a in i.arrays)
    group = _group(instruction, self._devices)
    if len(group) == 1:
      return
    payload *= len(group) if kind == "all-gather" else 1
    moved = sum(_hbm(i.arrays) for i in operands) + _hbm(instruction.arrays[: len(operands)])
    # One that runs beside other instructions is in the text of each of them, within their loops
    # too; it runs as often as the first of these, which starts it.
    key = len(self.collectives)
    if "async_collective_fusion_config" in instruction.attributes:
      key = instruction.find(r"(channel_id=\d+)")
    if key not in self.collectives or times < self.collectives[key][0].times:
      self.collectives[key] = Collective(kind, payload, group, times), times * moved

  def _traffic(self, computation, instruction, times) -> float:
    """Bytes that one run of an instruction reads from main memory and writes to it.

    Counts the collectives within a fusion too: XLA fuses them with what surrounds them.
    """
    operands = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode.endswith("-start"):
      # Results: of a copy (copy, operand, context), of a slice (operands, piece, context).
      is_slice = instruction.opcode.endswith("slice-start")
      moved = instruction.arrays[len(operands) if is_slice else 0]
      return moved.bytes * (bool(_hbm(operands[0].arrays)) + moved.in_hbm)
    if instruction.opcode == "fusion":
      within = self._computations[instruction.called("calls")[0]]
      names = _parameters(within)
      for inner in within.instructions.values():
        if inner.collective:
          self._count_collective(within, inner, times)
    else:
      within = Computation({i.name: i for i in (*operands, instruction)}, instruction.name)
      names = instruction.operands
    sizes = {name: _hbm(i.arrays) for name, i in zip(names, operands, strict=True)}  # once each
    read = sum(self._read(within, name, size) for name, size in sizes.items())
    return read + self._written(within, within.root, instruction.arrays)

  def _read(self, computation, name: str, whole: float) -> float:
    """Bytes that a computation reads of the value `name`, at most the `whole` of it."""
    if not whole:
      return 0.0
    total = 0.0
    for user in computation.instructions.values():
      if name not in user.operands:
        continue
      first = user.operands[0] == name
      if first and user.opcode in ("dynamic-slice", "slice", "gather"):
        total += sum(a.bytes for a in user.arrays)
      elif user.opcode == "tuple" or user.is_free_call or user.collective:
        pass  # passed on, or counted with the collectives
      elif first and user.opcode == _UPDATE:
        pass  # in place: what is not updated stays where it is
      elif user.opcode in ("bitcast", "get-tuple-element"):
        total += self._read(computation, user.name, whole)
      elif user.opcode == "fusion":
        inner = self._computations[user.called("calls")[0]]
        for parameter, operand in zip(_parameters(inner), user.operands, strict=True):
          if operand == name:
            total += self._read(inner, parameter, whole)
      else:
        return whole
    return min(total, whole)

  def _written(self, computation, name: str, arrays: tuple[Array, ...]) -> float:
    """Bytes written of a result; of an update in place, the update."""
    root = computation.instructions[name]
    if root.opcode == "tuple" and len(root.operands) == len(arrays):
      return sum(
        self._written(computation, operand, (array,))
        for operand, array in zip(root.operands, arrays, strict=True)
      )
    if root.opcode == "parameter" or root.is_free_call or root.collective:
      return 0.0
    if root.opcode == "bitcast":
      return self._written(computation, root.operands[0], arrays)
    if root.opcode == _UPDATE:
      update = computation.instructions[root.operands[1]]
      return min(_hbm(arrays), sum(a.bytes for a in update.arrays))
    return _hbm(arrays)


def read(text: str, devices: int, trips: Mapping[str, float]) -> Profile:
  """Reads `compiled.as_text()`.

  Args:
    text: of one device's program.
    devices: of the mesh.
    trips: how often loops run whose count depends on data, by a part of their JAX name, such as
      {"sinkhorn": 11} for a loop in `jax.named_scope("sinkhorn")`.
  """
  computations, entry = _parse(text)
  reader = _Reader(computations, trips, devices)
  reader.run(entry, 1)
  reader.parts["collectives"].bytes = sum(moved for _, moved in reader.collectives.values())
  return Profile(
    collectives=tuple(collective for collective, _ in reader.collectives.values()),
    parts=dict(sorted(reader.parts.items(), key=lambda named: -named[1].bytes)),
    assumed=reader.assumed,
    unknown=tuple(reader.unknown),
  )
