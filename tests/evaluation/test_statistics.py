"""Statistics of image sets are NumPy's moments of what the network sees, whoever reads them."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tracemalloc
import zipfile

from examples import tiny_config
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_sample_images

from ism_jax import data, experiment
from ism_jax.data import images as images_lib
from ism_jax.data import samples
from ism_jax.evaluation import reference, statistics
from ism_jax.metrics import distances, features, moments
from ism_jax.performance import benchmark
from ism_jax.runtime import sharding

SIZE = 16
PHOTOS = load_sample_images().images


def quadrants(x, xp):
  """Mean and mean square of each channel of each quadrant, [B, 24]."""
  h, w = x.shape[1] // 2, x.shape[2] // 2
  x = xp.concatenate([x] * (3 // x.shape[3]), 3) / 255
  parts = [x[:, i : i + h, j : j + w] for i in (0, h) for j in (0, w)]
  return xp.concatenate([f(p) for p in parts for f in (mean, lambda p: mean(p**2))], axis=1)


def mean(x):
  return x.mean((1, 2))


def rows(x, xp):
  """Mean of the upper and of the lower half, and of the left one, [B, 3]."""
  h, w = x.shape[1] // 2, x.shape[2] // 2
  parts = [x[:, :h], x[:, h:], x[:, :, :w]]
  return xp.stack([p.mean((1, 2, 3)) / 255 for p in parts], axis=1)


@functools.cache  # compiled once
def network(name="inception", sha256="abc"):
  """A feature network that NumPy can follow."""

  def apply(params, x):
    x = x.astype(jnp.float32)
    outputs = {"features": quadrants(x, jnp) * params["scale"]}
    return outputs | ({"spatial": rows(x, jnp)} if name == "inception" else {})

  return features.Network(name, "quadrants", sha256, {"scale": np.float32(1)}, apply)


def crops(count, size=SIZE, seed=0):
  rng = np.random.default_rng(seed)
  places = rng.integers(0, 400 - size, (count, 2))
  return np.stack([PHOTOS[i % 2][y : y + size, x : x + size] for i, (y, x) in enumerate(places)])


def saved_samples(path, images):
  with samples.writer(str(path), len(images), images.shape[1:]) as add:
    add(images, np.zeros(len(images), int))
  return str(path)


def png(array):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, "PNG")
  return buffer.getvalue()


def check_file(path, images):
  """The file's moments are those of images uint8 [N, H, W, C]."""
  seen, spatial = (f(images.astype(float), np) for f in (quadrants, rows))
  with np.load(path, allow_pickle=False) as file:
    np.testing.assert_allclose(file["mu"], seen.mean(0), rtol=1e-6)
    np.testing.assert_allclose(file["sigma"], np.cov(seen, rowvar=False), rtol=1e-4, atol=1e-7)
    if "mu_s" in file:
      np.testing.assert_allclose(file["mu_s"], spatial.mean(0), rtol=1e-6)
      np.testing.assert_allclose(file["sigma_s"], np.cov(spatial, rowvar=False), 1e-4, 1e-7)
    assert file["mu"].dtype == file["sigma"].dtype == np.float64
    return dict(file), json.loads(str(file["protocol"]))


def make(images, out, networks=None, keep=100, batch_size=2, devices=None):
  networks = (network(),) if networks is None else networks
  return statistics.make(
    images,
    networks,
    str(out),
    keep=keep,
    batch_size=batch_size,
    devices=jax.devices()[:3] if devices is None else devices,
  )


@pytest.mark.parametrize(("count", "batch_size", "devices"), [(30, 1, 1), (37, 2, 3), (37, 100, 8)])
def test_moments_and_kept_features_are_numpys_whatever_the_batches(
  tmp_path, count, batch_size, devices
):
  images = crops(count)
  path = saved_samples(tmp_path / "samples.npz", images)
  image_set = samples.open(path, num_threads=2)
  files = make(image_set, tmp_path, None, 10, batch_size, jax.devices()[:devices])
  assert files == {"inception": str(tmp_path / "inception.npz")}
  arrays, protocol = check_file(files["inception"], images)
  chosen = np.linspace(0, count - 1, 10).round().astype(int)
  np.testing.assert_allclose(arrays["features"], quadrants(images.astype(float), np)[chosen], 1e-5)
  assert protocol == {
    "source": path,
    "sha256": samples.open(path).protocol()["sha256"],
    "listed": count,
    "images": count,
    "unreadable": {},
    "network": "inception",
    "weights": "abc",
    "features": "quadrants",
    "keep": 10,
    "jax": jax.__version__,
  }


