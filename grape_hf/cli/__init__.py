"""The command ``grape-hf``: each subcommand calls what the package's public functions do.

What a user did wrong is said in one line on standard error, with exit status 2; ``--traceback`` shows where it came up.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

DESCRIPTION = """\
Train Hugging Face models with GrAPE: direct feedback to every block, in place of backpropagation through all of them.

  1. grape-hf inspect type:gpt2        what would happen to this model, and at what cost? (trains nothing)
  2. grape-hf compare demo.yaml        a few minutes: backpropagation, DFA and GrAPE side by side, on a small text
  3. grape-hf train my.yaml            your own run, by a recipe
"""
EXAMPLES = {
    "inspect": """\
examples:
  grape-hf inspect outputs/demo/grape                            a folder with a config.json
  grape-hf inspect openai-community/gpt2 --batch_size 16         a model on the Hub: its configuration alone is read
  grape-hf inspect type:llama --overrides num_hidden_layers=8    a kind of transformers model, with its default sizes
  grape-hf inspect timm:resnet18                                 a timm architecture
  grape-hf inspect type:gpt2 --feedback_points 3                 any option of GrAPE: what would it change?
  grape-hf inspect type:gpt2 --pipeline_stages 4                 which blocks would go to which process?
""",
    "train": """\
Further options go over those of the file. In several processes:
  accelerate launch --num_processes 2 -m grape_hf.cli train my.yaml

examples:
  grape-hf train demo.yaml --output_dir outputs/small                       two minutes, no network, no GPU
  grape-hf train image_classification/digits.yaml                           half a minute, the same
  grape-hf train wikitext103.yaml --method bp --output_dir outputs/wiki_bp  WikiText-103 by backpropagation
  grape-hf train my.yaml --max_steps 100 --seed 1
""",
    "compare": """\
Every method trains from the same weights on the same batches for as many steps, one run for each seed. Runs that are
done are kept: start again to go on, or a second time beside it to share the work.

examples:
  grape-hf compare demo.yaml                                         bp, dfa and grape; some minutes on one core
  grape-hf compare image_classification/digits.yaml --seeds 0 1 2
  grape-hf compare demo.yaml --methods bp dfa_identity grape         DFA with a fixed identity, dfa: fixed random
  grape-hf compare my.yaml --methods bp grape --learning_rates bp=3e-3 grape=5e-3
""",
    "plot": """\
Of one run: curves.png and alignment.png, in its folder. Of several: their curves together, and a heat map each.

examples:
  grape-hf plot outputs/demo/grape
  grape-hf plot outputs/demo/bp outputs/demo/grape --output both.png
""",
    "card": """\
examples:
  grape-hf card outputs/demo/grape
  grape-hf card outputs/demo/grape --bp outputs/demo/bp     with the figures of the run by backpropagation
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: its name and arguments; default: those of this process.

    Returns:
        The exit status: 0, or 2 where what was asked for cannot be done.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(with_options="inspect" in words[:2])
    options, rest = parser.parse_known_args(words)
    if rest and options.command != "train":
        parser.error(f"{options.command} knows no {rest[0]}; see grape-hf {options.command} --help")
    # A RuntimeError of a training is no user's mistake: it keeps its traceback.
    expected: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, FloatingPointError)
    if options.command in ("inspect", "compare"):
        expected += (RuntimeError,)
    try:
        options.act(options, rest)
    except expected as error:
        if options.traceback:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        hint = " (grape-hf --traceback ... shows where.)" if options.command == "train" else ""
        print(f"grape-hf {options.command}: {text}{hint}", file=sys.stderr)
        return 2
    return 0


