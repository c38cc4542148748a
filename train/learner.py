"""The network, its averaged weights and AdamW, and one step of training on the diffusion loss, run by Lightning Fabric.

Everything random at step k is drawn from generators seeded by (seed, k), so a run that was killed and resumed takes the same
steps as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import EMA, MODEL, check_weights, load_weights, read_state, read_weights
from cdiff.train.config import Config
from cdiff.train.diffusion import Diffusion
from cdiff.train.fabric import summed
from cdiff.train.initial import Initial
from cdiff.train.machine import usable
from cdiff.train.network import ConsensusNet, recompute_activations
from cdiff.train.rows import Rows
from cdiff.train.targets import TARGETS


class Learner:
    """The network in training. `ema` holds its averaged weights by name: what is validated and exported.

    `model` and `optimiser` are the network and AdamW as Fabric runs them; `network` is the network itself.
    """

    def __init__(self, config: Config, fabric: Fabric) -> None:
        self.config, self.fabric, self.device = config, fabric, fabric.device
        settings = config.training
        torch.manual_seed(settings.seed)
        self.network = ConsensusNet(config.network)
        with usable(self.device):
            self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.checkpointing:
            recompute_activations(self.network)
        if settings.compile:
            self.network.compile()
        network = config.network
        self.diffusion = Diffusion(config.schedule, network.target, self.device, settings.dice_weight, network.outside)
        self.target = TARGETS[config.network.variant]
        adamw = torch.optim.AdamW(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
        )
        # `model` is the network in its precision, which averages gradients where there are several processes.
        self.model, self.optimiser = fabric.setup(self.network, adamw, move_to_device=False)
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    @property
    def loss_scale(self) -> float:
        """The factor on fp16's loss at the next step, which keeps its gradients from underflowing; 1 where the loss is not scaled."""
        precision = self.fabric.strategy.precision
        scaler = precision.scaler if isinstance(precision, MixedPrecision) else None
        return 1.0 if scaler is None else float(scaler.get_scale())

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def start_from(self, initial: Initial) -> None:
        """Take these weights as the initial ones. Raises CdiffError where they do not fit, or would compute something else here."""
        initial.check_shapes(self.config, self.network)
        load_weights(
            self.network, initial.tensors, initial.path, "the new run's settings, which must give the same network"
        )
        initial.check_function(self.config)
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def step(self, k: int, parts: Sequence[Rows], lr: float) -> tuple[float, float]:
        """Optimiser step k (from 0) on this process's parts of it, at the learning rate `lr`.

        Returns the loss over all rows of the step and the gradient's norm before clipping. Raises CdiffError when one of them is not
        finite. With fp16 a norm that is not finite is an error only once the loss scale has fallen to 1. Above 1 the scale was too large,
        and AdamW skipped the step; at 1 the gradient itself overflows, and every further step would be skipped.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        fabric = self.fabric
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts):
            # Processes exchange gradients once per step, when its last part is done.
            with fabric.no_backward_sync(self.model, enabled=number < len(parts) - 1):
                loss = part.share * self.loss(part.to(self.device))
                fabric.backward(loss)
            total += loss.detach()
        if fabric.world_size > 1:
            # Processes' gradients are averaged; the step needs their sum. A larger loss would give it too, but would overflow that many
            # times sooner in half precision, so that other steps would be skipped than in one process.
            gradients = [value.grad for value in self.network.parameters() if value.grad is not None]
            torch._foreach_mul_(gradients, float(fabric.world_size))
        norm = fabric.clip_gradients(
            self.model, self.optimiser, max_norm=self.config.training.clip, error_if_nonfinite=False
        )
        self.optimiser.step()
        self._average(k)
        assert norm is not None  # with max_norm there is one
        value, size = torch.stack([summed(fabric, total), norm]).tolist()  # the step's one wait for the device
        for what, result in (("loss", value), ("gradient", size)):
            if not math.isfinite(result) and (what == "loss" or self.loss_scale <= 1):
                advice = (
                    f"start a new run with a lower lr (now {lr:.3g}), anew or from this one's last checkpoint (--init); --resume takes the "
                    "same lr again"
                    if k
                    else "no lr has moved a weight yet, so start a new run with other settings of the loss or the network: a lower dice_weight, "
                    "fewer rrdbs or residual_blocks, another amp"
                )
                raise CdiffError(f"the {what} became {result} at step {k + 1}; {advice}")
        return value, size

    def loss(self, rows: Rows) -> Tensor:
        """The mean loss of the rows, float32 []."""
        masks, raters = (
            part.repeat_interleave(len(rows.t) // len(rows.image), 0) for part in (rows.masks, rows.raters)
        )
        m = self.diffusion.coded(self.target(masks, raters, rows.level, rows.u))
        x = self.diffusion.noised(m, rows.noise, rows.t)
        torch.manual_seed(rows.seed)  # dropout draws from the global generator
        output = self.model(x, rows.image, rows.t, rows.level)
        return self.diffusion.loss(output, m, rows.noise, x, rows.t)

    def _average(self, k: int) -> None:
        # The average starts short, or it would hold the random initial weights for thousands of steps.
        keep = min(self.config.training.ema, (1 + k) / (10 + k))
        # All tensors in a few calls: with one call for each tensor a GPU would wait.
        update = get_ema_multi_avg_fn(keep)  # type: ignore[no-untyped-call]
        state = self.network.state_dict()
        update([self.ema[name] for name in state], list(state.values()), k)

    def averaged(self) -> ConsensusNet:
        """A network with the averaged weights, in evaluation mode."""
        network = ConsensusNet(self.config.network).to(self.device)
        network.load_state_dict(self.ema)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.eval()

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The network's tensors and their averages, as a checkpoint takes them."""
        network = {name: value.detach().contiguous() for name, value in self.network.state_dict().items()}
        return network, {name: value.contiguous() for name, value in self.ema.items()}

    def state(self) -> dict[str, Any]:
        """What else a resumed run needs: the optimiser's state, and fp16's loss scale."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.fabric.strategy.precision.state_dict()}

    def restore(self, folder: Path) -> None:
        """Load the checkpoint in `folder`. Raises CdiffError when its tensors do not fit."""
        load_weights(self.network, read_weights(folder, MODEL), folder / MODEL)
        averaged = read_weights(folder, EMA)
        check_weights(self.network, averaged, folder / EMA)
        self.ema = {k: v.to(self.device) for k, v in averaged.items()}
        state = read_state(folder / "optimiser.pt")
        try:
            self.optimiser.load_state_dict(state["optimiser"])
            self.fabric.strategy.precision.load_state_dict(state["scaler"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CdiffError(
                f"{folder / 'optimiser.pt'} is from another network ({error}); copy the run again"
            ) from error
