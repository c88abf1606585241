"""The studies of language models and images: cells of a few steps, the laws of their Trainers, what machines give back.

First half: gradients against oracles. Second half: which cells are run and what is made of them.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundle
import curves
import image_pixels
import language_model
import numpy as np
import pytest
import token_blocks
import torch
import yaml
from grid import TOP, Cell, Grid, fill
from image_model import ImageStudy
from image_pixels import squeezed, unsqueezed
from language_model import LanguageStudy
from matplotlib.figure import Figure
from study import Study, run
from study_trainers import (
    TRAINERS,
    ExactPart,
    FirstPoints,
    LastPoints,
    LateStages,
    MapKernel,
    MeasuredUpdates,
    RandomSigns,
    SmallerBelow,
    part_of,
)
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from wide_maps import WideMaps

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.core.block_maps import chained
from grape_hf.recipes.cells import Cells
from grape_hf.vision import image_classifier

FOLDER = TOP / "recipes" / "studies"
STUDIES: list[tuple[type[Study], Path]] = [
    *((LanguageStudy, path) for path in [*sorted((FOLDER / "novels").glob("*.yaml")), FOLDER / "language_model.yaml"]),
    *((ImageStudy, path) for path in [*(FOLDER / "image_model").glob("*.yaml")]),
]
LAYERS, CONTEXT = 4, 8


@pytest.fixture(autouse=True)
def nothing_left_in_outputs() -> Iterator[None]:
    """Studies keep data and scratch files in ``outputs``: those of a test have its process in their names."""
    yield
    for folder in ("study_data", "studies"):
        for name in (f"*-{os.getpid()}", f"*-{os.getpid()}-*"):  # and not those of a process whose number begins so
            for path in (TOP / "outputs" / folder).glob(name):
                shutil.rmtree(path)


def tiny_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32,
        n_positions=CONTEXT,
        n_embd=16,
        n_layer=LAYERS,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


class Watch(TrainerCallback):
    """Keeps the gradients that each optimiser step uses, and the weights that its forward used."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, *args: Any, model: GPT2LMHeadModel, **kwargs: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def on_pre_optimizer_step(self, *args: Any, model: GPT2LMHeadModel, **kwargs: Any) -> None:
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append({n: g.clone() for n, g in found.items()})


