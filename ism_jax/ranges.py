"""What the values of a config may be: declared beside each field, checked in one place.

A field has its range in its type: `Annotated[float, "[0, 1)"]` is an interval,
`Annotated[str, ("constant", "cosine")]` a choice, and `Annotated[tuple[int, ...], DISTINCT]` holds
one value or more, each once. A bound may be a power: 2^32. Of a union, `One | tuple[One, One]`, a
tuple is the second kind and everything else the first.
"""

import dataclasses
import numbers
import typing
from typing import Annotated

DISTINCT = "one value or more, each once"
_KINDS = {  # the types whose values each may have, and its name
  int: (numbers.Integral, "a whole number"),
  float: (numbers.Real, "a number"),
  bool: (bool, "True or False"),
  str: (str, "a text"),
}

# A JAX key has 32 bits of its seed: larger ones would be seeds of the same numbers.
Seed = Annotated[int, "[0, 2^32)"]
Guidance = Annotated[float, "[0, 100]"]
Side = Annotated[int, "[1, 1024]"]
Size = Side | tuple[Side, Side]  # of squares, or (height, width)


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
  """(height, width) of images of a size: of squares one number, or both."""
  height, width = (size, size) if isinstance(size, int) else size
  return height, width


def size_as_json(size: int | tuple[int, int]) -> int | list[int]:
  """A size as files have it: one number of squares, or [height, width]."""
  height, width = sides(size)
  return height if height == width else [height, width]


def check_fields(config, section: str = "") -> None:
  """Checks the fields of a dataclass, but for those that are dataclasses, which check themselves.

  Args:
    section: of the config, that this dataclass is; "" for the whole.
  Raises:
    ValueError: naming the key, its value and what to give instead.
  """
  for field in dataclasses.fields(config):
    if not dataclasses.is_dataclass(field.type):
      key = f"config.{section}.{field.name}" if section else f"config.{field.name}"
      check(key, getattr(config, field.name), field.type)


def check(name: str, value, kind) -> None:
  """Raises ValueError as `check_fields` does unless a value is of a kind: a type and its range."""
  kind, declared = split(kind)
  if typing.get_origin(kind) is typing.Union:
    _check_union(name, value, *typing.get_args(kind))
    return
  if typing.get_origin(kind) is tuple:
    _check_tuple(name, value, typing.get_args(kind), declared)
    return
  allowed, needed = _KINDS[kind]
  known, interval = (declared, "") if isinstance(declared, tuple) else ((), declared or "")
  fits = isinstance(value, allowed) and isinstance(value, bool) == (kind is bool)
  if fits and known and value not in known:
    raise ValueError(f"{name}={value!r} is unknown; known are {', '.join(known)}.")
  if not fits or (interval and not contains(interval, value)):
    raise ValueError(f"{name}={value!r}: give {needed}{interval and f' in {interval}'}.")


def split(kind) -> tuple:
  """(type, what is declared of its values or None) of a type that may be Annotated."""
  return typing.get_args(kind) if typing.get_origin(kind) is Annotated else (kind, None)


def bounds(interval: str) -> tuple[float, float]:
  """Those of "[0, 2^32)"."""
  values = (end.strip().partition("^") for end in interval[1:-1].split(","))
  return tuple(float(base) ** int(power or 1) for base, _, power in values)


def contains(interval: str, value) -> bool:
  """Whether a number lies in an interval; NaN lies in none."""
  least, most = bounds(interval)
  inside = least <= value <= most
  return inside and (interval[0] == "[" or value > least) and (interval[-1] == "]" or value < most)


def _check_union(name, value, one, several):
  if isinstance(value, tuple):
    check(name, value, several)
    return
  try:
    check(name, value, one)
  except ValueError as error:
    count = len(typing.get_args(several))
    raise ValueError(f"{str(error).removesuffix('.')}, or {count} of them: (24, 32).") from None


def _check_tuple(name, values, kinds, declared):
  repeated = kinds[-1] is Ellipsis
  if not isinstance(values, tuple) or not (repeated or len(values) == len(kinds)):
    needed = "values in parentheses, such as (1,)" if repeated else f"{len(kinds)} values"
    raise ValueError(f"{name}={values!r}: give {needed}.")
  for i, value in enumerate(values):
    check(f"{name}[{i}]", value, kinds[0 if repeated else i])
  if declared and not 0 < len(values) == len(set(values)):
    raise ValueError(f"{name}={values}: give {declared}.")
