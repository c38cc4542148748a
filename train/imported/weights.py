"""Reads a published checkpoint's tensors, without unpickling anything else, and names those that do not fit."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.sources import is_there
from cdiff.runtime.words import first_line
from cdiff.train.archive import SCRIPT, must_be_as_written
from cdiff.train.imported.mapping import Link
from cdiff.train.imported.options import CONSENSUS, IMPLICIT, TABLE, Options, widths_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("missing", "extra", "misshapen", "wrong type", "not finite")
"""What can be wrong with a tensor, in the order in which a message lists it."""
DOUBLING_BLOCK = re.compile(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight")
DOUBLING_CONVOLUTION = re.compile(r"output_blocks\.\d+\.[12]\.conv\.weight")
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name; a network may be wrapped in both."""
MOST = 12
"""Most tensors of each kind that a message names."""
LONGEST = 100
"""Most characters of a name in a message; the published codes' names have at most half as many."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a .pt file by name, without the prefixes that wrappers (`WRAPPERS`) put before all names.

    Raises CdiffError when the file is missing or damaged, would need anything but tensors to be unpickled (nothing is then), or
    holds anything but a dictionary of tensors. Their types are `check_fit`'s matter.
    """
    if is_there(path) and path.is_dir():
        raise CdiffError(
            f"{path} is a folder; give the .pt file in it that the published code saved, such as {path / 'ema.pt'}"
        )
    if not (is_there(path) and path.is_file()):
        raise CdiffError(f"{path} does not exist; give the .pt file that the published code saved")
    try:
        must_be_as_written(path)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # an error follows where one matters
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if f"operand {pickle.FRAME[0]}" in str(error):  # the first opcode of a pickle of protocol 4 or later
            raise CdiffError(
                f"{path} was saved with a pickle_protocol above 3, which PyTorch reads only by running what it holds: it was not "
                "loaded; save the network's state_dict() again with torch.save as it is"
            ) from None
        if "global" in str(error).lower() or "Can only" in str(error):
            raise CdiffError(
                f"{path} holds more than tensors, and unpickling that could run any code: it was not loaded; "
                "save the network's state_dict() alone with torch.save"
            ) from None
        raise _no_checkpoint(path) from None
    except Exception as error:  # a damaged file fails in the archive, the pickle or the storages, each in its own way
        # Say, another program's ZIP archive, or a text that was taken for a pickle.
        if "hasRecord" in str(error) or isinstance(error, LookupError):
            raise _no_checkpoint(path) from None
        if SCRIPT in str(error) or "weights_only" in str(error):  # PyTorch's advice is to run what it holds
            raise CdiffError(
                f"{path} is a TorchScript archive, or was saved by a PyTorch before 0.4, and is not a state_dict; save the state_dict with torch.save"
            ) from None
        raise CdiffError(f"{path} cannot be read ({first_line(error)}); it is damaged: copy it again") from None
    if not isinstance(loaded, dict) or not loaded:
        raise CdiffError(f"{path} holds a {type(loaded).__name__}, not named tensors; give the network's state_dict")
    if {"state", "param_groups"} <= set(loaded):
        raise CdiffError(f"{path} is an optimiser's state; give the network's file (ema*.pt, or model*.pt)")
    # Methods are called on the classes here and below: a file may have put an attribute of the same name into an object.
    held: dict[Any, Any] = dict(dict.items(loaded))
    if not all(isinstance(name, str) for name in held):
        raise CdiffError(f"{path} is not a state_dict: some of its names are not text; save the state_dict alone")
    odd = sorted(name[:LONGEST] for name, value in held.items() if not isinstance(value, Tensor))
    if odd:
        raise CdiffError(
            f"{path} is not a state_dict: {', '.join(odd[:5])} {'is not a tensor' if len(odd) == 1 else 'are not tensors'}; save the state_dict alone"
        )
    tensors = {name: Tensor.detach(value) for name, value in held.items()}
    if sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type == "cpu") > path.stat().st_size:
        raise CdiffError(
            f"{path} is shorter than its tensors, some of which repeat numbers or share them; save copies: "
            "torch.save({name: tensor.clone() for name, tensor in state_dict.items()}, FILE)"
        )
    while wrapper := next((one for one in WRAPPERS if all(name.startswith(one) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _no_checkpoint(path: Path) -> CdiffError:
    return CdiffError(f"{path} is not a PyTorch checkpoint; give the .pt file that the published code saved")


def source_of(tensors: dict[str, Tensor], path: Path) -> str:
    """Which published code the checkpoint is from. Raises CdiffError when it is from neither."""
    if any(name.startswith("rrdb.") for name in tensors):
        return CONSENSUS
    if any(name.startswith(("time_embed.", "input_blocks.")) for name in tensors):
        return IMPLICIT
    some = ", ".join(sorted(tensors)[:3])
    raise CdiffError(f"{path} is from neither published code: it has neither rrdb.* nor input_blocks.*, but {some} ...")


def check_fit(tensors: dict[str, Tensor], wanted: list[Link], options: Options, path: Path) -> None:
    """Raise CdiffError where a tensor is missing, extra, misshapen, not floating point or not finite.

    It names them kind by kind, sorted; of each kind the first few, and how many more there are.
    """
    shapes = {link.theirs: link.shape for link in wanted}
    wrong: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    wrong["missing"] = {name: f" {list(shape)}" for name, shape in shapes.items() if name not in tensors}
    wrong["extra"] = {name: f" {list(t.shape)}" for name, t in tensors.items() if name not in shapes}
    for name in shapes.keys() & tensors.keys():
        tensor = tensors[name]
        if tuple(tensor.shape) != shapes[name]:
            wrong["misshapen"][name] = f" {list(tensor.shape)}, not {list(shapes[name])}"
        elif tensor.device.type != "cpu" or tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.") if tensor.device.type == "cpu" else tensor.device.type
            wrong["wrong type"][name] = f" {kind}, not plain floating-point numbers"
        elif not torch.isfinite(tensor.float()).all():  # as they will be used: a double may be too large
            wrong["not finite"][name] = ""
    number = sum(map(len, wrong.values()))
    if not number:
        return
    first = f"{path.name} does not fit its options; {number} of {len(shapes.keys() | tensors.keys())} tensors are wrong"
    if hints := _contradictions(tensors, options):
        first += f" ({'; '.join(hints)})"
    lines = [line for kind in KINDS for line in _named(kind, wrong[kind])]
    raise CdiffError("\n  ".join([first + ":", *lines]))


def _named(kind: str, wrong: dict[str, str]) -> list[str]:
    """One line for each of the first `MOST` tensors of a kind, by name, and one that counts the others."""
    lines = [f"{kind:10} {name}{wrong[name]}" for name in sorted(wrong)]
    more = len(lines) - MOST
    return [*lines[:MOST], f"{kind:10} {more} more"] if more > 1 else lines


def shown(tensors: dict[str, Tensor], source: str) -> dict[str, Any]:
    """The published options that the tensors show by themselves, so that nobody need give them; those they leave open are not in it."""

    def size(name: str, axis: int) -> int | None:
        tensor = tensors.get(name)
        return tensor.shape[axis] if tensor is not None and tensor.dim() > axis else None

    channels, rows = size("input_blocks.0.0.weight", 0), size("middle_block.0.emb_layers.1.weight", 0)
    found: dict[str, Any] = {
        "num_channels": channels,
        "learn_sigma": {1: False, 2: True}.get(size("out.2.weight", 0) or 0),
    }
    if rows and (width := size("middle_block.0.out_layers.0.weight", 0)):
        found["use_scale_shift_norm"] = rows == 2 * width
    # Between two depths stands a convolution of stride 2, or with resblock_updown another residual block. On the way down no name tells that
    # block from the others; on the way up it is the second residual block of its output block, whose name shows it.
    halved = sum(name.startswith("input_blocks.") and name.endswith(".op.weight") for name in tensors)
    doubled = sum(DOUBLING_BLOCK.fullmatch(name) is not None for name in tensors)
    if source == IMPLICIT and (halved or doubled):
        found["resblock_updown"] = not halved
    depths = (halved or doubled) + 1
    blocks, rest = divmod(_count(tensors, "input_blocks.") - depths, depths)
    # A file that has lost what halves the size shows no more than one depth; what doubles it again shows that there were others.
    lost = depths == 1 and any(DOUBLING_CONVOLUTION.fullmatch(name) for name in tensors)
    if not lost and rest == 0 and blocks > 0:
        found["num_res_blocks"] = blocks
    if source == CONSENSUS:
        found["rrdb_blocks"] = _count(tensors, "rrdb.RRDB_trunk.") or None
        found["condition_input_channel"] = size("rrdb.conv_first.weight", 1)
        found["number_of_annotators"] = size(TABLE, 0)
    firsts = [f"input_blocks.{d * (blocks + 1) + 1}.0.out_layers.3.weight" for d in range(depths)]
    if channels and "num_res_blocks" in found:
        widths = tuple((size(name, 0) or 0) // channels for name in firsts)
        if source == CONSENSUS:
            found |= widths_of(widths)
        elif min(widths):
            found["channel_mult"] = ",".join(map(str, widths))
    return {name: value for name, value in found.items() if value is not None}


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many modules the module list named `prefix` has."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def _contradictions(tensors: dict[str, Tensor], options: Options) -> list[str]:
    """Options that the tensors themselves disprove, in words."""
    found = shown(tensors, options.source)
    said = {**options.values, "channel_mult": ",".join(map(str, options.channel_mult))}
    if options.source == CONSENSUS:
        found.setdefault("number_of_annotators", 0)
        said["number_of_annotators"] = options.annotators
        if options.variant == "no-annotator" and found.pop("number_of_annotators"):
            found["no_annotator_training"] = False
        drawn = widths_of(
            options.channel_mult
        )  # several sizes share their widths: the option may be right though `shown` gives another
        found = {name: value for name, value in found.items() if drawn.get(name) != value}
    depths, blocks = len(options.channel_mult), options["num_res_blocks"] + 1
    firsts = (f"input_blocks.{depth * blocks + 1}.1.qkv.weight" for depth in range(depths))
    attending = tuple(depth for depth, name in enumerate(firsts) if name in tensors)
    if _count(tensors, "input_blocks.") == depths * blocks and attending != options.attention_depths:
        size = options["image_size"]
        said["attention_resolutions"] += f" with image_size={size}"
        found["attention_resolutions"] = (
            ",".join(str(size >> depth) for depth in attending)
            or "nowhere but in the bottleneck (as with attention_resolutions=1)"
        )
    return [
        f"the options say {name}={said[name]}, the tensors {value}"
        for name, value in found.items()
        if said[name] != value
    ]
