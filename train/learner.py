"""What learns: the network, its average, AdamW and the loss scaler, and one step of them on the diffusion loss.

Everything random at step k is drawn from generators seeded by (seed, k), so a run that was killed and resumed takes the same
steps as one that was not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import checkpoint_folder, load_weights, read_tensors
from cdiff.train.config import Config
from cdiff.train.data import Batch
from cdiff.train.diffusion import Diffusion
from cdiff.train.network import ConsensusNet
from cdiff.train.targets import TARGETS


class Learner:
    """The network in training. `ema` holds its averaged weights by name: what is validated and exported."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        settings = config.training
        torch.manual_seed(settings.seed)
        self.network = ConsensusNet(config.network).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
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

    def step(self, k: int, batch: Batch, lr: float) -> tuple[float, float]:
        """Optimiser step k (from 0) on a batch, at the learning rate `lr`. Returns the loss and the gradient's norm before
        clipping. Raises CdiffError when the loss is not finite."""
        settings = self.config.training
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + k)
        rows, window = len(batch.image) * settings.rows_per_image, batch.image.shape[-1]
        T = self.config.network.T
        share = torch.rand(rows, generator=generator) ** (1 / settings.t_power)
        t = (1 + (T * share).long().clamp(max=T - 1)).to(self.device)
        level = torch.randint(1, self.config.network.conditions + 1, (rows,), generator=generator).to(self.device)
        noise = torch.randn(rows, 1, window, window, generator=generator).to(self.device)
        u = torch.rand(rows, generator=generator).to(self.device)
        image = batch.image.to(self.device, memory_format=torch.channels_last)
        masks, raters = (
            part.to(self.device).repeat_interleave(settings.rows_per_image, 0) for part in (batch.masks, batch.raters)
        )
        m = self.target(masks, raters, level, u)
        x = self.diffusion.noised(m, noise, t)
        self.network.train()
        torch.manual_seed(settings.seed * 1_000_003 + k)  # dropout draws from the global generator
        with self._autocast():
            features = self.network.encoder(image).repeat_interleave(settings.rows_per_image, 0)
            output = self.network.denoiser(x, features, t, level)
        loss = self.diffusion.loss(output, m, noise, x, t)
        if not torch.isfinite(loss):
            raise CdiffError(f"the loss became {loss.item()} at step {k + 1}; lower lr (now {lr:.3g}) and resume")
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self._average(k)
        return loss.item(), norm.item()

    def _average(self, done: int) -> None:
        # The average starts short, or it would hold the random initial weights for thousands of steps.
        keep = min(self.config.training.ema, (1 + done) / (10 + done))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                self.ema[name].lerp_(value, 1 - keep)

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
