"""Draws the Latin letters of the fonts of this machine: a dataset that is real, and no download.

  apt-get install 'fonts-*'       # or some of them: the more fonts, the more images
  python launch/glyphs.py OUT [FONTS]

Grey images of 32x32 pixels in 26 class folders, A to Z, of the capital and the small letter of each
font below FONTS (default /usr/share/fonts). Each letter is scaled to the same extent and centred;
fonts that lack letters or draw boxes for them are left out, and of equal images there is one.
"""

import pathlib
import string
import sys

from PIL import Image, ImageFont

SIZE, MARGIN = 32, 3  # pixels of an image, and of its empty border
_DRAWN = 128  # font size, before it is shrunk
_DISTINCT = 40  # of 52 letters: those of some fonts have only capitals


def letters(path) -> dict[str, Image.Image]:
  """The letters of a font by name; none of a font that lacks some."""
  try:
    font = ImageFont.truetype(path, _DRAWN)
    masks = {letter: font.getmask(letter) for letter in string.ascii_letters}
  except (OSError, ValueError):  # PIL's, of fonts that it cannot draw
    return {}
  if None in [mask.getbbox() for mask in masks.values()]:
    return {}
  drawn = {letter: (mask.size, bytes(mask)) for letter, mask in masks.items()}
  if len(set(drawn.values())) < _DISTINCT:
    return {}
  return {letter: _centred(Image.frombytes("L", *data)) for letter, data in drawn.items()}


def _centred(ink: Image.Image) -> Image.Image:
  ink = ink.crop(ink.getbbox())
  scale = (SIZE - 2 * MARGIN) / max(ink.size)
  filters = Image.Resampling
  shape = [max(1, round(n * scale)) for n in ink.size]
  ink = ink.resize(shape, filters.BOX if scale < 1 else filters.BICUBIC)
  image = Image.new("L", (SIZE, SIZE))
  image.paste(ink, ((SIZE - ink.width) // 2, (SIZE - ink.height) // 2))
  return image


def draw(out: str, fonts: str = "/usr/share/fonts") -> None:
  """Writes the images; see above."""
  files = [p for p in sorted(pathlib.Path(fonts).rglob("*.[ot]tf")) if p.is_file()]
  seen, used = set(), 0
  for letter in string.ascii_uppercase:
    (pathlib.Path(out) / letter).mkdir(parents=True)
  for i, path in enumerate(files):
    images = letters(path)
    used += bool(images)
    for letter, image in images.items():
      if (pixels := image.tobytes()) not in seen:
        seen.add(pixels)
        case = "capital" if letter.isupper() else "small"
        image.save(pathlib.Path(out) / letter.upper() / f"{i:04d}_{path.stem}_{case}.png")
  if not used:
    sys.exit(f"Error: below {fonts} is no font (.ttf, .otf) with Latin letters: install some.")
  print(f"{len(seen)} images of {used} of {len(files)} fonts are in {out}.")


if __name__ == "__main__":
  if not 2 <= len(sys.argv) <= 3:
    sys.exit(__doc__)
  draw(*sys.argv[1:])
