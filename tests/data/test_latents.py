"""Reading encoded datasets: hand-written shards whose every number says which image it is of."""

import dataclasses
import json
import os
import resource
import shutil

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
import huggingface_hub
import numpy as np
import pytest

from configs import latents as latents_config
from ism_jax import data, experiment
from ism_jax.data import latents
from ism_jax.pretrained import vae, weights
from ism_jax.runtime import commands

SETTINGS = latents.Settings(
  vae="some/vae",
  vae_sha256="0123",
  size=16,
  latent_channels=4,
  crop="some crop",
  listing="4567",
  listed=50,
  images_per_shard=12,
)
CLASSES = ("ant", "bee", "cat")
UNREADABLE = {5: "torn", 24: "no image", 49: "torn"}
READABLE = [i for i in range(SETTINGS.listed) if i not in UNREADABLE]


def moments_of(image, mirrored):
  """Float16 [2, 2, 8] that no other image or view has."""
  # Float16 has all halves up to 1,024.
  return (np.arange(32) + 64 * image + 32 * mirrored - 1_600).reshape(2, 2, 8) / np.float16(2)


def label_of(image):
  return image % len(CLASSES)


def write(directory, settings=SETTINGS, label=label_of):
  for shard in range(settings.shards):
    with latents.ShardWriter(directory, settings, shard) as writer:
      for i in settings.images_of(shard):
        if i in UNREADABLE:
          writer.add_unreadable(f"image{i}", UNREADABLE[i])
        else:
          writer.add(label(i), np.stack([moments_of(i, mirrored) for mirrored in (0, 1)]))
  trailers = latents.finished_shards(directory, settings)
  text = latents.manifest(settings, CLASSES, trailers)
  with open(os.path.join(directory, latents.MANIFEST), "w") as f:
    f.write(text)


def config(directory, **changes):
  values = dict(
    name="latents",
    dir=str(directory),
    image_size=2,
    channels=4,
    num_classes=3,
    flip=True,
    seed=0,
    num_threads=0,
    vae="some/vae",
  )
  return data.DataConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  directory = tmp_path_factory.mktemp("latents")
  write(str(directory))
  return directory


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def source(folder):
  return data.load_source(config(folder))


def seen(pool):
  """(image, mirrored, label) of every row of a pool, whose moments are whole."""
  first = pool["moments"][..., 0, 0, 0].astype(int) * 2 + 1_600
  image, mirrored = first // 64, first % 64 // 32
  expected = [moments_of(i, m) for i, m in zip(image.ravel(), mirrored.ravel(), strict=True)]
  np.testing.assert_array_equal(pool["moments"], np.reshape(expected, pool["moments"].shape))
  assert pool["moments"].dtype == np.float16 and pool["c"].dtype == np.int32
  return image.ravel(), mirrored.ravel(), pool["c"].ravel()


def test_any_image_is_read_as_it_was_written_in_either_view(source):
  assert len(source) == len(READABLE)
  keys = np.random.default_rng(0).permutation(len(READABLE))
  mirror = np.arange(len(keys)) % 3 == 0
  arrays, labels = source.read(keys, mirror)
  expected = [moments_of(READABLE[k], m) for k, m in zip(keys, mirror, strict=True)]
  np.testing.assert_array_equal(arrays["moments"], expected)
  np.testing.assert_array_equal(labels, [label_of(READABLE[k]) for k in keys])


def test_records_are_label_and_moments_in_little_endian_and_a_trailer_in_json(folder):
  reader = ArrayRecordReader(str(folder / "latents-00002-of-00005.array_record"))
  *records, trailer = reader.read_all()
  readable = [i for i in range(24, 36) if i != 24]
  expected = [
    np.array(label_of(i), "<i4").tobytes() + moments_of(i, view).astype("<f2").tobytes()
    for i in readable
    for view in (0, 1)
  ]
  assert records == expected
  trailer = json.loads(trailer)
  assert trailer["vae_sha256"] == "0123" and trailer["shard"] == 2 and trailer["images"] == 11
  assert trailer["unreadable"] == {"image24": "no image"}


def test_the_manifest_counts_what_is_there_and_names_what_is_not(folder):
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["classes"] == list(CLASSES)
  assert manifest["counts"] == np.bincount([label_of(i) for i in READABLE]).tolist()
  assert manifest["images"] == 47 and manifest["unreadable_count"] == 3
  assert manifest["unreadable"] == {f"image{i}": reason for i, reason in UNREADABLE.items()}
  assert manifest["shards"] == [11, 12, 11, 12, 1]
  assert (manifest["vae"], manifest["size"], manifest["crop"]) == ("some/vae", 16, "some crop")


