"""Attention of sequences that are spread over ranks: keys and values travel round a ring.

Each rank holds its run of the tokens. What its queries make of each run of keys is merged by the
runs' lse; while one run is attended to the next one is on its way. Under a causal mask the ranks at
the end attend to more than those at the beginning, and the ring waits for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from trilith.blocks.alibi import Alibi
from trilith.blocks.attention import SelfAttention
from trilith.blocks.positions import LearnedPosition, Rotary, SinusoidalPosition
from trilith.blocks.stochastic_depth import StochasticDepth
from trilith.kernels import attention, merge_attention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_POSITIONS = (LearnedPosition, Rotary, SinusoidalPosition)


def context_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Make a model take, on each rank of a mesh, that rank's run of every sequence.

    Rank r of P is called with tokens[:, r * T / P : (r + 1) * T / P] and with the targets of these.
    Its loss is the mean over its own tokens; gradients are averaged over the mesh as over ranks
    with other rows, by DDP or `fully_shard`. Where ranks have unequally many targets that count,
    `num_items` is what they count together, divided by P.

    Args:
        model: has `SelfAttention`s, and positions that are not Alibi; it is changed and returned.
            It does not generate text: its weights do, in a model that is not spread.
        mesh: of one dimension.

    Raises:
        NotImplementedError: the model has Alibi or StochasticDepth.
        ValueError: from the model, when the ranks' tokens together outgrow the positions' max_len.

    Example:
        >>> mesh = init_device_mesh("cuda", (4,))
        >>> model = DistributedDataParallel(context_parallel(model, mesh))
        >>> rank, ranks = mesh.get_local_rank(), mesh.size()
        >>> model(tokens.chunk(ranks, 1)[rank], targets.chunk(ranks, 1)[rank]).backward()
    """
    attentions = [m for m in model.modules() if isinstance(m, SelfAttention)]
    if any(isinstance(m.position, Alibi) for m in attentions):
        raise NotImplementedError("context_parallel: position must not be Alibi")
    if any(isinstance(m, StochasticDepth) for m in model.modules()):
        raise NotImplementedError(
            "context_parallel: the model must not have StochasticDepth: a sample's tokens are on "
            "several ranks, which would drop it each for itself"
        )
    if mesh.size() == 1:
        return model
    ring = Ring(mesh)
    for module in attentions:
        module.ring = ring
    places = [m for m in model.modules() if isinstance(m, _POSITIONS)]
    model.register_forward_pre_hook(_Offsets(places, mesh), with_kwargs=True)
    return model


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks, which follow one another.

    Args:
        q: (B, H, T, D), this rank's run of the queries; T is the same on all ranks.
        k, v: (B, Hkv, T, D) and (B, Hkv, T, Dv), this rank's run of the keys and values.
        mesh: of one dimension.
        causal: whether a query sees only its own and earlier positions of the whole sequence.
        scale: of the scores; None for 1 / sqrt(D).
        dropout_p: probability, of the attention weights.

    Returns:
        (B, H, T, Dv), differentiable; gradients of k and v come from all ranks.

    Raises:
        ValueError: as `attention`.

    Numerics: each run's result is rounded to q's dtype, their sum in fp32 once more.

    Source: Liu et al., "Ring attention with blockwise transformers for near-infinite context",
        2023.

    Example:
        >>> mesh = init_device_mesh("cuda", (4,))
        >>> out = context_parallel_attention(q, k, v, mesh, causal=True)
    """
    return Ring(mesh).attend(q, k, v, causal=causal, scale=scale, dropout_p=dropout_p)


class Ring:
    """The ranks of a mesh, each of which passes on what the one before it had."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, dropout_p: float, **options: Any
    ) -> Tensor:
        parts = []
        coming = torch.cat([k.reshape(-1), v.reshape(-1)])
        for step in range(self.ranks):
            here = coming
            if step < self.ranks - 1:
                coming = self._pass_on(here)
            owner = (self.rank - step) % self.ranks
            if causal and owner > self.rank:
                continue
            keys, values = here.split([k.numel(), v.numel()])
            seen = (q, keys.view(k.shape), values.view(v.shape))
            own = causal and owner == self.rank
            options |= {"causal": own, "dropout_p": dropout_p, "return_lse": True}
            parts.append(attention(*seen, **options))
        out, _ = merge_attention(*zip(*cast("list[tuple[Tensor, Tensor]]", parts), strict=True))
        # Backward passes keys' gradients round the ring: each rank's graph needs the last that came
        nothing = torch.zeros((), dtype=torch.bool, device=q.device)
        return out + torch.where(nothing, coming.sum(), 0).to(out.dtype)

    def _pass_on(self, tensor: Tensor) -> Tensor:
        """The tensor of the rank before, while this one's goes to the next; they are alike."""
        sent, received = [0] * self.ranks, [0] * self.ranks
        sent[(self.rank + 1) % self.ranks] = tensor.numel()
        received[(self.rank - 1) % self.ranks] = tensor.numel()
        return all_to_all_single_autograd(tensor, received, sent, self.group)


class _Offsets:
    """A forward hook: positions count from where this rank's run begins."""

    def __init__(self, places: list[Any], mesh: DeviceMesh) -> None:
        self.places = places
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = inputs[0] if inputs else named["tokens"]
        n, length = tokens.shape[:2]
        offsets = torch.full((n,), self.rank * length, device=tokens.device)
        for place in self.places:
            if self.ranks * length > place.max_len:
                raise ValueError(
                    f"{type(place).__name__}: a sequence must have at most max_len="
                    f"{place.max_len} tokens, got {self.ranks} ranks of {length}"
                )
            place.offsets = offsets
