"""An inspection in words and figures, for a terminal."""

from grape_hf.cli.inspection import Boundary, Inspection
from grape_hf.reports.card_texts import times

_LINES = 14  # of blocks that are listed one by one; of more, the first and last of each run of like ones
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimiser": "optimiser (AdamW)",
    "activations": "activations kept for the backward",
    "feedback": "B_l",
    "estimate": "sums that teach B_l",
    "delta": "one delta_l at a time",
}


def describe(found: Inspection, name: str, batch: str) -> str:
    """Write an inspection as text.

    Args:
        found: the inspection.
        name: the model's, as the user gave it.
        batch: what was fed to it.
    """
    options = found.options
    total, trained = found.parameters
    some = "" if total == trained else f", {_count(trained)} of them trained"
    points = len(found.boundaries) - 1
    maps = options.learns_by_maps
    together, size = "B_l and the maps together" if maps else "B_l together", found.memory["feedback"]
    lines = [
        f"{name}: {found.model}, {_count(total)} parameters{some}. Nothing was trained, no weights were read.",
        f"Batch: {batch}. Errors are measured in {found.space} space, {found.n_y:,} numbers.",
        "",
        f"{points + 1} blocks, {points} feedback points",
        f"Settings: {found.preset}",
        *_table(found.boundaries),
        f"{together}: {_bytes(size)} (feedback_size_limit={options.feedback_size_limit:g} GiB)"
        + (": training is refused" if size > options.feedback_size_limit * 2**30 else ""),
        "",
        "Learning B_l",
    ]
    if maps:
        every = "step" if options.jvp_steps == 1 else f"{options.jvp_steps} steps"
        lines.append(f"  each block learns a map from its own backward, every {every}; no forward-mode derivatives")
    elif found.jvp_mode is None:
        lines.append(f'  method="{options.method}": no forward-mode derivatives are taken')
    else:
        samples, chosen = found.samples
        tangents = {"dual": "dual numbers", "finite_difference": "finite differences"}[found.jvp_mode]
        every = "every step" if options.jvp_steps == 1 else f"every {options.jvp_steps} steps"
        lines += [
            f"  tangents by {tangents}: {found.jvp_reason}",
            f"  one estimate {every}, on {chosen} of {samples} samples, {options.jvp_passes} passes, "
            f"rule {options.feedback_rule}",
        ]
    if options.feedback_path == "shortcut":
        lines.append("  the error takes the shortcut connections of the blocks, and B_l adds to it")
    if options.feedback_sweeps:
        lines.append(f"  the errors of all blocks are corrected {times(options.feedback_sweeps)} before they are used")
    bp = found.flops["bp"]
    cost = {"star, in place of the chain": found.flops["star"]}
    if found.jvp_mode is not None:
        cost["estimate, when it is due"] = found.flops["estimate"]
    lines += [
        "",
        f"Estimated operations of a step, in those of backpropagation ({_flops(bp)})",
        *(f"  {what:<36} {value / bp:5.2f}" for what, value in cost.items()),
        f"  {'a mean step':<36} {found.step_cost:5.2f}",
        "",
        "Estimated memory, float32",
        *(f"  {what:<36} {_bytes(found.memory[key]):>9}" for key, what in _MEMORY.items() if found.memory[key]),
        f"  {'GrAPE / backpropagation':<36} {found.memory_ratio:9.2f}",
        "",
        "Counted were matrix products and convolutions, and what autograd keeps, "
        + ("without numbers (meta device)." if found.counted_on == "meta" else "on the CPU with random weights.")
        + " Element-wise work and temporary tensors are not in it.",
    ]
    return "\n".join(lines)


def _table(boundaries: list[Boundary]) -> list[str]:
    rows = [
        (
            str(i),
            b.block,
            b.kind,
            " x ".join(map(str, b.h)),
            "none: its gradient is exact" if b.B is None else f"{b.B[0]:,} x {b.B[1]:,}",
            "" if b.B is None else _bytes(4 * b.B[0] * b.B[1]),
        )
        for i, b in enumerate(boundaries, 1)
    ]
    if len(rows) > _LINES:  # like ones in a row: the first and the last
        alike = [0 < i < len(rows) - 1 and rows[i - 1][2:] == rows[i][2:] == rows[i + 1][2:] for i in range(len(rows))]
        rows = [
            row if not alike[i] else ("...",) + ("",) * 5
            for i, row in enumerate(rows)
            if not alike[i] or not alike[i - 1]
        ]
    rows = [("l", "block", "class", "h_l", "B_l", ""), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return [
        "  " + "  ".join(f"{text:{'>' if i == 5 else ''}{widths[i]}}" for i, text in enumerate(row)).rstrip()
        for row in rows
    ]


def _count(number: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def _flops(number: float) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} FLOP"
