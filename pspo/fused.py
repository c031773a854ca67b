"""The layers of the Llama family, Qwen2 among them, with less work around their products than the library's.

A layer is one autograd function whose backward pass is written by hand. What is linear beside a product goes into its
weights first: a norm's weights and the scale of the attention; and a head's halves are interleaved, so that rotary
positions are products of complex numbers. Shape suffixes: M tokens of a batch end to end, N completion tokens, H hidden
size, D head width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pspo.layout import Plan
from pspo.model.batch import Batch

FAMILY = ("LlamaModel", "Qwen2Model")
ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on how long the text is


class Weights(NamedTuple):
    """Those of a layer's products, with what is linear beside them."""

    query: Tensor
    query_bias: Tensor | None
    pair: Tensor  # of keys and of values
    pair_bias: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


class Shape(NamedTuple):
    """Of the attention: key heads, query heads of each, their width; and the norms' ε."""

    keys: int
    groups: int
    width: int
    eps: float


def takes(decoder: Any) -> bool:
    """Whether a decoder is of the family, and plain: no adapters, no windows, angles whatever the length."""
    config = decoder.config
    linears = {name: module for name, module in decoder.named_modules() if name.endswith("_proj")}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return (
        type(decoder).__name__ in FAMILY
        and all(type(module) is torch.nn.Linear for module in linears.values())
        and all(
            module.bias is None for name, module in linears.items() if not name.endswith(("q_proj", "k_proj", "v_proj"))
        )
        and config.hidden_act == "silu"
        and rope in ROPE
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )


def trains(decoder: Any, autocast: bool, recomputes: bool = False) -> bool:
    """Whether its gradients are found here too: with grouped attention, without bfloat16 and recomputation."""
    return decoder.config._attn_implementation == "grouped" and not autocast and not recomputes and takes(decoder)


def shape_of(decoder: Any) -> Shape:
    """The shape of its layers."""
    attention, config = decoder.layers[0].self_attn, decoder.config
    return Shape(config.num_key_value_heads, attention.num_key_value_groups, attention.head_dim, config.rms_norm_eps)


def weights(layer: Any) -> Weights:
    """A layer's weights as its products need them, with gradient."""
    attention, mlp, width = layer.self_attn, layer.mlp, layer.self_attn.head_dim
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    biases: tuple[Tensor | None, Tensor | None] = None, None
    if query.bias is not None:
        pair_bias = torch.cat([_in_pairs(key.bias, width).flatten(), value.bias])
        biases = _in_pairs(query.bias, width).flatten() * attention.scaling, pair_bias
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    raw = query.weight, key.weight, value.weight, mlp.gate_proj.weight, mlp.up_proj.weight
    folded = _Folded.apply(attention.scaling, width, *norms, *raw)  # type: ignore[no-untyped-call]
    return Weights(folded[0], biases[0], folded[1], biases[1], attention.o_proj.weight, folded[2], mlp.down_proj.weight)


class _Folded(torch.autograd.Function):
    """The weights of queries, of keys and values, of gate and up, each times those of the norm before it."""

    @staticmethod
    def forward(
        ctx: Any, scaling: float, width: int, before: Tensor, after: Tensor, *raw: Tensor
    ) -> tuple[Tensor, ...]:
        query, key, value, gate, up = raw
        root, sizes = before.shape[0] ** 0.5, (len(query), len(key) + len(value), len(gate) + len(up))
        factors = [before * (root * scaling), before * root, before * root, after * root, after * root]
        folded = tuple(query.new_empty(size, before.shape[0]) for size in sizes)
        for (to, one), factor in zip(_alike(folded, raw, width), factors, strict=True):
            torch.mul(one, factor, out=to)
        ctx.save_for_backward(*raw, *factors)
        ctx.settings = scaling, width, root
        return folded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by_folded: Tensor) -> tuple[Tensor | None, ...]:
        (scaling, width, root), raw, factors = ctx.settings, ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        by_raw, by_factor = [torch.empty_like(one) for one in raw], []
        for (by, to), (_, one), factor in zip(
            _alike(by_folded, by_raw, width), _alike(by_folded, raw, width), factors, strict=True
        ):
            torch.mul(by, factor, out=to)
            by_factor.append((by * one).flatten(0, -2).sum(0))
        query, key, value, gate, up = by_factor
        by_before = query.mul_(scaling).add_(key).add_(value).mul_(root)
        return None, None, by_before, gate.add_(up).mul_(root), *by_raw


