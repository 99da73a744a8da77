"""Integrated gradients of the last token's state with respect to the response's token embeddings (arXiv 1703.01365).

    attribution_k(t) = (e_t - b) . mean over a in (0, 1) of d(w_k . h_last) / d e_t   at   b + a (e - b)

e are the embeddings of the response's tokens, b the baseline; the prompt is the same along the path, so its keys and
values are computed once where the model allows. Summed over tokens the attributions are w_k . h_last minus its value at
the baseline, up to the error of the quadrature (Gauss-Legendre).

The baseline is the embedding of a newline, not zero: normalisation layers divide by the length of a state, so near zero
the function changes as fast as the path is short, and no small number of steps finds the integral.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.progress import progress

STEPS = 16
# Layers of transformers' caches that hold keys and values alone; recurrent states are changed in place.
_ATTENTION_CACHES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
# How far, relative to its largest value, the last state may differ after a cached prompt: rounding only.
_CACHE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def attribute_last_state(
    backbone: Backbone, encoded: EncodedConversation, directions: torch.Tensor, *, steps: int = STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Attributions (t, k) of `directions @ last state` to the response's tokens, and their completeness errors (k,).

    Args:
        directions: (k, d).
    """
    start, device = backbone.response_start(encoded), backbone.device
    ids = torch.from_numpy(encoded.ids.astype(np.int64)).to(device)
    neutral = torch.tensor(backbone.tokenizer.encode("\n", add_special_tokens=False)[-1:], device=device)
    embed = backbone.model.get_input_embeddings()
    with torch.no_grad():
        before, end = embed(ids[None, :start]).detach(), embed(ids[None, start:]).detach()
        begin = embed(neutral[None]).detach().expand_as(end)
        last_state = _last_state(backbone, before, end)

    def readings(response: torch.Tensor) -> torch.Tensor:
        return directions @ last_state(response).float().to(directions.device)

    nodes, weights = np.polynomial.legendre.leggauss(steps)
    mean = torch.zeros((len(directions), *end.shape[1:]), dtype=torch.float64)
    with torch.enable_grad(), progress("gradients", steps * len(directions), "passes") as advance:
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            point = (begin + float(node) * (end - begin)).requires_grad_()
            read = readings(point)
            for k, value in enumerate(read):
                (slope,) = torch.autograd.grad(value, point, retain_graph=k + 1 < len(read))
                mean[k] += weight * slope[0].cpu().double()
                advance(1)
    attributed = torch.einsum("ktd,td->tk", mean, (end - begin)[0].cpu().double()).numpy()
    with torch.no_grad():
        change = (readings(end) - readings(begin)).cpu().double().numpy()
    return attributed, attributed.sum(0) - change


def _last_state(backbone: Backbone, before: torch.Tensor, end: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last token's state (d,) as a function of the response's embeddings (1, t, d).

    It continues from the prompt's keys and values if the model has such a cache, and if that gives the same state.
    """

    def whole(response: torch.Tensor) -> torch.Tensor:
        states = backbone.model(inputs_embeds=torch.cat([before, response], 1), use_cache=False).last_hidden_state
        return states[0, -1]

    if backbone.sharing_fault or not before.shape[1]:
        return whole
    cache = getattr(backbone.model(inputs_embeds=before, use_cache=True), "past_key_values", None)
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if not kinds or kinds - _ATTENTION_CACHES:
        return whole

    def continued(response: torch.Tensor) -> torch.Tensor:
        output = backbone.model(inputs_embeds=response, past_key_values=deepcopy(cache), use_cache=True)
        return output.last_hidden_state[0, -1]

    expected = whole(end)
    far = float((continued(end) - expected).abs().max() / expected.abs().max())
    return continued if far <= _CACHE_TOLERANCE.get(backbone.model.dtype, 5e-2) else whole
