"""What learns: the network, its average, AdamW and the loss scaler, and one step of them on the diffusion loss.

Everything random at step k is drawn from generators seeded by (seed, k), so a run that was killed and resumed takes the same
steps as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import checkpoint_folder, load_weights, read_tensors
from cdiff.train.config import Config
from cdiff.train.diffusion import Diffusion
from cdiff.train.network import ConsensusNet, recompute_activations
from cdiff.train.ranks import ALONE, Ranks
from cdiff.train.rows import Rows
from cdiff.train.targets import TARGETS


class Learner:
    """The network in training. `ema` holds its averaged weights by name: what is validated and exported."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.config, self.device, self.ranks = config, device, ranks
        settings = config.training
        torch.manual_seed(settings.seed)
        self.network = ConsensusNet(config.network).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.checkpointing:
            recompute_activations(self.network)
        if settings.compile:
            self.network.compile()
        # What a step calls: the network itself, or around it the averaging of gradients over the processes.
        self.model: torch.nn.Module = self.network
        if ranks.world > 1:
            self.model = DistributedDataParallel(self.network, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.diffusion = Diffusion(config.schedule, config.network.target, device, settings.dice_weight)
        self.target = TARGETS[config.network.variant]
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
        )
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.amp = _amp(settings.amp, device)
        # Half precision's gradients underflow; bf16 has float32's range and needs no scaling.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    @property
    def precision(self) -> str:
        return {None: "float32", torch.bfloat16: "mixed bf16", torch.float16: "mixed fp16"}[self.amp]

    def start_from(self, init: Path) -> None:
        """Take the averaged weights of the last checkpoint of the run `init`, or those of the bundle `init`, as the first ones."""
        folder = checkpoint_folder(init, "last")
        path = init / "model.safetensors" if folder is None else folder / "ema.safetensors"
        if not path.exists():
            raise CdiffError(f"{init} holds no weights to start from; give the folder of a training run or of a bundle")
        load_weights(self.network, read_tensors(path), path)
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def step(self, k: int, parts: Sequence[Rows], lr: float) -> tuple[float, float]:
        """Optimiser step k (from 0) on this process's parts of it, at the learning rate `lr`. Returns the loss over all rows of the
        step and the gradient's norm before clipping. Raises CdiffError when the loss is not finite."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts):
            with self._exchanging(number == len(parts) - 1):
                loss = part.share * self.loss(part.to(self.device))
                # Processes' gradients are averaged; what the step needs is their sum.
                self.scaler.scale(self.ranks.world * loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.training.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self._average(k)
        value, size = torch.stack([self.ranks.sum(total), norm]).tolist()  # the step's one wait for the device
        if not math.isfinite(value):
            raise CdiffError(f"the loss became {value} at step {k + 1}; lower lr (now {lr:.3g}) and resume")
        return value, size

    def loss(self, rows: Rows) -> Tensor:
        """The mean loss of the rows, float32 []."""
        masks, raters = (
            part.repeat_interleave(len(rows.t) // len(rows.image), 0) for part in (rows.masks, rows.raters)
        )
        m = self.target(masks, raters, rows.level, rows.u)
        x = self.diffusion.noised(m, rows.noise, rows.t)
        torch.manual_seed(rows.seed)  # dropout draws from the global generator
        with self._autocast():
            output = self.model(x, rows.image, rows.t, rows.level)
        return self.diffusion.loss(output, m, rows.noise, x, rows.t)

    def _exchanging(self, now: bool) -> AbstractContextManager[Any]:
        """Gradients travel between the processes once a step, when its last part is done."""
        if now or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _average(self, done: int) -> None:
        # The average starts short, or it would hold the random initial weights for thousands of steps.
        keep = min(self.config.training.ema, (1 + done) / (10 + done))
        # All tensors in few calls, where a GPU would wait for one call each.
        update = get_ema_multi_avg_fn(keep)  # type: ignore[no-untyped-call]
        state = self.network.state_dict()
        update([self.ema[name] for name in state], list(state.values()), done)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

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
        """What else a resumed run needs: the optimiser's and the scaler's."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, folder: Path) -> None:
        """Take up the checkpoint in `folder`. Raises CdiffError when its tensors do not fit."""
        load_weights(self.network, read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
        self.ema = {k: v.to(self.device) for k, v in read_tensors(folder / "ema.safetensors").items()}
        state = torch.load(folder / "optimiser.pt", map_location=self.device, weights_only=True)
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])


def _amp(name: str, device: torch.device) -> torch.dtype | None:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
