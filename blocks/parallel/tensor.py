"""Plans for `parallelize_module`: which layer is split how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from trilith.blocks.alibi import Alibi
from trilith.blocks.attention import SelfAttention
from trilith.blocks.mlp import MLP, GatedMLP
from trilith.blocks.norms import LayerNorm, RMSNorm
from trilith.blocks.parallel.heads import Heads, PackedColumns
from trilith.blocks.parallel.seeds import RankSeeds
from trilith.blocks.parallel.vocab import VocabParallel
from trilith.blocks.positions import LearnedPosition, SinusoidalPosition
from trilith.blocks.residual import Residual
from trilith.blocks.stochastic_depth import StochasticDepth
from trilith.blocks.transformer import TransformerBlock, TransformerLM

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

_TOKENS = 1  # the dimension of (B, T, dim) that sequence parallelism splits
_WHOLE = (LayerNorm, RMSNorm, nn.LayerNorm, nn.RMSNorm, LearnedPosition, SinusoidalPosition)
_CONTAINERS = (TransformerBlock, Residual, nn.ModuleList, nn.Identity)


def tensor_parallel_plan(
    model: TransformerLM, *, sequence_parallel: bool = False
) -> dict[str, ParallelStyle]:
    """The plan by which `parallelize_module` splits a `TransformerLM` over a mesh.

    Attention is split by heads, an MLP by hidden units, the embedding and the head by the
    vocabulary; norms and positions are on all ranks. The model is then called with the same tokens
    on all ranks of the mesh, gives the loss of one process on each, and its logits where they are
    asked for; the loss gathers no logits. All parameters become DTensors of the one process's
    shapes and order. Ranks start from the same `torch.manual_seed`.

    Args:
        model: of `build_lm`'s modules: norms LayerNorm or RMSNorm, MLP or GatedMLP, SelfAttention
            with n_heads and n_kv_heads that the mesh divides, any of the positions but Alibi.
        sequence_parallel: between attention and MLPs a rank holds its share of the tokens only,
            which the mesh must divide. Less memory, for the same communication. The model does not
            generate text: its weights do, without.

    Returns:
        Module names and their styles, of one mesh dimension.

    Raises:
        NotImplementedError: a module with parameters that no style here splits, Alibi, or, with
            sequence_parallel, StochasticDepth.
        ValueError: from `parallelize_module`, heads that the mesh does not divide.

    Source: Shoeybi et al., "Megatron-LM", 2019; Korthikanti et al., "Reducing activation
        recomputation in large transformer models", 2022.

    Example:
        >>> mesh = init_device_mesh("cuda", (8,))
        >>> parallelize_module(model, mesh, tensor_parallel_plan(model))
        >>> model(tokens, targets).backward()
    """
    between: Placement = Shard(_TOKENS) if sequence_parallel else Replicate()
    plan: dict[str, ParallelStyle] = {"": _Root(between)}
    known: set[nn.Module] = {model}
    for name, module in model.named_modules():
        _require_splittable(name, module, sequence_parallel)
        styles = _styles(model, name, module, between)
        plan |= {f"{name}.{part}" if part else name: style for part, style in styles.items()}
        known |= {module.get_submodule(part) for part in styles}
        covered = module in known or isinstance(module, _CONTAINERS)
        if not covered and any(True for _ in module.parameters(recurse=False)):
            raise NotImplementedError(
                f"tensor_parallel_plan: {name} must be one of trilith.blocks's modules, got "
                f"{type(module).__name__}; write a plan of your own for it"
            )
    return plan


def _require_splittable(name: str, module: nn.Module, sequence_parallel: bool) -> None:
    if isinstance(module, Alibi):
        raise NotImplementedError(
            f"tensor_parallel_plan: {name} must not be Alibi, whose slopes are those of all heads"
        )
    if sequence_parallel and isinstance(module, StochasticDepth):
        raise NotImplementedError(
            f"tensor_parallel_plan: {name} must not be StochasticDepth with sequence_parallel: a "
            "sample's tokens are on several ranks, which would drop it each for itself"
        )


def _styles(
    model: TransformerLM, name: str, module: nn.Module, between: Placement
) -> dict[str, ParallelStyle]:
    """Styles of the module and of parts of it, by the parts' names in it."""
    apart = between == Replicate()  # else all of the model runs under seeds of the rank
    if module is model.embedding:
        return {"": RowwiseParallel(input_layouts=Replicate(), output_layouts=between)}
    if module is model.head and isinstance(module, nn.Linear):
        return {"": _Rows()}
    if isinstance(module, _WHOLE):
        return {"": _OnAllRanks(between)}
    if isinstance(module, SelfAttention):
        packed = PackedColumns(module.heads, input_layouts=between)
        rows = RowwiseParallel(output_layouts=between)
        return _linear(module, {"qkv": packed, "out": rows}) | {"": Heads(name, apart)}
    if isinstance(module, (MLP, GatedMLP)):
        first = ["up"] if isinstance(module, MLP) else ["gate", "up"]
        styles: dict[str, ParallelStyle] = {"down": RowwiseParallel(output_layouts=between)}
        styles |= {part: ColwiseParallel(input_layouts=between) for part in first}
        return _linear(module, styles) | {"": _Hidden(apart)}
    return {}


def _linear(module: nn.Module, styles: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """Styles of those parts that are linear layers; others are found wanting by themselves."""
    return {p: s for p, s in styles.items() if isinstance(module.get_submodule(p), nn.Linear)}


class _Root(ParallelStyle):
    """The model itself: its head reads shards, and its dropout knows what is split."""

    def __init__(self, between: Placement) -> None:
        self.between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, TransformerLM)
        module.projection = VocabParallel(device_mesh, self.between)
        if self.between != Replicate():
            divisible = _RequireDivisible(device_mesh.size())
            module.register_forward_pre_hook(divisible, with_kwargs=True)
            RankSeeds(device_mesh).attach(module)
        return module


class _RequireDivisible:
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = inputs[0] if inputs else named["tokens"]
        if tokens.shape[_TOKENS] % self.ranks:
            raise ValueError(
                f"sequence parallel: tokens must be (B, T) with T divisible by the {self.ranks} "
                f"ranks of the mesh, got {tuple(tokens.shape)}"
            )


class _Hidden(ParallelStyle):
    """An MLP each rank of which has its share of the hidden units."""

    def __init__(self, seeds_apart: bool) -> None:
        self.seeds_apart = seeds_apart

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.seeds_apart:
            RankSeeds(device_mesh).attach(module)
        return module


class _Rows(ParallelStyle):
    """Parameters split in dimension 0, to be read by who knows; nothing happens in a call."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            split = distribute_tensor(
                parameter, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank
            )
            own = nn.Parameter(split, requires_grad=parameter.requires_grad)
            module.register_parameter(name, own)
        return module


class _OnAllRanks(ParallelStyle):
    """Parameters on all ranks; activations are placed as the layout says, before and after."""

    def __init__(self, layout: Placement) -> None:
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def placed(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Tensor:
            return DTensor.from_local(inputs[0], mesh, [self.layout], run_check=False)

        def own(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        hooks: Any = (placed, own)
        return distribute_module(module, device_mesh, None, *hooks)