def make_parser(with_options: bool = True) -> argparse.ArgumentParser:
    """Make the parser.

    Args:
        with_options: whether ``inspect`` takes GrAPE's options, which takes seconds to import.
    """
    parser = _Parser("grape-hf", description=DESCRIPTION, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it came up")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, act: Any, text: str, **more: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=EXAMPLES[name],
            formatter_class=_Formatter,
            allow_abbrev=False,  # what train does not know goes to the recipe as it is
            **more,
        )
        command.set_defaults(act=act)
        return command

    parents = [_grape_options()] if with_options else []
    command = add(
        "inspect",
        inspect,
        "Show a model's blocks, feedback matrices and estimated cost; train nothing.",
        parents=parents,
    )
    command.add_argument("model", help="folder, Hub name, timm:ARCHITECTURE or type:MODEL_TYPE")
    command.add_argument("--batch_size", type=_positive, default=8, help="samples in a step (default: 8)")
    command.add_argument("--sequence_length", type=_positive, help="tokens in a sample (default: 128 at most)")
    command.add_argument("--image_size", type=_positive, help="height and width (default: the model's)")
    command.add_argument("--overrides", metavar="NAME=VALUE,...", help="other values in the model's configuration")

    command = add("train", train, "Train by a recipe, with the options of a YAML or JSON file.")
    command.add_argument("config", help="the file, or the name of one that comes with grape_hf (demo.yaml)")
    command.add_argument("--recipe", choices=("text", "images"), help="default: told from the options in the file")

    command = add("compare", compare, "Train with several methods side by side; write a table, plots and a report.")
    command.add_argument("config", help="a recipe's file of options, as for train")
    command.add_argument("--recipe", choices=("text", "images"), help="default: told from the options in the file")
    command.add_argument(
        "--methods", nargs="+", default=["bp", "dfa", "grape"], help="values of method; default: bp dfa grape"
    )
    command.add_argument("--seeds", nargs="+", type=int, help="default: the file's")
    command.add_argument("--learning_rates", nargs="+", metavar="METHOD=RATE", default=[], help="default: the file's")
    command.add_argument("--output", type=Path, help="folder (default: outputs/compare/ and the file's name)")

    command = add("plot", plot, "Draw what runs logged, from their trainer_state.json.")
    command.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="folder of a run, or a checkpoint")
    command.add_argument("--output", type=Path, help="image file (default, of several runs: runs.png)")

    command = add("card", card, "Write the model card of a run.")
    command.add_argument("run", metavar="RUN_DIR", type=Path, help="one you trust: training_args.bin is a pickle")
    command.add_argument("--bp", type=Path, metavar="RUN_DIR", help="the same run by backpropagation, to compare with")
    command.add_argument("--output", type=Path, help="file to write (default: README.md in the folder)")
    return parser


def inspect(options: argparse.Namespace, _: Sequence[str]) -> None:
    """Print an inspection."""
    from transformers.utils import logging as transformers_logging

    from grape_hf import GrapeArgumentsMixin
    from grape_hf.cli.inspection import inspect_model
    from grape_hf.cli.models import maker
    from grape_hf.cli.report import describe
    from grape_hf.cli.stages import describe_stages
    from grape_hf.recipes.parsing import parse_overrides

    logging.basicConfig(level="WARNING", format="%(message)s")
    names = [field.name for field in dataclasses.fields(GrapeArgumentsMixin)]
    grape = GrapeArgumentsMixin(**{name: getattr(options, name) for name in names})
    overrides = parse_overrides("--overrides", options.overrides)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it says of a model that is only looked at
    try:
        batch, make = maker(options.model, options.batch_size, options.sequence_length, options.image_size, overrides)
        # Backpropagation has no feedback to inspect; over stages there is something to show of it.
        if grape.method != "bp" or grape.pipeline_stages == 1:
            print(describe(inspect_model(make, grape, options.batch_size), options.model, batch))
        if grape.pipeline_stages > 1:
            print(describe_stages(make, grape))
    finally:
        transformers_logging.set_verbosity(verbosity)


def train(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run a recipe in this process."""
    from grape_hf.cli import recipes

    recipes.train(options.config, options.recipe, rest)


def compare(options: argparse.Namespace, _: Sequence[str]) -> None:
    """Run a recipe with several methods."""
    from grape_hf.cli import recipes
    from grape_hf.recipes import compare as comparison

    config = recipes.find_config(options.config)
    recipe = recipes.RECIPES[options.recipe or recipes.recipe_of(config)]
    output = options.output or Path("outputs") / "compare" / config.stem
    rates = comparison.parse_rates(options.learning_rates)
    comparison.compare(config, recipe, output, options.methods, options.seeds, rates)


def plot(options: argparse.Namespace, _: Sequence[str]) -> None:
    """Write pictures of one run into its folder, or of several into one file."""
    from grape_hf.reports.plot_callback import plot_training
    from grape_hf.reports.plots import plot_runs, read_history

    if len(options.runs) == 1 and options.output is None:
        (run,) = options.runs
        history = read_history(run)
        written = plot_training(history, run if run.is_dir() else run.parent, _names([run])[0])
        if not written:
            raise ValueError(f"{run}: nothing was logged more than once, so that there is no curve to draw.")
    else:
        runs = dict(zip(_names(options.runs), map(read_history, options.runs), strict=True))
        written = [plot_runs(runs, options.output or Path("runs.png"))]
    print(*written, sep="\n")


def card(options: argparse.Namespace, _: Sequence[str]) -> None:
    """Write a model card."""
    from grape_hf.reports.cards import write_card

    print(write_card(options.run, options.output, options.bp))


def _names(runs: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as much of the path as tells them apart."""
    parts = [(run.resolve() if run.is_dir() else run.resolve().parent).parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"one run is named twice: {', '.join(map(str, runs))}.")


def _grape_options() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    from grape_hf import GrapeArgumentsMixin

    return HfArgumentParser(GrapeArgumentsMixin, add_help=False)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage, which for ``inspect`` fills a screen."""
        self.exit(2, f"{self.prog}: {message}\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=32, width=110, **kwargs)
