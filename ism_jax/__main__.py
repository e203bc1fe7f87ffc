"""The one door: python -m ism_jax COMMAND [FLAGS], installed as the command ism-jax too."""

import collections
import importlib
import sys

# Its module, imported once it is asked for; what it does, in a line; its mode, of several.
Command = collections.namedtuple("Command", "module about mode", defaults=[None])


COMMANDS = {
  "train": Command("main", "trains a network, or continues", "train"),
  "evaluate": Command("main", "measures a trained network, or any images", "evaluate"),
  "sweep": Command("main", "finds the best guidance for each number of steps", "sweep"),
  "sample": Command("main", "draws images from a trained network", "sample"),
  "encode": Command("data.encode", "turns images into latents to train on"),
  "statistics": Command("evaluation.statistics", "makes the statistics of real images, for FID"),
  "compare": Command("evaluation.compare", "puts evaluated runs side by side"),
  "demo": Command("demo.serve", "serves a page to try a trained network"),
  "export": Command("export.pytorch", "writes a checkpoint for PyTorch"),
  "publish": Command("export.publish", "uploads an export to the Hugging Face hub"),
  "stablehlo": Command("export.stablehlo", "writes a sampler that needs JAX alone"),
  "aot": Command("performance.aot", "compiles training for TPUs that are not there"),
  "benchmark": Command("performance.benchmark", "measures how fast this machine is"),
}


def main(argv: list[str] | None = None) -> None:
  """Runs the command that the arguments name; without one, lists them all."""
  argv = sys.argv if argv is None else argv
  name = argv[1] if len(argv) > 1 else "--help"
  if name in ("-h", "-help", "--help", "help"):
    width = max(map(len, COMMANDS))
    print("python -m ism_jax COMMAND [FLAGS], or ism-jax COMMAND [FLAGS]:\n")
    print("\n".join(f"  {name:{width}}  {command.about}" for name, command in COMMANDS.items()))
    print("\npython -m ism_jax COMMAND --help tells the flags of a command.")
    return
  from ism_jax.runtime import commands

  if name not in COMMANDS:
    raise SystemExit(
      f"Error: {name!r} is no command.{commands.suggest(name, COMMANDS)} There are "
      f"{', '.join(COMMANDS)}."
    )
  command = COMMANDS[name]
  with commands.one_line_stops():
    module = importlib.import_module(f"ism_jax.{command.module}")
  options = {"mode": command.mode} if command.mode else {}
  commands.run(module, [f"ism_jax {name}", *argv[2:]], **options)


if __name__ == "__main__":
  main()
