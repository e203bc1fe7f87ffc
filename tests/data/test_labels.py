"""Classes by name or number."""

import pytest

from ism_jax.data import labels

NAMES = [
  "tench, Tinca tinca",
  "tabby, tabby cat",
  "crane",
  "crane, bird",
  "字",
  "7",
  "none of these",
]


@pytest.mark.parametrize(
  ("label", "number"),
  [
    ("tabby", 1), ("Tabby_Cat", 1), ("tinca  tinca", 0), ("crane", 2), ("bird", 3), ("字", 4),
    ("7", 5),  # which is what a class is called
    ("3", 3), (3, 3), ("none", 7), (7, 7),
  ],
)  # fmt: skip
def test_a_class_is_called_by_its_name_a_part_of_it_or_its_number(label, number):
  assert labels.number_of(label, len(NAMES), NAMES) == number


@pytest.mark.parametrize(
  ("label", "names", "message"),
  [
    ("taby", NAMES, "'taby' is no class. Close are tabby, tabby cat.* 0 to 6, or 'none'"),
    ("tabby", None, "'tabby' is a name, and these classes have numbers alone.* 0 to 6"),
    ("cat", ["a, cat", "b, cat"], "'cat' is 2 classes: 0 is a, cat; 1 is b, cat. Give a number"),
    (-1, NAMES, "label -1: classes are 0 to 6, and 7 is no class"),
    ("8", NAMES, "label 8: classes are 0 to 6"),
    ("²", None, "'²' is a name"),
  ],
)
def test_what_is_no_class_is_an_error_that_says_what_is_close(label, names, message):
  with pytest.raises(ValueError, match=message):
    labels.number_of(label, len(names) if names and len(names) == 2 else 7, names)
