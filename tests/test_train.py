"""The loop on real digits: what it leaves, that it continues, and that it stops when it should."""

import dataclasses
import io
import json
import os
import shutil
import signal
import time
import types

import examples
from examples import draw_samples
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
import sklearn.datasets

from ism_jax import data, experiment, generate, model, paths, ranges, restore, steps, train
from ism_jax.evaluation import evaluate, monitor, reference
from ism_jax.export import pytorch
from ism_jax.pretrained import sit
from ism_jax.runtime import checkpoints, commands, files, locks, logs, sharding


def tiny_config():
  """With an average more than needed, which every run here keeps, stops and continues with."""
  config = examples.tiny_config()
  config.ema.others = (0.2,)  # which the warm-up reaches in two steps
  return config


@pytest.fixture(scope="module")
def one_device():
  return jax.devices()[:1]


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory):
  """The digits, prepared once for this file."""
  patch = pytest.MonkeyPatch()
  patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("data")))
  yield
  patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
  """A finished run of 8 steps: (workdir, state, the jitted functions it used)."""
  workdir = tmp_path_factory.mktemp("run")
  made = []
  patch = pytest.MonkeyPatch()
  for name in ("couple_function", "steps_function"):
    original = getattr(steps, name)
    patch.setattr(steps, name, lambda *a, original=original: made.append(original(*a)) or made[-1])
  state = train.train(tiny_config(), str(workdir), one_device)
  patch.undo()
  return workdir, jax.device_get(state), made


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
  """{init_time: a state dict of SiT's keys}: the packaged network of digits, at d = 0 and w = 0."""
  trained = restore.read("digits")
  params = jax.device_get(trained.params)
  embedder = model.ScalarEmbedder(params["t_embedder"]["mlp_0"]["bias"].size)
  for name, at_zero in (("d_embedder", paths.level(np.zeros(1))), ("w_embedder", np.zeros(1))):
    condition = embedder.apply({"params": params.pop(name)}, at_zero)[0]
    params["t_embedder"]["mlp_2"]["bias"] = params["t_embedder"]["mlp_2"]["bias"] + condition
  state = sit.from_params(params, trained.exp.network(), trained.exp.image_shape)
  folder, made = tmp_path_factory.mktemp("starts"), {}
  for time_, arrays in zip(sit.TIMES, (state, sit.reverse_time(state, "it")), strict=True):
    made[time_] = str(folder / f"{time_}.safetensors")
    arrays = {key: np.ascontiguousarray(a, np.float32) for key, a in arrays.items()}
    safetensors.numpy.save_file(arrays, made[time_])
  return made


def entries(workdir):
  with open(workdir / "metrics.jsonl") as f:
    return [json.loads(line) for line in f]


