"""What does not go with direct feedback is refused when the Trainer is made, by the name of its setting."""

from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from helpers import make_trainer
from problems import GPT2
from torch import nn

from grape_hf.engine.parallelism import refuse_parallelism


def refused(folder: Path, **options: Any) -> str:
    try:
        make_trainer(GPT2, folder, **options)
    except ValueError as error:
        return str(error)
    return "not refused"


def refused_parallelism(folder: Path, **sizes: Any) -> str:
    return refused(folder, parallelism_config=ParallelismConfig(**sizes), **jobs.as_if_on_gpus())


def refused_context_parallelism(folder: Path) -> str:
    return refused(folder, parallelism_config=ParallelismConfig(cp_size=2), fsdp=True, **jobs.as_if_on_gpus())


def refused_strangers(folder: Path) -> str:
    """Processes that were started together, of which each trains on its own: no GPU, and not told to do without."""
    from accelerate.state import PartialState

    options = jobs.as_if_on_gpus()
    PartialState().distributed_type, PartialState().num_processes = DistributedType.NO, 1
    return refused(folder, **options)


@pytest.mark.parametrize(
    ("job", "options", "says"),
    [
        (refused_parallelism, {"tp_size": 2}, "tensor parallelism (parallelism_config, tp_size=2)"),
        (
            refused_parallelism,
            {"sp_size": 2, "sp_backend": "deepspeed"},
            "sequence parallelism (parallelism_config, sp",
        ),
        (refused_context_parallelism, {}, "context parallelism (parallelism_config, cp_size=2)"),
        (refused_strangers, {}, "a launch of 2 processes"),
    ],
    ids=["tensor", "sequence", "context", "strangers"],
)
def test_several_processes(job, options, says, processes, tmp_path):
    for told in processes.run(job, tmp_path, **options):
        assert told.startswith(says)
        assert " does not go with method='grape': " in told
        assert " Use " in told


class _Set:
    """Attributes set for a while: what makes the setting is not there to be made (GPUs, DeepSpeed, Megatron)."""

    def __init__(self, owner: Any, **values: Any) -> None:
        self.owner, self.values = owner, values

    def __enter__(self) -> None:
        self.before = {name: getattr(self.owner, name) for name in self.values}
        for name, value in self.values.items():
            setattr(self.owner, name, value)

    def __exit__(self, *_: Any) -> None:
        for name, value in self.before.items():
            setattr(self.owner, name, value)


class _Plugin:
    fsdp_version = 1


def test_settings_that_cannot_be_made_here(tmp_path):
    """The check alone, on a Trainer that says of itself what it would say there."""
    trainer = make_trainer(GPT2, tmp_path)
    state = trainer.accelerator.state
    cases = [
        (_Set(trainer, is_deepspeed_enabled=True), "DeepSpeed (`deepspeed`)", "FSDP2"),
        (_Set(trainer.args, _n_gpu=2), "nn.DataParallel (2 GPUs in one process)", "`accelerate launch your_script.py`"),
        (_Set(state, distributed_type=DistributedType.MEGATRON_LM), "training by MEGATRON_LM", "FSDP2"),
        (_Set(state, distributed_type=DistributedType.XLA), "training by XLA", "FSDP2"),
    ]
    for setting, says, instead in cases:
        with setting, pytest.raises(ValueError, match=".") as caught:
            refuse_parallelism(trainer, trainer.grape_options)
        assert str(caught.value).startswith(says)
        assert instead in str(caught.value)
    trainer.accelerator.state._shared_state["fsdp_plugin"] = _Plugin()
    try:
        with _Set(trainer, is_fsdp_enabled=True), pytest.raises(ValueError, match="FSDP1 .fsdp_version=1.*FSDP2"):
            refuse_parallelism(trainer, trainer.grape_options)
    finally:
        del trainer.accelerator.state._shared_state["fsdp_plugin"]
    refuse_parallelism(trainer, trainer.grape_options)


def test_data_parallel_by_hand(tmp_path):
    with pytest.raises(ValueError, match=r"nn.DataParallel .* does not go with method='grape'"):
        make_trainer(GPT2, tmp_path, more={"model": nn.DataParallel(GPT2.model())}, blocks="module.transformer.h")


def test_a_sharded_parameter_however_it_came_about(processes, tmp_path):
    for told in processes.run(refused_shards, tmp_path):
        assert told.startswith("a model that was sharded when it was loaded")


def refused_shards(folder: Path) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = GPT2.model()
    mesh = init_device_mesh("cpu", (2,))
    model.lm_head.weight = nn.Parameter(distribute_tensor(torch.ones_like(model.lm_head.weight), mesh))
    return refused(folder, more={"model": model})
