"""Functions on a rewired model: they set how its stages run, and report how they ran."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from re2tal.reversible.containers import Rewired
from re2tal.reversible.coupling import Budget, Coupling
from re2tal.reversible.recompute import Recomputed


def reversible_stages(model: nn.Module) -> Iterator[tuple[str, Rewired]]:
    """Yield the rewired containers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Rewired):
            yield name, module


def set_reversible(model: nn.Module, reversible: bool) -> None:
    """Choose whether the rewired stages rebuild their activations or store them.

    Both compute the same function. Storing is for debugging, for comparison, and for what a replay
    cannot do (`torch.func`, gradients of gradients).

    Raises:
        ValueError: if the model has no rewired stage.
    """
    _change(model, reversible=reversible)
    for module in recomputed_modules(model):
        vars(module)["forward"].active = reversible


def set_coupling(model: nn.Module, *, alpha: float, beta: float) -> None:
    """Set alpha and beta of all rewired stages from the next forward on.

    Raises:
        ValueError: if the coefficients are invalid or the model has no rewired stage.
    """
    _change(model, coupling=Coupling(alpha=alpha, beta=beta))


def set_slice_bytes(model: nn.Module, slice_bytes: Budget) -> None:
    """Set the size of the pieces in which branches run: smaller ones save memory, larger ones time.

    Args:
        model: a rewired model.
        slice_bytes: budget of a piece, as for `rewire`.

    Raises:
        ValueError: if the model has no rewired stage.
    """
    _change(model, slice_bytes=slice_bytes)
    for module in recomputed_modules(model):
        vars(module)["forward"].slice_bytes = slice_bytes


def check(model: nn.Module) -> None:
    """Wait for the checks of all backward passes so far.

    On a GPU the result of a check is read at a later forward, so that nothing waits for it. Call
    this function before anything that cannot be undone, such as writing a checkpoint. After an
    error the gradients of that backward are wrong, and so are weights that were updated with them:
    return to the last checkpoint.

    Raises:
        ReversibleError: if a stream left the grid, or a rebuilt input differs from the forward's.
    """
    for _, stage in reversible_stages(model):
        stage.watch.poll(wait=True)


def reconstruction_errors(model: nn.Module) -> dict[str, float]:
    """Read the relative error of the input that each stage rebuilt last.

    The error is ``||rebuilt - x|| / ||x||`` over a sample of the values.

    Returns:
        Errors by name of the stage; 0 in exact mode. Stages that rebuilt nothing are left out.
    """
    return {
        where: float(error)
        for _, stage in reversible_stages(model)
        for where, error in stage.watch.errors.items()
    }


def stage_modes(model: nn.Module) -> dict[str, str]:
    """Read the mode in which each stage ran last: "reversible", or "stored: " and the reason."""
    return {
        where: mode
        for _, stage in reversible_stages(model)
        for where, mode in stage.watch.modes.items()
    }


def _change(model: nn.Module, **changes: Any) -> None:
    found = [stage for _, stage in reversible_stages(model)]
    if not found:
        raise ValueError(f"This {type(model).__name__} has no reversible stage: call rewire first.")
    for stage in found:
        stage.settings = replace(stage.settings, **changes)


def recomputed_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules that are recomputed in the backward pass."""
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), Recomputed)]


@dataclass(frozen=True, kw_only=True, slots=True)
class CouplingSchedule:
    """Schedule of alpha and beta over training: linear, then constant.

    Dr2Net's dynamic finetuning (Zhao et al., CVPR 2024, arXiv 2401.04105). At step ``t`` of ``T``,

        alpha_t = alpha_start + (t / T) (alpha_end - alpha_start),    beta_t likewise.

    Training starts at the pretrained network, and every step changes alpha and beta a little, so
    that the weights can follow the change of the function. This replaces Re2TAL's finetuning on the
    pretraining task.

    A stage stores its activations as long as it cannot be inverted: with exact streams until beta
    is 1, with ``rewire(model, exact=False)`` while beta is too small for the required precision.
    `stage_modes` tells. So only the last part of the schedule saves memory, and that part begins
    earlier with ``exact=False``.

    Attributes:
        steps: optimizer steps from start to end.
        start: coupling of the first step; (1, 0) is the pretrained network.
        end: coupling from step `steps` on; (0, 1) is Re2TAL.

    Raises:
        ValueError: if there is less than one step.
    """

    steps: int
    start: Coupling = field(default_factory=lambda: Coupling(alpha=1.0, beta=0.0))
    end: Coupling = field(default_factory=Coupling)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(
                f"A schedule of couplings needs at least 1 step, but got {self.steps}."
            )

    def at(self, step: int) -> Coupling:
        """Compute the coupling of a step, counted from 0; `end` itself from step `steps` on."""
        done = min(max(step / self.steps, 0.0), 1.0)
        if done == 1:  # not by the formula: its rounding could miss beta = 1, which exactness needs
            return self.end
        return Coupling(
            alpha=self.start.alpha + done * (self.end.alpha - self.start.alpha),
            beta=self.start.beta + done * (self.end.beta - self.start.beta),
        )

    def apply(self, model: nn.Module, step: int) -> Coupling:
        """Set the coupling of a step in a rewired model, before its forward.

        The coupling depends on the step alone, so a resumed run continues where it stopped.

        Args:
            model: a rewired model.
            step: optimizer steps taken so far.

        Returns:
            The coupling, for the log.

        Raises:
            ValueError: if the model has no rewired stage.
        """
        coupling = self.at(step)
        set_coupling(model, alpha=coupling.alpha, beta=coupling.beta)
        return coupling