def tokens(number: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": t, "labels": t} for t in torch.randint(0, 32, (number, CONTEXT), generator=generator)]


def trained(folder: Path, kind: Any, steps: int = 3, **options: Any) -> tuple[GPT2LMHeadModel, Watch]:
    model, watch = tiny_model(), Watch()
    arguments = GrapeTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    kind(model=model, args=arguments, train_dataset=tokens(2), callbacks=[watch]).train()
    return model, watch


def gradients_by_hand(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the exact gradients at these weights, and that of the look-up alone; a batch is all of the data."""
    model = tiny_model()
    model.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    batch = torch.stack([row["input_ids"] for row in tokens(2)])
    looked_up = model.transformer.wte.weight.detach().clone().requires_grad_()
    out = model(inputs_embeds=torch.nn.functional.embedding(batch, looked_up)).logits
    logits = out[:, :-1].flatten(0, 1)
    # The Trainer divides by the number of all labels, the first of which nothing predicts.
    loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum") / batch.numel()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, looked_up.grad


def is_low(name: str, k: int) -> bool:
    return name == "transformer.wpe.weight" or any(name.startswith(f"transformer.h.{i}.") for i in range(k))


def delay_of(name: str, cuts: list[int]) -> int:
    """How many steps late the gradient of a weight is: the first of K stages has the embeddings."""
    stages = len(cuts) - 1
    if not name.startswith("transformer.h."):
        return stages - 1 if name == "transformer.wpe.weight" else 0
    block = int(name.split(".")[2])
    return stages - 1 - next(s for s in range(stages) if cuts[s] <= block < cuts[s + 1])


class TestLateStages:
    @pytest.mark.parametrize("cuts", [[0, LAYERS], [0, 2, LAYERS], [0, 1, 2, LAYERS]])
    def test_a_stage_learns_from_the_gradient_of_an_earlier_step(self, tmp_path: Path, cuts: list[int]):
        stages = len(cuts) - 1
        _, watch = trained(tmp_path, lambda **kw: LateStages(stages, **kw), steps=4, method="bp")
        exact = [gradients_by_hand(weights) for weights in watch.weights]
        for t, used in enumerate(watch.gradients):
            for name in exact[t][0]:
                late, looked_up = t - delay_of(name, cuts), t - (stages - 1)
                if late < 0:
                    assert name not in used
                    continue
                gradient = exact[late][0][name]
                if name == "transformer.wte.weight":  # the head's part, in time, and the look-up's, late
                    gradient = gradient + (exact[looked_up][1] if looked_up >= 0 else 0)
                torch.testing.assert_close(used[name], gradient, msg=lambda text, n=name, t=t: f"{n}, {t}: {text}")


STAR = {"method": "dfa", "feedback_space": "hidden", "feedback_init": "identity"}


class TestFirstPoints:
    @pytest.mark.parametrize("k", range(LAYERS))
    def test_exact_above_and_feedback_below(self, tmp_path: Path, k: int):
        _, star = trained(tmp_path / "star", GrapeTrainer, steps=1, **STAR)
        _, bp = trained(tmp_path / "bp", GrapeTrainer, steps=1, method="bp")
        _, mixed = trained(tmp_path / "mixed", lambda **kw: FirstPoints(k, **kw), steps=1, **STAR)
        for name, used in mixed.gradients[0].items():
            # Identity feedback brings e to h_1 .. h_k; the embeddings' matrix is the head's as well.
            expected = star if k > 0 and (is_low(name, k) or "wte" in name) else bp
            torch.testing.assert_close(used, expected.gradients[0][name], msg=lambda t, n=name: f"{n}: {t}")


class TestLastPoints:
    @pytest.mark.parametrize("k", range(1, LAYERS + 1))
    def test_one_chain_below_and_the_star_above(self, tmp_path: Path, k: int):
        _, star = trained(tmp_path / "star", GrapeTrainer, steps=1, **STAR)
        _, mixed = trained(tmp_path / "mixed", lambda **kw: LastPoints(k, **kw), steps=1, **STAR)
        model, made = tiny_model(), dict[int, Tensor]()
        for index in (k - 1, LAYERS - 1):
            model.transformer.h[index].register_forward_hook(lambda _, a, out, i=index: made.update({i: out}))
        batch = torch.stack([row["input_ids"] for row in tokens(2)])
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum") / batch.numel()
        (e,) = torch.autograd.grad(loss, made[LAYERS - 1], retain_graph=True)
        low = {n: p for n, p in model.named_parameters() if is_low(n, k)}
        chain = dict(zip(low, torch.autograd.grad(made[k - 1], list(low.values()), e), strict=True))
        for name, used in mixed.gradients[0].items():
            if "wte" not in name:  # the embeddings' matrix is the head's as well
                expected = chain.get(name, star.gradients[0][name])
                torch.testing.assert_close(used, expected, msg=lambda t, n=name: f"{n}: {t}")


class TestExactPart:
    @pytest.mark.parametrize("part", ["attention", "mlp", "keys_values", "embeddings", "block_1"])
    def test_one_part_is_exact_and_the_rest_the_stars(self, tmp_path: Path, part: str):
        _, star = trained(tmp_path / "star", GrapeTrainer, steps=1, **STAR)
        _, bp = trained(tmp_path / "bp", GrapeTrainer, steps=1, method="bp")
        _, mixed = trained(tmp_path / "mixed", lambda **kw: ExactPart(part, **kw), steps=1, **STAR)
        inside = {
            "attention": (".ln_1.", ".attn."),
            "mlp": (".ln_2.", ".mlp."),
            "keys_values": (".c_attn.",),
            "embeddings": (".wte.", ".wpe."),
            "block_1": (".h.0.",),
        }[part]
        differ = 0
        for name, used in mixed.gradients[0].items():
            expected = (bp if any(i in name for i in inside) else star).gradients[0][name].clone()
            if part == "keys_values" and ".c_attn." in name:
                expected[..., :16] = star.gradients[0][name][..., :16]
            torch.testing.assert_close(used, expected, msg=lambda t, n=name: f"{n}: {t}")
            differ += not torch.allclose(used, star.gradients[0][name])
        assert differ

    def test_an_unknown_part(self):
        parts = "attention, mlp, keys_values, embeddings, block_1"
        with pytest.raises(ValueError, match=rf"exact_part='queries': expected one of {parts}\."):
            part_of(tiny_model(), "queries")


class TestRandomSigns:
    def test_the_stars_error_is_turned_round_or_left(self, tmp_path: Path):
        _, star = trained(tmp_path / "star", GrapeTrainer, steps=1, **STAR)
        _, bp = trained(tmp_path / "bp", GrapeTrainer, steps=1, method="bp")
        turned = set()
        for seed in range(6):
            _, used = trained(tmp_path / f"{seed}", lambda **kw: RandomSigns(True, **kw), steps=1, seed=seed, **STAR)
            name = "transformer.h.0.mlp.c_fc.weight"
            turned.add(sign := not torch.allclose(used.gradients[0][name], star.gradients[0][name]))
            for name, gradient in used.gradients[0].items():
                exact, wrong = bp.gradients[0][name], star.gradients[0][name]
                expected = exact - (wrong - exact) if sign else wrong
                torch.testing.assert_close(gradient, expected, msg=lambda t, n=name: f"{n}: {t}")
        assert turned == {True, False}


class TestGrid:
    def grid(self, folder: Path, **options: Any) -> Grid:
        cells = Cells(folder / "cells", folder / "locks")
        methods = {"bp": {}, "dfa": {}}
        return Grid(cells, methods, lambda method: [1.0, 2.0], [5, 6], lambda r: -r["loss"], **options)

    def names(self, grid: Grid, by_stage: bool = False) -> list[str]:
        ran = []

        def run(grid: Grid, cell: Cell, lock: int) -> None:
            ran.append(cell.name)
            grid.cells.finish(cell.name, {"method": cell.method, "loss": cell.learning_rate, "options": {}})

        fill([grid], run, by_stage)
        return ran

    def test_stages(self, tmp_path: Path):
        rates = [f"{method}-lr{rate}-seed5" for method in ("bp", "dfa") for rate in (1, 2)]
        final = [[f"{method}-lr1-seed{seed}-test" for method in ("bp", "dfa")] for seed in (5, 6)]
        assert self.names(self.grid(tmp_path), by_stage=True) == rates + final[0] + final[1]

    def test_without_a_test_split_no_seed_runs_twice(self, tmp_path: Path):
        grid = self.grid(tmp_path, test=False, only=["dfa"])
        assert self.names(grid) == ["dfa-lr1-seed5", "dfa-lr2-seed5", "dfa-lr1-seed6"]

    def test_no_cell_begins_when_time_is_up(self, tmp_path: Path):
        fill([self.grid(tmp_path)], lambda *_: pytest.fail("a cell began"), deadline=0)


def small_study(folder: Path, name: str = "small", **changes: Any) -> Path:
    """Write a study of a tiny model on random blocks, and its data where a study looks for them."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / name),
        "data": {"data_dir": f"random-{folder.name}-{os.getpid()}", "vocab_size": 64, "context": 8},
        "model": {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 2},
        "arguments": {"per_device_train_batch_size": 4, "eval_steps": 2, "logging_steps": 2},
        "steps": 4,
        "eval_blocks": 16,
        "learning_rates": [0.01, 0.001],
        "seeds": [0, 1],
        "methods": {"bp": {"method": "bp"}, "identity": STAR, "late": {"method": "bp", "trainer": {"late_stages": 2}}},
    } | changes
    data = token_blocks.folder_of(settings["data"])
    data.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        np.save(data / f"{split}.npy", generator.integers(0, 64, (64, 8)).astype(np.uint16))
    path = folder / f"{name}-{folder.name}-{os.getpid()}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def start(*arguments: Any) -> str:
    command = [sys.executable, TOP / "recipes" / "studies" / "language_model.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=TOP)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class TestStudies:
    def test_two_workers_a_longer_run_and_what_they_bring(self, tmp_path: Path):
        """The rates are chosen at 4 steps; 6 steps run at the chosen rate; all of it comes back in one file."""
        methods = {
            "bp": {"method": "bp"},
            "late": {"method": "bp", "trainer": {"late_stages": 2}, "learning_rates": [0.01]},
        }
        short = small_study(tmp_path, methods=methods)
        longer = small_study(tmp_path, "longer", rates_from=short.name, steps=6, methods={"bp": {"method": "bp"}})
        text = longer.read_text().replace("learning_rates:\n- 0.01\n- 0.001\n", "")
        longer.write_text(text)
        out = tmp_path / "out"
        start(short, longer, "--workers", "2", "--seconds", "200", "--out", out)
        cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "small" / "cells").glob("*.json")}
        assert len(cells) == (2 + 2) + (1 + 2)
        chosen = min(
            (r for n, r in cells.items() if n.startswith("bp") and "test" not in n), key=lambda r: r["validation_loss"]
        )
        final = cells[f"bp-lr{chosen['learning_rate']:g}-seed0-test"]
        assert final["validation_loss"] == chosen["validation_loss"]  # the same training
        assert final["test_loss"] != final["validation_loss"]
        assert [step for step, _ in final["curve"]] == [2, 4]
        assert "test_loss" not in chosen
        of_longer = sorted(path.stem for path in (tmp_path / "longer" / "cells").glob("*.json"))
        rate = f"{chosen['learning_rate']:g}"
        assert of_longer == [f"bp-lr{rate}-seed0", f"bp-lr{rate}-seed0-test", f"bp-lr{rate}-seed1-test"]
        rows = {row["method"]: row for row in json.loads((tmp_path / "small" / "table.json").read_text())}
        assert list(rows) == ["bp", "late"]
        assert rows["bp"]["above_bp"] == pytest.approx(0)
        assert rows["bp"]["seeds"] == 2
        assert (tmp_path / "small" / "curves.png").read_bytes().startswith(b"\x89PNG")

        before = {path: path.read_bytes() for path in (tmp_path / "small" / "cells").glob("*.json")}
        for path in before:
            path.unlink()
        bundle.unpack(out / "cells-0.jsonl", {str(s): tmp_path / n for s, n in ((short, "small"), (longer, "longer"))})
        assert {path: path.read_bytes() for path in before} == before

    def test_a_cell_whose_time_is_up_leaves_its_curve(self, tmp_path: Path):
        study = LanguageStudy(small_study(tmp_path, steps=10_000))
        blocks = study.load(torch.device("cpu"))
        cell = Cell("bp", 0.01, 0)
        run(study, cell, blocks, deadline=0)
        assert study.cells.read(cell.name) is None
        result = study.partial.read(cell.name)
        assert result is not None
        assert (result["partial"], result["steps"], result["validation_loss"]) == (True, 1, None)
        assert not study.cells.settled(cell.name)  # it is run again
        study.settings["steps"] = 4
        run(study, cell, blocks)
        assert study.cells.settled(cell.name)
        assert study.partial.read(cell.name) is None

    def test_a_loss_that_is_no_number_ends_the_cell_and_is_the_worst(self, tmp_path: Path):
        study = LanguageStudy(small_study(tmp_path, steps=100, arguments={"logging_steps": 1}))
        blocks = study.load(torch.device("cpu"))
        run(study, Cell("bp", 1e30, 0), blocks)
        result = study.cells.read("bp-lr1e+30-seed0")
        assert result is not None
        assert result["diverged"]
        assert result["steps"] < 100
        assert study.score(result) == -math.inf

    def test_cells_of_other_settings_are_refused(self, tmp_path: Path):
        path = small_study(tmp_path)
        study = LanguageStudy(path)
        blocks = study.load(torch.device("cpu"))
        run(study, Cell("bp", 0.01, 0), blocks)
        small_study(tmp_path, steps=5)
        with pytest.raises(ValueError, match="'steps': 4"):
            LanguageStudy(path)

    def test_what_fails_is_written_down(self, tmp_path: Path):
        study = LanguageStudy(small_study(tmp_path, methods={"bp": {"method": "nothing"}}))
        run(study, Cell("bp", 0.01, 0), study.load(torch.device("cpu")))
        assert "expected one of 'grape'" in study.cells.errors()["bp-lr0.01-seed0"]

    def test_the_first_label_is_counted_once(self):
        """With it the Trainer's mean is of all labels, and ``loss_of`` brings it to a mean per predicted token."""
        batch = torch.arange(12).view(2, 6)
        assert torch.equal(language_model.collate(batch, True)["labels"], batch)
        assert language_model.collate(batch, False)["labels"][:, 0].tolist() == [-100, -100]
        assert torch.equal(language_model.collate(batch, False)["labels"][:, 1:], batch[:, 1:])


