"""What the processes of one run divide among themselves: work, sums and the weights (FSDP2).

In one process everything here gives back what it is given. Only `shard` asks torch for more than
its sums; it is native FSDP2, since Accelerate's is silently plain DDP on CPUs.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from .errors import NarrowError
from .losses import Loss

Item = TypeVar("Item")


def count() -> int:
    """How many processes work together: 1 unless torch.distributed is initialised."""
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def join(device: str) -> None:
    """Meet the other processes that torchrun started, if any, before anything is loaded.

    `device` as in a recipe; "auto" and "cuda" become this process' own GPU. Leaves one process as
    it is. Raises NarrowError where there are fewer than torchrun says.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or count() > 1:
        return
    from accelerate import PartialState

    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    state = PartialState(cpu=cpu)
    if not cpu:
        torch.cuda.set_device(state.local_process_index)
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise NarrowError(
            f"{os.environ['WORLD_SIZE']} processes were started, and this one knows of "
            f"{state.num_processes}. Start them with torchrun, or `accelerate launch` on GPUs."
        )


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        distributed.barrier()


def agreed(mine: bool) -> bool:
    """Whether it is so for every process; each has to ask."""
    return int(summed(torch.tensor(int(mine)))) == count()


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Those of the items that this process works on; there may be none. All in one process."""
    return items[rank() :: count()]


def summed(tensor: Tensor) -> Tensor:
    """Add up over all processes, in place; every process gets the same sum, and has to call it."""
    if count() > 1:
        # NCCL adds up on GPUs only, and some sums are kept on the CPU.
        there = tensor.cuda() if distributed.get_backend() == "nccl" else tensor
        distributed.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)
    return tensor


class WithLoss(nn.Module):
    """A model whose forward is its loss, as DDP and FSDP2 need it.

    FSDP2 has the weights outside of the layers (embedding, head) whole within this forward only,
    so what the chunked loss does to the head has to happen in here.
    """

    def __init__(self, model: Any, loss: Loss) -> None:
        """Loss and model are called together from now on."""
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens: Tensor, loss: Loss | None = None) -> Tensor:
        """The loss of a batch; `loss` in place of the own one."""
        return (loss or self.loss)(self.model, tokens)


def shard(model: Any, loss: Loss, *, device: torch.device, bf16: bool) -> Any:
    """A sharded twin of the model within `WithLoss`: each decoder layer alone, then the rest.

    Every process holds 1/n of each parameter, as DTensors on `device`. `bf16` gathers and computes
    in bfloat16 and adds gradients up in float32. The weights are those of the first process, as
    with DDP. The given model's own parameters are emptied meanwhile: `give_back` fills them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    tensors = [*model.parameters(), *model.buffers()]
    home = next(model.parameters()).device
    # New modules around the same tensors: `fully_shard` changes modules beyond repair.
    whole_model = WithLoss(copy.deepcopy(model, {id(t): t for t in tensors}), loss)
    mesh = init_device_mesh(device.type, (count(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32
    )
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in whole_model.modules() if type(m).__name__ in names]
    for part in [*layers, whole_model]:
        plain = {n: p for n, p in part.named_parameters() if not _is_sharded(p)}
        fully_shard(part, mesh=mesh, mp_policy=policy)
        taken = dict(part.named_parameters())
        for name, p in plain.items():
            with torch.no_grad():
                taken[name].copy_(cut(p.data, taken[name]))
            p.data = torch.empty(0, dtype=p.dtype, device=home)
    return whole_model


@torch.no_grad()
def give_back(sharded: Any, model: Any) -> None:
    """Fill the model that `shard` emptied: plain whole weights, on every process, as it was given.

    Every process has to call it.
    """
    held = dict(sharded.named_parameters())
    for name, p in model.named_parameters():
        p.data = whole(held[name]).to(p.device)
    home = next(model.parameters()).device
    for b in model.buffers():  # shared with the twin, and gone with it to where it was sharded
        b.data = b.data.to(home)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered where it is sharded: every process has to call it then."""
    shards: Any = tensor
    return shards.detach().full_tensor() if _is_sharded(tensor) else tensor


def gathered(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors. Sharded ones come to the CPU of the first process only, one at a time."""
    found = {}
    for name, tensor in named.items():
        full = whole(tensor)
        if full is tensor:
            found[name] = tensor
        elif rank() == 0:
            found[name] = full.cpu()
    return found


@torch.no_grad()
def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it where it is not sharded. No copy."""
    shards: Any = tensor
    return shards.detach().to_local() if _is_sharded(tensor) else tensor


def copied(named: Mapping[str, Tensor], into: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What this process holds, copied to the CPU: over the copies before where there are some."""
    held = {name: own(t.detach()) for name, t in named.items()}
    return {
        name: h.to("cpu", copy=True) if (old := into[name]) is None else old.copy_(h)
        for name, h in held.items()
    }


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as another; the values are those of the first process."""
    if not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements)


def joined(held: Tensor, like: Tensor) -> Tensor:
    """The reverse of `own`: what each process holds, as a tensor sharded like another."""
    if not _is_sharded(like):
        return held
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    return DTensor.from_local(
        held.to(like.device), sharded.device_mesh, sharded.placements,
        shape=like.shape, stride=like.stride(),
    )  # fmt: skip


def _is_sharded(tensor: Tensor) -> bool:
    if count() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
