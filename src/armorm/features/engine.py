"""The engine: conversations through the backbone, by the fastest way that gives the right features.

In:  a backbone, conversations in lexicographic order, a budget of tokens.
Out: their prompt and response features, in order.

Two ways. `tree`: one stream of tokens a forward pass, every shared prefix once (backbone/prefix_forward.py). `plain`:
batches of similar length, padded on the right. The tree is chosen where the model passes the test on a sample of
this very work; where it does not, the reason is printed and the run is plain. Streams of the coming batch are laid
out while the model computes the present one. Where memory does not suffice, the budget halves and the run goes on;
a conversation for which it does not suffice alone is an error that says so.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, is_out_of_memory, length_sorted_batches
from armorm.backbone.prefix_forward import SharedForward, can_compile, flops_per_token, sample, why_not_shared
from armorm.backbone.prefix_tree import PrefixTree, build_tree, shared_with_previous, tree_batches
from armorm.errors import BackboneError
from armorm.progress import Advance, say

# Work below this many tokens is not worth a test of the backbone; it runs plain until some other work has brought one.
TESTED_TOKENS = 16_384
# Compiling layers takes half a minute and saves about a tenth: it pays from some minutes of work on, at the 1e11
# operations a second of a small processor.
COMPILED_OPERATIONS = 6e13
LEAST_BUDGET = 32
# Rows, what goes through the backbone, and tokens that count for progress.
_Pass = tuple[np.ndarray, "PrefixTree | list[EncodedConversation]", int]


@dataclass
class Engine:
    """A way to compute features.

    Args:
        budget: most tokens of a forward pass: of a tree, or of a plain batch with its padding.
        mechanism: `tree` or `plain`.
        compiled: layers are compiled for streams of exactly `budget` tokens.

    Attributes:
        halvings: how often the budget was halved for want of memory.
    """

    backbone: Backbone
    budget: int
    mechanism: str = "plain"
    compiled: bool = False
    halvings: int = 0
    _shared: SharedForward | None = field(default=None, init=False, repr=False)

    def settings(self) -> dict[str, Any]:
        """What decides the bytes of the features beside the backbone itself."""
        return {"mechanism": self.mechanism, "compiled": self.compiled, "budget": self.budget}

    def features(self, encoded: Sequence[EncodedConversation], advance: Advance) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response features (n, d) float32 of n conversations in lexicographic order.

        Args:
            advance: called with the tokens of each pass, padding left out.

        Raises:
            BackboneError: for a conversation that does not fit into memory even alone.
        """
        prompt = np.empty((len(encoded), self.backbone.hidden_size), np.float32)
        response = np.empty_like(prompt)
        todo = np.arange(len(encoded))
        while len(todo):
            todo = self._run(encoded, todo, prompt, response, advance)
        return prompt, response

    def _run(
        self,
        encoded: Sequence[EncodedConversation],
        todo: np.ndarray,
        prompt: np.ndarray,
        response: np.ndarray,
        advance: Advance,
    ) -> np.ndarray:
        """Compute rows until done or out of memory; the rows that are left."""
        passes = self._trees(encoded, todo) if self.mechanism == "tree" else self._batches(encoded, todo)
        left = set(todo.tolist())
        for rows, work, tokens in passes:
            try:
                prompt[rows], response[rows] = self._forward(work)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(rows) == 1 or self.budget // 2 < LEAST_BUDGET:
                    raise BackboneError(
                        f"out of memory on {len(rows)} conversation{'s' * (len(rows) > 1)} of "
                        f"{max(len(encoded[i]) for i in rows)} tokens; expected a smaller max_length or more memory"
                    ) from None
            else:
                left.difference_update(rows.tolist())
                advance(tokens)
                continue
            # (Outside of the handler, which would keep the tensors of the failed pass alive.)
            passes.close()
            self._halve()
            break
        return np.array(sorted(left), np.int64)

    def _halve(self) -> None:
        self.budget //= 2
        self.halvings += 1
        self.compiled, self._shared = False, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory: the budget is halved to {self.budget:,} tokens and the run goes on")

    def _forward(self, work: PrefixTree | list[EncodedConversation]) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(work, PrefixTree):
            if self._shared is None:
                self._shared = SharedForward(self.backbone, self.compiled, self.budget)
            return self._shared.features(work)
        return self.backbone.features(work)

    def _batches(self, encoded: Sequence[EncodedConversation], todo: np.ndarray) -> Generator[_Pass, None, None]:
        lengths = np.array([len(encoded[i]) for i in todo], np.int64)
        for places in length_sorted_batches(lengths, self.budget):
            yield todo[places], [encoded[i] for i in todo[places]], int(lengths[places].sum())

    def _trees(self, encoded: Sequence[EncodedConversation], todo: np.ndarray) -> Generator[_Pass, None, None]:
        sequences = [encoded[i].ids for i in todo]
        shared = shared_with_previous(sequences)
        lengths = np.array([len(ids) for ids in sequences], np.int64)
        batches = tree_batches(lengths, shared, self.budget)

        def lay_out(start: int, stop: int) -> PrefixTree:
            gates = [encoded[i].gate_position for i in todo[start:stop]]
            return build_tree(sequences[start:stop], gates, shared[start:stop].tolist())

        with ThreadPoolExecutor(1) as pool:
            coming: Future[PrefixTree] | None = pool.submit(lay_out, *batches[0]) if batches else None
            for number, (start, stop) in enumerate(batches):
                assert coming is not None
                tree = coming.result()
                coming = pool.submit(lay_out, *batches[number + 1]) if number + 1 < len(batches) else None
                yield todo[start:stop], tree, len(tree)