def test_no_features_are_kept_where_none_are_wanted(tmp_path):
  images = crops(30)
  image_set = samples.open(saved_samples(tmp_path / "a.npz", images), 1)
  arrays, _ = check_file(make(image_set, tmp_path, keep=0)["inception"], images)
  assert set(arrays) == {"mu", "sigma", "mu_s", "sigma_s", "count", "protocol"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of 2 classes, 40 images of many sizes, and two that cannot be read."""
  folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
  for i in range(40):
    height, width = rng.integers(17, 60, 2)
    y, x = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
    path = folder / ("china", "flower")[i % 2] / f"{i}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png(PHOTOS[i % 2][y : y + height, x : x + width]))
  (folder / "china" / "0.png").write_bytes((folder / "china" / "0.png").read_bytes()[:-200])
  (folder / "flower" / "text.png").write_bytes(b"no image")
  return str(folder)


def test_images_of_a_source_are_cropped_and_the_unreadable_ones_listed(tmp_path, photos):
  source = images_lib.open_source(photos, "")
  bad = {"china/0.png", "flower/text.png"}
  readable = [i for i in range(source.size) if source.name(i) not in bad]
  expected = np.stack(
    [images_lib.centre_crop(images_lib.decode(source.read(i)[0]), SIZE) for i in readable]
  )
  image_set = statistics.of_images(photos, "", SIZE, num_threads=2)
  arrays, protocol = check_file(make(image_set, tmp_path)["inception"], expected)
  assert len(arrays["features"]) == arrays["count"] == protocol["images"] == 39
  assert set(protocol["unreadable"]) == bad and "truncated" in protocol["unreadable"]["china/0.png"]
  said = {k: protocol[k] for k in ("source", "listing", "listed", "crop", "size")}
  assert said == {
    "source": photos,
    "listing": source.listing,
    "listed": 41,
    "crop": images_lib.CROP,
    "size": SIZE,
  }


def test_a_dataset_that_a_config_names_is_taken_as_it_is(tmp_path):
  cfg = data.DataConfig("digits", str(tmp_path), 8, 1, 10, False, 0, 0, "")
  images, _ = data.all_images(data.load_source(cfg))
  image_set = statistics.of_dataset(cfg, "train[:90%]")
  arrays, protocol = check_file(
    make(image_set, tmp_path, keep=7, batch_size=64)["inception"], images[:1617]
  )
  assert protocol["dataset"].startswith("digits/1.") and protocol["split"] == "train[:90%]"
  assert protocol["listed"] == arrays["count"] == 1617 and len(arrays["features"]) == 7


def test_several_networks_see_the_images_in_one_pass(tmp_path):
  images = crops(30)
  image_set, passes = samples.open(saved_samples(tmp_path / "a.npz", images), 1), []
  counting = lambda *args: passes.append(1) or image_set.batches(*args)
  counted = dataclasses.replace(image_set, batches=counting)
  files = make(counted, tmp_path, (network(), network("dinov2", "def")))
  assert len(passes) == 1 and set(files) == {"inception", "dinov2"}
  _, of_inception = check_file(files["inception"], images)
  arrays, of_dinov2 = check_file(files["dinov2"], images)
  assert "mu_s" not in arrays and of_dinov2["weights"] == "def" != of_inception["weights"]


def forbidden(*_):
  raise AssertionError("images were read again")


def test_what_is_done_is_not_done_again_and_nothing_else_is_overwritten(tmp_path):
  images = crops(30)
  path = saved_samples(tmp_path / "a.npz", images)
  image_set, out = samples.open(path, 1), tmp_path / "out"
  files = make(image_set, out)
  before = pathlib.Path(files["inception"]).read_bytes()
  assert make(dataclasses.replace(image_set, batches=forbidden), out) == files
  # Another network is added, and the first one's file stays.
  files = make(image_set, out, (network(), network("dinov2")))
  check_file(files["dinov2"], images)
  assert pathlib.Path(files["inception"]).read_bytes() == before
  # The same images elsewhere are the same images.
  moved = saved_samples(tmp_path / "b.npz", images)
  make(dataclasses.replace(samples.open(moved, 1), batches=forbidden), out)
  other = samples.open(saved_samples(tmp_path / "c.npz", images[::-1]), 1)
  for changed, message in [
    (lambda: make(other, out), "inception.npz holds .* another protocol: sha256="),
    (lambda: make(image_set, out, keep=5), "keep=30, not 5"),
    (lambda: make(image_set, out, (network(sha256="new"),)), "weights='abc', not 'new'"),
  ]:
    with pytest.raises(ValueError, match=message):
      changed()
  assert pathlib.Path(files["inception"]).read_bytes() == before
  (out / "inception.npz").write_bytes(before[:-100])
  with pytest.raises(ValueError, match=r"inception\.npz is no npz file of statistics, or damaged"):
    make(image_set, out)
  np.savez(out / "inception.npz", mu=np.zeros(24), sigma=np.eye(24))
  with pytest.raises(ValueError, match="another protocol: sha256=None"):
    make(image_set, out)


def write_class(folder, images):
  """Images under the same names, in files of the same size."""
  (folder / "class").mkdir(parents=True, exist_ok=True)
  for i, image in enumerate(images):
    Image.fromarray(image).save(folder / "class" / f"{i}.bmp")
  return folder


def test_other_pictures_under_the_same_names_are_other_images(tmp_path, caplog):
  first, second = crops(5), crops(5, seed=1)
  folder, other = write_class(tmp_path / "a", first), write_class(tmp_path / "b", second)
  of_images = lambda folder: statistics.of_images(str(folder), "", SIZE, 2)
  of_samples = lambda folder: samples.open(str(folder), 2)
  for kind, message in ((of_images, "protocol: contents="), (of_samples, "protocol: sha256=")):
    out = tmp_path / kind(folder).protocol().get("crop", "samples")
    made = make(kind(folder), out)["inception"]
    check_file(made, first)
    moved = shutil.copytree(folder, tmp_path / "moved", dirs_exist_ok=True)
    make(dataclasses.replace(kind(moved), batches=forbidden), out)
    with pytest.raises(ValueError, match=message):
      make(kind(other), out)
    write_class(moved, second)
    with pytest.raises(ValueError, match=message):
      make(kind(moved), out)
  # A file of an older version does not say.
  with np.load(tmp_path / images_lib.CROP / "inception.npz") as file:
    arrays = dict(file)
  protocol = json.loads(str(arrays["protocol"]))
  del protocol["contents"]
  arrays["protocol"] = json.dumps(protocol)
  np.savez(tmp_path / images_lib.CROP / "inception.npz", **arrays)
  with caplog.at_level("INFO", logger="absl"):
    make(dataclasses.replace(of_images(other), batches=forbidden), tmp_path / images_lib.CROP)
  assert "is older, and does not say which contents" in caplog.text


def test_images_that_cannot_be_read_leave_no_statistics(tmp_path, photos):
  folder = tmp_path / "photos" / "class"
  folder.mkdir(parents=True)
  for name in ("a.png", "b.png", "c.png"):
    (folder / name).write_bytes(b"no image")
  (folder / "d.png").write_bytes(png(crops(1)[0]))
  image_set = statistics.of_images(str(tmp_path / "photos"), "", SIZE, 2)
  with pytest.raises(
    ValueError, match=r"3 of 4 images .* at least 2; .*class/a\.png: Unidentified"
  ):
    make(image_set, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_samples_that_cannot_be_read_are_left_out_and_listed(tmp_path):
  images, folder = crops(6), tmp_path / "samples"
  folder.mkdir()
  for i, image in enumerate(images):
    (folder / f"{i}.png").write_bytes(png(image)[: -300 if i == 4 else None])
  (folder / "2text.png").write_bytes(b"no image")
  path = make(samples.open(str(folder), 2), tmp_path / "out")["inception"]
  _, protocol = check_file(path, np.delete(images, 4, axis=0))
  assert protocol["listed"] == 7 and protocol["images"] == 5
  assert set(protocol["unreadable"]) == {"4.png", "2text.png"}
  make(dataclasses.replace(samples.open(str(folder), 2), batches=forbidden), tmp_path / "out")


def test_a_network_that_gives_nan_is_an_error_and_leaves_no_file(tmp_path):
  image_set = samples.open(saved_samples(tmp_path / "a.npz", crops(30)), 1)
  broken = dataclasses.replace(network(), params={"scale": np.float32(np.nan)})
  with pytest.raises(ValueError, match="NaN"):
    make(image_set, tmp_path / "out", (broken,))
  assert not (tmp_path / "out").exists()


def test_latents_have_no_images(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "load_source", lambda cfg, split: object())
  cfg = data.DataConfig("latents", str(tmp_path), 32, 4, 10, False, 0, 0, "a/vae")
  with pytest.raises(ValueError, match=r"'latents' has no images.*--images"):
    statistics.of_dataset(cfg, "train")


# What evaluation reads.


def mesh():
  return sharding.data_mesh(jax.devices()[:2])


def test_evaluation_reads_what_was_written(tmp_path):
  images = crops(30)
  image_set = samples.open(saved_samples(tmp_path / "a.npz", images), 1)
  path = make(image_set, tmp_path, keep=12)["inception"]
  read, source = reference.read(path, network(), mesh())
  arrays, protocol = check_file(path, images)
  np.testing.assert_array_equal(read.features.mean, arrays["mu"])
  np.testing.assert_array_equal(read.features.covariance, arrays["sigma"])
  np.testing.assert_array_equal(read.spatial.covariance, arrays["sigma_s"])
  np.testing.assert_array_equal(read.kept, arrays["features"])
  assert read.features.count == 30 and source["protocol"] == protocol and source["file"] == path
  with pytest.raises(ValueError, match=r"made with inception, weights abc.* weights other"):
    reference.read(path, network(sha256="other"), mesh())


def others_statistics(images):
  seen, spatial = (f(images.astype(float), np) for f in (quadrants, rows))
  mu, sigma = seen.mean(0), np.cov(seen, rowvar=False)
  spatial = {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
  return {
    "ADM": {"arr_0": images, "mu": mu, "sigma": sigma, **spatial},
    "jax-fid": {"mu": np.float32(mu), "sigma": np.float32(sigma)},
    "MeanFlow": {"ref_mu": mu, "ref_sigma": sigma},
  }


@pytest.mark.parametrize("whose", ["ADM", "jax-fid", "MeanFlow"])
def test_statistics_of_others_are_read_as_they_are(tmp_path, whose):
  images = crops(30)
  arrays = others_statistics(images)[whose]
  np.savez(tmp_path / "reference.npz", **arrays)
  read, source = reference.read(str(tmp_path / "reference.npz"), network(), mesh())
  assert "protocol" not in source and len(source["sha256"]) == 64
  expected = moments.FeatureStatistics(*others_statistics(images)["MeanFlow"].values(), count=30)
  assert distances.frechet_distance(read.features, expected) == pytest.approx(0, abs=1e-6)
  if whose == "ADM":
    np.testing.assert_array_equal(read.spatial.mean, arrays["mu_s"])
    np.testing.assert_allclose(read.kept, quadrants(images.astype(float), np), rtol=1e-5)
  else:
    assert read.spatial is None and read.kept is None


def test_files_that_are_no_reference_are_refused(tmp_path):
  path = str(tmp_path / "reference.npz")

  def refused(error, message, **arrays):
    if arrays:
      np.savez(path, **arrays)
    with pytest.raises(error, match=message):
      reference.read(path, network(), mesh())

  good = dict(mu=np.zeros(24), sigma=np.eye(24))
  refused(FileNotFoundError, "no file of reference statistics .*ism_jax statistics")
  refused(ValueError, r"holds arr_0; needed are mu and sigma or ref_mu and ref_sigma", arr_0=[1])
  refused(ValueError, r"mu of .* has shape \(3,\).*inception has 24", **good | {"mu": np.zeros(3)})
  refused(ValueError, r"sigma \(24, 3\)", **good | {"sigma": np.zeros((24, 3))})
  refused(ValueError, "NaN or infinity", **good | {"mu": np.full(24, np.nan)})
  upper = np.triu(np.full((24, 24), 0.1)) + np.eye(24)
  for message, sigma in (
    ("covariance is not symmetric", upper),
    ("covariance has eigenvalues from -3 to 21", np.ones((24, 24)) - 3 * np.eye(24)[::-1]),
    ("variance of feature 3 is negative", np.diag(np.where(np.arange(24) == 3, -1.0, 1))),
    ("covariance goes to 1e.300", 1e300 * np.eye(24)),
    ("covariance is zero", np.zeros((24, 24))),
  ):
    named = (
      rf"mu and sigma of .*reference\.npz are no mean and covariance: .*{message}.*ism_jax stat"
    )
    refused(ValueError, named, **good | {"sigma": sigma})
  kept = np.zeros((9, 24), np.float32)
  refused(ValueError, r"features of .* shape \(9, 3\)", **good, features=kept[:, :3])
  kept[2] = np.nan
  refused(ValueError, r"1 of 9 rows of features of .*reference\.npz", **good, features=kept)
  pathlib.Path(path).write_bytes(pathlib.Path(path).read_bytes()[:-50])
  refused(ValueError, "no npz file of statistics, or damaged")


def write_npz(path, **members):
  """An npz of (shape, dtype, bytes of elements that are 0) or of arrays, compressed."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, member in members.items():
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        if isinstance(member, np.ndarray):
          np.lib.format.write_array(file, member)
          continue
        shape, kind, zeros = member
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        for _ in range(0, zeros, 2**20):
          file.write(bytes(2**20))


def test_a_reference_that_promises_gigabytes_is_refused_by_its_header(tmp_path):
  path = str(tmp_path / "reference.npz")
  good = dict(mu=np.zeros(24), sigma=np.eye(24), count=np.array(9))
  zeros, big = 2**26, (2**23,)  # 64 MB of float64 in 65 KB
  protocol = np.array(json.dumps({"network": "inception", "weights": "abc"}))
  cases = [
    (good | {"sigma": (big, "<f8", zeros)}, r"sigma \(8388608,\); inception has 24 features"),
    (good | {"mu": (big, "<f8", zeros)}, r"mu of .* has shape \(8388608,\)"),
    (good | {"features": ((2**22, 2), "<f8", zeros)}, r"features of .* \(4194304, 2\)"),
    (good | {"count": (big, "<i8", zeros)}, "count of .* is no number"),
    (good | {"protocol": (big, "<i8", zeros)}, "protocol of .* and no text"),
    (good | {"sigma": ((24, 24), "<f8", 0)}, r"sigma\.npy in .* is truncated or damaged"),
    (good | {"sigma": ((10**9, 10**9), "<f8", 0)}, r"sigma\.npy in .* is truncated or damaged"),
    (good | {"mu": np.zeros(24, np.complex64)}, "mu of .* is complex64, and numbers are needed"),
    (good | {"protocol": np.array("[1]")}, "protocol of .* it is list, not an object"),
    (good | {"protocol": np.array("{")}, "protocol of .* is damaged"),
  ]
  for members, message in cases:
    write_npz(path, **members)
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=message) as raised:
        reference.read(path, network(), mesh())
      assert tracemalloc.get_traced_memory()[1] < 2**23, message
    finally:
      tracemalloc.stop()
    assert "\n" not in str(raised.value) and path in str(raised.value)
  write_npz(path, **good, protocol=protocol, unused=(big, "<f8", zeros))
  read, _ = reference.read(path, network(), mesh())  # what is not needed is not read
  assert read.features.count == 9