def _alike(folded: Sequence[Tensor], raw: Sequence[Tensor], width: int) -> list[tuple[Tensor, Tensor]]:
    """Views of what is folded, one for each raw weight and in the same shape as that."""
    (by_query, pair, gate_up), (query, key, value, gate, up) = folded, raw
    query, key = _in_pairs(query, width), _in_pairs(key, width)
    by_key, by_value = pair[: -len(value)].view(key.shape), pair[-len(value) :]
    by_gate, by_up = gate_up[: len(gate)], gate_up[len(gate) :]
    return [(by_query.view(query.shape), query), (by_key, key), (by_value, value), (by_gate, gate), (by_up, up)]


def _in_pairs(rows: Tensor, width: int) -> Tensor:
    """Rows of a weight or bias, from each head's two halves to pairs: a view (heads, D / 2, 2, ...)."""
    return rows.view(-1, 2, width // 2, *rows.shape[1:]).transpose(1, 2)


def angles(decoder: Any, like: Tensor, position: Tensor) -> Tensor:
    """Rotary positions as complex numbers, (..., 1, D / 2), for heads in pairs."""
    cos, sin = (table[0, ..., None, : table.shape[-1] // 2] for table in decoder.rotary_emb(like, position[None]))
    return torch.complex(cos, sin)


def turn(heads: Tensor, cis: Tensor, width: int) -> None:
    """Rotate (..., heads · D), in pairs, by ``angles``; in place."""
    torch.view_as_complex(heads.view(*heads.shape[:-1], -1, width // 2, 2)).mul_(cis)


def scale(norm: Any) -> Tensor:
    """What an RMSNorm multiplies with what ``normed`` gives: its weights, and √H for the mean in the root."""
    weight: Tensor = norm.weight * norm.weight.shape[0] ** 0.5
    return weight


def normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """An RMSNorm (Zhang and Sennrich 2019) but for ``scale``: x / √(Σ x² + H ε) over (..., H), and 1 / that root."""
    inverse = torch.linalg.vecdot(x, x)[..., None].add_(x.shape[-1] * eps).rsqrt_()
    return x * inverse, inverse


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product x @ weight + bias, and a row of zeros, where the places of blocks look that have no token."""
    y = x.new_empty(len(x) + 1, weight.shape[1])
    y[-1] = 0
    if bias is None:
        torch.mm(x, weight, out=y[:-1])
    else:
        torch.addmm(bias, x, weight, out=y[:-1])
    return y


def predicting_states(decoder: Any, batch: Batch) -> Tensor:
    """The last hidden states (N, H) at the positions that predict the completion tokens, row by row."""
    shape = shape_of(decoder)
    plan = Plan(batch, shape.keys, shape.groups, decoder.dtype)
    x_MH = decoder.embed_tokens(batch.input_ids_RS.flatten()[plan.tokens])
    cis = angles(decoder, x_MH, batch.position_RS.flatten()[plan.tokens])
    for layer in decoder.layers:
        wanted = plan.wanted if layer is decoder.layers[-1] else None
        x_MH = _Layer.apply(x_MH, cis, plan, wanted, shape, *weights(layer))  # type: ignore[no-untyped-call]
    hidden_NH: Tensor = normed(x_MH[plan.source], shape.eps)[0] * scale(decoder.norm)
    return hidden_NH


class _Layer(torch.autograd.Function):
    """x + attention(norm(x)), and that + feed-forward(norm of that); of all tokens, or of those that are wanted."""

    @staticmethod
    def forward(
        ctx: Any, x_MH: Tensor, cis: Tensor, plan: Plan, wanted: Tensor | None, shape: Shape, *given: Tensor
    ) -> Tensor:
        w, side = Weights(*given), plan.all_queries if wanted is None else plan.wanted_queries
        n, inverse = normed(x_MH, shape.eps)
        x_query, n_query, cis_query = (t if wanted is None else t[wanted] for t in (x_MH, n, cis))
        query, pair = product(n_query, w.query.T, w.query_bias), product(n, w.pair.T, w.pair_bias)
        turn(query[:-1], cis_query, shape.width)
        turn(pair[:-1, : shape.keys * shape.width], cis, shape.width)
        q, kv = side.blocks.take(query, shape.width), plan.take_pair(pair, shape.width)
        found, softmaxes = torch.empty_like(q), []
        for mask, block, key_block in zip(side.masks, side.blocks, plan.keys, strict=True):
            query_block, (key, value) = block(q), (key_block(half) for half in kv.chunk(2))
            score = query_block @ key.transpose(1, 2)
            score.view(len(mask), shape.keys, shape.groups, *mask.shape[1:]).add_(mask[:, None, None])
            softmaxes.append(score.softmax(-1))
            torch.bmm(softmaxes[-1], value, out=block(found))
        found = side.blocks.give(found)
        x_after = torch.addmm(x_query, found, w.out.T)
        n_after, inverse_after = normed(x_after, shape.eps)
        gate_up = n_after @ w.gate_up.T
        gate, up = gate_up.chunk(2, -1)
        active = F.silu(gate)
        y = torch.addmm(x_after, active * up, w.down.T)
        ctx.save_for_backward(
            cis, wanted, *given, n, inverse, q, kv, found, n_after, inverse_after, gate_up, active, *softmaxes
        )  # fmt: skip
        ctx.rest = plan, shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, ...]:
        plan, shape = ctx.rest
        cis, wanted, *rest = ctx.saved_tensors
        w, (n, inverse, q, kv, found, n_after, inverse_after, gate_up, active, *softmaxes) = (
            Weights(*rest[:7]),
            rest[7:],
        )
        side = plan.all_queries if wanted is None else plan.wanted_queries
        # the feed-forward
        (gate, up), by_gate_up = gate_up.chunk(2, -1), torch.empty_like(gate_up)
        by_gate, by_up = by_gate_up.chunk(2, -1)
        by_inner = by_y @ w.down
        torch.mul(by_inner, active, out=by_up)
        torch.ops.aten.silu_backward.grad_input(by_inner.mul_(up), gate, grad_input=by_gate)
        by_down = by_y.T @ (active * up)
        by_after = _through_norm(by_gate_up @ w.gate_up, n_after, inverse_after).add_(by_y)
        # the attention
        by_found = side.blocks.take(product(by_after, w.out, None), shape.width)
        by_q, by_kv = torch.empty_like(q), torch.empty_like(kv)
        for seen, block, key_block in zip(softmaxes, side.blocks, plan.keys, strict=True):
            (key, value), (by_key, by_value) = ([key_block(half) for half in both.chunk(2)] for both in (kv, by_kv))
            torch.bmm(seen.transpose(1, 2), block(by_found), out=by_value)
            by_seen = block(by_found) @ value.transpose(1, 2)
            by_score = torch.ops.aten._softmax_backward_data(by_seen, seen, -1, seen.dtype)
            torch.bmm(by_score, key, out=block(by_q))
            torch.bmm(by_score.transpose(1, 2), block(q), out=by_key)
        by_query, by_pair = side.blocks.give(by_q), plan.give_pair(by_kv)
        cis = cis.conj().resolve_conj()
        turn(by_query, cis if wanted is None else cis[wanted], shape.width)
        turn(by_pair[:, : shape.keys * shape.width], cis, shape.width)
        # the norm before both, and what went past
        by_n = by_pair @ w.pair
        if wanted is None:
            by_x = _through_norm(by_n.addmm_(by_query, w.query), n, inverse).add_(by_after)
        else:
            by_x = _through_norm(by_n.index_add_(0, wanted, by_query @ w.query), n, inverse)
            by_x.index_add_(0, wanted, by_after)
        by_weights = Weights(
            by_query.T @ (n if wanted is None else n[wanted]),
            None if w.query_bias is None else by_query.sum(0),
            by_pair.T @ n,
            None if w.pair_bias is None else by_pair.sum(0),
            by_after.T @ found,
            by_gate_up.T @ n_after,
            by_down,
        )
        return by_x, None, None, None, None, *by_weights


def _through_norm(by_n: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    """∂x of n, inverse = normed(x): inverse (∂n − n Σ ∂n n), in place of ∂n."""
    return by_n.addcmul_(n, torch.linalg.vecdot(by_n, n)[:, None], value=-1).mul_(inverse)
