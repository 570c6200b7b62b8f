"""Several processes that train one model: who they are, what they split, and what they agree on.

Each rank takes every W-th window of the global batch, so that the batch is the same for any number of ranks.
With "fsdp" a rank holds 1/W of every weight, gradient and optimizer tensor (FSDP2's `fully_shard`, block by
block); with "ddp" it holds all of them. Gradients are means over ranks; the loss of a rank is therefore its
sum of token losses over (all tokens / W).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clinometer.distributed.board import Board, unreachable
from clinometer.distributed.heartbeat import GIVE_UP, LOST, Heartbeat, RankTrouble
from clinometer.distributed.launch import OPENING_SECONDS, Launch, host_name, launched
from clinometer.distributed.reduce import all_reduce
from clinometer.messages import InputError, say

if TYPE_CHECKING:
    from clinometer.lm.model import TransformerLM

OPENING_PATIENCE = 60
"""Seconds, until the configuration says otherwise."""
_DEFERENCE_SECONDS = 3.0
"""What every rank finds, such as a wrong setting, rank 0 shall say."""
_SHOWN = 16
"""Ranks that a message lists."""
_SYMPTOMS = ("gloo", "nccl", "connection", "timed out waiting", "broken pipe", "socket", "distbackend")


class Ended(BaseException):
    """The run is over because of another rank, which has said so."""


class World:
    """This process among the ranks; one on its own is a world of one, where nothing here costs anything."""

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch
        self.rank, self.size = (0, 1) if launch is None else (launch.rank, launch.size)
        self.kind = "one"
        self.mesh: Any = None
        self.remedy: Callable[[], str] = str
        """What to do when the run has ended by a fault, for whoever reads it."""
        self.device = torch.device("cpu")
        self._replica: nn.Module | None = None
        self._agreed: signal.Signals | None = None
        self._request: Any = None
        self._turns = 0
        self.board: Board = None  # pyright: ignore[reportAttributeAccessIssue]
        self.heartbeat: Heartbeat = None  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and keeps the run's files."""
        return self.rank == 0

    @property
    def restarted(self) -> bool:
        """Whether the launcher has started these ranks before, and they ended."""
        return self.launch is not None and self.launch.attempt > 0

    def described(self, parameters: int) -> dict[str, Any]:
        """What is said of the ranks at the start. Memory: weight, gradient and two moments in float32."""
        backend = torch.distributed.get_backend() if self.mesh is not None else ""
        each = parameters / (self.size if self.kind == "fsdp" else 1)
        return {"ranks": self.size, "backend": backend, "gigabytes": 16 * each / 2**30}

    def join(self) -> None:
        """Meet the other ranks. Raises `InputError` if they cannot be reached or do not come."""
        if self.launch is None:
            return
        self.board = Board.open(self.launch)
        place = f"{self.launch.address}:{self.launch.port}"
        names = [f"beat/{rank}" for rank in range(self.size)] if self.first else ["beat/0"]
        try:
            board = self.board.again()
            self.heartbeat = Heartbeat(
                board, self.rank, self.size, patience=OPENING_PATIENCE, tell=self._tell, place=place
            )
            self._wait(names, OPENING_SECONDS)
        except RuntimeError as error:  # whoever held the board ended before all had met
            self.heartbeat = None  # pyright: ignore[reportAttributeAccessIssue]  (there is nobody to tell)
            raise unreachable(self.launch, error) from None
        self.heartbeat.start()

    def choose(self, asked: str) -> str:
        """What "auto" comes to: FSDP2, which needs 1/W of the memory and sends half as much again as DDP."""
        if self.alone:
            return "one"
        return "fsdp" if asked == "auto" else asked

    def device_of(self, name: str) -> str:
        """This rank's device of that kind. Raises `InputError` if there is none left for it."""
        kind = torch.device(name).type
        if kind == "cpu":
            return "cpu"
        local_rank = 0 if self.launch is None else self.launch.local_rank
        if kind != "cuda":
            raise InputError("parallel.device", device=kind)
        if local_rank >= torch.cuda.device_count():
            raise InputError("parallel.gpus", count=torch.cuda.device_count(), number=local_rank + 1)
        return f"cuda:{local_rank}"

    def begin(self, device: torch.device, kind: str, patience: int) -> None:
        """Open the group of all ranks: nccl between GPUs, gloo between processors."""
        self.kind, self._replica = kind, None
        if self.alone:
            return
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        self.device = device
        self.heartbeat.patience = patience
        if self.mesh is not None:  # a second run in the same processes
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=self.board.group_store(),
            rank=self.rank,
            world_size=self.size,
            # The heart ends what does not go on, and names it; this is for a heart that cannot.
            timeout=timedelta(seconds=2 * GIVE_UP * patience),
        )
        self.mesh = init_device_mesh(device.type, (self.size,), mesh_dim_names=("data",))

    def leave(self) -> None:
        """The run has ended well here. Whoever holds the board stays until all have."""
        if self.alone:
            return
        import torch.distributed as dist

        self.board.post(f"left/{self.rank}", "")
        self.board.post("left", "")
        # A group that one rank takes down while another is still in it now and then aborts the process.
        self.board.wait([f"left/{rank}" for rank in range(self.size)], 30)
        if dist.is_initialized():
            dist.destroy_process_group()
        self.heartbeat.stop()
        self.board.post(f"gone/{self.rank}", "")
        if self.launch is not None and self.launch.holds_board:
            self.board.wait([f"gone/{rank}" for rank in range(self.size)], 30)

    # Words between ranks: JSON on the board.

    def share(self, value: Any = None) -> Any:
        """What rank 0 gives, on every rank. Waits for it as long as rank 0 lives."""
        if self.alone:
            return value
        name = self.turn()
        if self.first:
            self.board.post(name, json.dumps(value))
            return value
        self.heartbeat.rest()
        self._wait([name])
        return json.loads(self.board.read(name) or "null")

    def turn(self) -> str:
        """A name on the board for what the ranks do next together, the same on each."""
        self._turns += 1
        return f"turn/{self._turns}"

    def _wait(self, names: list[str], seconds: float = math.inf) -> None:
        """Until these words are there; without a limit only when the heart listens to who owes them."""
        until = time.monotonic() + seconds
        while not self.board.wait(names, 1.0):
            self.check()
            if time.monotonic() > until:
                absent = [name.partition("/")[2] for name in names if self.board.read(name) is None]
                shown = ", ".join(absent[:_SHOWN]) + (", …" if len(absent) > _SHOWN else "")
                raise InputError("parallel.absent", count=len(absent), ranks=shown, seconds=round(seconds))

    def check(self) -> None:
        """Raises `Ended` if another rank has ended the run."""
        if self.heartbeat.verdict is None and (text := self.board.read("verdict")) is not None:
            self.heartbeat.verdict = json.loads(text)
        if self.heartbeat.verdict is not None:
            raise Ended

    # The step.

    def reach(self, step: int) -> None:
        """Say how far this rank is; called at the same places on every rank."""
        if self.heartbeat is not None:
            self.heartbeat.reach(step)

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Around work that may take any time on any rank, such as writing: they must live, and not hurry."""
        if self.heartbeat is not None:
            self.heartbeat.rest()
        yield

    def wrap(self, model: TransformerLM) -> None:
        """Whatever goes around the model whose loss is trained."""
        if self.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            ids = [self.device.index] if self.device.type == "cuda" else None
            self._replica = DistributedDataParallel(_Loss(model), device_ids=ids)

    def loss(self, model: TransformerLM, token_ids: Tensor, targets: Tensor) -> Tensor:
        """The sum of the token losses, to be differentiated."""
        if self._replica is not None:
            return self._replica(token_ids, targets)
        return model.loss(token_ids, targets, reduction="sum")

    def accumulating(self, model: Any, *, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of one part: gradients are reduced once, with the last part."""
        if self.kind == "fsdp":
            model.set_requires_gradient_sync(last)
        elif self._replica is not None and not last:
            return self._replica.no_sync()  # pyright: ignore[reportCallIssue]
        return nullcontext()

    def agree(self, loss: Tensor, norm: Tensor) -> tuple[float, float]:
        """The loss of all ranks and the gradient's norm, the same numbers everywhere.

        With them travel who was asked to stop and who has seen a number that is not finite; so all ranks skip
        the same steps and stop after the same one.
        """
        if self.alone:
            both = torch.stack((loss, norm.to(loss.device, loss.dtype))).tolist()  # one wait for a GPU
            return both[0], both[1]
        asked = None if self._request is None else self._request.signal
        flags = [float(asked == signal.SIGINT), float(asked is not None and asked != signal.SIGINT)]
        packet = torch.cat((torch.tensor(flags, dtype=torch.float64).to(loss.device), loss.double().view(1)))
        norm = norm.detach().to(loss.device, torch.float64).view(1)
        packet = torch.cat((packet, (~norm.isfinite()).double()))
        all_reduce(packet, "sum")
        interrupts, terminations, total, unusable, found = torch.cat((packet, norm)).tolist()
        if interrupts or terminations:
            self._agreed = signal.SIGTERM if terminations else signal.SIGINT
        return total, float("nan") if unusable and found == found and abs(found) != float("inf") else found

    def listen(self, request: Any) -> None:
        """`request.signal` is what this process was asked."""
        self._request, self._agreed = request, None

    @property
    def asked(self) -> signal.Signals | None:
        """What all ranks have agreed to do: the signal that one of them got."""
        return self._request.signal if self.alone else self._agreed

    def sum(self, values: Sequence[float]) -> list[float]:
        if self.alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        all_reduce(total, "sum")
        return total.tolist()

    def settle(self, model: Any) -> None:
        """After forwards without a backward: give back the weights that they have gathered."""
        if self.kind == "fsdp":
            model.reshard()

    # The end.

    def _tell(self, finding: RankTrouble) -> None:
        text = say(finding.key, **finding.values)
        print(f"{text} {self.remedy()}".strip() if finding.fatal else text, file=sys.stderr, flush=True)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """However this rank ends, all end: with one message, one exit code, and nobody left waiting."""
        if self.alone:
            yield
            return
        try:
            self.join()
            yield
        except Ended:
            self._exit()
        except InputError as error:
            self._end(str(error), 2, {"key": error.key})
        except KeyboardInterrupt:
            self._end("", 130, {"key": "parallel.stopped"})
        except MemoryError as error:
            self._end(say("cli.memory", reason=error), 2, {"key": "cli.memory"})
        except Exception as error:
            if self.heartbeat is not None and _is_symptom(error):
                self._find_cause()
            if isinstance(error, RuntimeError) and "out of memory" in str(error):
                self._end(say("cli.memory", reason=error), 2, {"key": "cli.memory"})
            self._end(traceback.format_exc().rstrip(), 1, {"key": "parallel.failed"})

    def _find_cause(self) -> None:
        """A collective has failed, most likely because another rank is gone: wait until it is named."""
        self.board.post("broken", "")
        until = time.monotonic() + self.heartbeat.patience + _DEFERENCE_SECONDS
        while time.monotonic() < until:
            if self.heartbeat.verdict is not None:
                self._exit()
            time.sleep(0.05)

    def _end(self, text: str, code: int, verdict: dict[str, Any]) -> None:
        if self.heartbeat is None:  # the others could not be reached
            print(_by_rank(self.rank, text), file=sys.stderr, flush=True)
            sys.stderr.flush()
            os._exit(code)
        self.heartbeat.take()
        speak_once(self.board, self.rank, text, code, verdict)
        if self.launch is not None and self.launch.holds_board:
            time.sleep(2 * self.heartbeat.interval)  # for the others to read it
        self.heartbeat.stop()
        sys.stdout.flush()
        os._exit(code)

    def _exit(self) -> None:
        self.heartbeat.take()
        sys.stdout.flush()
        sys.stderr.flush()
        if self.launch is not None and self.launch.holds_board:
            time.sleep(2 * self.heartbeat.interval)
        os._exit(int((self.heartbeat.verdict or {}).get("code", LOST)))


