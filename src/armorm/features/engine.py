"""Order conversations and run them through a backbone in the fastest way that gives the right features.

There are two mechanisms. `tree`: each forward pass is one stream of tokens in which every shared prefix is computed
once (`backbone/prefix_forward.py`). `plain`: right-padded batches of similar length. The tree is used where it is
faster, which depends on the work alone, if the model passes a test on a sample of the work; if it fails, the reason is
logged and batches are plain. The result of the test is remembered (`backbone/sharing_verdict.py`). The next stream is
laid out while the model computes the current one. On a CPU, passes are smaller than the token budget where that is
faster. If memory runs out, the budget is halved and the run continues; a conversation that does not fit alone is an
error.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, is_out_of_memory, length_sorted_batches, pass_tokens
from armorm.backbone.prefix_forward import SharedForward, can_compile, flops_per_token, sample, why_not_shared
from armorm.backbone.prefix_tree import PrefixTree, build_tree, lexicographic_order, shared_with_previous, tree_batches
from armorm.backbone.sharing_verdict import SharingVerdict, remember_verdict, remembered_verdict
from armorm.errors import BackboneError
from armorm.features.store import KEY
from armorm.features.token_table import TokenTable
from armorm.files import write_arrays
from armorm.progress import Advance, say

BATCH_TOKENS = 8192
SHARD_TOKENS = 400_000
# Trees pay if they save at least a fifth of the tokens, and so many; or, whatever they save, from so many tokens to
# compute: a stream has no padding, and computes less in the last layer. (On a GPU, streams are padded to the budget.)
LEAST_SAVING = 256
LARGE_TOKENS = {"cpu": 4096, "cuda": 16_384}
# On a CPU, activations of shorter streams stay in its cache; they pay unless prompts that they cut cost more than this.
_CPU_STREAM_TOKENS, _CUT_PROMPTS = (2048, 4096), 0.03
# Compiling layers takes half a minute and saves up to a tenth, so it pays for work of a few minutes at the 1e11
# operations per second of a small CPU.
COMPILED_OPERATIONS = 6e13
LEAST_BUDGET = 32
_PARTS = 4  # of the work in memory, for each of several devices: the slowest ends not much after the others
PART_SECONDS = 10.0  # work of a shard that is lost at most when a process is killed, and a forward pass
# Rows, the input of one forward pass, and the tokens that count for progress.
_Pass = tuple[np.ndarray, "PrefixTree | list[EncodedConversation]", int]


@dataclass(frozen=True)
class ExtractionPlan:
    """The order in which conversations are computed."""

    rows: np.ndarray  # (m,) indices of the conversations, in lexicographic order of their ids
    lengths: np.ndarray  # (m,) tokens of each
    shared: np.ndarray  # (m,) ids each has in common with the previous one
    new_prompt: np.ndarray  # (m,) bool, whether its prompt is another than the previous one's
    bounds: list[int]  # end of each shard in `rows`

    def parts(self, devices: int, budget: int) -> list[slice]:
        """The rows in parts for some devices, of at least one forward pass of `budget` tokens; prompts stay whole."""
        if devices == 1 or not len(self.rows):
            return [slice(0, len(self.rows))]
        tokens = self.lengths - self.shared
        least = max(budget, int(tokens.sum()) // (_PARTS * devices))
        ends, total = list[int](), 0
        for row in range(1, len(self.rows)):
            total += int(tokens[row - 1])
            if total >= least and self.new_prompt[row]:
                ends.append(row)
                total = 0
        return [slice(start, end) for start, end in zip([0, *ends], [*ends, len(self.rows)], strict=True)]

    def computed(self, mechanism: str, budget: int) -> np.ndarray:
        """Tokens (m,) to compute of each conversation, without padding; every forward pass shares within itself."""
        computed = self.lengths.copy()
        if mechanism == "tree":
            for start, end in zip([0, *self.bounds[:-1]], self.bounds, strict=True):
                for first, last in tree_batches(self.lengths[start:end], self.shared[start:end], budget):
                    computed[start + first + 1 : start + last] -= self.shared[start + first + 1 : start + last]
        return computed


def plan_extraction(encoded: Sequence[EncodedConversation], rows: Sequence[int] | np.ndarray) -> ExtractionPlan:
    """Order distinct conversations and cut them into shards of about `SHARD_TOKENS` tokens to compute.

    A shard ends between two prompts, unless one prompt alone would fill two shards.
    """
    order = np.asarray(rows, np.int64)
    order = order[lexicographic_order(_Ids(encoded, order))]
    lengths = np.array([len(encoded[i]) for i in order], np.int64)
    shared = shared_with_previous(_Ids(encoded, order))
    new_prompt = shared <= np.array([encoded[i].gate_position for i in order], np.int64)
    bounds: list[int] = []
    total = 0
    for row, tokens in enumerate((lengths - shared).tolist()):
        full = total >= SHARD_TOKENS and new_prompt[row]
        if row and (full or total >= 2 * SHARD_TOKENS):
            bounds.append(row)
            total = 0
        total += tokens
    return ExtractionPlan(order, lengths, shared, new_prompt, [*bounds, len(order)] if len(order) else [])


class Rows(Sequence[Any]):
    """Some conversations of a sequence that may be on disk; each is read when it is used."""

    def __init__(self, encoded: Sequence[EncodedConversation], rows: np.ndarray) -> None:
        self.encoded, self.rows = encoded, rows  # (n,) positions in the sequence

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.encoded[int(self.rows[place])]


class _Ids(Rows):
    """Their token ids."""

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(place).ids


def keys_of(encoded: Sequence[EncodedConversation]) -> np.ndarray:
    """Keys (n,) of the response features."""
    return encoded.keys if isinstance(encoded, TokenTable) else np.array([c.key for c in encoded], KEY)


def prompt_keys_of(encoded: Sequence[EncodedConversation]) -> np.ndarray:
    """Keys (n,) of the prompt features."""
    return encoded.prompt_keys if isinstance(encoded, TokenTable) else np.array([c.prompt_key for c in encoded], KEY)


def lengths_of(encoded: Sequence[EncodedConversation]) -> np.ndarray:
    """Tokens (n,) of each conversation."""
    return encoded.lengths if isinstance(encoded, TokenTable) else np.array([len(c) for c in encoded], np.int64)


@dataclass
class _State:
    """How far the features of some conversations are computed."""

    prompt: np.ndarray  # (n, d) float32
    response: np.ndarray  # (n, ...) float32
    todo: np.ndarray  # rows from which passes are made
    done: np.ndarray  # (n,) bool

    def write(self, path: Path, settings: Mapping[str, Any]) -> None:
        rows = np.flatnonzero(self.done)
        arrays = {"rows": rows, "prompt": self.prompt[rows], "response": self.response[rows]}
        digest = blake2b(arrays["prompt"].tobytes() + arrays["response"].tobytes(), digest_size=16).hexdigest()
        write_arrays(path, arrays, {"settings": json.dumps(settings, sort_keys=True), "digest": digest})

    def read(self, path: Path, settings: Mapping[str, Any]) -> bool:
        """Take over what a file holds of an engine with the same settings; False if there is none, or it is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in ("rows", "prompt", "response")}
        except (OSError, SafetensorError):
            return False
        digest = blake2b(arrays["prompt"].tobytes() + arrays["response"].tobytes(), digest_size=16).hexdigest()
        if metadata != {"settings": json.dumps(settings, sort_keys=True), "digest": digest}:
            return False
        rows = arrays["rows"]
        self.prompt[rows], self.response[rows], self.done[rows] = arrays["prompt"], arrays["response"], True
        return True


