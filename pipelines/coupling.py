"""Moving the connections of a rewired network in the course of training (Dr2Net)."""

from torch import nn

from pipelines.settings import BackboneModelConfig
from re2tal.reversible.schedule import CouplingSchedule


def connect(
    model: nn.Module, config: BackboneModelConfig, *, done: int, steps: int
) -> dict[str, float]:
    """Moves the connections to where they are to be after the steps that were taken.

    Args:
        model: with a rewired backbone.
        config: says over how many epochs; nothing is done if over none.
        done: steps before this one.
        steps: of an epoch.

    Returns:
        Metrics: where they are.
    """
    if config.coupling_epochs is None:
        return {}
    schedule = CouplingSchedule(steps=max(1, round(config.coupling_epochs * steps)))
    coupling = schedule.apply(model, done)
    return {"coupling/alpha": coupling.alpha, "coupling/beta": coupling.beta}