def assert_equal_trees(a, b):
  for (path, x), (_, y) in zip(*map(jax.tree_util.tree_leaves_with_path, (a, b)), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def assert_close_params(state, expected):
  state = jax.device_get(state)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(expected.params), jax.tree.leaves(state.params), strict=True
  ):
    np.testing.assert_allclose(b, a, atol=2e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("time_", sit.TIMES)
def test_a_run_begins_with_a_network_of_either_time_and_refuses_the_other(
  starts, tmp_path, time_, caplog
):
  caplog.set_level("INFO", "absl")
  (other,) = set(sit.TIMES) - {time_}
  config = tiny_config()
  config.update({"init_from": starts[time_], "init_time": other})
  with pytest.raises(ValueError, match=rf"velocity error of .* reversed: set init_time={time_}\."):
    train.train(config, str(tmp_path))
  assert not list((tmp_path / "checkpoints").iterdir())
  config.init_time = time_
  exp, mesh = experiment.parse(config), sharding.data_mesh()
  params = restore.read_start(exp.init_from, exp, None)
  original = dataclasses.replace(exp, init_from=starts[sit.TIMES[0]], init_time=sit.TIMES[0])
  expected = restore.read_start(original.init_from, original, None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected)
  params = steps.init_function(exp, mesh)(jax.random.key(0), params).params
  train.check_time(exp, mesh, params, data.load_source(exp.data))
  assert f"init_time={time_} has a mean squared velocity error" in caplog.text


def test_both_readings_of_a_network_err_as_its_reverse_does_and_one_of_no_knowledge_alike(starts):
  exp, mesh = experiment.parse(tiny_config()), sharding.data_mesh()
  digits = sklearn.datasets.load_digits()
  images = {"x1": np.float32(digits.images[:64, ..., None] / 8 - 1)}
  images["c"] = np.int32(digits.target[:64])
  images = sharding.global_arrays(sharding.rows(mesh), images)
  init, measure = steps.init_function(exp, mesh), steps.velocity_errors_function(exp, mesh)
  key = jax.random.key(1)
  begun = [init(key, restore.read_start(path, exp, None)).params for path in starts.values()]
  errors, of_reverse = (measure(params, images, key) for params in begun)
  np.testing.assert_allclose(errors, of_reverse[::-1], rtol=1e-3)
  assert 5 * errors[0] < errors[1]
  # Where the output is zero, the error is the mean square of the velocity.
  error, reverse = measure(jax.tree.map(jnp.zeros_like, begun[0]), images, key)
  assert error == reverse
  np.testing.assert_allclose(error, 1 + np.mean(images["x1"] ** 2), rtol=0.05)


def test_a_whole_run_compiles_each_function_once(run):
  _, _, (couple, train_steps) = run
  assert couple._cache_size() == 1
  assert train_steps._cache_size() == 1


def test_a_run_leaves_checkpoints_metrics_and_events(run):
  workdir, state, _ = run
  assert state.step == 8
  assert [e["step"] for e in entries(workdir)] == [4, 8]
  last = entries(workdir)[-1]
  for name in (
    "loss",
    "velocity",
    "guidance",
    "consistency",
    "gradient_norm",
    "data_wait",
    "steps_per_second",
    "coupling/attained_gain",
    "coupling/class_shift",
  ):
    assert np.isfinite(last[name]), name
  np.testing.assert_allclose(
    last["loss"], last["velocity"] + last["guidance"] + last["consistency"], rtol=1e-5
  )
  assert list(workdir.glob("events.out.tfevents.*"))
  with checkpoints.open_manager(workdir, keep=1, read_only=True) as manager:
    assert manager.all_steps() == [4, 8]
    assert checkpoints.read_config(manager) == files.as_dict(tiny_config())


def test_a_run_is_watched_while_it_trains(run, tmp_path, one_device):
  """Samples of the same noise, scores, gradient norms, a profile; the training is as before."""
  config = tiny_config()
  config.profile_steps = 2
  config.monitor.update({"every": 4, "num_images": 30, "steps": (1, 2)})
  config.log.gradients_every = 4
  state = jax.device_get(train.train(config, str(tmp_path), one_device))
  assert_equal_trees(state, run[1])
  lines = entries(tmp_path)
  scores = {e["step"]: e for e in lines if "monitor/steps_1/classifier_times_floor" in e}
  assert list(scores) == [4, 8]
  norms = [e for e in lines if "gradient_norm/consistency" in e]
  assert [e["step"] for e in norms] == [4, 8] and norms[0] != norms[1]

  # The numbers and the grid of the last step are those of the final state's samples.
  exp = experiment.parse(config)
  images, labels = draw_samples(
    exp,
    sharding.data_mesh(one_device),
    state.ema,
    num_images=30,
    steps=2,
    w=config.monitor.w,
    seed=0,
    batch_size=30,
  )
  with pytest.warns(UserWarning, match="30 samples"):
    expected = reference.Reference(exp, sharding.data_mesh(one_device)).score(images, labels)
  for name in ("frechet_distance", "accuracy"):
    np.testing.assert_allclose(
      scores[8][f"monitor/steps_2/classifier_{name}"], expected["classifier"][name], rtol=1e-3
    )
  png = (tmp_path / "grids" / "steps2_00000008.png").read_bytes()
  assert png == generate.grid_png(images, exp.evaluation.enlarge)
  assert png != (tmp_path / "grids" / "steps2_00000004.png").read_bytes()
  (events,) = tmp_path.glob("events.out.tfevents.*")
  content = events.read_bytes()
  assert (
    content.count(b"samples/steps_2") == 2 and b"monitor/steps_1/classifier_accuracy" in content
  )
  (profile,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
  events = [
    event
    for plane in jax.profiler.ProfileData.from_file(str(profile)).planes
    for line in plane.lines
    for event in line.events
  ]
  seen = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
  assert seen == [4]  # one call of two steps, in the second pool
  assert not [event.name for event in events if event.name.startswith("$")]  # calls in Python


def test_a_run_stopped_inside_a_pool_and_continued_is_the_same_run(
  run, tmp_path, one_device, monkeypatch
):
  """Bit for bit, and with the metrics of what it did again written once."""
  _workdir, whole, _ = run
  config = tiny_config()
  config.checkpoint.every = 2  # a pool has 4 steps
  steps_function = steps.steps_function

  def dies_in_its_fourth_call(*args):
    f, calls = steps_function(*args), []

    def call(*a):
      calls.append(None)
      if len(calls) == 4:
        raise KeyboardInterrupt
      return f(*a)

    return call

  with monkeypatch.context() as patch:
    patch.setattr(steps, "steps_function", dies_in_its_fourth_call)
    with pytest.raises(KeyboardInterrupt):
      train.train(config, str(tmp_path), one_device)
  with checkpoints.open_manager(tmp_path, keep=2, read_only=True) as manager:
    assert manager.latest_step() == 6
  continued = jax.device_get(train.train(config, str(tmp_path), one_device))
  assert_equal_trees(continued, whole)
  assert list(whole.others) == ["ema:0.2"]
  assert [e["step"] for e in entries(tmp_path)] == [4, 8]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_a_signal_stops_saves_where_it_is_and_continues_as_the_same_run(
  run, tmp_path, one_device, monkeypatch, stop
):
  _, whole, _ = run
  steps_function = steps.steps_function

  def gets_it_in_its_first_call(*args):
    f, calls = steps_function(*args), []

    def call(*a):
      calls.append(None)
      if len(calls) == 1:
        os.kill(os.getpid(), stop)
      return f(*a)

    return call

  before = signal.getsignal(stop)
  with monkeypatch.context() as patch:
    patch.setattr(steps, "steps_function", gets_it_in_its_first_call)
    with pytest.raises(SystemExit) as stopped:
      train.train(tiny_config(), str(tmp_path), one_device)
  assert stopped.value.code == 128 + stop and signal.getsignal(stop) is before
  with checkpoints.open_manager(tmp_path, keep=2, read_only=True) as manager:
    assert manager.all_steps() == [2]
  if stop == signal.SIGTERM:
    continued = jax.device_get(train.train(tiny_config(), str(tmp_path), one_device))
    assert_equal_trees(continued, whole)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_kills_unless_it_has_the_cause_of_the_first(stop, capfd, monkeypatch):
  killed, now = [], time.monotonic()
  monkeypatch.setattr(os, "kill", lambda process, number: killed.append((process, number)))
  with train.watch_for_preemption(None) as preempted:
    assert not preempted(1, 2)
    signal.raise_signal(stop)
    assert preempted(3, 4) == stop
    for each in commands.STOPS:  # at once
      signal.raise_signal(each)
    assert preempted(3, 4) == stop and not killed
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  said = f"{stop.name}: saving after the steps under way; another one kills.\n"
  assert capfd.readouterr().err == said


def test_a_signal_saves_though_nobody_reads_what_is_said():
  """As where Ctrl-C ends the `tee` behind the run, too."""
  read, write = os.pipe()
  os.close(read)
  stderr = os.dup(2)
  os.dup2(write, 2)
  try:
    with train.watch_for_preemption(None) as preempted:
      signal.raise_signal(signal.SIGINT)
      assert preempted(1, 2) == signal.SIGINT
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)
    os.close(write)


def test_a_signal_that_the_process_ignores_stays_ignored():
  """As SIGHUP under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with train.watch_for_preemption(None) as preempted:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not preempted(1, 2)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_grids_that_cannot_be_written_stop_no_run(tmp_path):
  (tmp_path / "file").touch()
  exp = experiment.parse(tiny_config())
  values = {"_exp": exp, "_reference": None, "_workdir": str(tmp_path / "file")}
  images = np.zeros((10, 8, 8, 1), np.uint8)
  with logs.Writer(tmp_path, start=0, state=None, total=4, every=4) as writer:
    monitor.Monitor._score(types.SimpleNamespace(**values), 4, {1: (images, True)}, writer)
  (events,) = tmp_path.glob("events.out.tfevents.*")
  assert b"samples/steps_1" in events.read_bytes()


def test_a_damaged_checkpoint_is_put_aside_and_its_steps_are_trained_again(
  run, tmp_path, one_device
):
  workdir = shutil.copytree(run[0], tmp_path / "work")
  last = workdir / "checkpoints" / "8"
  biggest = max(last.rglob("d/*"), key=lambda p: p.stat().st_size)
  content = bytearray(biggest.read_bytes())
  content[len(content) // 2] ^= 1
  biggest.write_bytes(content)
  assert_equal_trees(jax.device_get(train.train(tiny_config(), str(workdir), one_device)), run[1])
  assert (workdir / "checkpoints_damaged" / "8").is_dir()
  assert [e["step"] for e in entries(workdir)] == [4, 8]
  with checkpoints.open_manager(workdir, keep=2, read_only=True) as manager:
    assert manager.all_steps() == [4, 8]
    like = steps.abstract_state(experiment.parse(tiny_config()), sharding.data_mesh(one_device))
    assert_equal_trees(jax.device_get(checkpoints.restore(manager, like, 8)[0]), run[1])


def test_swapped_checkpoints_of_an_older_version_are_damaged(run, tmp_path, one_device):
  """One that does not say its step: the state has it."""
  workdir = shutil.copytree(run[0], tmp_path / "work")
  for old, new in (("4", "x"), ("8", "4"), ("x", "8")):
    path = (workdir / "checkpoints" / old).rename(workdir / "checkpoints" / new)
    path = path / "checksums" / "metadata"
    sums = json.loads(path.read_text())
    path.write_text(json.dumps({name: sums[name] for name in sums if name != "step"}))
  with pytest.raises(
    ValueError, match=r"(?s)whole.*8 is damaged: it holds step 4.*it holds step 8"
  ):
    train.train(tiny_config(), str(workdir), one_device)


def test_a_path_that_cannot_hold_checkpoints_is_refused_before_the_data_is_read(
  tmp_path, one_device, monkeypatch
):
  monkeypatch.setattr(data, "load_source", None)
  with pytest.raises(ValueError, match=r"a\[1\]' cannot hold checkpoints"):
    train.train(tiny_config(), str(tmp_path / "a[1]"), one_device)


def test_a_second_run_in_a_workdir_is_refused_and_reading_it_is_not(
  run, tmp_path, one_device, monkeypatch
):
  """Here the second starts while the first begins to read its checkpoint."""
  workdir = shutil.copytree(run[0], tmp_path / "work")
  before = sorted(path for path in workdir.rglob("*") if path.name != "training.lock")
  starts = []

  def start_another(*_, **__):
    starts.append(str(workdir))
    train.train(tiny_config(), str(workdir), one_device)

  monkeypatch.setattr(train, "start_or_continue", start_another)
  with pytest.raises(OSError, match=f"work is being trained in by process {os.getpid()} on "):
    train.train(tiny_config(), str(workdir), one_device)
  assert len(starts) == 1
  with locks.hold(str(workdir)):  # which the error above has given back
    assert restore.read(str(workdir)).step == 8
  assert sorted(path for path in workdir.rglob("*") if path.name != "training.lock") == before


def test_a_finished_run_is_left_alone(run, one_device):
  workdir, state, _ = run
  before = (workdir / "metrics.jsonl").read_bytes()
  assert_equal_trees(jax.device_get(train.train(tiny_config(), str(workdir), one_device)), state)
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_the_step_may_take_its_states_buffers(one_device):
  """Donation: the old state is gone, and the result is that of a step that keeps it."""
  config = tiny_config()
  exp, keys = experiment.parse(config), steps.base_keys(0)
  mesh = sharding.data_mesh(one_device)
  source = data.load_source(exp.data)
  pool = next(data.pools(source, batch_size=64, pool_size=4, seed=0))
  put = lambda: sharding.global_arrays(sharding.rows(mesh, axis=1), pool)
  couple, train_steps = steps.couple_function(exp, mesh), steps.steps_function(exp, mesh)
  results = []
  for _ in range(2):
    state = steps.init_function(exp, mesh)(keys.init)
    paired, _ = couple(put(), keys, 0)
    after, _ = train_steps(state, paired, keys, 0)
    results.append(jax.device_get(after))
    assert all(a.is_deleted() for a in jax.tree.leaves((state.params, state.ema)))
    assert not any(a.is_deleted() for a in jax.tree.leaves(after))
  assert_equal_trees(*results)


def test_the_first_step_that_is_not_finite_is_named():
  metrics = {"loss": np.array([1.0, 2.0, np.nan]), "velocity": np.array([1.0, np.inf, 1.0])}
  with pytest.raises(FloatingPointError, match="velocity not finite at step 11"):
    train.check_finite(metrics, {"entropy": 0.1}, last_step=12)
  with pytest.raises(
    FloatingPointError, match=r"coupling/entropy not finite at step 10.*data\.dir"
  ):
    train.check_finite(metrics, {"entropy": np.nan}, last_step=12)


def test_samples_are_written_as_the_name_of_the_output_asks(run, tmp_path, one_device):
  """An npz for ADM's evaluator, PNGs of each, all side by side, and on their way from noise."""
  workdir, _, _ = run
  config = tiny_config()
  config.sample.update({"num_images": 25, "steps": "1/2,1/4,1/4", "label": "3", "batch_size": 10})
  write = lambda name: generate.write_samples(
    config, str(workdir), str(tmp_path / name), one_device
  )
  write("samples.npz")
  with np.load(tmp_path / "samples.npz") as archive:
    images = archive["arr_0"]
    assert images.shape == (25, 8, 8, 3) and images.dtype == np.uint8  # as ADM reads grey ones
    assert (images == images[..., :1]).all()
    np.testing.assert_array_equal(archive["arr_1"], np.full(25, 3))
  config.sample.label = "all"
  write("samples.npz")
  with np.load(tmp_path / "samples.npz") as archive:
    images = archive["arr_0"]
    np.testing.assert_array_equal(archive["arr_1"], np.arange(25) % 10)
  write("folder")
  pngs = sorted((tmp_path / "folder").iterdir())
  assert [p.name for p in pngs][:2] == ["000000_class0.png", "000001_class1.png"]
  np.testing.assert_array_equal([np.asarray(Image.open(p)) for p in pngs], images[..., 0])
  write("grid.png")
  enlarge = config.evaluation.enlarge
  with Image.open(tmp_path / "grid.png") as grid:
    corners = np.asarray(grid)[::enlarge, ::enlarge]
  np.testing.assert_array_equal(corners[:8, :8], images[0])
  write("path.gif")
  with Image.open(tmp_path / "path.gif") as gif:
    assert gif.n_frames == 4  # noise, and after each of three steps
    gif.seek(3)
    last = np.asarray(gif.convert("L"))
  with Image.open(io.BytesIO(generate.grid_png(images[..., :1], enlarge))) as grid:
    assert np.abs(last - np.int32(grid)).mean() < 1  # 256 colours of all frames


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("x.jpg", r"is no \.npz, \.png, \.gif"),
    ("folder.npz", "is a folder; name a f"),
    ("full/", "there and not empty"),
    ("full", "there and not empty"),
  ],
)
def test_what_samples_cannot_be_written_to_is_said_before_they_are_drawn(tmp_path, name, message):
  (tmp_path / "folder.npz").mkdir()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "a.png").touch()
  with pytest.raises((ValueError, OSError), match=message):
    generate.write_samples(tiny_config(), "/no/workdir", f"{tmp_path}/{name}")


