"""transformers' causal language models with their loss but without their logits.

A model is known by its parts (a base model, a linear `lm_head`) and by a probe: its own forward,
with stand-ins for both parts, must give the loss that ours gives.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import inspect
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.linear import plain_linear
from trilith.kernels import linear_cross_entropy

_PROBE_DIM = 8
_IGNORED = -100
_OUTPUT = {"loss", "logits", "past_key_values", "hidden_states", "attentions", "cross_attentions"}


class FusedLossClass(type):
    """The type of the classes that `fused_loss_class` makes; they are pickled by what made them."""

    base: type[nn.Module]
    output: type


@functools.cache
def fused_loss_class(base: Any, output: Any) -> FusedLossClass:
    """A subclass of `base`, by its name, that in training makes the loss without the logits.

    Its forward takes one argument more: `logits=True` asks for the logits too, which then are made
    by the model's own forward, and so are they in eval, without labels, with `logits_to_keep`, and
    where the head must be called (LoRA, hooks, a sharded head).
    """
    own = base.forward
    order = [name for name in inspect.signature(own).parameters if name != "self"]
    fields = [field.name for field in dataclasses.fields(output)]  # which Dynamo cannot trace
    kept = [name for name in fields if name not in ("loss", "logits")]

    @functools.wraps(own)
    def forward(self: Any, *args: Any, logits: bool = False, **kwargs: Any) -> Any:
        by_position = dict(zip(order, args, strict=False))
        if logits or not (self.training and takes(self, by_position | kwargs)):
            return own(self, *args, **kwargs)
        loss, hidden = _loss_and_hidden(self, **by_position, **kwargs)
        others = {name: getattr(hidden, name, None) for name in kept}
        return output(loss=loss, logits=None, **others)

    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    made = FusedLossClass(base.__name__, (base,), {**names, "forward": forward})
    made.base, made.output = base, output
    return made


copyreg.pickle(FusedLossClass, lambda made: (fused_loss_class, (made.base, made.output)))  # type: ignore[arg-type, return-value]


def takes(model: Any, given: dict[str, Any]) -> bool:
    """Whether a call's loss can be made without its logits."""
    keep = given.get("logits_to_keep", 0)
    as_dict = given.get("return_dict", getattr(model.config, "return_dict", True))
    return (
        given.get("labels") is not None
        and as_dict is not False
        and isinstance(keep, int)
        and keep == 0
        and getattr(model.loss_function, "__name__", "") == "ForCausalLMLoss"
        and plain_linear(model.lm_head)
    )


def _loss_and_hidden(
    model: Any,
    *,
    labels: Tensor,
    logits_to_keep: int = 0,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    hidden = model._modules[model.base_model_prefix](**kwargs)
    ignored = kwargs.get("ignore_index", _IGNORED)
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=ignored)[..., 1:]
    items = kwargs.get("num_items_in_batch")
    x, head = hidden.last_hidden_state, model.lm_head
    loss = linear_cross_entropy(
        x,
        head.weight,
        targets.to(x.device),
        linear_bias=head.bias,
        ignore_index=ignored,
        softcap=getattr(model.config, "final_logit_softcapping", None),
        num_items=items.to(x.device) if isinstance(items, Tensor) else items,
        dtype=torch.promote_types(x.dtype, torch.float32),  # as transformers' own loss
    )
    return loss, hidden


def has_causal_parts(module: Any) -> bool:
    prefix = getattr(module, "base_model_prefix", None)
    parts = module._modules
    return bool(prefix) and prefix in parts and "lm_head" in parts and hasattr(module, "config")


def causal_lm(module: Any, cls: type[nn.Module]) -> Any:
    """The class for a model of class `cls` whose loss is ours; None where a probe finds another."""
    vocabulary = getattr(module.config, "vocab_size", None)
    if not isinstance(module.lm_head, nn.Linear) or not isinstance(vocabulary, int):
        return None
    try:
        with torch.no_grad(), torch.device("cpu"):
            return _agreeing(cls, _probe(module, vocabulary), _calls(cls, vocabulary))
    except Exception:  # another library's forward may raise anything
        return None


def _agreeing(cls: Any, probe: Any, calls: list[dict[str, Any]]) -> FusedLossClass | None:
    output: Any = type(cls.forward(probe, **calls[0]))
    if not {field.name for field in dataclasses.fields(output)} <= _OUTPUT:
        return None
    base = probe._modules[probe.base_model_prefix]
    for given in calls:
        theirs, was_given = cls.forward(probe, **given).loss, base.given
        ours, _ = _loss_and_hidden(probe, **given)
        if not torch.allclose(ours, theirs, rtol=1e-4) or base.given != was_given:
            return None
    return fused_loss_class(cls, output)


class _Base(nn.Module):
    """In the base model's place: hidden states that depend on nothing, as large as logits need.

    `given` are the tensors of its last call that belong to tokens.
    """

    given: set[int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        self.given = {id(v) for v in values if isinstance(v, Tensor) and v.ndim > 1}
        outputs = import_module("transformers.modeling_outputs")
        x = 4 * torch.sin(torch.arange(2.0 * 5 * _PROBE_DIM)).view(2, 5, _PROBE_DIM)
        return outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)


def _probe(module: Any, vocabulary: int) -> Any:
    probe = object.__new__(type(module))
    vars(probe).update(vars(module))
    head = nn.utils.skip_init(
        nn.Linear, _PROBE_DIM, vocabulary, bias=module.lm_head.bias is not None
    )
    for scale, parameter in enumerate(head.parameters(), start=1):
        steps = torch.arange(parameter.numel(), dtype=torch.float32)
        parameter.data = torch.cos(scale * steps).view(parameter.shape)
    vars(probe)["_modules"] = {module.base_model_prefix: _Base(), "lm_head": head}
    vars(probe)["training"] = True
    return probe


def _calls(cls: Any, vocabulary: int) -> list[dict[str, Any]]:
    """With what a forward may look at on its way: labels to ignore, padding, positions."""
    labels = (torch.arange(10) % vocabulary).view(2, 5)
    labels[1, 2] = _IGNORED
    plain = {"input_ids": labels.clamp(min=0), "labels": labels}
    positions = torch.arange(5).flip(0).expand(2, 5)
    padding = (torch.arange(10) > 2).long().view(2, 5)
    more = {"attention_mask": padding, "position_ids": positions}
    taken = inspect.signature(cls.forward).parameters
    laden = plain | {name: value for name, value in more.items() if name in taken}
    return [plain, {**plain, "num_items_in_batch": torch.tensor(17)}, laden]
