"""Rewire the residual blocks of a model in place, and take it back."""

from torch import nn

from re2tal.reversible.controls import recomputed_modules, reversible_stages
from re2tal.reversible.grid import Bits
from re2tal.reversible.plan import CONTAINERS, Plan, left_out
from re2tal.reversible.recompute import Recomputed
from re2tal.reversible.replay import ReversibleError
from re2tal.reversible.report import RewireReport
from re2tal.reversible.settings import Budget, Settings
from re2tal.reversible.streams import Coupling


def rewire(
    model: nn.Module,
    *,
    alpha: float = 0.0,
    beta: float = 1.0,
    exact: bool = True,
    grid: Bits = "auto",
    slice_bytes: Budget = "auto",
    recompute: bool = True,
    verify: bool = True,
) -> RewireReport:
    """Make the residual blocks of a model reversible, in place and without touching a parameter.

    Every maximal run of consecutive blocks in an `nn.Sequential` or `nn.ModuleList` for which a
    family is registered (see `branches`) becomes one reversible stage. Names and order of
    parameters and buffers do not change, so state dicts load strictly in both directions. The
    function computed does change, except for (1, 0); hence the finetuning that both papers
    describe.

    Forward hooks of a rewired block would not be called, so blocks that have some are left out;
    hooks of modules inside a block are called in the forward and again in the replay, once for
    every piece.

    Rewiring a model again finds its stages again and changes how they run.

    Args:
        model: any module that contains residual blocks, or a container of them.
        alpha: weight of the pretrained skip connection.
        beta: weight of the reversible skip connection. (0, 1) is Re2TAL (arXiv 2211.14053), other
            values are Dr2Net (arXiv 2401.04105), (1, 0) is the network as it was.
        exact: round the streams to a fixed-point grid, so that activations are rebuilt bit for bit
            and gradients are those of stored activations. Needs ``beta=1`` to be reversible.
        grid: fractional bits of that grid: streams are multiples of ``2**-grid`` and must stay
            below ``2**(24 - grid)``. "auto" chooses them in every forward of a stage by its input,
            which streams may then outgrow 256 times.
        slice_bytes: branches run in pieces of about this many bytes, where their family says how.
            "auto" takes as many as one of the streams, but at least 32 MiB on a CPU and 2 GiB on a
            GPU (see `AtLeast`); None runs branches whole, by the blocks' own code.
        recompute: also recompute stems and the layers between stages instead of storing their
            activations.
        verify: compare the rebuilt input of every stage with what it was; see `check` and
            `reconstruction_errors`.

    Returns:
        What became reversible, what did not, and why.

    Raises:
        ValueError: if the coefficients are invalid or nothing in the model can be rewired.
    """
    settings = Settings(
        coupling=Coupling(alpha=alpha, beta=beta),
        grid=grid if exact else None,
        slice_bytes=slice_bytes,
        verify=verify,
    )
    plan = Plan()
    for name, module in model.named_modules():
        plan.consider(name, module)
    if recompute:
        plan.find_recomputed(model)
    report = RewireReport(
        coupling=settings.coupling,
        exact=settings.grid is not None,
        stages=tuple(stage for *_, stages in plan.containers for stage in stages),
        left_out=left_out(model, plan),
    )
    if not plan.containers:
        raise ValueError(
            f"Nothing in this {type(model).__name__} can be rewired:\n"
            + "\n".join(f"  {left.name} ({left.kind}): {left.reason}" for left in report.left_out)
            + "\nRegister a family for its blocks: see re2tal/reversible/README.md."
        )
    unwire(model)
    for module, name, stages in plan.containers:
        blocks = frozenset(block for stage in stages for block in stage.blocks)
        CONTAINERS[type(module)].adopt(module, settings=settings, rewired=blocks, place=name)
    for name, module in plan.recomputed.items():
        vars(module)["forward"] = Recomputed(module, name)
    return report


def unwire(model: nn.Module) -> None:
    """Give the model back as it was before `rewire`, with the parameters that it has now.

    Raises:
        ReversibleError: if the class of a stage was changed since, as `fully_shard` does, or for
            what a check of an earlier backward found.
    """
    found = list(reversible_stages(model))
    for name, stage in found:
        if type(stage) not in CONTAINERS.values():
            raise ReversibleError(
                f"{name or 'The model'} has become a {type(stage).__name__}, and cannot be given "
                "back as it was. Call rewire and unwire before fully_shard."
            )
    for _, stage in found:
        stage.watch.poll(wait=True)
    for _, stage in found:
        stage.restore()
    for module in recomputed_modules(model):
        del vars(module)["forward"]