def test_an_evaluation_leaves_numbers_tables_and_grids(run, one_device):
  workdir, _, _ = run
  config = tiny_config()
  config.evaluation.update({"num_images": 100, "steps": (1, 128), "w": (0.0, 0.5)})
  report = evaluate.evaluate(config, str(workdir), one_device)
  assert report == json.loads((workdir / "evaluation.json").read_text())
  settings = [(r["steps"], r["w"]) for r in report["results"]]
  assert settings == [(1, 0.0), (1, 0.5), (128, 0.0), (128, 0.5)]
  (network,) = report["networks"]
  assert report["step"] == 8 and network["held_out_accuracy"] > 0.97
  floor, distance = (
    network["floor"]["mean"],
    lambda r: r["scores"]["classifier"]["frechet_distance"],
  )
  real, class_means, noise = (
    report["yardsticks"][name] for name in ("real images", "class means", "noise")
  )
  assert distance(real) < 1e-6 < floor < distance(class_means) < distance(noise)
  assert real["scores"]["classifier"]["precision"] == real["scores"]["classifier"]["recall"] == 1
  assert class_means["scores"]["classifier"]["recall"] < 0.2
  # Eight steps of training: the samples are still noise, and the judge says so.
  assert distance(report["results"][0]) > max(5 * floor, distance(class_means))
  assert report["results"][2]["images_per_second"] is None  # the only batch compiled the sampler
  assert report["results"][3]["images_per_second"]["drawn"] > 0
  markdown = (workdir / "evaluation.md").read_text()
  assert "| 128 | 0.5 | 0 |" in markdown and "class means" in markdown
  assert not (workdir / evaluate.PARTIAL).exists()
  with Image.open(workdir / "evaluation.png") as figure:
    assert figure.size[0] > 1000
  with Image.open(workdir / "samples_steps1_w0.5.png") as grid:
    assert grid.size == (10 * 9 * 8, 8 * 9 * 8)
    pixels = np.asarray(grid.convert("RGB"))
  # All four side by side, halved: the pixels of every digit stay sharp.
  with Image.open(workdir / "samples.png") as figure:
    shown = np.asarray(figure.convert("RGB"))
  np.testing.assert_array_equal(shown[-296:-8, -736:-376], pixels[::2, ::2])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model": {"size": "SiT-XS/4"}}, r"model\.size='SiT-XXS/4', now 'SiT-XS/4'"),
    ({"batch_size": 128, "seed": 1}, r"batch_size=64, now 128, seed=0, now 1"),
    ({"variant": "sot"}, r"variant='ism', now 'sot'"),
    ({"ema": {"others": ()}}, r"ema\.others=\(0\.2,\), now \(\)"),
  ],
)
def test_a_checkpoint_of_another_run_is_refused(run, one_device, change, message):
  workdir, _, _ = run
  config = tiny_config()
  config.update({"steps": 16, **change})
  for mode in (train.train, evaluate.evaluate):
    with pytest.raises(ValueError, match=rf"{message}.*--config"):
      mode(config, str(workdir), one_device)


