"""What one request gets of a model: a pipeline that knows its device, and autoencoders of its own.

An autoencoder is called by `decode`, may keep state on itself and may be cast in mid-request, so each request has its
own tree of the autoencoder's modules; only the bytes of its params are shared.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from services.sampler.engine import Engine
from services.sampler.gates import Absent, Gate


def view_class(pipeline_class: type, device: torch.device) -> type:
    """The pipeline's class, told where it runs: it would look at params, which may be anywhere at the moment."""
    here = property(lambda self: device)
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": here, "device": here})


def unit_view(engine: Engine, gate: Gate, absent: Absent) -> Any:
    """A tree of the unit's modules for one request; its params have bytes only inside `decode` and `encode`.

    A cast of the tree (an upcasting pipeline) changes this request's params only, and is honoured when they are bound.
    """
    own = [nn.Parameter(absent.like(p.view), requires_grad=p.tensor.requires_grad) for p in gate.params]
    unit: Any = tree_copy(gate.module, {id(p.tensor): o for p, o in zip(gate.params, own, strict=True)})
    for name in ("decode", "encode"):
        if hasattr(unit, name):
            unit.__dict__[name] = bound_while(engine, gate, own, absent, getattr(unit, name))
    return unit


def bound_while(
    engine: Engine, gate: Gate, own: list[nn.Parameter], absent: Absent, call: Callable[..., object]
) -> Callable[..., object]:
    """`call`, stopped at the gate and with `own` bound to its bytes."""

    @functools.wraps(call)
    def gated(*args: object, **options: object) -> object:
        engine.arrive(gate)
        for param, bytes_ in zip(own, engine.transfer.views(gate), strict=True):
            param.data = bytes_.to(param.dtype)
        try:
            return call(*args, **options)
        finally:
            for param in own:
                param.data = absent.like(param.data)
            engine.leave(gate)

    return gated


def tree_copy(root: nn.Module, params: Mapping[int, nn.Parameter]) -> nn.Module:
    """The same modules again, with dictionaries and lists of their own; params by the id of those that they replace.

    Buffers and what cannot be changed in place are shared. `copy.deepcopy` does the same in several times the time,
    while everybody waits for the baton.
    """
    others = dict(params)  # what lies outside the arena has bytes of its own, and a cast must not change the shared one
    copies: dict[int, nn.Module] = {id(module): object.__new__(type(module)) for module in root.modules()}

    def own(value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in copies:
            return copies[id(value)]
        if isinstance(value, types.MethodType) and id(value.__self__) in copies:
            return types.MethodType(value.__func__, copies[id(value.__self__)])
        if type(value) in (dict, OrderedDict):
            return type(value)((key, own(item)) for key, item in value.items()) if value else type(value)()
        if type(value) in (list, tuple, set):
            return type(value)(own(item) for item in value)
        if isinstance(value, nn.Parameter) and id(value) not in others:
            others[id(value)] = nn.Parameter(value.data, requires_grad=value.requires_grad)
        return others.get(id(value), value)

    for module in root.modules():
        copies[id(module)].__dict__.update({name: own(value) for name, value in module.__dict__.items()})
    return copies[id(root)]
