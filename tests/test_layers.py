"""The rooms of the package: which may import which, no circles, and modules short enough to be read in one sitting."""

from graphlib import CycleError, TopologicalSorter

import pytest
import rooms

DATA = {"text", "vision", "metrics", "hub"}
CORE = {"core"}
OPTIONS = {"presets", "option_checks", "training_args"}
ENGINE = CORE | OPTIONS | {"engine"}
METHODS = ENGINE | {"methods"}
REPORTS = ENGINE | {"reports", "vision"}  # a card says how a network of ours is opened
PIPELINE = ENGINE | {"pipeline"}
TRAINER = METHODS | REPORTS - DATA | PIPELINE | {"trainer"}
MAY_IMPORT = {
    "presets": set(),
    "option_checks": {"presets"},
    "training_args": {"presets", "option_checks"},
    "core": CORE,
    "engine": ENGINE,
    "methods": METHODS,
    "reports": REPORTS,
    "pipeline": PIPELINE,
    "trainer": TRAINER,
    "grape_hf": {"trainer", "training_args"},
    **dict.fromkeys(sorted(DATA), DATA),
    "recipes": TRAINER | DATA | {"grape_hf", "recipes"},
    "cli": TRAINER | DATA | {"grape_hf", "recipes", "cli"},
}
TOO_LONG = 300  # lines

IMPORTS = rooms.imports()


def within_a_room(found: rooms.Import) -> bool:
    return rooms.room(found.importer) == rooms.room(found.imported)


def test_every_room_is_known_and_its_imports_were_read():
    assert {rooms.room(module) for module in rooms.modules()} == MAY_IMPORT.keys()
    pairs = {(rooms.room(found.importer), rooms.room(found.imported)) for found in IMPORTS}
    assert {("engine", "core"), ("trainer", "engine"), ("grape_hf", "trainer"), ("text", "hub")} <= pairs
    # One within a function, and one for annotations alone.
    assert rooms.Import("grape_hf.cli", "grape_hf.reports.plots", False) in IMPORTS
    assert rooms.Import("grape_hf.core.modes", "grape_hf.core.boundaries", True) in IMPORTS


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_it_may(room: str):
    wrong = [
        f"{found.importer} imports {found.imported}"
        for found in IMPORTS
        if rooms.room(found.importer) == room
        and rooms.room(found.imported) not in MAY_IMPORT[room]
        and not (found.typing and within_a_room(found))
    ]
    assert wrong == []


def test_modules_import_each_other_in_no_circle():
    graph = TopologicalSorter({module: set() for module in rooms.modules()})
    for found in IMPORTS:
        if not (found.typing and within_a_room(found)):
            graph.add(found.importer, found.imported)
    try:
        graph.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_module_is_short_enough_to_be_read_in_one_sitting():
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in rooms.modules().items()}
    assert {module: count for module, count in lines.items() if count > TOO_LONG} == {}