def test_an_open_config_takes_sizes_classes_and_autoencoder_of_the_manifest(folder):
  open_config = latents_config.get_config()
  open_config.data.dir = str(folder)
  resolved = experiment.parse(data.resolve(open_config)).data
  expected = config(folder, vae="some/vae", num_threads=8)
  assert resolved == expected
  source = data.load_source(resolved)
  assert source.classes == list(CLASSES)
  _, labels = source.read(np.arange(len(source)), np.zeros(len(source), bool))
  assert source.class_counts == np.bincount(labels, minlength=3).tolist()


def test_an_epoch_holds_every_image_once_with_its_label_and_half_of_them_mirrored(source):
  # 47 is prime: one batch is an epoch.
  iterator = data.pools(source, batch_size=47, pool_size=40, seed=1, flip=True)
  image, mirrored, label = (a.reshape(40, 47) for a in seen(next(iterator)))
  np.testing.assert_array_equal(np.sort(image, axis=1), np.tile(READABLE, (40, 1)))
  np.testing.assert_array_equal(label, label_of(image))
  assert abs(mirrored.mean() - 0.5) < 0.05  # 4 standard deviations of 1,880 coins
  by_image = np.take_along_axis(mirrored, np.argsort(image, axis=1), axis=1)
  assert (by_image.mean(axis=0) > 0.1).all() and (by_image.mean(axis=0) < 0.9).all()


def test_without_flips_the_order_is_the_same_and_no_image_is_mirrored(source):
  settings = dict(batch_size=20, pool_size=5, seed=2)
  plain, flipped = (seen(next(data.pools(source, **settings, flip=flip))) for flip in (False, True))
  np.testing.assert_array_equal(plain[0], flipped[0])
  assert not plain[1].any() and flipped[1].any()


def test_the_stream_is_the_documented_function_of_the_seed(source):
  pool = next(data.pools(source, batch_size=30, pool_size=4, seed=7, flip=True, num_threads=3))
  expected = []
  for epoch in range(3):
    rng = np.random.default_rng((7, epoch))
    order = rng.permutation(47)
    expected += zip(np.array(READABLE)[order], rng.integers(2, size=47), strict=True)
  np.testing.assert_array_equal(np.stack(seen(pool)[:2], axis=1), expected[:120])