def speak_once(board: Board, rank: int, text: str, code: int, verdict: dict[str, Any]) -> None:
    """Print `text` unless a rank has said already why the run ends; rank 0 goes first where all know it."""
    until = time.monotonic() + (0 if rank == 0 else _DEFERENCE_SECONDS)
    while board.read("verdict") is None and time.monotonic() < until:
        time.sleep(0.05)
    mine = json.dumps({**verdict, "code": code, "by": rank})
    if board.first("verdict", mine) == mine and text:
        print(text if rank == 0 else _by_rank(rank, text), file=sys.stderr, flush=True)


def refuse_together(text: str, code: int) -> None:
    """Say what is wrong before the ranks have met: once, if all have found the same. Ends the process."""
    try:
        launch = launched()
        board = None if launch is None else Board.open(launch, 20)
    except InputError:
        launch = board = None
    if launch is None or board is None:
        print(text, file=sys.stderr, flush=True)
    else:
        speak_once(board, launch.rank, text, code, {"key": "parallel.refused"})
        if launch.holds_board:
            time.sleep(_DEFERENCE_SECONDS)
    sys.stdout.flush()
    os._exit(code)


def _by_rank(rank: int, text: str) -> str:
    return say("parallel.by_rank", rank=rank, host=host_name(), text=text)


def _is_symptom(error: Exception) -> bool:
    """Whether a collective failed, which says nothing of why."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _SYMPTOMS)


class _Loss(nn.Module):
    """The model's loss as a module's forward, which is what DDP wraps."""

    def __init__(self, model: TransformerLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(token_ids, targets, reduction="sum")