def test_scan_steps_that_cannot_reach_the_checkpoint_are_refused(tmp_path, one_device):
  config = tiny_config()
  config.update({"steps": 4, "scan_steps": 1, "checkpoint": {"every": 1, "keep": 9}})
  train.train(config, str(tmp_path), one_device)
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  config.scan_steps = 2
  with pytest.raises(ValueError, match="scan_steps=2 does not reach step 3"):
    train.train(config, str(tmp_path), one_device)


def test_a_run_that_diverges_stops_keeps_its_last_good_checkpoint_and_continues_clipped(
  run, tmp_path, one_device, monkeypatch
):
  monkeypatch.setattr(ranges, "check_fields", lambda *_: None)  # no config may have that rate
  workdir = shutil.copytree(run[0], tmp_path / "work")
  config = tiny_config()
  config.update({"steps": 12, "optimizer": {"learning_rate": 1e30}, "checkpoint": {"every": 2}})
  with pytest.raises(FloatingPointError, match=r"not finite at step 9\. .*clip_norm"):
    train.train(config, str(workdir), one_device)
  with checkpoints.open_manager(workdir, keep=1, read_only=True) as manager:
    assert manager.latest_step() == 8
  config.optimizer.update({"learning_rate": 1e-3, "clip_norm": 1.0})
  assert train.train(config, str(workdir), one_device).step == 12


