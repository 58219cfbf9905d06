"""Random number generators: remember where they stood, and visit that state again.

A replayed branch must draw the dropout and drop-path masks of its first run, and the generators
that the rest of the program uses must not notice. PyTorch's default generators of the CPU and of
the devices in use are covered; Python's `random`, NumPy and a module's private generator are not.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class GeneratorStates:
    """States of the default generators of some devices, as uint8 tensors on the host."""

    states: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> "GeneratorStates":
        """The states at this moment, of the CPU's generator and of those of `devices`."""
        chosen = dict.fromkeys([CPU, *(d for d in devices if d.type not in ("cpu", "meta"))])
        return cls(tuple((device, _get(device)) for device in chosen))

    def moved(self) -> bool:
        """Whether any of these generators has been drawn from since."""
        return any(not torch.equal(state, _get(device)) for device, state in self.states)

    def set(self) -> None:
        """Put the generators back to these states."""
        for device, state in self.states:
            if device == CPU:
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def revisited(self) -> Iterator[None]:
        """Run a block of code from these states, then leave the generators as they were found."""
        found = GeneratorStates.now(device for device, _ in self.states)
        self.set()
        try:
            yield
        finally:
            found.set()


class Draws:
    """Where the generators stood before each part of a run, so that any part can be repeated."""

    def __init__(self) -> None:
        self._marks: list[GeneratorStates] = []

    def mark(self, stream: Tensor, devices: Iterable[torch.device]) -> None:
        """A part of the run begins, on this tensor and with generators of these devices."""
        # Fake tensors draw nothing, and cannot be mixed with real generator states.
        if not isinstance(stream, FakeTensor):
            self._marks.append(GeneratorStates.now(devices))

    def settle(self) -> None:
        """The run has ended: forget the states if it drew nothing."""
        if self._marks and not self._marks[0].moved():
            self._marks.clear()

    def revisited(self, part: int) -> AbstractContextManager[None]:
        """The generators as they stood before a part; as they are if the run drew nothing."""
        return self._marks[part].revisited() if self._marks else nullcontext()


def _get(device: torch.device) -> Tensor:
    if device == CPU:
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state
