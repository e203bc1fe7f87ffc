"""Classes as people call them: by name or by number, no class, or all in turn."""

from collections.abc import Sequence
import difflib

ALL = ("all", "-1")
NONE = "none"


def words(name: str) -> list[str]:
  """A name and its comma-separated parts ("tabby, tabby cat"), in one spelling."""
  parts = (" ".join(w.casefold().replace("_", " ").split()) for w in (name, *name.split(",")))
  return [part for part in parts if part]


def number_of(label: str | int, num_classes: int, names: Sequence[str] | None) -> int:
  """The number of a class.

  Args:
    label: its number or its name: the whole, or a part between commas that no other class has;
      "none" for no class. A class that is called "none", or by a number, is meant by its name.
    num_classes: which is the number of no class.
    names: of the classes; None where they have numbers alone.
  Raises:
    ValueError: there is no such class, or there are several.
  """
  if isinstance(label, str):
    wanted = " ".join(label.casefold().replace("_", " ").split())
    whole = [i for i, name in enumerate(names or ()) if words(name)[:1] == [wanted]]
    matches = whole or [i for i, name in enumerate(names or ()) if wanted in words(name)]
    if len(matches) == 1:
      return matches[0]
    if matches:
      listing = "; ".join(f"{i} is {names[i]}" for i in matches)
      raise ValueError(f"label {label!r} is {len(matches)} classes: {listing}. Give a number.")
    if wanted == NONE:
      return num_classes
    if not (wanted.isdecimal() and wanted.isascii()):
      known = {word: name for name in names or () for word in words(name)}
      close = dict.fromkeys(known[w] for w in difflib.get_close_matches(wanted, known))
      hint = f" Close are {'; '.join(close)}." if close else ""
      why = "is no class" if names else "is a name, and these classes have numbers alone"
      raise ValueError(
        f"label {label!r} {why}.{hint} Give a name or 0 to {num_classes - 1}, or {NONE!r}."
      )
    label = int(wanted)
  if not 0 <= label <= num_classes:
    raise ValueError(
      f"label {label}: classes are 0 to {num_classes - 1}, and {num_classes} is no class."
    )
  return int(label)
