"""Moving averages, exported programs and Lightning's trainer around a rewired model."""

import copy
import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from re2tal.reversible import (
    ReversibleError,
    rewire,
    set_coupling,
    set_reversible,
    stage_modes,
    unwire,
)
from tests.reversible.toy_blocks import assert_same_step, one_step, tiny_swin

PIECE = 2**14  # bytes; the branches below need up to eight pieces


def swin(*, drop_path: float = 0.3, depths: Sequence[int] = (2, 2)) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_swin(depths, drop_path=drop_path)
    rewire(model, slice_bytes=PIECE)
    return model


def frames(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(seed))


def stored_copy(model: nn.Module) -> nn.Module:
    stored = copy.deepcopy(model)
    set_reversible(stored, False)
    return stored


def test_a_moving_average_is_that_of_stored_activations_and_trains_reversibly() -> None:
    averages = []
    for model in (swin(), stored_copy(swin())):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(2)
        for seed in range(3):
            optimizer.zero_grad()
            model(frames(seed)).pow(2).sum().backward()
            optimizer.step()
            average.update_parameters(model)
        averages.append(average)
    ours, stored = averages
    assert_same_step(one_step(ours, frames()), one_step(stored, frames()))
    assert set(stage_modes(ours).values()) == {"reversible"}


@pytest.mark.slow
def test_an_exported_program_computes_what_the_model_computes() -> None:
    model = swin(drop_path=0.0, depths=(1, 1))
    exported = torch.export.export(model, (frames(),))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    program = torch.export.load(file).module()
    found, truth = one_step(program, frames(2)), one_step(model, frames(2))
    assert set(stage_modes(model).values()) == {"reversible"}  # as before the export
    # the program sums a parameter's gradients over pieces in another order
    assert_same_step(found, truth, tolerance=1e-5)


torchscript = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning",  # it is deprecated
    "ignore::torch.jit.TracerWarning",  # Swin asks for the values of shapes
)


@torchscript
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_torchscript_is_refused_with_what_to_do_instead(reversible: bool, gradients: bool) -> None:
    model = swin(drop_path=0.0, depths=(1, 1))
    set_reversible(model, reversible)
    tools: tuple[Any, ...] = (lambda m: torch.jit.trace(m, frames()), torch.jit.script)
    message = r"^features\.0.*torch\.export.*unwire"
    for tool in tools:
        with pytest.raises(ReversibleError, match=message), torch.set_grad_enabled(gradients):
            tool(model)


@torchscript
def test_torchscript_records_the_network_as_it_was_before_rewire() -> None:
    model = swin(drop_path=0.0, depths=(1, 1)).eval()
    set_coupling(model, alpha=1.0, beta=0.0)
    wired = torch.jit.trace(model, frames())
    unwire(model)
    for program in (wired, torch.jit.trace(model, frames())):
        assert torch.equal(program(frames(2)), model(frames(2)))


def lightning_run(folder: Path, mode: str, **options: Any) -> dict[str, Tensor]:
    """Train two epochs with Lightning's trainer, the second from a checkpoint of the first.

    Returns:
        The parameters of the model and of its moving average.
    """
    model = swin(depths=(1, 1))
    set_reversible(model, mode == "reversible")
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(batch[0]).pow(2).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    data = DataLoader(TensorDataset(torch.cat([frames(s) for s in range(4)])), batch_size=2)
    lightning.seed_everything(3, verbose=False)
    module, last = Module(), folder / "last.ckpt"
    for epochs in (1, 2):
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[EMAWeightAveraging(decay=0.9), ModelCheckpoint(folder, save_last=True)],
            default_root_dir=folder,
            gradient_clip_val=0.5,
            accumulate_grad_batches=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=False)
    if "devices" not in options:  # otherwise the stages ran in other processes
        assert {one.partition(":")[0] for one in stage_modes(model).values()} == {mode}
    kept = torch.load(last, weights_only=False)
    assert kept["epoch"] == 1
    current = {f"current {name}": value for name, value in kept["current_model_state"].items()}
    return {**kept["state_dict"], **current}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"strategy": "ddp_fork", "devices": 2}], ids=str
)
def test_lightning_trains_as_with_stored_activations(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip("lightning", reason="`make slow` installs Lightning beside the environment")
    # `ddp_fork` cannot fork a process in which autograd has started a thread, as it has done for
    # the nested backwards of another test. So start a fresh process.
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as fresh:
        modes = ("stored", "reversible")
        runs = [fresh.submit(lightning_run, tmp_path / mode, mode, **options) for mode in modes]
        stored, rebuilt = (run.result() for run in runs)
    assert rebuilt.keys() == stored.keys()
    for name, tensor in rebuilt.items():
        assert torch.equal(tensor, stored[name]), name