def test_a_resumed_iterator_continues_bit_exactly_and_processes_share_the_rows(source):
  settings = dict(batch_size=20, pool_size=2, seed=3, flip=True)
  iterator = data.pools(source, **settings)
  next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  parts = [
    data.pools(source, **settings, rows=rows, num_threads=2) for rows in (range(10), range(10, 20))
  ]
  for part in parts:
    part.set_state(state)
  for _ in range(3):  # over the end of an epoch
    expected, rows = next(iterator), [next(part) for part in parts]
    for name in ("moments", "c"):
      np.testing.assert_array_equal(np.concatenate([r[name] for r in rows], 1), expected[name])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image_size": (2, 4)}, r"2x2 latents of 4 .* for 2x4 latents"),
    ({"image_size": 4}, r"2x2 latents of 4 channels in 3 .*\(16x16 images\).* 4x4 latents"),
    ({"channels": 8}, "for 2x2 latents of 8 channels"),
    ({"num_classes": 1000}, "in 3 classes.* in 1000 classes"),
    ({"vae_scale": 0.13025}, r"factor 0\.18215 and .* factor 0\.13025 and .*data\.vae_scale"),
    ({"vae_shift": 0.5}, r"shift factor 0\.0.* shift factor 0\.5"),
    ({"vae": "other/vae"}, "of the VAE 'some/vae'.* of the VAE 'other/vae'.*data.vae"),
    ({"dir": ""}, r"needs data\.dir.*python -m ism_jax encode"),
    ({"dir": "gs://bucket/latents"}, "gs://bucket/latents is no folder: mount the bucket"),
    ({"dir": "/nowhere/at/all"}, r"/nowhere/at/all does not exist.*python -m ism_jax encode"),
  ],
)
def test_a_config_for_other_latents_is_refused(folder, change, message, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(ValueError, match=message):
    data.load_source(config(folder, **change))


@pytest.mark.parametrize(("name", "vae"), [("latents", ""), ("digits", "some/vae")])
def test_latents_have_a_vae_and_images_have_none(name, vae):
  with pytest.raises(ValueError, match=f"data.vae='{vae}' does not go with data.name='{name}'"):
    config("", name=name, vae=vae)


def test_weights_that_did_not_encode_the_data_are_refused(folder):
  loaded = lambda sha256: weights.Pretrained({}, sha256, "some/vae")
  latents.check_vae(folder, loaded(SETTINGS.vae_sha256))
  with pytest.raises(ValueError, match=r"sha256 0123456789ab.*name the weights that encoded it"):
    latents.check_vae(folder, loaded("0123456789abcdef"))


def test_the_autoencoder_of_latents_is_known_by_its_weights_and_not_by_its_name(copy, tmp_path):
  path = tmp_path / "vae" / vae.WEIGHTS
  path.parent.mkdir()
  path.write_bytes(b"weights")
  settings = dataclasses.replace(SETTINGS, vae_sha256=vae.checksum(str(path)))
  for name in ("elsewhere/vae", str(path.parent), f"{path.parent}/", str(path)):
    same = dataclasses.replace(settings, vae=name)
    if name == "elsewhere/vae":
      write(str(copy), same)
    assert len(latents.finished_shards(str(copy), same)) == 5
    assert len(data.load_source(config(copy, vae=name))) == len(READABLE)
  path.write_bytes(b"other weights")
  with pytest.raises(ValueError, match=r"vae/' has weights of sha256 .*'elsewhere/vae', have"):
    data.load_source(config(copy, vae=f"{path.parent}/"))


def test_latents_of_another_scale_say_so_and_older_ones_have_the_published_one(copy):
  older = copy / "manifest.json"
  content = json.loads(older.read_text())
  assert (content.pop("scaling_factor"), content.pop("shift_factor")) == (0.18215, 0.0)
  older.write_text(json.dumps(content))
  assert len(data.load_source(config(copy))) == len(READABLE)
  scaled = dataclasses.replace(SETTINGS, scaling_factor=0.13025, shift_factor=0.25)
  with pytest.raises(ValueError, match=r"00000-of-.* has scaling_factor=0\.18215, not 0\.13025"):
    latents.finished_shards(str(copy), scaled)
  write(str(copy), scaled)
  assert len(data.load_source(config(copy, vae_scale=0.13025, vae_shift=0.25))) == len(READABLE)


def test_latents_are_the_same_data_elsewhere_and_other_data_if_anything_differs(
  source, copy, tmp_path
):
  assert data.load_source(config(copy)).identity == source.identity
  for i, change in enumerate(({"listing": "89"}, {"vae_sha256": "89"}, {"crop": "none"})):
    (tmp_path / str(i)).mkdir()
    write(str(tmp_path / str(i)), dataclasses.replace(SETTINGS, **change))
    other = data.load_source(config(tmp_path / str(i))).identity
    assert source.identity | change == other != source.identity
  write(str(copy), label=lambda i: (i + 1) % 3)
  assert data.load_source(config(copy)).identity["counts"] != source.identity["counts"]


def test_an_unfinished_folder_is_refused_with_the_command(copy):
  (copy / "manifest.json").unlink()
  with pytest.raises(ValueError, match=r"unfinished.*manifest\.json.*ism_jax encode"):
    data.load_source(config(copy))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"{", r"damaged, or another file: Expecting .*Delete it; the command that made it"),
    (b'{"format": 2}', "format 2, and this version reads 1"),
    (b"[1]", "it is list, not an object"),
    (b'{"format": true}', "format is bool, not int"),
    (b"{}", "it has no 'format'"),
    (b'{"format": 1}', "it has no 'vae'"),
    (b'\xff{"format": 1}', "can't decode byte 0xff"),
    (b"[" * 100_000, "recursion"),
  ],
)
def test_a_manifest_that_cannot_be_understood_is_refused(copy, content, message):
  (copy / "manifest.json").write_bytes(content)
  with pytest.raises(ValueError, match=rf"manifest\.json .*{message}"):
    data.load_source(config(copy))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"images": 10**12}, r"not that of its shards, .* has other images \(1000000000000 images\)"),
    ({"shards": [11, 12, 11, 12]}, "it lists 4 shards, and 50 images have 5"),
    ({"listed": 10**12}, "it lists 5 shards, and 1000000000000 images have 83333333334"),
    ({"images_per_shard": 10**12}, r"it lists 5 shards, and \d+ images have 1"),
    ({"images_per_shard": 0}, "images_per_shard=0 must be at least 1"),
    ({"size": 10**9}, r"moments=\[.*\], not \[125000000, 125000000, "),
    ({"size": -8}, "size=-8 must be a multiple of 8"),
    ({"size": [16, 24]}, r"moments=\[2, 2, 8\], not \[2, 3, 8\]"),
    ({"size": [16, "16"]}, r"size\[1\] is str, not int"),
    ({"size": [16]}, "damaged: "),
    ({"shards": "many"}, "shards is str, not list"),
    ({"counts": [1, 2.5]}, r"counts\[1\] is float, not int"),
    ({"unreadable": {"a.png": 1}}, r"unreadable\['a.png'\] is int, not str"),
    ({"classes": None}, "classes is NoneType, not list"),
  ],
)
def test_a_manifest_that_promises_what_cannot_be_is_refused(copy, changes, message):
  manifest = json.loads((copy / "manifest.json").read_text())
  (copy / "manifest.json").write_text(json.dumps(manifest | changes))
  with pytest.raises(ValueError, match=rf"manifest\.json is .*{message}.*Delete it"):
    data.load_source(config(copy))