def test_objects_in_a_reference_are_never_unpickled(tmp_path):
  class Malicious:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "run"),)

  evil, path = np.array([Malicious()], object), str(tmp_path / "reference.npz")
  np.savez(path, mu=np.zeros(24), sigma=np.eye(24), extra=evil)
  reference.read(path, network(), mesh())
  for name, message in (("count", "is no number"), ("protocol", "is object .* no text")):
    np.savez(path, **dict(mu=np.zeros(24), sigma=np.eye(24)) | {name: evil})
    with pytest.raises(ValueError, match=message):
      reference.read(path, network(), mesh())
  np.savez(path, mu=np.array(24 * [Malicious()], object), sigma=np.eye(24))
  with pytest.raises(ValueError, match=r"mu of .* is object, and numbers are needed"):
    reference.read(path, network(), mesh())
  assert not (tmp_path / "run").exists()


# The command.


def run(arguments):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, *arguments], env=environment, capture_output=True, text=True
  )
  assert "Traceback" not in done.stderr, done.stderr
  return done


WRONG = [
  ([], "Error: no images given: name the images by one of --images, --samples and --config."),
  (["--samples=a", "--images=b"], "Error: --images and --samples given"),
  (["--samples=a", "--size=64"], "Error: --size only goes with --images"),
  (["--images=a", "--split=test"], "Error: --split only goes with --config"),
  (["--samples=nosuch"], "Error: nosuch: there is no such file or folder"),
  (["--samples=a", "--networks=inception,vgg"], "'vgg' is unknown; known are inception, dinov2"),
  (["--samples=a", "--networks=dinov2,dinov2"], "Error: --networks=dinov2,dinov2 names a"),
  (["--samples=a", "--weights=dinov2=a.pth"], "'dinov2=a.pth' is no NETWORK=FILE"),
  (["--images=a", "--size=0"], "Error: flag --size=0"),
  (["--config=configs/nosuch.py"], "Error: --config=configs/nosuch.py: there is no such file"),
]