def choose_engine(
    backbone: Backbone,
    encoded: Sequence[EncodedConversation],
    shared: np.ndarray,
    budget: int,
    *,
    sharing: bool | None = None,
    compiled: bool | None = None,
) -> Engine:
    """The engine for a piece of work.

    Args:
        encoded: the work, in lexicographic order.
        shared: (n,) ids each has in common with the one before.
        sharing: whether beginnings are shared; by default where that is exact for this model and pays.
        compiled: whether layers are compiled; by default where that pays.
    """
    lengths = np.array([len(conversation) for conversation in encoded], np.int64)
    asked, computed = int(lengths.sum()), int((lengths - shared).sum())
    if sharing is False or len(encoded) < 2:
        return Engine(backbone, budget)
    small = computed < TESTED_TOKENS and not sharing
    if small and (backbone.sharing_fault is None or computed > 0.8 * asked):
        return Engine(backbone, budget)
    if not _can_share(backbone, encoded, shared):
        return Engine(backbone, budget)
    if compiled is None:
        operations = computed * flops_per_token(backbone.model)
        compiled = backbone.device.type == "cpu" and operations > COMPILED_OPERATIONS
    return Engine(backbone, budget, "tree", bool(compiled) and can_compile(backbone.device))


def resumed_engine(backbone: Backbone, settings: dict[str, Any], encoded: Sequence[EncodedConversation]) -> Engine:
    """The engine that a stored plan was begun with, if the backbone can still be trusted with it.

    Args:
        encoded: some of the work, in lexicographic order, to test the backbone on.
    """
    engine = Engine(backbone, **settings)
    engine.compiled = engine.compiled and can_compile(backbone.device)
    if engine.mechanism == "tree" and len(encoded) > 1:
        shared = shared_with_previous([conversation.ids for conversation in encoded])
        if not _can_share(backbone, encoded, shared):
            engine.mechanism = "plain"
    return engine


def _can_share(backbone: Backbone, encoded: Sequence[EncodedConversation], shared: np.ndarray) -> bool:
    """Whether the backbone passed the test, which is made once, on a sample of this work."""
    if backbone.sharing_fault is None:
        window = getattr(backbone.model.config.get_text_config(), "sliding_window", None)
        rows = sample(encoded, shared, window)
        backbone.sharing_fault = why_not_shared(backbone, [encoded[i] for i in rows])
        if backbone.sharing_fault:
            say(f"{backbone.name}: beginnings are not shared: {backbone.sharing_fault}; plain batches instead")
    return not backbone.sharing_fault