def test_eight_devices_train_the_same_run_as_one_which_continues_theirs(run, tmp_path, one_device):
  """Two pools end to end: draws, pairs, gradients, update. (Adam magnifies rounding a little.)"""
  _, one, _ = run
  assert_close_params(train.train(tiny_config(), str(tmp_path)), one)
  shutil.rmtree(tmp_path / "checkpoints" / "8")
  continued = train.train(tiny_config(), str(tmp_path), one_device)
  assert continued.step == 8
  assert_close_params(continued, one)


def test_a_run_does_not_continue_on_other_data_unless_that_is_meant(
  tmp_path, one_device, monkeypatch, caplog
):
  config = tiny_config()
  source = data.load_source(experiment.parse(config).data)
  monkeypatch.setattr(data, "load_source", lambda cfg: source)

  def train_to(steps):
    config.steps = steps
    train.train(config, str(tmp_path), one_device)

  source.identity = {"dataset": "some/1.0.0", "images": 1797}
  train_to(4)
  source.identity = {"dataset": "some/1.0.0", "images": 1796}
  with pytest.raises(ValueError, match=r"images was 1797, and is 1796\. .*data\.may_change=True"):
    train_to(8)
  config.data.may_change = True
  train_to(8)
  assert "Continuing on other data: images was 1797" in caplog.text
  config.data.may_change = False
  train_to(8)  # this is its data now