def test_a_shard_that_is_no_file_or_has_another_trailer_is_damaged(copy):
  path, other = SETTINGS.path(copy, 2), SETTINGS.path(copy, 3)
  os.remove(path)
  os.mkfifo(path)  # an open would wait for a writer
  for content in (b"[]", b'{"images": 0}', b"\xff"):
    writer = ArrayRecordWriter(other, "group_size:1,uncompressed")
    writer.write(content)
    writer.close()
    with pytest.raises(ValueError, match=r"2 of 5 shards are truncated or damaged"):
      data.load_source(config(copy))
    assert sorted(latents.finished_shards(str(copy), SETTINGS)) == [0, 1, 4]


def test_missing_shards_are_named(copy):
  for shard in (1, 3):
    os.remove(SETTINGS.path(copy, shard))
  with pytest.raises(ValueError, match=r"2 of 5 shards are missing: \S*00001-of-.*00003-of-"):
    data.load_source(config(copy))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_shard_is_named(copy, keep):
  path = SETTINGS.path(copy, 2)
  os.truncate(path, int(keep * os.path.getsize(path)))
  with pytest.raises(ValueError, match=r"1 of 5 shards are truncated .*00002-of-00005"):
    data.load_source(config(copy))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vae_sha256": "89ab"}, r"00002-of-.* has vae_sha256='89ab', not '0123'"),
    ({"crop": "another crop"}, "has crop='another crop', not 'some crop'"),
    ({"listing": "ef"}, "has listing='ef'"),
  ],
)
def test_a_shard_of_another_encoding_is_named_with_what_differs(copy, tmp_path, changes, message):
  (tmp_path / "other").mkdir()
  write(str(tmp_path / "other"), other := dataclasses.replace(SETTINGS, **changes))
  shutil.copy(other.path(tmp_path / "other", 2), copy)
  with pytest.raises(ValueError, match=message):
    data.load_source(config(copy))
  with pytest.raises(ValueError, match=message):
    latents.finished_shards(str(copy), SETTINGS)


def test_a_shard_under_another_shards_name_is_named(copy):
  shutil.copy(SETTINGS.path(copy, 0), SETTINGS.path(copy, 2))
  with pytest.raises(ValueError, match=r"00002-of-.* has shard=0, not 2"):
    data.load_source(config(copy))


def flip_bits(path):
  """In a record: of the about 4,000 bytes that have some, of a block of 65,536."""
  with open(path, "r+b") as f:
    f.seek(1_000)
    f.write(bytes(100))


def rewrite(copy, shard, change):
  """Writes other records into a shard, whose trailer and checksums know of nothing."""
  path = SETTINGS.path(copy, shard)
  reader = ArrayRecordReader(path)
  *records, trailer = reader.read_all()
  reader.close()
  writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
  for record in [*map(change, records), trailer]:
    writer.write(record)
  writer.close()


def relabel(copy, shard, label):
  rewrite(copy, shard, lambda record: np.array(label, "<i4").tobytes() + record[4:])


def end_with(number):
  return lambda copy: rewrite(copy, 1, lambda r: r[:-2] + np.array(number, "<f2").tobytes())


