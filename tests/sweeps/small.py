"""A sweep of one's own is one small file."""

from pipelines.config.recipe import Recipe
from sweeps.search import main
from sweeps.suggestions import Suggestions
from sweeps.sweep import Sweep, one_worker


def space(suggest: Suggestions, base: Recipe) -> None:
    """A learning rate whose other value ends in a loss that is not finite; and the clipping."""
    suggest.choice("optim.localizer_lr", (base.optim.localizer_lr, 1e30))
    suggest.number("optim.clip", 0.5, 2.0)


SWEEP = Sweep(name="small", space=space, epochs=lambda base: 1, trials=4, prepare=one_worker)

if __name__ == "__main__":
    main(SWEEP, __doc__ or "")
