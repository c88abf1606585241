"""The recipes for ``grape-hf train`` and ``compare``: which files of options there are, and which recipe one is for."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grape_hf
from grape_hf import GrapeTrainingArguments
from grape_hf.recipes.parsing import read_options

RECIPES = {"text": "grape_hf.recipes.wikitext103", "images": "grape_hf.recipes.image_classification"}


def configs_folder() -> Path:
    """Find the files of options: a wheel carries them in the package, a checkout beside it.

    Raises:
        FileNotFoundError: if they are in neither place.
    """
    package = Path(grape_hf.__file__).parent
    candidates = [folder / "recipes" for folder in (package, package.parent)]
    for folder in candidates:
        if (folder / "wikitext103.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"the files of options are missing: expected {' or '.join(map(str, candidates))}. Install the package again."
    )


def find_config(name: str) -> Path:
    """Return the file of options that is meant: one of the user's, or one that comes with the recipes.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path, shipped = Path(name), configs_folder() / name
    if path.is_file() or not shipped.is_file():
        if not path.is_file():
            raise FileNotFoundError(
                f"{name}: expected a file of options, or one of those that come with grape_hf: "
                f"{', '.join(shipped_configs())}."
            )
        return path
    return shipped


def shipped_configs() -> list[str]:
    """Return the files of options that come with the recipes, by their names in their folder."""
    folder = configs_folder()
    files = [*folder.glob("*.yaml"), *folder.glob("image_classification/*.yaml")]
    return sorted(str(path.relative_to(folder)) for path in files)


def recipe_of(config: Path) -> str:
    """Tell from its keys which recipe a file of options is for.

    Returns:
        A key of ``RECIPES``.

    Raises:
        ValueError: if the keys fit both or none.
    """
    options = read_options(config)
    common = _names(GrapeTrainingArguments)
    asked = set(options) - common
    own = {name: _own_names(module) for name, module in RECIPES.items()}
    known = {name: len(asked & names) for name, names in own.items()}
    best = max(known, key=known.__getitem__)
    others = set().union(*(names for name, names in own.items() if name != best))
    if not asked & (own[best] - others):
        raise ValueError(
            f"{config}: no option in it says which recipe it is for. Name one: --recipe {' or '.join(RECIPES)}."
        )
    return best


def _own_names(module: str) -> set[str]:
    recipe = importlib.import_module(module)
    return _names(recipe.DataArguments) | _names(recipe.ModelArguments)


def _names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def train(config: str, recipe: str | None, argv: Sequence[str]) -> None:
    """Run the recipe that a file of options is for, with further options over it."""
    path = find_config(config)
    importlib.import_module(RECIPES[recipe or recipe_of(path)]).main([str(path), *argv])