@pytest.mark.slow
def test_wrong_flags_end_in_one_line(tmp_path):
  script = (
    "import json, sys\n"
    "from absl.testing import flagsaver\n"
    "from ism_jax.evaluation import statistics\n"
    "from ism_jax.runtime import commands\n"
    "statistics.define_flags()\n"
    "for arguments in json.loads(sys.argv[1]):\n"
    "  with flagsaver.flagsaver():\n"
    "    try:\n"
    "      statistics.main(commands.parse_flags(['statistics', sys.argv[2], *arguments]))\n"
    "      print('no error')\n"
    "    except SystemExit as error:\n"
    "      print(error)\n"
  )
  wrong = json.dumps([arguments for arguments, _ in WRONG])
  said = run(["-c", script, wrong, f"--out={tmp_path}"]).stdout.splitlines()
  assert len(said) == len(WRONG), said
  for line, (arguments, message) in zip(said, WRONG, strict=True):
    assert message in line, arguments
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_makes_inceptions_statistics(tmp_path):
  from ism_jax.pretrained import inception

  images = crops(6, size=32)
  for i, image in enumerate(images):
    (tmp_path / f"{i}.png").write_bytes(png(image))
  flags = (
    "-m",
    "ism_jax",
    "statistics",
    f"--samples={tmp_path}",
    f"--out={tmp_path / 'out'}",
    "--weights=random",
    "--batch_size=4",
    "--keep_features=3",
  )
  said = run(flags).stderr
  assert "6/6 images" in said and "6 images do not determine the covariance of the 2048" in said
  loaded = inception.load("random")
  seen = jax.device_get(jax.jit(inception.features)(loaded.params, images))
  with np.load(tmp_path / "out" / "inception.npz", allow_pickle=False) as file:
    assert json.loads(str(file["protocol"]))["weights"] == loaded.sha256
    for mu, sigma, output in (("mu", "sigma", "features"), ("mu_s", "sigma_s", "spatial")):
      expected = np.float64(seen[output])
      covariance = np.cov(expected, rowvar=False)
      np.testing.assert_allclose(file[mu], expected.mean(0), rtol=1e-3, atol=1e-5)
      np.testing.assert_allclose(
        file[sigma], covariance, rtol=1e-2, atol=1e-3 * np.abs(covariance).max()
      )
    np.testing.assert_allclose(file["features"], seen["features"][[0, 2, 5]], rtol=1e-3, atol=1e-5)
  assert "is there already" in run(flags).stderr


