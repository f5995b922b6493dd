"""Cutting tensors out of a model, and telling its modules their new sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Keep = Mapping[int, Tensor]  # dimension -> bool per index


def resize_(model: nn.Module, slices: Mapping[str, Keep]) -> None:
    """Slice parameters and buffers by name, in place; ties, dtype, device and ``requires_grad`` stay.

    slices: tensor name -> dimension -> bool per index, True stays. The sizes that torch's own modules remember
    (``out_channels``, ``groups``, ``normalized_shape`` …) follow their tensors.
    """
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    new = {id(named[name]): _cut(named[name], keep) for name, keep in slices.items()}
    old = {id(named[name]): keep for name, keep in slices.items()}
    changed: dict[nn.Module, dict[str, Keep]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if id(tensor) in new:
                    changed.setdefault(module, {})[name] = old[id(tensor)]
                    tensors[name] = new[id(tensor)]  # type: ignore[assignment]
    for module in model.modules():
        if here := {**_derived(module, changed), **changed.get(module, {})}:
            for kind, refit in _REFIT:
                if isinstance(module, kind):
                    refit(module, here)


def _derived(module: nn.Module, changed: Mapping[nn.Module, Mapping[str, Keep]]) -> dict[str, Keep]:
    """What stays of tensors that a module computes from others, as parametrizations and ``weight_norm`` do."""
    found: dict[str, Keep] = {}
    if is_parametrized(module):
        lists = module.parametrizations.items()  # type: ignore[union-attr, operator]
        sources = {name: list(changed.get(originals, {}).values()) for name, originals in lists}
    else:
        own = changed.get(module, {})
        sources = {"weight": [own[n] for n in ("weight_g", "weight_v", "weight_orig") if n in own]}
    for name, keeps in sources.items():
        if keeps:
            found[name] = {dim: flags for keep in keeps for dim, flags in keep.items()}
    return found


def _weight(m: nn.Module) -> Any:
    """The weight; where a hook of the older ``weight_norm`` or ``spectral_norm`` makes it, what it is made from."""
    own = (m._parameters.get(name) for name in ("weight", "weight_v", "weight_orig"))
    return next((w for w in own if w is not None), m.weight)


def _cut(tensor: Tensor, keep: Keep) -> Tensor:
    value = tensor.detach()
    for dim, flags in keep.items():
        value = value.index_select(dim, flags.nonzero()[:, 0].to(value.device))
    value = value.contiguous() if keep else value.clone()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _groups_left(keep: Tensor, groups: int) -> int:
    """Groups that still have a channel: flags of all channels, laid out group by group."""
    return int(keep.reshape(groups, -1).any(1).sum())


def _conv(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.modules.conv._ConvNd)
    keep = changed.get("weight", {})
    if 0 in keep and m.groups > 1:
        m.groups = _groups_left(keep[0], m.groups)
    first, second = _weight(m).shape[:2]
    m.out_channels, m.in_channels = first, second * m.groups
    if m.transposed:
        m.in_channels, m.out_channels = first, second * m.groups


def _linear(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.Linear)
    m.out_features, m.in_features = _weight(m).shape


def _batch_norm(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, (nn.modules.batchnorm._NormBase,))
    tensor = m.weight if m.weight is not None else m.running_mean
    if tensor is not None:
        m.num_features = len(tensor)


def _layer_norm(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, (nn.LayerNorm, nn.RMSNorm))
    m.normalized_shape = tuple(m.weight.shape)


def _group_norm(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.GroupNorm)
    keep = changed.get("weight", {})
    if 0 in keep:
        m.num_groups = _groups_left(keep[0], m.num_groups)
        m.num_channels = len(m.weight)


def _embedding(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    m.num_embeddings, m.embedding_dim = _weight(m).shape


def _prelu(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.PReLU)
    m.num_parameters = len(m.weight)


def _recurrent(m: nn.Module, changed: dict[str, Keep]) -> None:
    """``_flat_weights`` is what a recurrent layer really computes with."""
    assert isinstance(m, nn.RNNBase)
    m._flat_weights = [getattr(m, name) for name in m._flat_weights_names]
    w_ih, w_hh, w_hr = (getattr(m, f"weight_{kind}_l0", None) for kind in ("ih", "hh", "hr"))
    assert w_ih is not None
    assert w_hh is not None
    m.input_size, m.hidden_size = w_ih.shape[1], w_hh.shape[1]
    if w_hr is not None:  # an LSTM whose state is a projection of its hidden units
        m.proj_size, m.hidden_size = w_hr.shape


def _cell(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.modules.rnn.RNNCellBase)
    m.input_size, m.hidden_size = m.weight_ih.shape[1], m.weight_hh.shape[1]


def _bilinear(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.Bilinear)
    m.out_features, m.in1_features, m.in2_features = m.weight.shape


def _multihead(m: nn.Module, changed: dict[str, Keep]) -> None:
    """Its code takes heads x width for the width of the input; where those differ now, it fails."""
    assert isinstance(m, nn.MultiheadAttention)
    fused = m.in_proj_weight is not None
    rows = changed.get("in_proj_weight" if fused else "q_proj_weight", {}).get(0)
    if rows is not None:
        m.num_heads = _groups_left(rows[: m.num_heads * m.head_dim], m.num_heads)
    m.embed_dim = (m.in_proj_weight if fused else m.q_proj_weight).shape[1]
    m.head_dim = m.out_proj.weight.shape[1] // m.num_heads
    m.kdim, m.vdim = (m.embed_dim, m.embed_dim) if fused else (m.k_proj_weight.shape[1], m.v_proj_weight.shape[1])


_REFIT: tuple[
    tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[nn.Module, dict[str, Keep]], None]], ...
] = (
    (nn.modules.conv._ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.modules.rnn.RNNCellBase, _cell),
    (nn.Bilinear, _bilinear),
    (nn.MultiheadAttention, _multihead),
)