class TestScaledBlocks:
    """One step of GPT-2; the star's own gradients are those of the same Trainer without the law."""

    def test_the_lower_blocks_have_a_factor(self, tmp_path: Path):
        _, star = trained(tmp_path, GrapeTrainer, steps=1, **STAR)
        _, scaled = trained(tmp_path, lambda **kw: SmallerBelow(0.25, **kw), steps=1, **STAR)
        for name, gradient in star.gradients[0].items():
            factor = 0.25 if is_low(name, 2) else 1.0
            assert torch.equal(scaled.gradients[0][name], factor * gradient), name

    @pytest.mark.parametrize("law", ["cosine", "projection"])
    def test_each_block_has_what_was_measured(self, law: str, tmp_path: Path):
        _, star = trained(tmp_path, GrapeTrainer, steps=1, **STAR)
        _, scaled = trained(tmp_path, lambda **kw: MeasuredUpdates(law, **kw), steps=1, alignment_steps=1, **STAR)
        exact, _ = gradients_by_hand(star.weights[0])
        for i in range(LAYERS):
            names = [name for name in exact if name.startswith(f"transformer.h.{i}.")]
            g, true = (torch.cat([found[name].flatten() for name in names]) for found in (star.gradients[0], exact))
            cosine = torch.nn.functional.cosine_similarity(g, true, 0).clamp(min=0)
            factor = cosine if law == "cosine" else cosine * true.norm() / g.norm()
            if i < LAYERS - 1:
                assert abs(factor - 1) > 1e-3
            for name in names:
                torch.testing.assert_close(
                    scaled.gradients[0][name], factor * star.gradients[0][name], rtol=1e-4, atol=1e-7
                )

    def test_a_law_without_measurements_is_refused(self, tmp_path: Path):
        with pytest.raises(ValueError, match="alignment_steps"):
            trained(tmp_path, lambda **kw: MeasuredUpdates("cosine", **kw), **STAR)


