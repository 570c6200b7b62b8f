"""Generating text: sampling one token after another, with a key-value cache.

Shapes: B batch, S sequence given now, T positions so far, C capacity, H heads, K head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clinometer.lm.decoding import Decoders
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError


class LanguageModel(Protocol):
    """What `generate` calls: `TransformerLM`, or anything called as it is.

    With the cache, `model(token_ids, caches, start, last_only=True)` gives the last position's logits,
    (B, 1, V); without, `model(token_ids)` gives all, (B, S, V).
    """

    @property
    def config(self) -> TransformerConfig: ...

    def __call__(self, token_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...


class LayerKeyValues:
    """One layer's keys and values, in buffers of (B, H, capacity, K) that are filled in place.

    The first append makes the buffers, so they have the dtype and device in which the model computes
    (bfloat16 under autocast, say). For inference: autograd would see its saved keys overwritten.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept: Tensor | None = None  # (2, B, H, C, K): keys, then values

    @property
    def k_BHCK(self) -> Tensor | None:
        return None if self._kept is None else self._kept[0]

    @property
    def v_BHCK(self) -> Tensor | None:
        return None if self._kept is None else self._kept[1]

    def append(self, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Store these after what is there; return views of all so far, (B, H, T, K) each.

        Raises `InputError` when they do not fit.
        """
        end = self.length + k_BHSK.shape[-2]
        if end > self.capacity:
            raise InputError("generate.cache_full", length=end, capacity=self.capacity)
        kept = self._kept
        if kept is None:
            kept = self._kept = k_BHSK.new_empty(2, *k_BHSK.shape[:-2], self.capacity, k_BHSK.shape[-1])
        kept[0, ..., self.length : end, :] = k_BHSK
        kept[1, ..., self.length : end, :] = v_BHSK
        self.length = end
        return kept[0, ..., :end, :], kept[1, ..., :end, :]

    def append_one(self, kv_B2HK: Tensor) -> tuple[Tensor, Tensor]:
        """`append` of one position's keys and values, side by side, after earlier ones and in their dtype."""
        if self._kept is None or self.length == self.capacity:
            raise InputError("generate.cache_full", length=self.length + 1, capacity=self.capacity)
        self._kept.select(3, self.length).copy_(kv_B2HK.transpose(0, 1))
        self.length += 1
        k_BHTK, v_BHTK = self._kept.narrow(3, 0, self.length).unbind(0)
        return k_BHTK, v_BHTK


class KeyValueCache(Sequence[LayerKeyValues]):
    """The keys and values of every layer: `model(token_ids, cache, cache.length)` continues where it ends."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self._layers = [LayerKeyValues(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self._layers[0].length

    def clear(self) -> None:
        """Forget every position; the buffers stay."""
        for layer in self._layers:
            layer.length = 0

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)


def fit_prompt(token_ids: Tensor, config: TransformerConfig) -> tuple[Tensor, int]:
    """The last context_length tokens of a prompt (..., S), and how many before them were dropped."""
    dropped = max(0, token_ids.shape[-1] - config.context_length)
    return token_ids[..., dropped:], dropped


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) with -inf for tokens outside the top k, then outside the nucleus of mass p.

        top_k: keep the k largest (and what equals the k-th)              Fan et al. 2018
        top_p: keep the fewest tokens whose probabilities reach p         Holtzman et al. 2020

    The nucleus is taken after top_k; the token that crosses p belongs to it. The same tokens, and bits,
    as transformers' TopKLogitsWarper and TopPLogitsWarper.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort(dim=-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[:, -1] = False  # the likeliest token stays under any rounding
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return logits


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id a row (B,) drawn from softmax(filter(logits / temperature)), logits (B, V).

    Temperature 0 takes the largest logit, the lowest id among equals. Raises `InputError` if a row's
    largest logit is not finite (-inf elsewhere is a token that cannot come).
    """
    largest, likeliest = _largest(logits)  # NaN counts as the largest, so B numbers tell of all
    peaks = largest.tolist()
    for row, peak in enumerate(peaks):
        if not math.isfinite(peak):
            raise InputError("generate.non_finite", value=peak, row=row)
    if temperature == 0:
        return likeliest
    scores = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    limits = torch.finfo(scores.dtype)
    temperature = max(temperature, limits.tiny)
    if max(map(abs, peaks)) / temperature > limits.max:
        scores = scores - scores.amax(-1, keepdim=True)  # the same distribution, overflowing only to -inf
    scores = scores / temperature
    ids = None
    if top_k is not None and top_k < scores.shape[-1]:
        values, ids = scores.topk(top_k, sorted=False)
        if int((scores >= values.amin(-1, keepdim=True)).sum()) > values.numel():
            ids = None  # more tokens equal the k-th than fit: the slow way keeps them all
        else:  # continue with k columns instead of V; by id, so that near equals keep their places
            ids, order = ids.sort(-1)
            scores, top_k = values.gather(-1, order), None
    drawn = _draw(filter_logits(scores, top_k, top_p).softmax(-1), generator)
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`logits.max(-1)`: the largest of each row (B,), NaN above all, and the lowest id that has it.

    By blocks of 128 and then inside one: torch finds a row's largest value faster than its place.
    """
    B, V = logits.shape
    whole = V // 128 * 128
    if B * V < 2**16 or logits.device.type != "cpu":
        largest, ids = logits.max(dim=-1)
        return largest, ids
    blocks = logits[:, :whole].unflatten(-1, (-1, 128))
    peaks = blocks.amax(-1)
    if whole < V:
        peaks = torch.cat((peaks, logits[:, whole:].amax(-1, keepdim=True)), dim=-1)
    first = peaks.argmax(-1, keepdim=True) * 128
    ids = first + torch.arange(128, device=logits.device)
    largest, place = logits.gather(-1, ids.clamp(max=V - 1)).max(dim=-1)
    return largest, first[:, 0] + place


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """The token (B, 1) in whose part of the stacked probabilities (B, V) a uniform number falls.

    One random number a row: torch.multinomial draws V, and takes 3 to 15 times as long (V = 10,000).
    """
    # float64, for the last of 50,000 small parts; Apple's GPU has none.
    dtype = torch.float32 if probabilities.device.type == "mps" else torch.float64
    borders = probabilities.cumsum(-1, dtype=dtype)
    total = borders[:, -1:]
    u = torch.rand(total.shape, dtype=dtype, device=total.device, generator=generator) * total
    # The product may round up to the total, past every token.
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(borders, u, right=True)


class Generation(Iterator[Tensor]):
    """The tokens `generate` makes, one (B,)-tensor a step, computed when it is requested."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        stop_id: int | None,
        cache: bool,
        sampling: dict[str, Any],
    ) -> None:
        self.dropped: int
        """Tokens at the prompt's beginning that did not fit into the context."""
        self.slides = 0
        """How often the context was full and its older half was forgotten."""
        self._model = model
        self._stop_id = stop_id
        self._sampling = sampling
        self._modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self._remaining = max_new_tokens
        prompt, self.dropped = fit_prompt(prompt, model.config)
        B, self._length = prompt.shape
        context = model.config.context_length
        self._window = prompt.new_zeros(B, min(context, self._length + max_new_tokens))
        self._window[:, : self._length] = prompt
        self._stopped = torch.zeros(B, dtype=torch.bool, device=prompt.device)
        self._cache = KeyValueCache(model.config.num_layers, self._window.shape[1]) if cache else None
        self._decoders = Decoders(model, self._modules, B, self._window.shape[1])

    def __next__(self) -> Tensor:
        if self._remaining <= 0:
            raise StopIteration
        # Entered and left in every step: a mode held across a yield would leak into the caller's code.
        with torch.inference_mode(), _evaluating(self._modules):
            try:
                ids = sample(self._next_logits(), **self._sampling)
            except BaseException:
                if self._cache is not None:
                    self._cache.clear()  # it may be half filled, and a caller may continue after Ctrl-C
                raise
            self._remaining -= 1
            if self._stop_id is not None:
                ids = torch.where(self._stopped, self._stop_id, ids)
                self._stopped |= ids == self._stop_id
                if bool(self._stopped.all()):
                    self._remaining = 0
            if self._remaining:
                self._extend(ids)
        return ids.clone()  # a normal tensor: autograd rejects those of inference mode

    def _next_logits(self) -> Tensor:
        """The last position's logits, (B, V)."""
        if self._cache is None:
            return self._model(self._window[:, : self._length])[:, -1]
        start = self._cache.length
        if 0 < start == self._length - 1:
            decoder = self._decoders.now(self._remaining)
            if decoder is not None:
                return decoder(self._window[:, start], self._cache)
        new = self._window[:, start : self._length]
        return self._model(new, self._cache, start, last_only=True)[:, -1]

    def _extend(self, ids: Tensor) -> None:
        if self._length == self._window.shape[1]:
            # Rotary positions are absolute in the cached keys, so what is kept is read again from position 0.
            # Keeping half makes that rare: one more prefill every context/2 tokens.
            kept = max(1, self._length // 2) - 1
            self._window[:, :kept] = self._window[:, self._length - kept : self._length].clone()
            self._length = kept
            self.slides += 1
            if self._cache is not None:
                self._cache.clear()
        self._window[:, self._length] = ids
        self._length += 1


def generate(
    model: LanguageModel,
    token_ids: Tensor | Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
    cache: bool = True,
) -> Generation:
    """Continue a prompt, (S,) or (B, S): an iterator over steps, each the (B,) ids of the next tokens.

        p(next) = softmax(logits / temperature), restricted to top_k, then to top_p

    A row that made `stop_id` repeats it, and the iteration ends when all rows have. Of a prompt longer than
    the context the last part is kept (`.dropped` says how many tokens were not). When the context is full,
    the last half of it is kept and read again (`.slides` counts), with and without `cache` alike.

    Randomness comes from `generator`, or a new one with `seed`, or torch's own. The same seed gives the same
    tokens on the same machine. `cache` changes logits by rounding only (≤ 1e-5 in float32): greedy tokens
    differ only where two logits are closer than that, drawn ones only where the draw falls that close to
    the border between two tokens.

    Raises `InputError` for settings or ids out of range at once, for logits that are not finite when met.
    """
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    if seed is not None and generator is not None:
        raise InputError("generate.two_sources", seed=seed)
    V = model.config.vocab_size
    if stop_id is not None and not (_is_whole(stop_id) and 0 <= stop_id < V):
        raise InputError("generate.stop_id", value=stop_id, vocab_size=V, last=V - 1)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    prompt = torch.as_tensor(token_ids, device=None if parameter is None else parameter.device)
    prompt = _check_prompt(prompt, V)
    if seed is not None:
        generator = torch.Generator(prompt.device).manual_seed(seed)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    return Generation(model, prompt, max_new_tokens, stop_id=stop_id, cache=cache, sampling=sampling)


def _check_settings(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not _is_whole(max_new_tokens) or max_new_tokens < 0:
        raise InputError("generate.max_new_tokens", value=max_new_tokens)
    if not 0 <= temperature < math.inf:  # NaN too fails every comparison
        raise InputError("generate.temperature", value=temperature)
    if top_k is not None and (not _is_whole(top_k) or top_k < 1):
        raise InputError("generate.top_k", value=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError("generate.top_p", value=top_p)


def _check_prompt(prompt: Tensor, vocab_size: int) -> Tensor:
    """The prompt as (B, S), B and S at least 1."""
    if prompt.numel() == 0:
        raise InputError("generate.empty_prompt", shape=tuple(prompt.shape))
    if prompt.dim() not in (1, 2) or prompt.is_floating_point() or prompt.dtype == torch.bool:
        raise InputError("generate.prompt_kind", shape=tuple(prompt.shape), dtype=str(prompt.dtype))
    wrong = (prompt < 0) | (prompt >= vocab_size)
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise InputError(
            "model.id_range",
            value=int(prompt[index]),
            vocab_size=vocab_size,
            last=vocab_size - 1,
            index=list(index),
        )
    return prompt.long().reshape(-1, prompt.shape[-1])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Every module in eval mode inside; afterwards each in the mode it had."""
    training = [module for module in modules if module.training]
    # nn.Module's own __setattr__ looks through parameters and submodules: 0.5 ms a token on 54 modules.
    for module in training:
        module.__dict__["training"] = False
    try:
        yield
    finally:
        for module in training:
            module.__dict__["training"] = True
