"""Cutting tensors out of a model, and telling its modules their new sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

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
    for module in model.modules():
        changed: dict[str, Keep] = {}
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if id(tensor) in new:
                    changed[name] = old[id(tensor)]
                    tensors[name] = new[id(tensor)]  # type: ignore[assignment]
        if changed:
            for kind, refit in _REFIT:
                if isinstance(module, kind):
                    refit(module, changed)


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
    first, second = m.weight.shape[:2]
    m.out_channels, m.in_channels = first, second * m.groups
    if m.transposed:
        m.in_channels, m.out_channels = first, second * m.groups


def _linear(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.Linear)
    m.out_features, m.in_features = m.weight.shape


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
    m.num_embeddings, m.embedding_dim = m.weight.shape


def _prelu(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.PReLU)
    m.num_parameters = len(m.weight)


def _recurrent(m: nn.Module, changed: dict[str, Keep]) -> None:
    """``_flat_weights`` is what a recurrent layer really computes with."""
    assert isinstance(m, nn.RNNBase)
    m._flat_weights = [getattr(m, name) for name in m._flat_weights_names]
    w_ih, w_hh, w_hr = (getattr(m, f"weight_{kind}_l0", None) for kind in ("ih", "hh", "hr"))
    assert w_ih is not None and w_hh is not None
    m.input_size, m.hidden_size = w_ih.shape[1], w_hh.shape[1]
    if w_hr is not None:  # an LSTM whose state is a projection of its hidden units
        m.proj_size, m.hidden_size = w_hr.shape


def _cell(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.modules.rnn.RNNCellBase)
    m.input_size, m.hidden_size = m.weight_ih.shape[1], m.weight_hh.shape[1]


def _bilinear(m: nn.Module, changed: dict[str, Keep]) -> None:
    assert isinstance(m, nn.Bilinear)
    m.out_features, m.in1_features, m.in2_features = m.weight.shape


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
)
