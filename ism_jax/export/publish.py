"""Publishes an export on the Hugging Face hub.

  python -m ism_jax publish --export=DIR --repo=OWNER/NAME [--private] [--dry_run]
      [--license=apache-2.0] [--base_model=OWNER/NAME] [--dataset=OWNER/NAME]

Uploads the folder that `python -m ism_jax export` wrote, with its model card, README.md, whose
header and text get what the hub shows: licence, library, task, what the network was trained on and
from, and of an evaluation in DIR its scores, its protocol and its picture. `python -m ism_jax
evaluate --workdir=DIR --out=DIR` makes that. What the card says already stays. The repository is
made if it is not there, and gets a tag step-N. Broken off, the same command goes on. --dry_run
shows the files and the header, asks nobody and changes nothing.

Needed is a token that may write: `hf auth login`, or $HF_TOKEN.
"""

import contextlib
import glob
import json
import os
import pathlib
import re

from absl import flags, logging
from huggingface_hub import EvalResult, HfApi, ModelCard, constants, errors

from ism_jax import restore
from ism_jax.evaluation import report as report_lib
from ism_jax.evaluation import summary
from ism_jax.export import pytorch
from ism_jax.pretrained import hub
from ism_jax.pretrained.weights import cause_of
from ism_jax.runtime import commands, files

TASK = "unconditional-image-generation"  # the hub has none for classes
TAGS = ["ism_jax", "shortcut-models", "flow-matching", "class-conditional"]
_DATASETS = {  # on the hub, by data.title and data.name
  "ImageNet": "ILSVRC/imagenet-1k",
  "cifar10": "uoft-cs/cifar10",
}
# The card has the table of evaluation.md, without what is of this machine alone.
_LEFT_HERE = ("evaluation.md", "evaluation_partial.json", "*.npz", ".*", "__pycache__/*")


def publish(
  export: str, repo: str, *, private: bool = False, dry_run: bool = False, **about: str | None
) -> str:
  """Uploads an export; see the module's docstring.

  Args:
    export: its folder.
    repo: OWNER/NAME on the hub.
    private: whether only its owner may read it.
    dry_run: whether to only print what would go up.
    about: license, base_model, dataset, as `card` takes them.
  Returns:
    The address of the repository's page.
  Raises:
    FileNotFoundError: there is no export.
    ValueError: the folder or the name is not what is needed, or the repository is public already.
    OSError: nobody is logged in, this account may not write there, or the upload broke off.
  """
  repository = hub.parse(repo)
  if repository != hub.Repository(repository and repository.name):
    raise ValueError(
      f"--repo={repo} is no OWNER/NAME, a repository's name on the Hugging Face hub."
    )
  if not pathlib.Path(export).expanduser().is_dir():
    raise FileNotFoundError(f"--export={export} is no folder: python -m ism_jax export makes one.")
  folder, details = restore.find_export(export)
  text, name = card(folder, details, **about), repository.name
  report = _read_report(folder, details)
  uploaded = [
    path for path in sorted(folder.rglob("*")) if path.is_file() and _goes_up(folder, path)
  ]
  for path in uploaded:
    logging.info("%12s  %s", f"{path.stat().st_size:,}", path.relative_to(folder))
  size = sum(path.stat().st_size for path in uploaded) / 1e6
  logging.info("%d files, %.1f MB, for %s.", len(uploaded), size, repository.page)
  if report is None:
    remedy = f"python -m ism_jax evaluate --workdir={export} --out={export} adds them"
    logging.warning("The card has no scores and no picture of samples: %s.", remedy)
  if dry_run:
    logging.info("\n%s", text.partition("\n---\n")[0] + "\n---")
    return repository.page
  api = HfApi()
  _check_account(api, name)
  with _one_line(name):
    api.create_repo(name, private=private, exist_ok=True)
    is_private = api.model_info(name, timeout=hub.SECONDS).private
  if private and not is_private:
    raise ValueError(f"{repository.page} is public already: name another, or leave --private out.")
  files.write_here(folder / pytorch.CARD, text)
  if report is not None:
    report = json.dumps(pytorch.for_others(report), indent=2) + "\n"
    files.write_here(folder / pytorch.EVALUATION, report)
  about_it = restore.describe(details["tree"], details["step"])
  with _one_line(name):
    api.upload_folder(
      repo_id=name,
      folder_path=folder,
      commit_message=f"Upload the {about_it}",
      allow_patterns=[glob.escape(path.relative_to(folder).as_posix()) for path in uploaded],
    )
    api.create_tag(name, tag=f"step-{details['step']}", exist_ok=True)
  logging.info("Published: %s", repository.page)
  return repository.page


