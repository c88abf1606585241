"""Pieces of Markdown for the model card, from values that may hold any characters."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def code(value: Any) -> str:
    """Write a value as Markdown code, in one line, whatever characters are in it."""
    text = one_line(str(value))
    if not text:
        return "(empty)"
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def cell(text: str) -> str:
    """Make Markdown fit for the cell of a table, which bars would end, even in code."""
    return text.replace("|", r"\|")


def link(repository: str, kind: str, name: str | None = None) -> str:
    """Write the name of a model (``kind=""``) or data set (``"datasets/"``), with a link where it is on the Hub."""
    shown = code(repository if name is None else name)
    # Names without an owner may be those of a script or a format, and no page.
    on_hub = "/" in repository and is_hub_id(repository)
    return f"[{shown}](https://huggingface.co/{kind}{repository})" if on_hub else shown


def is_hub_id(name: Any) -> bool:
    """Whether a name can be that of a repository on the Hub; a folder's is not, which would be taken before it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()  # which load_dataset takes before it asks the Hub


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, up to the next one."""
    found = re.search(rf"^{re.escape(heading)}[ \t]*\n(.*?)(?=^#|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else ""


def label(name: str) -> str:
    """Turn the name under which a figure was logged into words."""
    split, _, rest = name.partition("_")
    if split in ("eval", "test") and rest:
        name = f"{rest} (test)" if split == "test" else rest
    words = one_line(name.replace("_", " "))
    return words[:1].upper() + words[1:]


def number(value: Any) -> str:
    """Write a figure with six digits; empty where there is none."""
    if value is None:
        return ""
    return f"{int(value):,}" if is_finite(value) and value == int(value) else f"{value:,.6g}"


def one_line(text: str) -> str:
    """Replace all white space by single spaces."""
    return re.sub(r"\s+", " ", text).strip()


def listed(value: Any) -> list[Any]:
    """Make a list of what may be one thing, several or None."""
    values = [value] if isinstance(value, str | Mapping) else list(value or [])
    return [item for item in values if item is not None]


def is_finite(value: Any) -> bool:
    """Whether a figure can stand in metadata, which the Hub keeps as JSON."""
    return isinstance(value, int | float) and math.isfinite(value)
