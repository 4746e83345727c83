"""On which device ranks compute: from what Spark gave each task to one decision for all of them.

    address    what Spark gave a task: the number of a GPU of its machine ("1"), or its UUID ("GPU-8f3a...")
    visible    CUDA_VISIBLE_DEVICES of the executor, which may hide GPUs and numbers the others anew. It is only ever read
    index      torch's number of a GPU that is visible

    what ranks have                                device="auto"                    device="cuda"
    no task was given a GPU                        the CPU                          visible GPUs in turn; an error where there are none
    each has one that torch can use                its GPU                          its GPU
    some have none, or one that torch cannot use   the CPU for all, and one line    an error that says the same

    meeting    when                                        weights and gradients       sums are made
    nccl       each rank has a GPU to itself               of each rank, on its GPU    on GPUs: in a machine, then between machines
    memory     ranks share a GPU (NCCL refuses that),      one copy in the machine's   on CPUs, as without GPUs; a rank copies its
               torch has no NCCL, or hierarchical=True     memory, another on the GPU  gradient out of its GPU, the new weights in
    apart      each rank is a peer of its own              of each rank, on its GPU    by the exchange or the peers, on CPUs
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.comm.block import Block
from bigdl_lite.comm.group import has_nccl
from bigdl_lite.engine.recipe import Event, Observer
from bigdl_lite.errors import RecipeError

_LOG = logging.getLogger("bigdl_lite")
CPU = torch.device("cpu")


# ---- one task ---------------------------------------------------------------------------------------------------------


def index_of(address: str, visible: str | None, count: int, uuids: Sequence[str] = ()) -> int:
    """torch's number of the GPU at an address.

    visible  CUDA_VISIBLE_DEVICES; None: not set, and all are visible. As for CUDA, its list ends at the first entry that is none
    count    GPUs that torch sees
    uuids    of these, in torch's order, where torch tells them
    Raises   RecipeError, which names address and variable, where that GPU is hidden or not there
    """
    listed = None if visible is None else [entry.strip() for entry in visible.split(",")]
    shown = "is not set" if visible is None else f"is {visible!r}"
    if listed is not None:
        end = next((i for i, entry in enumerate(listed) if not entry or entry.startswith("-")), len(listed))
        listed = listed[:end]
    if _is_uuid(address):
        known = list(uuids) if uuids else listed or []
        found = [i for i, other in enumerate(known) if _is_uuid(other) and (other.startswith(address) or address.startswith(other))]
    elif not address.isdigit():
        raise RecipeError(f"Spark gave a GPU at {address!r}, which is neither a number nor a UUID (CUDA_VISIBLE_DEVICES {shown})")
    elif listed is None:
        found = [int(address)]
    else:
        found = [i for i, entry in enumerate(listed) if entry.isdigit() and int(entry) == int(address)]
    if len(found) != 1 or found[0] >= count:
        raise RecipeError(
            f"Spark gave the GPU at {address!r}, CUDA_VISIBLE_DEVICES {shown}, and torch sees {count}: that GPU is not among them. Let "
            "the discovery script print what executors may see, numbers as nvidia-smi has them or UUIDs"
        )
    return found[0]


def _is_uuid(address: str) -> bool:
    return address.startswith(("GPU-", "MIG-"))


@dataclass(frozen=True)
class Given:
    """What a rank says of its GPU, as plain data. gpu: the same for ranks that share one; count: GPUs that torch sees there.

    why  torch cannot use what Spark gave; "" where it can, or where Spark gave nothing
    """

    host: str = ""
    address: str = ""
    index: int = -1
    gpu: str = ""
    count: int = 0
    nccl: bool = False
    why: str = ""


def look(addresses: Sequence[str], asked: str, host: str = "") -> Given:
    """Inside a task: what it was given. CUDA is not touched where there is no need."""
    if asked == "cpu" or not (addresses or asked == "cuda"):
        return Given(host)
    told = Given(host, addresses[0] if addresses else "")
    if why := _unusable():
        return replace(told, why=why)
    told = replace(told, count=torch.cuda.device_count(), nccl=has_nccl())
    if not addresses:
        return told
    uuids = _uuids(told.count)
    try:
        index = index_of(told.address, os.environ.get("CUDA_VISIBLE_DEVICES"), told.count, uuids)
    except RecipeError as error:
        return replace(told, why=str(error))
    if why := _broken(index):
        return replace(told, why=why)
    return replace(told, index=index, gpu=uuids[index] if uuids else f"{host}/{index}")


def _unusable() -> str:
    """Why torch can use no GPU in this process; "" where it can."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"torch {torch.__version__} finds no CUDA device (CUDA_VISIBLE_DEVICES is {visible!r}); is the driver there?"


def _broken(index: int) -> str:
    """Why nothing can be computed on a GPU that is there: taken by others, or too old for this torch."""
    try:
        torch.zeros(1, device=f"cuda:{index}").add_(1).item()
    except Exception as error:
        return f"torch cannot compute on cuda:{index}: {str(error).splitlines()[0]}"
    return ""


def _uuids(count: int) -> list[str]:
    found = [getattr(torch.cuda.get_device_properties(i), "uuid", None) for i in range(count)]
    return [str(x) if _is_uuid(str(x)) else f"GPU-{x}" for x in found] if all(found) else []


def task_device(addresses: Sequence[str], asked: str, partition: int = 0) -> tuple[torch.device, str]:
    """Where one task computes that meets nobody, and why not on the GPU that it was given.

    asked  "auto": the GPU that Spark gave, else the CPU; "cpu"; "cuda": a GPU, by its partition where Spark gave none
    Raises RecipeError where asked is "cuda" and there is none.
    """
    told = look(addresses, asked)
    if told.index >= 0:
        return torch.device("cuda", told.index), ""
    if asked == "cuda":
        if told.why or not told.count:
            raise RecipeError(f"device is 'cuda', and this task {_lack(told)}{_WAY_OUT}")
        return torch.device("cuda", max(partition, 0) % told.count), ""
    return CPU, told.why