def card(
  folder: pathlib.Path,
  details: dict,
  *,
  license: str | None = None,
  base_model: str | None = None,
  dataset: str | None = None,
) -> str:
  """The model card of an export, with all that the hub shows.

  Args:
    folder: of the export, whose own card it begins with.
    details: its config.json.
    license: of the weights, by the hub's identifier; None is that of the card, or else this code's.
    base_model: whose weights training began with, on the hub; None is that of the card or config.
    dataset: that it was trained on, on the hub; None is that of the card, or known by its name.
  Raises:
    FileNotFoundError: the folder has no card.
    ValueError: its header cannot be read, or its evaluation is of other parameters.
  """
  path, config = folder / pytorch.CARD, details["config"]
  if not path.is_file():
    raise FileNotFoundError(f"{folder} has no {pytorch.CARD}, its model card: export it again.")
  try:
    model_card = ModelCard(path.read_text(encoding="utf-8"))
  except Exception as error:  # YAML's, the hub's own
    raise ValueError(f"the header of {path} cannot be read ({cause_of(error)}).") from error
  data = model_card.data
  began = None if os.path.exists(start := config.get("init_from", "")) else hub.parse(start)
  known = _DATASETS.get(config["data"].get("title")) or _DATASETS.get(config["data"]["name"])
  data.license = license or data.license or "apache-2.0"
  data.base_model = base_model or data.base_model or (began and began.name)
  data.datasets = [dataset] if dataset else data.datasets or (known and [known])
  data.pipeline_tag = data.pipeline_tag or TASK
  data.library_name = "diffusers" if (folder / "model_index.json").is_file() else "pytorch"
  data.tags = [*dict.fromkeys([*(data.tags or []), *TAGS])]
  text = model_card.text
  report = _read_report(folder, details)
  if report is not None:
    data.model_name = f"{details['architecture']} on {config['data']['name']}"
    data.eval_results = results(report)
    section = "\n".join(["## Evaluation", "", *pytorch.measured(report)]).rstrip() + "\n"
    before, *after = re.split(r"^## Evaluation\n(?:(?!## ).*\n?)*", text, maxsplit=1, flags=re.M)
    text = before.rstrip() + "\n\n" + section + "".join("\n" + part for part in after if part)
    picture = f"![Samples: rows w, columns steps]({pytorch.PICTURE})\n\n"
    if (folder / pytorch.PICTURE).is_file() and f"({pytorch.PICTURE})" not in text:
      text = text.replace("## Use\n", f"{picture}## Use\n", 1)
  return f"---\n{data.to_yaml().strip()}\n---\n{text.lstrip()}"


