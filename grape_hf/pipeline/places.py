"""Which process is which stage of which replica, and the groups in which processes talk.

K stages times R replicas are K R processes. Process ``replica * K + stage`` is that stage of that replica. A replica is
the whole model; replicas train on different shares of each batch, as processes do under DDP.
"""

import datetime
import pickle
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Places:
    """This process's place among all.

    Attributes:
        stages: K.
        replicas: R.
        stage: of this process, 0 .. K-1.
        replica: of this process, 0 .. R-1.
        pipe: the stages of this replica; activations and gradients travel in it.
        down: the same processes, for the maps' products: in a group of their own, as torch's schedules count on the
            order of messages in theirs.
        control: the same processes, for Python objects. It is always on the CPU.
        batches: the same, for the batches that the first stage hands up.
        across: the processes of this stage, one a replica.
        ends: the first and the last stage of this replica.
        world: all processes, for objects and barriers, on the CPU.
        on_their_way: the last batches that were handed up, as transfers and what they carry.
    """

    stages: int
    replicas: int
    stage: int
    replica: int
    pipe: Any
    down: Any
    control: Any
    batches: Any
    across: Any
    ends: Any
    world: Any
    on_their_way: list[list[tuple[Any, torch.Tensor]]] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        """Whether this process reads the batches."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this process computes the loss."""
        return self.stage == self.stages - 1

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.first + self.stage

    @property
    def first(self) -> int:
        """The rank of this replica's first stage."""
        return self.replica * self.stages

    @property
    def last(self) -> int:
        """The rank of this replica's last stage."""
        return self.first + self.stages - 1

    def from_first(self, value: Any) -> Any:
        """Return what the first stage of this replica has; to be called by all its stages."""
        return self._shared(value, self.first)

    def handed_up(self, value: Any) -> Any:
        """Return what the first stage of this replica has, as ``from_first``, which does not wait for the others.

        A collective, and gloo's own ``send``, would end when the receiver is there: when it is done with the batch
        before. The first stage would start each batch that much later.
        """
        if not self.is_first:
            size = torch.empty(1, dtype=torch.int64)
            dist.recv(size, self.first, group=self.batches)
            packed = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(packed, self.first, group=self.batches)
            return pickle.loads(packed.numpy().tobytes())
        # A transfer of gloo's says that it is done to those alone who wait for it. That of the batch before last is, as
        # all stages have been through that batch.
        while len(self.on_their_way) > 1:
            for work, _ in self.on_their_way.pop(0):
                work.wait()
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self.on_their_way.append(
            [
                (dist.isend(message, rank, group=self.batches), message)
                for rank in range(self.first + 1, self.last + 1)
                for message in (torch.tensor([len(packed)]), packed)
            ]
        )
        return value

    def from_last(self, value: Any) -> Any:
        """Return what the last stage of this replica has; to be called by all its stages."""
        return self._shared(value, self.last)

    def _shared(self, value: Any, source: int) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.control)
        return box[0]

    def gathered(self, value: Any) -> list[Any] | None:
        """Return what each stage of the first replica has, by stage, on the main process; None on the others."""
        if self.replica:
            return None
        found: list[Any] | None = [None] * self.stages if self.is_first else None
        dist.gather_object(value, found, dst=0, group=self.control)
        return found

    def together(self, value: Any) -> list[Any]:
        """Return what each stage of this replica has, by stage, on all of them."""
        found: list[Any] = [None] * self.stages
        dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Wait until every process of the run is here."""
        dist.barrier(group=self.world)


def take_places(stages: int, timeout: float) -> Places:
    """Find this process's place and make the groups.

    Every group has ``timeout``, in seconds. torch's own limit is half an hour, and a group does not inherit the limit
    of the default one.

    Args:
        stages: K.
        timeout: how long a process waits for another before it gives up.

    Raises:
        ValueError: if the number of processes is no multiple of K.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % stages or world < stages:
        raise ValueError(
            f"pipeline_stages={stages} divides the model among {stages} processes, or each of several replicas among "
            f"as many: expected a multiple of {stages} processes, found {world}. Start it with `accelerate launch "
            f"--num_processes {stages} your_script.py`, on CPUs with `torchrun --nproc_per_node {stages} "
            "your_script.py` and `use_cpu=True` among the arguments."
        )
    rank, replicas = dist.get_rank(), world // stages
    replica, stage = divmod(rank, stages)
    limit = datetime.timedelta(seconds=timeout)

    def own(groups: list[list[int]], backend: str | None = None) -> Any:
        """Make groups, all of them on every process as torch wants it, and return the one that this process is in."""
        made = [dist.new_group(ranks, timeout=limit, backend=backend) for ranks in groups]
        return next((group for group, ranks in zip(made, groups, strict=True) if rank in ranks), None)

    pipes = [list(range(r * stages, (r + 1) * stages)) for r in range(replicas)]
    return Places(
        stages=stages,
        replicas=replicas,
        stage=stage,
        replica=replica,
        pipe=own(pipes),
        down=own(pipes),
        control=own(pipes, "gloo"),
        batches=own(pipes, "gloo"),
        across=own([list(range(s, world, stages)) for s in range(stages)]),
        ends=own([[pipe[0], pipe[-1]] for pipe in pipes]),
        world=own([list(range(world))], "gloo"),
    )
