"""Near-duplicate prompts: the same question with another formatting or a few edited words.

Decontamination, hold-outs, folds and the record of seen prompts (seen_prompts.py) compare prompts in one way. A prompt
is its words and the signs inside or outside them in lower case; spaces, Unicode forms, punctuation around words and
system turns are ignored. 2+2 and 2-2, 1.5 and 15 differ. Two prompts are near-duplicates if their sets of three
consecutive words overlap by about four fifths (Jaccard), which is one edited word in 25; short prompts therefore match
exactly. A longer dialogue that begins with a benchmark's prompt is another prompt, unless it adds less than that. If
more than 20 prompts are linked in this way, they share a template (a long instruction before short questions) and are
near-duplicates only up to formatting.

No text is kept: a prompt is 64 bytes, each a hash of one of 64 minima over hashed triples (b-bit minwise
hashing, Li and Koenig 2010), and near-duplicates agree in 50 of them. They are found without comparing every two, as
neighbours in the order of the sketches under 16 rotations of their bytes (an LSH forest, Bawa et al. 2005).
`benchmarks/near_duplicates.py` measures errors and time.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b

import numpy as np

from armorm.conversation import Conversation

MINIMA = 64  # bytes of a sketch that are compared
SKETCH = MINIMA + 8  # and those of a hash of all words
AGREEING = 50  # bytes in which near-duplicates agree
MOST_SIMILAR = 20  # prompts: of a larger group, what is equal is a template
ROTATIONS = 16
_FACTOR = np.uint32(0x9E3779B1)  # 2^32 / golden ratio
_MULTIPLIERS = np.array(
    [int.from_bytes(blake2b(bytes([i]), digest_size=4).digest(), "little") | 1 for i in range(MINIMA)], np.uint32
)
# Words (one per ideograph), signs inside words, and signs outside them that are not punctuation.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+|(?<=[^\W_])[^\w\s](?=[^\W_])"
    r"|[^\w\s.,;:!?\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb\u2026\u3001\u3002\u300c-\u300f()\[\]*#]"
)


def words(text: str) -> list[str]:
    """The words and signs of a text, without its formatting."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    return _WORD.findall(text.casefold()) or [text.strip()]


def sketch(conversation: Conversation) -> np.ndarray:
    """Sketch (72,) uint8 of the prompt."""
    found = [""]
    for turn in conversation.prompt:
        if turn.role != "system":
            found += [f"{turn.role}:", *words(turn.content)]
    found += ["", ""]  # every word is in three triples
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found], np.uint32)
    triples = ((hashes[:-2] * _FACTOR) ^ hashes[1:-1]) * _FACTOR ^ hashes[2:]
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):  # the finaliser of MurmurHash3
        triples = triples * np.uint32(factor)
        triples ^= triples >> np.uint32(shift)
    least = (triples[:, None] * _MULTIPLIERS).min(0)
    minima = (least * _FACTOR >> np.uint32(24)).astype(np.uint8)  # (the top byte depends on all bits)
    same = blake2b("\n".join(found).encode("utf-8", "surrogatepass"), digest_size=SKETCH - MINIMA).digest()
    return np.concatenate([minima, np.frombuffer(same, np.uint8)])


def sketches(conversations: Sequence[Conversation]) -> np.ndarray:
    """Sketches (n, 72) uint8 of the prompts; each distinct prompt is read once."""
    rows: dict[str, int] = {}
    index = [rows.setdefault(conversation.prompt_key, len(rows)) for conversation in conversations]
    found = np.empty((len(rows), SKETCH), np.uint8)
    done = -1
    for row, conversation in zip(index, conversations, strict=True):
        if row > done:
            found[row], done = sketch(conversation), row
    return found[index]


def _orders(table: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of a table of distinct sketches in their order under each rotation of the minima."""
    for shift in range(0, MINIMA, MINIMA // ROTATIONS):
        yield np.argsort(np.roll(table[:, :MINIMA], -shift, 1).view(f"S{MINIMA}")[:, 0], kind="stable")


def _agreement(table: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number of equal minima of each two rows."""
    return np.asarray((table[first, :MINIMA] == table[second, :MINIMA]).sum(1))


def _components(table: np.ndarray, orders: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Component of each row among near-duplicates, and mask of the rows that share a template: each is by itself."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = [np.stack([order[:-1], order[1:]]) for order in orders]
    first, second = np.concatenate([ends[:, _agreement(table, *ends) >= AGREEING] for ends in links], 1)
    graph = coo_matrix((np.ones(len(first), bool), (first, second)), (len(table),) * 2)
    count, component = connected_components(graph, directed=False)
    template = np.bincount(component)[component] > MOST_SIMILAR
    return np.where(template, count + np.arange(len(table)), component), template


def nearest(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Row (n,) int64 of a near-duplicate among `known` (m, 72) of each of `asked` (n, 72), -1 for none."""
    if not len(known) or not len(asked):
        return np.full(len(asked), -1, np.int64)
    table, index = np.unique(np.concatenate([known, asked]), axis=0, return_inverse=True)
    index = index.ravel()
    best = np.full(len(table), -1, np.int64)
    best[index[: len(known)]] = np.arange(len(known))
    new = best < 0
    agreeing, orders = np.where(new, AGREEING - 1, MINIMA), list(_orders(table))
    for order in orders:
        place = np.arange(len(order))
        before = np.maximum.accumulate(np.where(new[order], -1, place))
        after = np.minimum.accumulate(np.where(new[order], len(order), place)[::-1])[::-1]
        for neighbour, is_there in ((before, before >= 0), (after, after < len(order))):
            rows = np.flatnonzero(new[order] & is_there)
            row, other = order[rows], order[neighbour[rows]]
            count = _agreement(table, row, other)
            better = count > agreeing[row]
            best[row[better]], agreeing[row[better]] = best[other[better]], count[better]
    _, template = _components(table, orders)
    best[new & template] = -1
    return best[index[len(known) :]]


def prompt_groups(conversations: Sequence[Conversation], earlier: Mapping[str, str] | None = None) -> dict[str, str]:
    """Key of the group of near-duplicates of each prompt, by the prompt's content key: the smallest key of a prompt in
    the group, whatever the order of the conversations. Groups are connected components.

    Args:
        earlier: group of some of the prompts, which the whole group takes.
    """
    prompts = {conversation.prompt_key: conversation for conversation in conversations}
    keys = sorted(prompts)
    if not keys:
        return {}
    table, index = np.unique(sketches([prompts[key] for key in keys]), axis=0, return_inverse=True)
    components = _components(table, list(_orders(table)))[0][index.ravel()].tolist()
    group: dict[int, str] = {}
    for key, component in zip(keys, components, strict=True):
        if earlier and key in earlier:
            group[component] = min(earlier[key], group.get(component, earlier[key]))
    for key, component in zip(keys, components, strict=True):
        group.setdefault(component, key)
    return {key: group[component] for key, component in zip(keys, components, strict=True)}


class KnownPrompts:
    """Prompts to exclude from training."""

    def __init__(self, conversations: Iterable[Conversation] = ()) -> None:
        self.prompts: dict[str, Conversation] = {}
        self.add(conversations)

    def add(self, conversations: Iterable[Conversation]) -> None:
        for conversation in conversations:
            self.prompts.setdefault(conversation.prompt_key, conversation)

    def find(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Mask (n,) of the conversations whose prompt is known, or a near-duplicate of one that is."""
        return nearest(sketches([*self.prompts.values()]), sketches(conversations)) >= 0