def test_a_run_on_a_folder_knows_its_classes_and_continues_without_the_folder(
  tmp_path, one_device, monkeypatch
):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
  digits = sklearn.datasets.load_digits()
  for i in range(60):
    path = tmp_path / "ink" / f"digit {digits.target[i]}" / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(path)
  config = tiny_config()
  config.data.update({"name": "images", "dir": str(tmp_path / "ink"), "channels": -1})
  config.data.num_classes = -1
  config = data.resolve(config)
  config.steps = 4
  train.train(config, str(tmp_path / "run"), one_device)
  trained = restore.read(str(tmp_path / "run"))
  assert trained.names == [f"digit {i}" for i in range(10)]
  assert sum(trained.class_counts) == 52 and len(trained.class_counts) == 10  # 8 are held out
  shutil.rmtree(tmp_path / "ink")
  config.steps = 8
  with pytest.raises(ValueError, match=r"ink: there is no such .* that was prepared of them"):
    train.train(config, str(tmp_path / "run"), one_device)
  (config.data.dir,) = map(str, (tmp_path / "prepared" / "images").iterdir())
  train.train(config, str(tmp_path / "run"), one_device)
  trained = restore.read(str(tmp_path / "run"))
  assert trained.step == 8 and trained.exp.data.title == "ink"
  card = pytorch.card(trained, "float32", None, trained.names)
  assert "sampler of the 10 classes of ink" in card and '"digit 0"' in card
