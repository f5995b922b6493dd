"""A method's state as a dictionary, and back, also on another number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.train.bits import pack, unpack
from secateur.train.channels import Channels
from secateur.train.shards import gather, is_shared, local

if TYPE_CHECKING:
    from secateur.train.pruner import Pruner

VERSION = 1


def state_of(pruner: Pruner) -> dict[str, Any]:
    """See ``Pruner.state_dict``."""
    state: dict[str, Any] = {
        "version": VERSION,
        "about": about(pruner),
        "applied": pruner.applied,
        "done": pruner.done,
        "masks": {n: bits.clone() for n, bits in pruner.bits.items() if n not in pruner.parts},
        "state": {n: {k: _whole(pruner, n, v) for k, v in kept.items()} for n, kept in pruner.state.items()},
    }
    for name in [n for n in pruner.parts if n in pruner.bits]:  # processes gather in the same order
        mask = pruner.mask(name)
        assert mask is not None
        state["masks"][name] = pack(gather(mask, pruner.parts[name]))
    if isinstance(pruner.wish, Channels) and pruner.wish.kept is not None:
        state["units"] = {name: pack(flags) for name, flags in pruner.wish.kept.units.items()}
    return state


def about(pruner: Pruner) -> dict[str, Any]:
    """What tells this method at work from others."""
    return {
        "method": type(pruner).__name__,
        "pattern": str(pruner.pattern),
        "budget": str(pruner.budget),
        "steps": pruner.steps,
        "schedule": [[s.step, None if s.budget is None else str(s.budget)] for s in pruner.schedule],
        "weights": {name: list(weight.shape) for name, weight in pruner.weights.items()},
        "seed": pruner.seed,
    }


def load(pruner: Pruner, state: Mapping[str, Any]) -> None:
    """See ``Pruner.load_state_dict``."""
    try:
        saved, now = dict(state["about"]), about(pruner)
        if state["version"] != VERSION:
            raise DataError(f"the state is of format {state['version']}, this Secateur continues {VERSION}")
        for key in now:
            if saved.get(key) != now[key]:
                raise DataError(
                    f"the state is of another training: {key} was {_brief(saved.get(key))}, is now {_brief(now[key])}"
                )
        bits = {name: _bits(pruner, name, packed) for name, packed in state["masks"].items()}
        kept = {n: {k: _here(pruner, n, v) for k, v in values.items()} for n, values in state["state"].items()}
        applied, done = int(state["applied"]), int(state["done"])
        if kept.keys() != pruner.state.keys() or not 0 <= done <= len(pruner.schedule) or applied < 0:
            raise DataError(f"the state is damaged: {len(kept)} weights, {applied} steps, {done} stages")
        if isinstance(pruner.wish, Channels):
            pruner.wish.restore(state.get("units"))
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"this is no state of a training method, or a damaged one: {error!r}") from error
    pruner.bits, pruner.state = bits, kept
    pruner.applied = pruner._seen = applied
    pruner.done = done


def _whole(pruner: Pruner, name: str, value: Tensor) -> Tensor:
    """A copy; of what has a row for each row of its parameter that is here, split over processes as that is.

    A distributed checkpoint can then split it otherwise.
    """
    parameter = pruner.tensor(name)
    if not is_shared(parameter) or value.shape[:1] != local(parameter).shape[:1]:
        return value.clone()
    from torch.distributed.tensor import DTensor

    shape = (parameter.shape[0], *value.shape[1:])
    return DTensor.from_local(
        value.clone(),
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def _here(pruner: Pruner, name: str, value: Tensor) -> Tensor:
    """What is here of a saved tensor, on the parameter's device. Raises DataError for one that is split otherwise."""
    parameter, part = pruner.tensor(name), pruner.parts[name]
    here = local(value) if is_shared(value) else value
    if not is_shared(value) and value.shape[:1] == parameter.shape[:1]:
        here = part.slice(value)
    elif is_shared(value) and (value.shape[0], len(here)) != (part.shape[0], part.local_shape[0]):
        raise DataError(
            f"the state of {name!r} is split over another number of processes; load it whole, as full_tensor() gives "
            "it, or through torch.distributed.checkpoint"
        )
    return here.detach().to(parameter.device).clone()


def _bits(pruner: Pruner, name: str, packed: Tensor) -> Tensor:
    shape = pruner.parts[name].shape if name in pruner.parts else tuple(pruner.tensor(name).shape)
    if packed.numel() != -(-int(np.prod(shape)) // 8) or packed.dtype != torch.uint8:
        raise DataError(f"the mask of {name!r} has {packed.numel()} bytes, expected one bit for each of {list(shape)}")
    device = local(pruner.tensor(name)).device
    if name not in pruner.parts or pruner.parts[name].group is None:
        return packed.to(device).clone()
    return pack(pruner.parts[name].slice(unpack(packed.cpu(), shape))).to(device)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
