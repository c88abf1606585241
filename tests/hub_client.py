"""What users' own processes do with a Hub, for test_hub.py, which runs them against hub_server.py.

``hub_client.py push FOLDER TOKEN`` trains and pushes, ``hub_client.py open FOLDER`` reads it back. They leave what they
saw in FOLDER.
"""

import gc
import importlib.abc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image as Picture
from safetensors.torch import load_file

TOKENS = torch.arange(24).reshape(1, 24) % 250
IMAGES = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)
WHOLE, FLAKY, DOWN, SMALL = "someone/whole", "someone/flaky", "someone/down", "someone/small"


class Hidden(importlib.abc.MetaPathFinder):
    """Makes grape_hf absent."""

    def find_spec(self, name: str, *rest: Any) -> None:
        if name.split(".")[0] == "grape_hf":
            raise ModuleNotFoundError(name)


def make_trainer(folder: Path, repository: str, model: Any = None, images: bool = False, **options: Any) -> Any:
    from helpers import OnEvent
    from transformers import GPT2Config, GPT2LMHeadModel

    from grape_hf import GrapeTrainer, GrapeTrainingArguments
    from grape_hf.reports.plot_callback import PlotCallback
    from grape_hf.text import train_tokenizer

    gc.freeze()  # as in conftest.py
    torch.manual_seed(0)
    shape = dict(n_layer=3, n_embd=16, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    tokenizer = None if images else train_tokenizer((f"line {i} of a text" for i in range(99)), 300, lowercase=False)
    model = model or GPT2LMHeadModel(GPT2Config(vocab_size=300, **shape))
    tokens = torch.randint(0, 250, (32, 16))
    texts = [{"input_ids": row, "labels": row} for row in tokens]
    pictures = [{"pixel_values": torch.randn(1, 28, 28), "labels": torch.tensor(i % 2)} for i in range(32)]
    usual = dict(max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=4, jvp_steps=1)
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False)
    pushing = dict(push_to_hub=True, hub_model_id=repository)
    args = GrapeTrainingArguments(output_dir=str(folder), **(usual | quiet | pushing | options))
    trainer = GrapeTrainer(
        model, args, train_dataset=pictures if images else texts, processing_class=tokenizer, callbacks=[PlotCallback()]
    )
    # Between two saves of a real training there is time for the push of the first.
    trainer.add_callback(OnEvent("step_begin", lambda state, **_: trainer._finish_current_push()))
    return trainer


def push(folder: Path, token: str) -> None:
    """Push five runs: to a Hub that refuses, a whole one, two through failures, and a small network of grape_hf's."""
    from transformers import AutoModelForCausalLM

    from grape_hf.vision import image_classifier

    seen: dict[str, Any] = {}
    expected = {}

    def attempt(name: str, act: Any) -> None:
        """Do what is expected to fail, and keep what a user would read."""
        try:
            act()
        except Exception as error:
            seen[name] = [str(error), *getattr(error, "__notes__", [])]

    attempt("refused", lambda: make_trainer(folder / "refused", "refused"))

    # Private, by a token among the arguments alone, with checkpoints; the name has no user before it.
    whole = make_trainer(
        folder / "whole",
        "whole",
        hub_token=token,
        hub_private_repo=True,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
    )
    whole.train()
    whole.create_model_card(dataset="Novels of 1900", tasks="text-generation")
    whole.push_to_hub()
    expected["whole"] = whole.model.eval()(TOKENS).logits.detach()

    # Fine-tuned from a folder; the first upload and the first commit fail, and nobody pushes at the end.
    start = AutoModelForCausalLM.from_pretrained(folder / "whole")
    flaky = make_trainer(folder / "flaky", FLAKY, start, hub_token=token)
    flaky.train()
    expected["flaky"] = flaky.model.eval()(TOKENS).logits.detach()

    # The connection drops at the end of training; the second attempt gets through.
    down = make_trainer(folder / "down", DOWN, hub_token=token, hub_strategy="end", save_strategy="no")
    down.train()
    attempt("down", down.push_to_hub)
    seen["down left"] = sorted(path.name for path in (folder / "down").iterdir())
    seen["down again"] = down.push_to_hub().commit_message
    expected["down"] = down.model.eval()(TOKENS).logits.detach()

    # A network that only grape_hf.vision knows; its push never gets through from here.
    network = image_classifier("mnist_cnn", ["even", "odd"])
    small = make_trainer(
        folder / "small", SMALL, network, images=True, hub_token=token, hub_strategy="end", save_strategy="no"
    )
    small.train()
    attempt("small", small.save_model)
    expected["small"] = small.model.eval()(IMAGES).logits.detach()

    torch.save(expected, folder / "expected.pt")
    (folder / "seen.json").write_text(json.dumps(seen))


def open_by_its_card(repository: str) -> dict[str, Any]:
    """Run the lines that the card gives; return what they make."""
    card = Path(hf_hub_download(repository, "README.md")).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.+?)```", card, re.DOTALL)[1], names)
    return names


def read_back(folder: Path) -> None:
    """Open what was pushed, without grape_hf where it is not needed; go on from a checkpoint that was pushed."""
    got = {}
    hidden = Hidden()
    sys.meta_path.insert(0, hidden)
    for repository in (WHOLE, FLAKY, DOWN):
        names = open_by_its_card(repository)
        got[repository.split("/")[1]] = names["model"].eval()(TOKENS).logits.detach()
        assert names["tokenizer"].decode(names["tokenizer"]("line 5 of a text")["input_ids"]) == "line 5 of a text"
    sys.meta_path.remove(hidden)
    names = open_by_its_card(SMALL)
    got["small"] = names["model"].eval()(IMAGES).logits.detach()
    read = names["image_processor"](Picture.new("L", (40, 30), 99), return_tensors="pt")
    assert names["model"](**read).logits.shape == (1, 2)

    checkpoints = Path(snapshot_download(WHOLE, allow_patterns="checkpoint-*"))
    resumed = make_trainer(folder / "resumed", "unused", push_to_hub=False)
    resumed.train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))
    last = folder / "resumed" / "checkpoint-4"
    for name in ("model.safetensors", "grape_feedback.safetensors"):
        mine, theirs = load_file(last / name), load_file(checkpoints / "checkpoint-4" / name)
        assert mine.keys() == theirs.keys() != set()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    torch.save(got, folder / "got.pt")


if __name__ == "__main__":
    task, place = sys.argv[1], Path(sys.argv[2])
    if task == "push":
        push(place, sys.argv[3])
    else:
        read_back(place)