_WAY_OUT = (
    ": give tasks GPUs (spark.task.resource.gpu.amount, or resourceProfile), which their torch can use, or set device='auto', which "
    "takes the CPU where there is no GPU"
)


def _lack(told: Given) -> str:
    if not told.address:
        return f"was given no GPU, and {told.why or 'torch sees none'}"
    return f"was given GPU {told.address}, but {told.why}"


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    """A GPU is the current one inside, for code that says "cuda" alone; a reused worker has its old one again afterwards."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


# ---- all ranks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The decision for all ranks. indices: torch's number for each rank; none on the CPU. meeting: see above.

    line  what the driver logs, once; warns: whether it is a warning
    """

    meeting: str = "memory"
    indices: tuple[int, ...] = ()
    line: str = ""
    warns: bool = False

    @property
    def note(self) -> dict[str, Any]:
        """What rank 0 tells the driver."""
        return {"note": self.line, "warns": self.warns}

    def device(self, rank: int) -> torch.device:
        return torch.device("cuda", self.indices[rank]) if self.indices else CPU


def decide(told: Sequence[Given], asked: str = "auto", apart: bool = False, hierarchical: bool = False) -> Choice:
    """Pure: every rank that knows what all said decides alike. hierarchical: of an exchange, which sums in the machine's memory.

    Raises RecipeError where asked is "cuda" and some rank has no GPU that torch can use.
    """
    if asked == "cpu" or (asked == "auto" and not any(given.address for given in told)):
        return Choice()
    if asked == "cuda":
        told = _in_turn(told)
    lacking = [r for r, given in enumerate(told) if given.index < 0]
    if lacking:
        r, p = lacking[0], len(told)
        which = f"{p} ranks have no GPU that torch can use" if len(lacking) == p else (
            f"{len(lacking)} of {p} ranks have no GPU that torch can use, and ranks on CPUs and GPUs do not mix"
        )  # fmt: skip
        why = f"{which}; rank {r} on {told[r].host or 'its machine'} {_lack(told[r])}"
        if asked == "cuda":
            raise RecipeError(f"device is 'cuda', and {why}{_WAY_OUT}")
        return Choice(line=f"training on CPUs: {why} (device='cpu' asks for that, and says nothing)", warns=True)
    on = Counter(given.gpu for given in told)
    meeting = "nccl"
    if apart:
        meeting = "apart"
    elif len(told) > 1 and (hierarchical or max(on.values()) > 1 or not all(given.nccl for given in told)):
        meeting = "memory"
    how = {"nccl": "through NCCL", "memory": "in the memory of their machines", "apart": "on CPUs"}[meeting]
    line = f"training on {len(on)} GPU(s), {len(told)} rank(s)" + (f" that meet {how}" if len(told) > 1 else "")
    return Choice(meeting, tuple(given.index for given in told), line)


def _in_turn(told: Sequence[Given]) -> list[Given]:
    """Ranks to which Spark gave nothing take the GPUs of their machine in turn."""
    made, taken = [], Counter[str]()
    for given in told:
        if not given.address and given.count:
            index = taken[given.host] % given.count
            taken[given.host] += 1
            given = replace(given, index=index, gpu=f"{given.host}/{index}")
        made.append(given)
    return made


class Noting:
    """An observer that logs what ranks note, each line once, and passes all else on."""

    def __init__(self, observer: Observer) -> None:
        self._observer, self._said = observer, set[str]()
        if hasattr(observer, "asked"):
            self.asked = observer.asked

    def __call__(self, event: Event) -> None:
        if "note" in event:
            self.note(event["note"], event.get("warns", False))
        else:
            self._observer(event)

    def note(self, line: str, warns: bool) -> None:
        if line and line not in self._said:
            self._said.add(line)
            _LOG.log(logging.WARNING if warns else logging.INFO, "%s", line)


# ---- between a GPU and the memory of the machine -----------------------------------------------------------------------


class Staging:
    """The copies of a rank that computes on its GPU and meets in memory: its gradient out, the new weights in.

    Its part of the block is page-locked, as far as the system lets it, so that copies run at the speed of the bus.
    """

    def __init__(self, block: Block, device: torch.device) -> None:
        self.block, self.device = block, device
        self._locked = [x for x in (block.weights, block.grads[block.me]) if _lock(x, device)]

    def load(self, weights: Tensor) -> None:
        """weights [n], on the GPU, become those of the block."""
        self._copy(weights, self.block.weights)

    def store(self, gradient: Tensor) -> None:
        """The rank's row of the block becomes gradient [n], on the GPU."""
        self._copy(self.block.grads[self.block.me], gradient)

    def _copy(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source, non_blocking=True)
        if self.device.type == "cuda":  # others read or write that memory next
            torch.cuda.current_stream(self.device).synchronize()

    def close(self) -> None:
        """Before the memory goes."""
        locked, self._locked = self._locked, []
        for x in locked:
            torch.cuda.cudart().cudaHostUnregister(x.data_ptr())


def _lock(x: Tensor, device: torch.device) -> bool:
    """Whether x, on the CPU, is page-locked from now on; where it cannot be, copies are only slower."""
    if device.type != "cuda" or not x.numel():
        return False
    code: Any = torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0)
    if int(code):
        _LOG.info("memory is not page-locked (CUDA error %d): copies to and from GPUs are slower", int(code))
    return not int(code)