DAMAGE = {
  "flipped bits": (lambda copy: flip_bits(SETTINGS.path(copy, 1)), "Corrupted"),
  "NaN": (end_with(np.nan), "its moments hold NaN or infinity"),
  "infinity": (end_with(-np.inf), "NaN or infinity"),
  "a class too many": (lambda copy: relabel(copy, 1, 3), "run from 3 to 3, .* classes from 0 to 2"),
  "a short record": (
    lambda copy: rewrite(copy, 1, lambda r: r[:-2]),
    "66 bytes, and 68 are",
  ),
  "a negative class": (lambda copy: relabel(copy, 1, -1), "labels run from -1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_in_a_shard_names_it_and_the_remedy_also_in_the_middle_of_a_run(copy, damage):
  hurt, reason = DAMAGE[damage]
  hurt(copy)
  source = data.load_source(config(copy))
  remedy = r"Delete it; the encoding command makes it again.*encode --verify --out="
  line = rf"^Error: \S*latents-00001-of-00005\.array_record is damaged: .*{reason}.*{remedy}[^\n]*$"
  pools = data.pools(source, batch_size=47, pool_size=1, seed=0, flip=True, num_threads=2)
  with pytest.raises(SystemExit, match=line), commands.one_line_errors():
    [next(pools) for _ in range(3)]  # in which both views of all images are
  first = np.arange(11)  # of the first shard, which is whole
  np.testing.assert_array_equal(source.read(first, first < 0)[1], label_of(np.array(READABLE[:11])))
  with pytest.raises(ValueError, match=r"1 of 5 shards are damaged: \S*00001-of-.* Delete them"):
    latents.verify(str(copy), 2)


def test_a_whole_folder_is_verified_and_labels_that_no_trailer_counts_are_not(copy, caplog):
  with caplog.at_level("INFO", logger="absl"):
    latents.verify(str(copy), 2)
  assert "All 47 images in the 5 shards" in caplog.text
  relabel(copy, 4, 2)  # of the one image 48, of class 0
  with pytest.raises(ValueError, match="00004-of-00005"):
    latents.verify(str(copy), 2)
  assert "not those that its trailer counts" in caplog.text


@pytest.mark.parametrize(
  "change",
  [
    {"images": 40},
    {"images": 470},
    {"shards": [11, 12, 11, 12, 0]},
    {"shards": [11, 10, 11, 12, 1], "images": 45},
    {"shards": [11, 14, 11, 12, 1], "images": 49},
    {"counts": [47, 0, 0]},
  ],
)
def test_a_manifest_that_counts_other_images_than_the_shards_hold_is_refused(copy, change):
  path = copy / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  other = " and ".join(name for name in ("images", "counts", "shards") if name in change)
  with pytest.raises(ValueError, match=rf"which hold 47 images, .* has other {other} .*Delete it"):
    data.load_source(config(copy))


def test_a_shard_of_classes_that_the_manifest_does_not_have_is_named(copy):
  path = copy / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": ["ant", "bee"]}))
  with pytest.raises(ValueError, match=r"00000-of-.* has images of class 2, .* are 0 to 1"):
    data.load_source(config(copy, num_classes=2))


def test_a_shard_that_fails_half_way_leaves_nothing(tmp_path):
  with pytest.raises(KeyError), latents.ShardWriter(tmp_path, SETTINGS, 0) as writer:
    writer.add(0, np.zeros((2, 2, 2, 8), np.float16))
    raise KeyError
  assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  try:
    error = pytest.raises(OSError, match=r"could not be written.*Make room")
    with error, latents.ShardWriter(tmp_path, SETTINGS, 0) as writer:
      for _ in range(3_000):
        writer.add(0, np.zeros((2, 2, 2, 8), np.float16))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not list(tmp_path.iterdir())


def test_the_limit_of_open_files_is_raised_to_hold_every_shard(folder, monkeypatch):
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    data.load_source(config(folder))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 5 + 300
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
  monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 400))
  with pytest.raises(ValueError, match=r"may have 400: raise the limit .*--images_per_shard"):
    data.load_source(config(folder))


def test_latents_are_no_images_and_have_one_split(folder, source):
  with pytest.raises(ValueError, match="no images, only their latents"):
    data.all_images(source)
  with pytest.raises(ValueError, match="no split 'test'"):
    data.load_source(config(folder), "test")
  assert data.directory(config(folder)) == str(folder)


@pytest.mark.parametrize(("size", "nearest"), [(250, 248), (3, 8), (-8, 8), ((64, 37), 40)])
def test_a_size_that_the_vae_does_not_divide_names_the_nearest_that_it_does(size, nearest):
  side = size if isinstance(size, int) else size[1]
  with pytest.raises(ValueError, match=f"size={side} must be a multiple of 8.* is {nearest}"):
    latents.check_size(size)