class TestMapKernel:
    """Maps that see a square of positions."""

    def test_they_learn_the_transpose_of_a_convolution(self):
        """Of a block that is one convolution, on random deltas; its transpose is a convolution with turned kernels."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64)  # h_1 has 2 channels, h_2 has 3
        maps = WideMaps(chained([torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)]), 3)
        for turn in range(60):
            d = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64)
            v = torch.nn.functional.conv_transpose2d(d, weight, padding=1)
            vectors = d.flatten(2).mT
            maps.begin(turn)
            maps.observe(0, v.flatten(2).mT, vectors, maps.apply(0, vectors))
            maps.G = maps.refined(maps.total(list), 0.5)
        kernel = maps.G[0].unflatten(1, (3, 3, 3))
        torch.testing.assert_close(kernel, weight.transpose(0, 1).flip(2, 3), rtol=0, atol=1e-3)
        by_squares = maps.squares(vectors) @ maps.G[0].mT
        torch.testing.assert_close(maps.apply(0, vectors), by_squares)

    def test_a_step_begins_as_with_small_maps_and_learns_neighbours(self, tmp_path: Path):
        """The second step is another one, as maps have learned from what lies beside a position."""
        small, wide = (self.trained(tmp_path, kind) for kind in (GrapeTrainer, lambda **kw: MapKernel(3, **kw)))
        for name, gradient in small.gradients[0].items():
            torch.testing.assert_close(wide.gradients[0][name], gradient, rtol=1e-4, atol=1e-7)
        lowest = "timm_model.blocks.0.conv.weight"
        assert (
            torch.dist(wide.gradients[1][lowest], small.gradients[1][lowest]) > 1e-4 * small.gradients[1][lowest].norm()
        )

    def trained(self, folder: Path, kind: Any) -> Watch:
        torch.manual_seed(0)
        model, watch = image_classifier("alexnet_cifar", ["a", "b", "c"]), Watch()
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(8, 3, 32, 32, generator=generator)
        arguments = GrapeTrainingArguments(
            output_dir=str(folder),
            max_steps=2,
            per_device_train_batch_size=4,
            feedback_points=0,
            feedback_space="hidden",
            feedback_sharing="position",
            feedback_rule="local",
            feedback_init="gaussian",
            feedback_path="shortcut",
            feedback_lr=0.5,
            jvp_steps=1,
            report_to=[],
            use_cpu=True,
        )
        data = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]
        kind(model=model, args=arguments, train_dataset=data, callbacks=[watch]).train()
        return watch


class TestImages:
    def test_nothing_is_lost_when_images_are_squeezed(self):
        generator = np.random.default_rng(0)
        for pixels in (generator.integers(0, 256, (5, 3, 6, 7)), generator.integers(0, 256, (5, 3, 1, 1)).repeat(4, 2)):
            images = pixels.astype(np.uint8)
            assert np.array_equal(unsqueezed(squeezed(images)), images)

    def test_cells_and_their_table(self, tmp_path: Path):
        """Every kind of method that paths.yaml has, for two steps, on random images; then what is made of them."""
        from grape_hf.vision.sources import ImageData, Split

        generator = torch.Generator().manual_seed(0)
        splits = [
            Split(
                torch.randint(256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8),
                torch.randint(10, (n,), generator=generator),
            )
            for n in (64, 32, 32)
        ]
        settings = yaml.safe_load((FOLDER / "image_model" / "paths.yaml").read_text())
        settings |= {"output_dir": str(tmp_path / "images"), "steps": 2, "learning_rates": [0.1], "seeds": [0]}
        settings["data"] |= {"data_dir": f"random-images-{os.getpid()}"}
        settings["arguments"] |= {"per_device_train_batch_size": 32, "bf16": False, "eval_steps": 1, "logging_steps": 1}
        settings["arguments"]["alignment_steps"] = 1
        for method in settings["methods"].values():
            method.pop("learning_rates", None)
        path = tmp_path / f"images-{os.getpid()}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        image_pixels.write(image_pixels.folder_of(settings["data"]), ImageData("random", list("abcdefghij"), *splits))
        study = ImageStudy(path)
        data = study.load(torch.device("cpu"))
        for name, split in zip(("train", "validation", "test"), splits, strict=True):
            assert torch.equal(data.images(name).pixels, split.pixels)
            assert torch.equal(data.images(name).labels, split.labels)
        fill([study.grid], lambda _, cell, lock: run(study, cell, data))
        assert study.cells.errors() == {}
        results = study.cells.all()
        assert len(results) == 2 * len(settings["methods"])
        final = results["shortcut-lr0.1-seed0-test"]
        assert final["validation"] == results["shortcut-lr0.1-seed0"]["validation"]  # the same training
        assert [step for step, _ in final["curve"]] == [1, 2]
        assert 0 <= final["test"] <= 1
        study.report()
        table = (tmp_path / "images" / "table.md").read_text()
        assert all(label in table for label in settings["labels"].values())


class TestReport:
    def test_partial_runs_are_drawn_and_not_counted(self, tmp_path: Path):
        grid = Grid(Cells(tmp_path / "c", tmp_path / "l"), {"bp": {}}, lambda _: [0.1], [0, 1], language_model.score)
        whole = {"method": "bp", "learning_rate": 0.1, "seed": 0, "validation_loss": 2.0, "log_history": []}
        results = {"a": whole | {"curve": [[1, 3.0], [2, 2.0]]}}
        results["b"] = whole | {"seed": 1, "validation_loss": None, "partial": True, "steps": 1, "curve": [[1, 3.5]]}
        settings = {
            "title": "t",
            "methods": {"bp": {}},
            "data": {"vocab_size": 4, "context": 8},
            "steps": 2,
            "seeds": [0, 1],
        }
        curves.write_report(settings, grid, results, tmp_path)
        (row,) = json.loads((tmp_path / "table.json").read_text())
        assert (row["seeds"], row["unfinished"], row["validation"]) == (1, 1, 2.0)
        assert curves.seeds_of([{1: 3.0, 2: 2.0}, {1: 3.5}]) == {1: [3.0, 3.5]}

    def test_without_bp_there_is_no_distance_to_it(self, tmp_path: Path):
        grid = Grid(Cells(tmp_path / "c", tmp_path / "l"), {"dfa": {}}, lambda _: [0.1], [0], language_model.score)
        run = {"method": "dfa", "learning_rate": 0.1, "seed": 0, "validation_loss": 2.0, "log_history": [], "curve": []}
        row = curves.row_of(grid, {"a": run}, "dfa", [run], math.nan)
        settings = {"title": "t", "data": {"vocab_size": 4, "context": 8}, "steps": 2, "seeds": [0]}
        assert "| 1 | 2.000 | - | 7.4 |" in curves.markdown(settings, [row])

    @pytest.mark.parametrize(("method", "pictures"), [("bp", 2), ("dfa", 1)])
    def test_a_distance_to_bp_is_drawn_where_bp_has_run(self, method: str, pictures: int, tmp_path: Path, monkeypatch):
        drawn: list[int] = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(len(figure.axes)))
        run = {"method": method, "learning_rate": 0.1, "seed": 0, "curve": [[1, 3.0], [2, 2.0]]}
        curves.plot({"title": "t", "data": {"context": 8}}, {method: [run]}, tmp_path / "curves.png")
        assert drawn == [pictures]

    def test_files_of_a_limited_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(bundle, "_FILE_BYTES", 100)
        folder = tmp_path / "study"
        Cells(folder / "cells", tmp_path / "l").finish("a", {"text": "x" * 60})
        Cells(folder / "cells", tmp_path / "l").finish("b", {"text": "y" * 60})
        bundle.pack({"s.yaml": folder}, tmp_path)
        assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["cells-0.jsonl", "cells-1.jsonl"]
        with pytest.raises(ValueError, match=r"holds cells of s.yaml; name that study too"):
            bundle.unpack(tmp_path / "cells-0.jsonl", {})


@pytest.mark.parametrize(("kind", "file"), STUDIES, ids=[path.stem for _, path in STUDIES])
def test_our_studies_can_be_run(kind: type[Study], file: Path, tmp_path: Path):
    study = kind(file)
    for method in study.settings["methods"]:
        rates_given = "learning_rates" in study.settings["methods"][method]
        given = study.options(method)
        trainer = given.pop("trainer", {})
        assert set(trainer) <= set(TRAINERS)
        GrapeTrainingArguments(
            str(tmp_path), **(study.settings["arguments"] | given | {"bf16": False, "eval_strategy": "steps"})
        )
        assert study.settings.get("rates_from") or rates_given or len(study.grid.choices(method)) >= 2
