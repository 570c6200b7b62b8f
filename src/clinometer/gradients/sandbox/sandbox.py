"""Leaving no trace: whatever runs inside, everything is afterwards bit for bit what it was.

Memory: one more copy of the parameters, buffers and gradients that are there (and of the optimizer's
state, if an optimizer is given). Version counters alone would be cheaper and wrong: a forward that does
`weight.data.clamp_()` moves no counter.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from clinometer.distributed.ranks import shard_again
from clinometer.gradients.sandbox.random_state import KeptGenerator, RandomState, is_generator
from clinometer.gradients.sandbox.saved_state import CONTAINERS, KeptBits, KeptContainer, KeptTensor, has_grad
from clinometer.gradients.sandbox.subject import Subject
from clinometer.torch_support import offers

_PLAIN = (str, int, float, bool, type(None), tuple)
"""Most of what a module holds: it cannot change, and no tensor in it is looked for."""
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def untouched(subject: Subject, *, closure: Any = None, optimizer: Any = None) -> Iterator[Before]:
    """Inside, every `.grad` is None and anything may be changed; afterwards all is what it was.

    Put back, also when an exception or KeyboardInterrupt passes: values, memory, `requires_grad`,
    version counters and `.grad` (the same object with the same bits) of the subject's tensors; those, the
    mode, the hooks and the attributes of its module, of modules `closure` names, and of every module that
    the first runs call, wherever it is kept (it is looked at before its forward runs); the optimizers' state;
    random generators, the global ones and those that the closure or a module names; grad mode, autocast,
    default dtype and device, and the other switches of `_Modes`.

    Not seen: tensors that neither the subject, the closure nor such a module names, objects other than
    tensors, modules and plain containers, hooks on tensors; what other threads draw meanwhile from the
    global random generators. A second thread that asks waits: two at once would put each other's state back.
    """
    offers("versions")
    with _ONE_AT_A_TIME:
        before = Before(subject, closure, optimizer)
        here = threading.get_ident()

        def first_call(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == here:
                before.keep_called(module)

        hook = register_module_forward_pre_hook(first_call)
        try:
            before.set_grads_aside()
            yield before
        finally:
            hook.remove()
            _uninterrupted(before.restore)
            before.forget()


class Before:
    """How everything was when `untouched` began."""

    def __init__(self, subject: Subject, closure: Any = None, optimizer: Any = None) -> None:
        self._modes = _Modes()
        self._rewinds = 0
        self._random = RandomState()
        self._tensors: list[KeptTensor] = []
        self._by_id: dict[int, KeptTensor] = {}
        self._containers: list[KeptContainer] = []
        self._empty: list[Any] = []
        self._scripted: list[tuple[nn.Module, bool]] = []
        self._modules: list[nn.Module] = []
        self._generators: list[KeptGenerator] = []
        self._bits: dict[tuple[Any, ...], KeptBits] = {}
        self._values: set[int] = {id(tensor) for tensor in subject.tensors.values()}
        self._value_bits: set[tuple[Any, ...]] = set()
        self._seen: dict[int, Any] = {}
        optimizers = optimizer if isinstance(optimizer, tuple) else (optimizer,)
        with torch.inference_mode(False), torch.no_grad():
            self._keep(
                [*subject.tensors.values(), subject.module, *_named(closure)],
                [each.__dict__ for each in optimizers if each is not None],
            )
            for bits in self._bits.values():
                bits.take()
        self._list_containers()

    def keep_called(self, module: nn.Module) -> None:
        """Keep a module that nothing named when it is first called, such as a criterion of another file.

        In the first runs only: one that a later run meets was most likely made by the closure itself, and to
        keep a new one of each run would take memory without end.
        """
        if self._rewinds > 1 or id(module) in self._seen:
            return
        tensors, bits = len(self._tensors), set(self._bits)
        with torch.inference_mode(False), torch.no_grad():
            self._keep([module])
            for key in self._bits.keys() - bits:
                self._bits[key].take()
            for kept in self._tensors[tensors:]:
                if has_grad(kept.tensor):
                    kept.tensor.grad = None
        self._list_containers()

    def _list_containers(self) -> None:
        self._held: list[Any] = [kept.container for kept in self._containers]
        self._lengths = list(map(len, self._held))
        self._keys = list(chain.from_iterable(self._held))
        self._tables: list[dict[Any, Any]] = [held for held in self._held if isinstance(held, dict)]
        self._entries = list(chain.from_iterable(map(dict.values, self._tables)))

    def set_grads_aside(self) -> None:
        """`.grad` of every tensor becomes None; `restore` puts the set-aside ones back."""
        for kept in self._tensors:
            if has_grad(kept.tensor) and kept.tensor.grad is not None:
                kept.tensor.grad = None

    @property
    def modules(self) -> list[nn.Module]:
        """Those whose state is kept: of the subject, of the closure, and every one that was called."""
        return list(self._modules)

    def grad_of(self, tensor: Tensor) -> Tensor | None:
        """The `.grad` that was set aside."""
        kept = self._by_id.get(id(tensor))
        return None if kept is None else kept.grad

    def differs(self, tensor: Tensor) -> bool:
        """Whether the values of a kept tensor are other than they were."""
        kept = self._by_id.get(id(tensor))
        return kept is not None and any(self._bits[bits.key].differs() for bits in kept.bits)

    def puts_back(self, tensor: Tensor) -> bool:
        """Whether `rewind` gives a tensor its memory and values of before: a buffer, or a plain attribute."""
        return id(tensor) in self._by_id and id(tensor) not in self._values

    def values_of(self, tensor: Tensor) -> Tensor | None:
        """The values of a kept strided tensor as they were; None if it is none. Do not write to them."""
        kept = self._by_id.get(id(tensor))
        if kept is None or kept.shell is None or len(kept.bits) != 1:
            return None
        return self._bits[kept.bits[0].key].values(kept.shell)

    def rewind(self) -> None:
        """Random generators, buffers, modes and attributes as at the beginning, every `.grad` None.

        Values of parameters and of the subject's tensors are left alone: call it between two runs of
        a closure that should see the same masks and the same running statistics.
        """
        self._rewinds += 1
        with torch.inference_mode(False), torch.no_grad():
            self._restore_containers()
            self.set_grads_aside()
            for kept in self._tensors:
                if id(kept.tensor) not in self._values:
                    kept.restore()
            for key, bits in self._bits.items():
                if key not in self._value_bits:
                    bits.restore()
            self._random.restore()

    def rewind_frozen(self) -> None:
        """Values of frozen tensors as at the beginning, which a forward may move on (a teacher's average)."""
        with torch.inference_mode(False), torch.no_grad():
            for kept in self._tensors:
                if id(kept.tensor) in self._values and not kept.tensor.requires_grad:
                    for bits in kept.bits:
                        self._bits[bits.key].restore()

    def restore(self) -> None:
        """Everything, in an order that may be begun again after an interruption.

        What cannot be put back does not keep the rest from it; its error is raised at the end.
        """
        with torch.inference_mode(False), torch.no_grad():
            errors = _each(
                [self._restore_containers]
                # A .grad of another dtype or shape would forbid giving a tensor its memory back.
                + [self.set_grads_aside]
                + [kept.restore for kept in self._tensors]
                + [bits.restore for bits in self._bits.values()]
                + [kept.restore_grad for kept in self._tensors]
                + [kept.restore_version for kept in self._tensors]
            )
        errors += _each([*(kept.restore for kept in self._generators)])
        errors += _each([self._modes.restore, self._random.restore])
        if errors:
            raise errors[0]

    def forget(self) -> None:
        """Let the copies go; nothing can be put back any more."""
        for held in (self._tensors, self._containers, self._empty, self._scripted, self._modules):
            held.clear()
        self._generators.clear()
        for held in (self._held, self._keys, self._tables, self._entries):
            held.clear()
        for held in (self._by_id, self._bits, self._seen):
            held.clear()

    def _restore_containers(self) -> None:
        shard_again(self._modules)
        # Most are the empty hook tables of modules; between any two runs they are asked all at once.
        if any(self._empty):
            for container in self._empty:
                container.clear()
        if not self._same_containers():
            for kept in self._containers:
                kept.restore()
        for module, training in self._scripted:
            if module.training != training:
                module.training = training

    def _same_containers(self) -> bool:
        """Whether all hold what they held: asked between any two runs, so without a loop in Python."""
        return (
            list(map(len, self._held)) == self._lengths
            and all(map(is_, chain.from_iterable(self._held), self._keys))
            and all(map(is_, chain.from_iterable(map(dict.values, self._tables)), self._entries))
        )

    def _keep(self, *roots: Any) -> None:
        queue = [root for group in roots if group is not None for root in group]
        while queue:
            value = queue.pop()
            if type(value) in _PLAIN or id(value) in self._seen:
                continue
            if isinstance(value, Tensor):
                self._seen[id(value)] = value
                queue.extend(self._keep_tensor(value))
            elif isinstance(value, nn.Module):
                self._seen[id(value)] = value
                self._modules.append(value)
                if isinstance(value, torch.jit.ScriptModule):  # its attributes live in C++
                    self._scripted.append((value, value.training))
                    queue.extend([*value.parameters(False), *value.buffers(False), *value.children()])
                else:
                    queue.append(value.__dict__)
            elif type(value) in CONTAINERS:
                self._seen[id(value)] = value
                if not value:
                    self._empty.append(value)
                    continue
                kept = KeptContainer(value)
                self._containers.append(kept)
                queue.extend(kept.items)
            elif is_generator(value):
                self._seen[id(value)] = value
                self._generators.append(KeptGenerator(value))

    def _keep_tensor(self, tensor: Tensor) -> list[Tensor]:
        if is_lazy(tensor):
            return []
        kept = KeptTensor(tensor)
        self._tensors.append(kept)
        self._by_id[id(tensor)] = kept
        if isinstance(tensor, nn.Parameter):
            self._values.add(id(tensor))
        for bits in kept.bits:
            self._bits.setdefault(bits.key, bits)
            if id(tensor) in self._values:
                self._value_bits.add(bits.key)
        return [] if kept.grad is None else [kept.grad]


def modules_named_by(closure: Any) -> list[nn.Module]:
    """Modules a callable reaches by its names: enclosed, global, default, bound, partial.

    Functions of the same file that it names are looked into as well.
    """
    return [value for value in _named(closure) if isinstance(value, nn.Module)]


def _named(closure: Any) -> list[Any]:
    """Modules and generators of random numbers that a callable reaches by its names."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    queue = [closure]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module) or is_generator(value):
            found[id(value)] = value
        elif isinstance(value, functools.partial):
            queue += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            queue += [value.__self__, value.__func__]
        elif inspect.isfunction(value):
            if value is closure or value.__globals__ is getattr(closure, "__globals__", value.__globals__):
                queue += _named_by(value)
        elif value is closure or value is getattr(closure, "__self__", None):
            held = getattr(value, "__dict__", {}).values()
            queue += [v for v in held if isinstance(v, nn.Module) or is_generator(v)]
    return list(found.values())


def _named_by(function: Any) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # enclosed, not yet assigned
            continue
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _flushes_denormals() -> bool:
    """Whether the smallest numbers become zero; torch tells it nobody."""
    return sys.float_info.min * 0.5 == 0.0


def _set_deterministic(enabled: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(enabled[0], warn_only=enabled[1])


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _of(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


_SWITCHES: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_flushes_denormals, torch.set_flush_denormal),
    (torch.get_default_device, _set_default_device),
    _of(torch.backends.cudnn, "enabled"),
    _of(torch.backends.cudnn, "benchmark"),
    _of(torch.backends.cudnn, "deterministic"),
]
"""How each switch of the process is read and turned."""


class _Modes:
    """Switches of the process that a closure may leave turned."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.dtype = torch.get_default_dtype()
        self.anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        self.autocast = {
            d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
        }
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self._switches = [(read, write, read()) for read, write in _SWITCHES]

    def restore(self) -> None:
        torch.set_grad_enabled(self.grad)
        torch.set_default_dtype(self.dtype)
        torch.set_anomaly_enabled(*self.anomaly)
        for device, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        for read, write, value in self._switches:
            if read() != value:
                write(value)
        torch.clear_autocast_cache()  # a cast of values that were changed inside is not the user's


def _each(actions: list[Callable[[], None]]) -> list[Exception]:
    errors = []
    for action in actions:
        try:
            action()
        except Exception as error:
            errors.append(error)
    return errors


def _uninterrupted(action: Callable[[], None]) -> None:
    """Do all of it even if Ctrl-C comes in the middle, then let the Ctrl-C pass."""
    interrupted = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted
