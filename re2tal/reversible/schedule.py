"""Dr2Net's dynamic finetuning: from the pretrained network to a reversible one, step by step.

Zhao et al., CVPR 2024, arXiv 2401.04105: training starts close to the pretrained network, (1, 0),
and moves alpha and beta a little with every step, so that the weights follow the change of the
function that they compute. It takes the place of Re2TAL's finetuning on the pretraining task.
"""

from dataclasses import dataclass, field

from torch import nn

from re2tal.reversible.controls import set_coupling
from re2tal.reversible.streams import Coupling


@dataclass(frozen=True, kw_only=True, slots=True)
class CouplingSchedule:
    """Alpha and beta over training: a straight line, then constant.

    While beta is small a stage cannot be run backwards precisely enough, and with exact streams it
    can not be at all before beta is 1: it stores its activations until then, and says so
    (`stage_modes`). The last part of the way is therefore where memory is saved; with
    ``rewire(model, exact=False)`` it begins earlier.

    Attributes:
        steps: optimizer steps from start to end.
        start: (1, 0) is the pretrained network.
        end: (0, 1) is Re2TAL.

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
        """The coupling of a step, counted from 0; exactly `end` from step `steps` on."""
        done = min(max(step / self.steps, 0.0), 1.0)
        if done == 1:
            return self.end
        return Coupling(
            alpha=self.start.alpha + done * (self.end.alpha - self.start.alpha),
            beta=self.start.beta + done * (self.end.beta - self.start.beta),
        )

    def apply(self, model: nn.Module, step: int) -> Coupling:
        """Set the coupling of a step in a rewired model, before its forward.

        It is a function of the step alone: a run that resumes goes on where it was.

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
