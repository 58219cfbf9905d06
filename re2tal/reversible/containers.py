"""Rewired containers: an `nn.Sequential` or `nn.ModuleList` whose class runs reversible stages.

`rewire` changes the class of a container. The container stays the same object with the same
children, parameter names and hooks. Every forward asks the blocks for their branches again, so a
copied, unpickled or edited container runs its present children.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.weak import WeakTensorKeyDictionary

from re2tal.reversible.branches import Branch, NotReversibleError, returned, split
from re2tal.reversible.coupling import Settings
from re2tal.reversible.engine import leaf_of_trace, no_torchscript, run_stage
from re2tal.reversible.replay import ReversibleError
from re2tal.reversible.step import Step
from re2tal.reversible.tensors import version_of
from re2tal.reversible.watch import Watch


class Rewired(nn.Module):
    """Container whose runs of residual blocks are reversible stages.

    Attributes:
        settings: settings of its stages.
        rewired: names of the children that belong to a stage; the others are called as they are.
        where: name of the container in the rewired model, for errors.
        watch: checks and measurements of its stages.
        original: class of the container before rewiring.
        plain_class: PyTorch's class from which the container derives.
    """

    settings: Settings
    rewired: frozenset[str]
    where: str
    watch: Watch
    original: type[nn.Module]
    plain_class: type[nn.Module]

    @classmethod
    def adopt(
        cls, module: nn.Module, *, settings: Settings, rewired: frozenset[str], where: str
    ) -> None:
        """Turn a container into a rewired one, in place.

        Its blocks get a `Passage` as their ``forward``, for models that call them one by one.
        """
        vars(module).update(
            original=type(module), settings=settings, rewired=rewired, where=where, watch=Watch()
        )
        module.__class__ = cls
        assert isinstance(module, Rewired)
        for name in rewired:
            # Attributes of the object precede those of its class: nn.Module calls this forward.
            vars(module._modules[name])["forward"] = Passage(module, name)

    def restore(self) -> None:
        """Give the container its original class and its blocks their own forward, in place."""
        for block in self._modules.values():
            if block is not None and isinstance(vars(block).get("forward"), Passage):
                del vars(block)["forward"]
        self.__class__ = self.original  # type: ignore[assignment]
        for attribute in ("original", "settings", "rewired", "where", "watch"):
            vars(self).pop(attribute, None)

    def __getitem__(self, index: Any) -> Any:
        """Return a child, or for a slice a plain container of these children.

        A slice does not shorten the stages: leaving one early, or entering it late, is an error.
        """
        if not isinstance(index, slice):
            return super().__getitem__(index)  # type: ignore[misc]
        chosen = OrderedDict(list(self._modules.items())[index])
        plain = self.plain_class
        return plain(chosen if plain is nn.Sequential else chosen.values())

    def runs(self) -> Iterator[tuple[bool, tuple[str, ...]]]:
        """Yield runs of consecutive children: whether they are rewired, and their names."""
        for rewired, names in groupby(self._modules, key=self.rewired.__contains__):
            yield rewired, tuple(names)

    def run(
        self,
        names: Sequence[str],
        x: Tensor,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Run the blocks with these names as one stage."""
        steps = [
            Step(branch, f"{where} ({branch.name})", x.dtype, self.settings, args, kwargs)
            for where, block in ((dotted(self.where, n), self._modules[n]) for n in names)
            for branch in _branches_of(where, block)
        ]
        return run_stage(steps, x, self.settings, self.watch, self._stage(names))

    def plain(self, names: Sequence[str]) -> bool:
        """Tell whether blocks are called as before rewiring, because (alpha, beta) is (1, 0)."""
        if not self.settings.coupling.plain:
            return False
        self.watch.note(self._stage(names), "stored: the network as it was", self.settings)
        return True

    def _stage(self, names: Sequence[str]) -> str:
        return dotted(self.where, first_to_last(names))

    def __prepare_scriptable__(self) -> None:
        """Refuse `torch.jit.script`, which calls this method first.

        Raises:
            ReversibleError: always.
        """
        raise ReversibleError(no_torchscript(self._stage(tuple(self._modules))))

    def extra_repr(self) -> str:
        """Describe the coupling and the mode, for `print(model)`."""
        coupling = self.settings.coupling
        because = self.settings.stored_because()
        mode = "reversible" if because is None else f"stored: {because}"
        return f"alpha={coupling.alpha:g}, beta={coupling.beta:g}, {mode}"


def _branches_of(where: str, block: nn.Module | None) -> list[Branch]:
    try:
        return split(block)
    except NotReversibleError as error:
        raise ReversibleError(
            f"Block {where} was rewired, but cannot run reversibly now: {error}."
        ) from error