def test_latents_have_the_reference_of_the_images_that_they_were_made_of(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(features, "published", lambda name, weights: network(name))
  images, folder = crops(12), tmp_path / "images"
  (folder / "a").mkdir(parents=True)
  for i, image in enumerate(images):
    (folder / "a" / f"{i:02d}.png").write_bytes(png(image))
  config = tiny_config()
  config.data.update({"name": "latents", "vae": "random-small", "channels": 4, "image_size": 2})
  config.data.update({"num_classes": 1, "dir": str(tmp_path / "latents")})
  config.evaluation.update({"networks": "inception", "enlarge": 1})
  config.model.size = "SiT-XXS/2"
  exp = experiment.parse(config)
  (tmp_path / "latents").mkdir()
  benchmark.write_random_latents(exp.data, exp.data.dir)
  manifest = tmp_path / "latents" / "manifest.json"
  mesh = sharding.data_mesh(jax.devices()[:1])
  assert statistics.for_latents(exp, mesh) == exp  # an older manifest does not say where they were
  content = json.loads(manifest.read_text())
  content["source"] = {"images": str(folder), "tfds_dir": ""}
  manifest.write_text(json.dumps(content))
  assert statistics.for_latents(exp, mesh) == exp and "other images than were" in caplog.text
  content["listing"] = images_lib.open_source(str(folder), "").listing
  manifest.write_text(json.dumps(content))
  named = statistics.for_latents(exp, mesh).evaluation.reference_files()["inception"]
  check_file(named, images)
  assert named.startswith(exp.data.dir)

  shutil.rmtree(folder)
  assert statistics.for_latents(exp, mesh).evaluation.reference_files() == {"inception": named}
  pathlib.Path(named).write_bytes(b"PK")
  assert statistics.for_latents(exp, mesh) == exp
  assert "are not where they were" in caplog.text