@dataclass
class Engine:
    """Computes features with one mechanism."""

    backbone: Backbone
    budget: int  # most tokens of a forward pass: of a tree, or of a plain batch with its padding
    mechanism: str = "plain"  # or "tree"
    compiled: bool = False  # layers are compiled for streams of exactly `budget` tokens
    halvings: int = 0  # how often the budget was halved because memory ran out
    seconds: float = field(default=0.0, init=False)  # spent in forward passes
    _shared: SharedForward | None = field(default=None, init=False, repr=False)

    def settings(self) -> dict[str, Any]:
        """What determines the bytes of the features, apart from the backbone."""
        return {"mechanism": self.mechanism, "compiled": self.compiled, "budget": self.budget}

    def features(
        self, encoded: Sequence[EncodedConversation], advance: Advance, part: Path | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response features (n, ...) float32 of n conversations in lexicographic order.

        Args:
            advance: called with the tokens of each pass, without padding.
            part: file of the rows that are finished, written every `PART_SECONDS`; a call that finds one of the same
                engine goes on from there, through the same passes. The caller deletes it.

        Raises:
            BackboneError: for a conversation that does not fit into memory even alone.
        """
        prompt = np.zeros((len(encoded), self.backbone.hidden_size), np.float32)
        response = np.zeros((len(encoded), self.backbone.response_size), np.float32)
        state = _State(prompt, response, np.arange(len(encoded)), np.zeros(len(encoded), bool))
        work = {**self.settings(), "rows": blake2b(keys_of(encoded).tobytes(), digest_size=8).hexdigest()}
        if part is not None and state.read(part, work):
            # (What is done counts as progress.)
            advance(sum(len(encoded[i]) for i in np.flatnonzero(state.done).tolist()))
        while len(state.todo):
            self._run(encoded, state, advance, None if part is None else partial(state.write, part, work))
        return prompt, response

    def _run(
        self,
        encoded: Sequence[EncodedConversation],
        state: _State,
        advance: Advance,
        save: Callable[[], None] | None,
    ) -> None:
        """Compute rows until done or out of memory; `state.todo` is then what remains."""
        saved = time.monotonic()
        passes = self._trees(encoded, state) if self.mechanism == "tree" else self._batches(encoded, state)
        for rows, work, tokens in passes:
            start = time.perf_counter()
            try:
                if isinstance(work, PrefixTree):
                    self._shared = self._shared or SharedForward(self.backbone, self.compiled, self.budget)
                    state.prompt[rows], state.response[rows] = self._shared.features(work)
                else:
                    state.prompt[rows], state.response[rows] = self.backbone.features(work)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(rows) == 1 or self.budget // 2 < LEAST_BUDGET:
                    raise BackboneError(
                        f"out of memory on {len(rows)} conversation{'s' * (len(rows) > 1)} of "
                        f"{max(len(encoded[i]) for i in rows)} tokens; expected a smaller max_length or more memory"
                    ) from None
            else:
                self.seconds += time.perf_counter() - start
                state.done[rows] = True
                advance(tokens)
                # (After a halving the passes are no longer those of the settings.)
                if save is not None and not self.halvings and time.monotonic() - saved > PART_SECONDS:
                    save()
                    saved = time.monotonic()
                continue
            # (Outside of the handler, which would keep the tensors of the failed pass alive.)
            passes.close()
            self._halve()
            break
        state.todo = np.flatnonzero(~state.done)

    def _halve(self) -> None:
        self.budget //= 2
        self.halvings += 1
        self.compiled, self._shared = False, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory: continuing with half the budget, {self.budget:,} tokens")

    def _batches(self, encoded: Sequence[EncodedConversation], state: _State) -> Generator[_Pass, None, None]:
        todo = state.todo
        lengths = np.array([len(encoded[i]) for i in todo], np.int64)
        for places in length_sorted_batches(lengths, self.budget):
            if state.done[todo[places]].all():
                continue
            yield todo[places], [encoded[i] for i in todo[places]], int(lengths[places].sum())

    def _trees(self, encoded: Sequence[EncodedConversation], state: _State) -> Generator[_Pass, None, None]:
        todo = state.todo
        sequences = [encoded[i].ids for i in todo]
        shared = shared_with_previous(sequences)
        batches = tree_batches(np.array([len(ids) for ids in sequences], np.int64), shared, self.budget)
        batches = [(start, stop) for start, stop in batches if not state.done[todo[start:stop]].all()]

        def lay_out(start: int, stop: int) -> PrefixTree:
            gates = [encoded[i].gate_position for i in todo[start:stop]]
            return build_tree(sequences[start:stop], gates, shared[start:stop].tolist(), self.backbone.header)

        with ThreadPoolExecutor(1) as pool:
            following: Future[PrefixTree] | None = pool.submit(lay_out, *batches[0]) if batches else None
            for number, (start, stop) in enumerate(batches):
                assert following is not None
                tree = following.result()
                following = pool.submit(lay_out, *batches[number + 1]) if number + 1 < len(batches) else None
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
        shared: (n,) ids each has in common with the previous one.
        sharing: share prefixes; by default if that is faster. Only if it is exact for this model.
        compiled: compile layers; by default if that pays.
    """
    plain = Engine(backbone, pass_tokens(budget, backbone.device))
    if sharing is False or len(encoded) < 2:
        return plain
    lengths = np.array([len(conversation) for conversation in encoded], np.int64)
    saved, computed = int(shared.sum()), int((lengths - shared).sum())
    large = computed >= LARGE_TOKENS.get(backbone.device.type, LARGE_TOKENS["cuda"])
    pays = bool(sharing) or large or saved >= max(LEAST_SAVING, computed // 4)
    if not pays or not _can_share(backbone, encoded, shared, again=bool(sharing)):
        return plain
    if compiled is None:
        operations = computed * flops_per_token(backbone.model)
        compiled = backbone.device.type == "cpu" and operations > COMPILED_OPERATIONS
    if backbone.device.type == "cpu":
        budget = _stream_tokens(lengths, shared, budget)
    return Engine(backbone, budget, "tree", bool(compiled) and can_compile(backbone.device))


def _stream_tokens(lengths: np.ndarray, shared: np.ndarray, budget: int) -> int:
    """Most tokens of a stream on a CPU."""

    def computed(size: int) -> int:
        starts = [start for start, _ in tree_batches(lengths, shared, size)]
        return int((lengths - shared).sum() + shared[starts].sum())

    most = (1 + _CUT_PROMPTS) * computed(budget)
    return next((size for size in _CPU_STREAM_TOKENS if size < budget and computed(size) <= most), budget)


def resumed_engine(backbone: Backbone, settings: dict[str, Any], encoded: Sequence[EncodedConversation]) -> Engine:
    """The engine that a stored plan was started with; plain if the backbone fails the test for sharing prefixes.

    The test is run on `encoded`, some of the work, in lexicographic order.
    """
    engine = Engine(backbone, **settings)
    engine.compiled = engine.compiled and can_compile(backbone.device)
    if engine.mechanism == "tree" and len(encoded) > 1:
        shared = shared_with_previous([conversation.ids for conversation in encoded])
        if not _can_share(backbone, encoded, shared):
            engine.mechanism = "plain"
    return engine


def _can_share(
    backbone: Backbone, encoded: Sequence[EncodedConversation], shared: np.ndarray, *, again: bool = False
) -> bool:
    """Whether the backbone passed a test that is as thorough as one on a sample of this work.

    Args:
        again: a backbone that failed the test in an earlier process is tested again.
    """
    window = getattr(backbone.model.config.get_text_config(), "sliding_window", None)
    tested = [encoded[i] for i in sample(encoded, shared, window)]
    lengths = [len(conversation) for conversation in tested]
    verdict = backbone.sharing_verdict
    if verdict is None or not verdict.covers(lengths, window):
        verdict = remembered_verdict(backbone.model, backbone.readout)
        if verdict is None or not verdict.covers(lengths, window) or (verdict.fault and again):
            verdict = SharingVerdict(why_not_shared(backbone, tested), sum(lengths), max(lengths))
            remember_verdict(backbone.model, backbone.readout, verdict)
        if verdict.fault:
            say(f"{backbone.name}: prefixes are not shared, batches are plain: {verdict.fault}")
        backbone.sharing_verdict = verdict
    return not verdict.fault
