"""Images of a folder as a dataset: how they are listed, cropped, split and found again."""

import io
import json
import os
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
from PIL import Image
import pytest

from configs import images as images_config
from configs import latents as latents_config
from ism_jax import data, experiment
from ism_jax.data import folders, images, recipe

SIZE = 8


def draw(seed: int, shape=(12, 10, 3)) -> Image.Image:
  array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  return Image.fromarray(array[..., 0] if shape[-1] == 1 else array)


def png(image: Image.Image, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, "PNG", **options)
  return buffer.getvalue()


def write(root: pathlib.Path, contents: dict[str, bytes]) -> str:
  for name, content in contents.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
  return str(root)


def listed(where) -> list[tuple]:
  """(class, bytes) of all images of a source."""
  source = images.open_source(str(where), "")
  read = map(source.read, range(source.size))
  return [(source.classes[label], content) for content, label in read]


@pytest.fixture(autouse=True)
def prepared_in(tmp_path, monkeypatch):
  """Where folders are prepared."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
  return tmp_path / "prepared" / "images"


def config_of(folder, words="ism", **changes):
  config = images_config.get_config(words)
  config.data.update({"dir": str(folder), "image_size": SIZE, "num_threads": 0} | changes)
  return config


def settings(**changes) -> folders.Settings:
  return folders.settings_of(experiment.parse(recipe.fill(config_of("", **changes), FACTS)).data)


FACTS = recipe.Facts(
  50, (SIZE, SIZE, 3), 2, {"data.image_size": SIZE, "data.channels": 3, "data.num_classes": 2}
)


def load(folder, split="train", **changes):
  config = data.resolve(config_of(folder, **changes))
  return data.load_source(experiment.parse(config).data, split)


@pytest.fixture
def two_classes(tmp_path):
  """24 images of two classes, of which two are the same."""
  contents = {f"{'ab'[i % 2]}/{i:02}.png": png(draw(i)) for i in range(23)}
  return write(tmp_path / "photos", contents | {"a/copy.png": contents["a/04.png"]})


def archive_of(path, names: dict[str, bytes]):
  if path.suffix == ".zip":
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
      for name, content in names.items():
        archive.writestr(name, content)
    return path
  with tarfile.open(path, "w") as archive:
    for name, content in names.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("above", ["", "photos/"])
def test_images_lie_anywhere_below_their_class_in_a_folder_a_zip_and_a_tar(tmp_path, kind, above):
  names = {"b/images/1.JPEG": b"1", "b/0.png": b"22", "a/x.avif": b"333", "a/notes.txt": b"4"}
  names |= {"a/.hidden.png": b"5", "loose.png": b"6"} if not above else {"__MACOSX/a/x.png": b"7"}
  names = {name if name.startswith("__") else above + name: c for name, c in names.items()}
  where = tmp_path / f"source.{kind}"
  _ = write(where / "", names) if kind == "folder" else archive_of(where, names)
  if kind == "folder":
    shutil.rmtree(where / "__MACOSX", ignore_errors=True)
    where = where / above
  assert listed(where) == [("a", b"333"), ("b", b"22"), ("b", b"1")]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_images_without_class_folders_are_one_class(tmp_path, kind):
  names, where = {"1.png": b"1", "0.jpg": b"2", "notes.txt": b"3"}, tmp_path / f"cats.{kind}"
  _ = write(where, names) if kind == "folder" else archive_of(where, names)
  assert listed(where) == [("cats.folder" if kind == "folder" else "cats", c) for c in (b"2", b"1")]


def test_splits_are_not_taken_for_classes(tmp_path):
  where = write(tmp_path / "tiny", {"train/a/1.png": b"1", "val/images/2.png": b"2"})
  with pytest.raises(ValueError, match=r"train, val, which are splits and no classes: name .*val"):
    images.open_source(where, "")
  assert listed(f"{where}/train") == [("a", b"1")]


def test_a_damaged_or_locked_member_of_a_zip_is_one_image_and_a_damaged_zip_an_error(tmp_path):
  path = archive_of(tmp_path / "x.zip", {"1.png": png(draw(0)), "2.png": png(draw(1))})
  content = bytearray(path.read_bytes())
  content[60:64] = b"\0\0\0\0"  # of the first member
  path.write_bytes(content)
  assert len(load(path, held_out=0.0)) == 1
  with zipfile.ZipFile(path) as archive:
    at = archive.start_dir
  content[at + 8] |= 1  # of the first entry of the directory
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"is encrypted, 1\.png for one: unpack it"):
    images.open_source(str(path), "")


def test_the_crops_are_adms_and_every_image_is_in_one_split(two_classes):
  sources = {split: load(two_classes, split) for split in ("train", "test")}
  crops = {}
  for i in range(23):
    crop = images.centre_crop(draw(i), SIZE)
    crops[crop.tobytes()] = ("ab".index("ab"[i % 2]), 2 if i == 4 else 1)
  seen = {}
  for source in sources.values():
    pixels, labels = data.all_images(source)
    for image, label in zip(pixels, labels, strict=True):
      seen.setdefault(image.tobytes(), []).append((label, id(source)))
  assert {c: (s[0][0], len(s)) for c, s in seen.items()} == crops
  assert all(len(set(places)) == 1 for places in seen.values()), "copies are in two splits"
  assert len(sources["test"]) in (5, 6)  # a fourth of 23, as 8 are too many, and perhaps the copy
  assert sources["train"].classes == ["a", "b"]
  assert sources["train"].class_counts == np.bincount(data.all_images(sources["train"])[1]).tolist()


def test_the_split_keeps_its_share_and_the_last_image_of_each_class():
  digests = [bytes([i // 256, i % 256]) for i in range(1000)]
  out = folders.split(digests, [0] * 1000, 0.1)
  assert out.sum() == 100
  labels = np.arange(1000) % 600  # 200 classes have one image
  out = folders.split(digests, labels.tolist(), 0.5)
  assert len(set(labels[~out])) == 600 and out.sum() == 400
  assert not folders.split(digests, [0] * 1000, 0.0).any()
  assert not folders.split([b"a"] * 3, [0] * 3, 0.5).any(), "nothing would be left to train on"
  assert folders.split([b"a", b"b", b"c"], [0] * 3, 0.1).sum() == 1


def test_the_same_images_are_prepared_once_and_other_ones_anew(two_classes, prepared_in, tmp_path):
  before = load(two_classes)
  load(two_classes, "test")
  (first,) = prepared_in.iterdir()
  os.utime(first / folders.MANIFEST, (0, 0))
  load(two_classes)
  assert (first / folders.MANIFEST).stat().st_mtime == 0, "it was prepared again"
  # The same pixels elsewhere are the same data, whatever their files.
  shutil.copytree(two_classes, tmp_path / "again")
  assert load(tmp_path / "again").identity == before.identity
  (pathlib.Path(two_classes) / "a/00.png").write_bytes(png(draw(99)))
  after = load(two_classes)
  assert len(list(prepared_in.iterdir())) == 3
  with pytest.raises(ValueError, match=r"not the data .* contents was '"):
    data.check_same(before.identity, after.identity, may_change=False)
  assert load(first).identity == before.identity, "a prepared folder is a dataset itself"


def test_a_prepared_folder_of_other_settings_or_damaged_is_refused(two_classes, prepared_in):
  load(two_classes)
  (folder,) = prepared_in.iterdir()
  with pytest.raises(ValueError, match=r"prepared with crop='centre', and .* crop='resize'"):
    load(folder, crop="resize")
  with pytest.raises(ValueError, match=r"prepared with height=8, width=8, and .* width=16"):
    load(folder, image_size=16)
  assert load(folder, image_size=-1).stored([0])[0].shape == (1, SIZE, SIZE, 3)
  shard = folder / "images-00000.array_record"
  os.truncate(shard, shard.stat().st_size - 100)
  with pytest.raises(ValueError, match=r"00000\.array_record has 0 records, not 24\. Delete it"):
    load(folder)
  manifest = json.loads((folder / folders.MANIFEST).read_text())
  (folder / folders.MANIFEST).write_text(json.dumps(manifest | {"images": 25}))
  with pytest.raises(ValueError, match=r"contradict each other\. Delete"):
    load(folder)


def test_an_interrupted_preparation_leaves_nothing(two_classes, prepared_in, monkeypatch):
  def fail(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(folders, "split", fail)
    load(two_classes)
  assert not any(prepared_in.iterdir())
  assert load(two_classes)


def test_the_loser_of_a_race_takes_the_winners_folder(two_classes, prepared_in, monkeypatch):
  split = folders.split

  def overtaken(*arguments):
    monkeypatch.setattr(folders, "split", split)
    assert load(two_classes)
    return split(*arguments)

  monkeypatch.setattr(folders, "split", overtaken)
  assert load(two_classes)
  assert len(list(prepared_in.iterdir())) == 1


def test_channels_are_those_of_the_images_and_grey_ones_fit_among_coloured(tmp_path):
  grey = write(tmp_path / "grey", {f"{i}.png": png(draw(i, (SIZE, SIZE, 1))) for i in range(3)})
  source = load(grey, held_out=0.0)
  np.testing.assert_array_equal(source.stored([1])[0][0, ..., 0], np.asarray(draw(1, (8, 8, 1))))
  assert source.stored([0])[0].shape[-1] == 1
  colour = draw(9, (SIZE, SIZE, 3))
  write(tmp_path / "grey", {"9.png": png(colour)})
  pixels, _ = data.all_images(load(grey, held_out=0.0))
  np.testing.assert_array_equal(pixels[3], np.asarray(colour))
  np.testing.assert_array_equal(pixels[0], np.asarray(draw(0, (8, 8, 1)).convert("RGB")))
  pixels, _ = data.all_images(load(grey, held_out=0.0, channels=1))
  np.testing.assert_array_equal(pixels[3, ..., 0], np.asarray(colour.convert("L")))


def test_orientation_alpha_size_and_limit_are_as_the_config_says(tmp_path):
  image = draw(0, (SIZE, SIZE, 3))
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise
  clear = image.copy()
  clear.putalpha(Image.fromarray(np.full((SIZE, SIZE), 64, np.uint8)))
  wide = draw(1, (SIZE, 2 * SIZE, 3))
  names = {"0.png": png(image, exif=exif), "1.png": png(clear), "2.png": png(wide)}
  folder = write(tmp_path / "odd", names)
  pixels, _ = data.all_images(load(folder, held_out=0.0, background="#ff0000", crop="resize"))
  np.testing.assert_array_equal(pixels[0], np.rot90(np.asarray(image), -1))
  red = 0.25098 * np.asarray(image) + 0.74902 * np.array([255, 0, 0])
  np.testing.assert_allclose(pixels[1], red, atol=1)
  np.testing.assert_array_equal(pixels[2], np.asarray(wide.resize((SIZE, SIZE), 3)))
  pixels, _ = data.all_images(load(folder, held_out=0.0, background="", orient=False))
  np.testing.assert_array_equal(pixels[:2], np.stack([np.asarray(image)] * 2))
  np.testing.assert_array_equal(pixels[2], np.asarray(wide)[:, 4:12])
  assert len(load(folder, held_out=0.0, max_pixels=70)) == 2
  assert Image.MAX_IMAGE_PIXELS == folders.MAX_PIXELS // 2
  with pytest.raises(ValueError, match=r"data\.background='invisible' is no colour: give its name"):
    load(folder, background="invisible")
  with pytest.raises(ValueError, match=r"data\.image_size=-1.*--config\.data\.image_size=32"):
    load(folder, image_size=-1)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "WEBP"])
def test_newer_formats_are_read_and_one_that_this_pillow_lacks_is_named(
  tmp_path, monkeypatch, kind
):
  grey, buffer = Image.new("RGB", (16, 16), (90, 120, 30)), io.BytesIO()
  grey.save(buffer, kind)
  suffix = {"AVIF": "avif", "JPEG2000": "jp2", "WEBP": "webp"}[kind]
  folder = write(tmp_path / kind, {f"1.{suffix}": buffer.getvalue()})
  np.testing.assert_allclose(data.all_images(load(folder))[0][0, 4, 4], (90, 120, 30), atol=4)
  if kind == "AVIF":
    monkeypatch.setattr(images, "_known_formats", lambda: ["PNG"])
    monkeypatch.setattr(images.pil_features, "check", lambda _: False)
    with pytest.raises(ValueError, match=r"this Pillow reads no AVIF: pip install 'pillow>=11\.3'"):
      load(folder, image_size=4)


def test_a_folder_says_what_it_has_and_what_is_wrong_with_it(tmp_path, prepared_in, caplog):
  folder = tmp_path / "mine"
  good = png(draw(0))
  names = {"日本語/猫.png": good, "日本語/犬.png": png(draw(1)), "Ω/é.png": png(draw(2))}
  write(folder, names | {"read me.txt": b"hello", "Ω/cut.png": good[:50], "Ω/list.csv": b"1,2"})
  odd = os.fsencode(folder) + b"/\xff"
  os.mkdir(odd)
  with pytest.raises(ValueError, match=r"1 of the 3 classes of .* have no image: .*\. Remove them"):
    load(folder)
  pathlib.Path(os.fsdecode(odd + b"/\xfe.png")).write_bytes(png(draw(3)))
  with caplog.at_level("INFO"):
    source = load(folder)
  assert source.classes == ["Ω", "日本語", "\\xff"]
  assert len(source) == 3  # of four images one is held out, and never the last of a class
  said = caplog.text
  for part in (
    "read me.txt",
    "list.csv",
    "Ω/cut.png (",
    "Prepared 3 images to train on, and 1 he",
  ):
    assert part in said, part
  (made,) = prepared_in.iterdir()
  assert "Ω/cut.png" in json.loads((made / folders.MANIFEST).read_text())["unreadable"]


def test_three_images_are_enough_and_none_that_can_be_read_are_an_error(tmp_path):
  folder = write(tmp_path / "few", {f"{i}.png": png(draw(i)) for i in range(3)})
  assert (len(load(folder)), len(load(folder, "test"))) == (2, 1)
  with pytest.raises(ValueError, match=r"no image is held out.*set data\.held_out=0\.1"):
    load(folder, "test", held_out=0.0)
  with pytest.raises(ValueError, match="known are train, test"):
    load(folder, "validation")
  broken = write(tmp_path / "broken", {"1.png": b"nothing", "2.jpg": b""})
  with pytest.raises(ValueError, match=r"none of the 2 images could be read.* is 1\.png: "):
    load(broken)
  with pytest.raises(ValueError, match=r"needs data\.dir: a folder of images"):
    load("")


def test_the_rule_follows_the_data_and_what_was_chosen(two_classes):
  config = data.resolve(config_of(two_classes, "sm"))
  assert (config.data.channels, config.data.num_classes) == (3, 2)
  assert config.model.size == "SiT-XXS/1" and config.model.dtype == "float32"
  assert config.ema.inference_decay == config.ema.target_decay == 0.999, "one EMA"
  assert config.steps == 2_000 and config.optimizer.warmup_steps == 100
  exp = experiment.parse(config)
  experiment.check_devices(exp, 1)
  assert data.resolve(config) is config, "nothing is open any more"
  del config["coupling"]
  assert data.resolve(config) is config, "the error is that of experiment.parse"
  rule = lambda n, shape, **chosen: recipe.rule(n, shape, chosen)
  large = rule(1_281_167, (32, 32, 4))
  paper = {"steps": 800_000, "batch_size": 256, "model.size": "SiT-XL/2", "coupling.pool_size": 32}
  paper |= {"optimizer.learning_rate": 1e-4, "optimizer.schedule": "constant"}
  assert {k: large[k] for k in paper} == paper
  chosen = {"model.size": "SiT-B/auto", "batch_size": 64, "coupling.pool_size": 2}
  mixed = recipe.rule(60, (48, 64, 3), chosen)
  assert mixed["model.size"] == "SiT-B/4" and mixed["scan_steps"] == 2 and mixed["batch_size"] == 64
  assert recipe.rule(60_000, (28, 28, 1), {})["model.size"] == "SiT-S/2"


@pytest.mark.parametrize("n", [1, 3, 60, 2_999, 12_340, 50_000, 400_000, 10**8])
@pytest.mark.parametrize("words", ["ism", "sm", "sm_compounding", "quick", "no_sot,quick"])
def test_what_the_rule_makes_is_a_config(n, words):
  for config_file in (images_config, latents_config):
    config = config_file.get_config(words)
    values = FACTS.values | {"data.vae": "x", "data.vae_scale": 2.0, "data.vae_shift": -1.0}
    config = recipe.fill(config, FACTS._replace(images=n, values=values))
    exp = experiment.parse(config)
    experiment.check_devices(exp, 1)
    assert exp.data.vae_shift == (-1.0 if config_file is latents_config else 0.0)
    assert exp.ema.warmup
    if words.startswith(("sm", "no_twin")):
      assert exp.ema.inference_decay == exp.ema.target_decay


def test_a_word_that_is_unknown_is_refused():
  with pytest.raises(ValueError, match="'ism,fast': give one variant, quick, or both"):
    images_config.get_config("ism,fast")
