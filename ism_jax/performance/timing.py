"""Times calls in turn, and summarises the seconds: median and quartiles."""

from collections.abc import Callable
import math
import os
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

SHORTEST = 0.2  # seconds of a timing: shorter calls are made several times
_LONG = 10.0  # seconds of a first call that cannot be a short one


def rounds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
  """Seconds of each call, [repeats], all in turn.

  Each returns what has to be ready when the clock stops. Of calls that are shorter than `SHORTEST`,
  several follow each other without waiting, as in training. All processes make the same calls.
  """
  # The most seconds of any process.
  once = lambda call: float(multihost_utils.process_allgather(np.float64(_seconds(call, 1))).max())
  together = {}
  for name, call in calls.items():
    seconds = once(call)  # with what is done the first time alone
    if seconds < _LONG:
      seconds = once(call)
    together[name] = math.ceil(SHORTEST / max(seconds, 1e-9))
  return in_turn(lambda name: _seconds(calls[name], together[name]), calls, repeats)


def in_turn(measure: Callable, names, repeats: int) -> dict[Any, np.ndarray]:
  """{name: measure(name), [repeats]}: all names one after another, `repeats` times over."""
  values = [[measure(name) for name in names] for _ in range(repeats)]
  return dict(zip(names, np.array(values).T, strict=True))


def _seconds(call, times: int) -> float:
  start = time.perf_counter()
  for _ in range(times):
    result = call()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / times


def quartiles(values) -> dict[str, float]:
  """{"median", "quartiles": [lower, upper]}, for JSON."""
  low, median, high = np.percentile(values, (25, 50, 75))
  return {"median": float(median), "quartiles": [float(low), float(high)]}


def format_quartiles(value: dict, scale: float = 1.0, form: str = ".3g") -> str:
  """ "1.2 [1.1, 1.4]": what `quartiles` returns, scaled."""
  low, high = (format(scale * v, form) for v in value["quartiles"])
  return f"{format(scale * value['median'], form)} [{low}, {high}]"


def cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