def results(report: dict) -> list[EvalResult]:
  """The scores of an evaluation as the hub's model-index has them.

  Of every number of steps they are those at the w of the least Fréchet distance.
  """
  run, networks = summary.as_run(report), report["networks"]
  protocol = {k: report[k] for k in ("num_images", "labels", "rounding")}
  rows = []
  for steps in summary.step_counts([run]):
    w = summary.best_w([run], steps)
    at_best = [r for r in report["results"] if (r["steps"], r["w"]) == (steps, w)]
    for network in networks:
      name = network["name"]
      for metric in sorted(at_best[0]["scores"][name]):
        if (title := report_lib.title_of(name, metric)) is None or metric == "times_floor":
          continue
        values = [r["scores"][name][metric] for r in at_best]
        rows.append(
          EvalResult(
            task_type=TASK,
            dataset_type=report["config"]["data"]["name"],
            dataset_name=report["config"]["data"].get("title") or report["config"]["data"]["name"],
            dataset_args=protocol,
            metric_type="fid" if title == "FID" else metric,
            metric_name=f"{title}, {steps} step{'s' * (steps > 1)}, w = {w:g}",
            metric_value=round(sum(values) / len(values), 5),
            metric_args={"steps": steps, "w": w, "network": name, "seeds": len(values)}
            | {"reference_images": network["reference_images"]}
            | ({"weights_sha256": sha256} if (sha256 := network["weights_sha256"]) else {}),
          )
        )
  return rows


def _read_report(folder, details) -> dict | None:
  path = folder / pytorch.EVALUATION
  if not path.is_file():
    return None
  try:
    report = json.loads(path.read_text(encoding="utf-8"))
    measured = report["step"], report["parameters"]
    report["networks"], report["results"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is no evaluation of a network ({type(error).__name__}: {error}): delete it, or "
      f"make it again with python -m ism_jax evaluate --workdir={folder} --out={folder}."
    ) from error
  if measured != (details["step"], restore.name_of(details["tree"])):
    raise ValueError(
      f"{path} is of the {measured[1]}, step {measured[0]}, and the export of the "
      f"{restore.describe(details['tree'], details['step'])}: delete it, or make it again."
    )
  return report


def _goes_up(folder, path) -> bool:
  relative = path.relative_to(folder)
  return not any(relative.match(pattern) for pattern in _LEFT_HERE) and not any(
    part.startswith((".", "__pycache__")) for part in relative.parts
  )


@contextlib.contextmanager
def _one_line(name: str):
  """What the hub refuses, as OSError."""
  try:
    yield
  except Exception as error:  # the hub's, the network's: they have no base in common
    raise OSError(
      f"{constants.ENDPOINT}/{name} was not published, or not all of it ({cause_of(error)}): the "
      "same command goes on where it broke off."
    ) from error


def _check_account(api: HfApi, name: str) -> None:
  """Raises OSError unless somebody is logged in who may write there."""
  try:
    account = hub.within(hub.SECONDS, api.whoami)
  except errors.LocalTokenNotFoundError as error:
    raise OSError(
      f"nobody is logged in: publishing needs a token that may write ({hub.LOGIN})."
    ) from error
  except Exception as error:  # a token that has expired, no network
    raise OSError(
      f"{constants.ENDPOINT} did not say whose token this is ({cause_of(error)}): log in again "
      f"({hub.LOGIN}), or look at the network."
    ) from error
  owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", ()))]
  owner = name.partition("/")[0]
  if owner.lower() not in map(str.lower, owners):
    raise OSError(
      f"--repo={name}: this token is of {account['name']}, who may write to {', '.join(owners)}."
    )


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("export", None, "Folder that python -m ism_jax export wrote.")
  flags.DEFINE_string("repo", None, "OWNER/NAME on the Hugging Face hub.")
  flags.DEFINE_bool("private", False, "Whether only its owner may read it.")
  flags.DEFINE_bool("dry_run", False, "Only show what would go up.")
  flags.DEFINE_string(
    "license", None, "Of the weights, as the hub names it; default what the card says, apache-2.0."
  )
  flags.DEFINE_string("base_model", None, "Whose weights training began with, on the hub.")
  flags.DEFINE_string("dataset", None, "What it was trained on, on the hub.")
  flags.mark_flags_as_required(["export", "repo"])


def main(argv):
  """Publishes; see the module's docstring."""
  args = flags.FLAGS
  about = {name: args[name].value for name in ("license", "base_model", "dataset")}
  with commands.one_line_errors():
    publish(args.export, args.repo, private=args.private, dry_run=args.dry_run, **about)