class ReversibleSequential(Rewired, nn.Sequential):
    """An `nn.Sequential` that runs its runs of consecutive residual blocks as reversible stages."""

    plain_class = nn.Sequential

    # The stage's autograd nodes keep state, which torch.compile cannot trace. Modules inside the
    # blocks can be compiled.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's has no types
    def forward(self, input: Tensor | Proxy) -> Any:  # noqa: A002 - the name that nn.Sequential gives it
        """Call the children in order; each run of rewired ones is one stage.

        Raises:
            ReversibleError: if a rewired child is no longer reversible.
        """
        if isinstance(input, Proxy):
            return leaf_of_trace(self, input)
        x = input
        for rewired, names in self.runs():
            if rewired and not self.plain(names):
                x = self.run(names, x)
                continue
            for name in names:
                child = self._modules[name]
                x = x if child is None else child(x)
        return x


class ReversibleModuleList(Rewired, nn.ModuleList):
    """An `nn.ModuleList` whose blocks the model's own forward calls one by one; see `Passage`."""

    plain_class = nn.ModuleList


def rewired_class(module: nn.Module) -> type[Rewired] | None:
    """Find the class that `rewire` gives to a container; None if its class has other methods.

    A subclass of PyTorch's container that only defines ``__init__`` counts as a plain container.
    """
    for cls in (ReversibleSequential, ReversibleModuleList):
        if type(module) is cls:
            return cls
        between = type(module).__mro__
        if cls.plain_class in between:
            derived = between[: between.index(cls.plain_class)]
            return None if any(vars(c).keys() - _ONLY_BUILDS for c in derived) else cls
    return None


# Attributes of a class that defines nothing but __init__, in all supported versions of Python.
_ONLY_BUILDS = {*vars(type("_Empty", (nn.Module,), {"__init__": None})), "__annotations__"} | {
    "__annotate_func__",
    "__annotations_cache__",
    "__annotate__",
    "__static_attributes__",
    "__firstlineno__",
    "_version",
}


# Results that the blocks of a stage pass on. A dictionary, not an attribute of the tensor: pickling
# a tensor includes its attributes.
_PASSED: MutableMapping[Tensor, tuple[Any, ...]] = WeakTensorKeyDictionary()


class Passage:
    """Replacement of ``forward`` in the ``__dict__`` of a rewired block that a model calls itself.

    Calling the first block of a stage runs the whole stage; the other blocks pass its result on.

    Args:
        container: container of the block.
        name: name of the block in it.
    """

    def __init__(self, container: Rewired, name: str) -> None:
        self.container = container
        self.name = name

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's has no types
    def __call__(self, x: Tensor | Proxy, *args: Any, **kwargs: Any) -> Any:
        """Return the stage's result at its first block, and the input at the others.

        Raises:
            ReversibleError: if a block does not get the result of the block before it, gets other
                arguments than the first block, or was replaced.
        """
        block = self.container._modules[self.name]
        assert block is not None
        if isinstance(x, Proxy):
            return leaf_of_trace(block, x, *args, **kwargs)
        names = next(names for _, names in self.container.runs() if self.name in names)
        if self.container.plain(names):
            return type(block).forward(block, x, *args, **kwargs)
        if self.name == names[0]:
            self._check_others(names)
            self.container.watch.begins()
            x = self.container.run(names, x, args, kwargs)
        else:
            self._check(x, names[names.index(self.name) - 1], args, kwargs)
        # With the version, so that the next block notices a change in place.
        _PASSED[x] = self.container, self.name, version_of(x), args, kwargs
        self.container.watch.left_at(self.name, at_end=self.name == names[-1])
        return returned(block, x, *args, **kwargs)

    def _check_others(self, names: Sequence[str]) -> None:
        """Check that the stage's other blocks are still the rewired ones, which pass results on."""
        for name in names:
            passage = vars(self.container._modules[name]).get("forward")
            here = (self.container, name)
            if not isinstance(passage, Passage) or (passage.container, passage.name) != here:
                raise ReversibleError(
                    f"Block {dotted(self.container.where, name)} is not the one that was rewired: "
                    "call rewire(model) again. (A block that stands in it twice cannot be "
                    "called by itself: call unwire(model).)"
                )

    def _check(self, x: Tensor, before: str, args: Any, kwargs: Any) -> None:
        where = dotted(self.container.where, self.name)
        container, name, version, *arguments = _PASSED.get(x, (None, "", 0))
        if container is not self.container or name != before or version != version_of(x):
            raise ReversibleError(
                f"Block {where} is in the middle of a reversible stage, but its input is not the "
                "result of the block before it. Call the blocks of a stage one after another, "
                "with nothing in between, or unwire(model)."
            )
        if not _same(arguments, [args, kwargs]):
            raise ReversibleError(
                f"Block {where} is called with other arguments than the first block of its stage, "
                "but a reversible stage runs all its blocks with the arguments of the first."
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b  # `==` would compare element by element
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a is b or a == b)


def first_to_last(blocks: Sequence[str]) -> str:
    """Name a run of blocks by its first and its last block."""
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]}…{blocks[-1]}"


def dotted(container: str, name: str) -> str:
    """Join the name of a container in the model and that of its child."""
    return f"{container}.{name}" if container else name
