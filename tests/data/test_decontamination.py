"""Near-duplicate prompts against a comparison of every two, and the record of seen prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from armorm.conversation import Conversation
from armorm.data.decontamination import nearest, prompt_groups, sketches, words
from armorm.data.seen_prompts import FILE, SeenPrompts
from armorm.errors import CheckpointError
from armorm.files import write_arrays

VOCABULARY = [f"{a}{b}{c}" for a in "bdklmnprst" for b in "aeiou" for c in ("r", "nd", "st", "lo", "vi", "ke")]
LONG = " ".join(VOCABULARY[3 * i] for i in range(60))


def asked(prompt: str, reply: str = "yes") -> Conversation:
    return Conversation.from_prompt(prompt, reply)


def triples(prompt: str) -> set[tuple[str, ...]]:
    found = ["", "user:", *words(prompt), "", ""]
    return {tuple(found[i : i + 3]) for i in range(len(found) - 2)}


def similarity(one: str, other: str) -> float:
    first, second = triples(one), triples(other)
    return len(first & second) / len(first | second)


def edited_prompts(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts of 20 to 120 words behind one of three instructions, and each with up to a fifth of its words replaced."""
    draw = random.Random(seed)
    instructions = [" ".join(draw.choices(VOCABULARY, k=20)) for _ in range(3)]
    texts, others = [], []
    for _ in range(count):
        text = [*draw.choice(instructions).split(), *draw.choices(VOCABULARY, k=draw.randint(20, 120))]
        share = draw.choice((0, 0.01, 0.02, 0.05, 0.1, 0.2))
        texts.append(" ".join(text))
        others.append(" ".join(draw.choice(VOCABULARY) if draw.random() < share else word for word in text))
    return texts, others


def test_near_duplicates_are_those_whose_words_overlap_by_four_fifths():
    """Errors of the sketches and of their index, against sets of triples."""
    texts, others = edited_prompts(3000)
    found = nearest(sketches([asked(text) for text in texts]), sketches([asked(text) for text in others])) >= 0
    overlap = np.array([similarity(one, other) for one, other in zip(texts, others, strict=True)])
    very, mostly, hardly = overlap >= 0.9, (overlap >= 0.8) & (overlap < 0.9), overlap < 0.65
    assert min(very.sum(), mostly.sum(), hardly.sum()) > 200
    assert found[very].all()
    assert found[mostly].mean() > 0.9
    assert found[hardly].mean() < 0.002


def test_prompts_behind_the_same_instruction_are_not_near_duplicates():
    texts, _ = edited_prompts(3000, seed=1)
    half = len(texts) // 2
    assert (nearest(*(sketches([asked(text) for text in part]) for part in (texts[:half], texts[half:]))) < 0).all()


def test_short_prompts_match_up_to_formatting_only():
    known = sketches([asked("What is 2+2?"), asked("Name the capital of France."), asked("你好吗朋友们")])
    others = [
        "what is 2-2",
        "what is  **2+2**",
        "Name the capital of Spain.",
        "name the capital of france",
        "你好吗朋友们。",
    ]
    assert (nearest(known, sketches([asked(text) for text in others])) >= 0).tolist() == [
        False,
        True,
        False,
        True,
        True,
    ]
    system = Conversation.from_messages(
        [{"role": "system", "content": "Be brief."}, *asked("What is 2+2?", "4").to_list()]
    )
    assert nearest(known, sketches([system]))[0] == 0


def test_short_prompts_with_another_word_are_different():
    texts = [f"How do I {verb} a {thing}?" for verb in VOCABULARY[:40] for thing in VOCABULARY[40:80]]
    assert len(set(prompt_groups([asked(text) for text in texts]).values())) == len(texts)


def test_short_prompts_do_not_collide():
    texts = [f"{first} {second}" for first in VOCABULARY[:60] for second in VOCABULARY[:60]]
    assert len(np.unique(sketches([asked(text) for text in texts]), axis=0)) == len(texts)


def test_many_questions_behind_a_long_instruction_are_different():
    texts = [f"{LONG} {LONG} The question: {a} {b}?" for a in VOCABULARY[:20] for b in VOCABULARY[20:40]]
    assert similarity(*texts[:2]) > 0.9
    few, many = ([asked(text) for text in part] for part in (texts[:10], texts))
    assert len(set(prompt_groups(few).values())) == 1
    assert len(set(prompt_groups(many).values())) == len(texts)
    first, second = sketches(many[:200]), sketches(many[200:])
    assert (nearest(first, second) < 0).all()
    assert nearest(first, sketches([asked(texts[7].upper()), *many[200:]])).tolist() == [7, *[-1] * 200]
    assert (nearest(first[:3], sketches(many[3:10])) >= 0).all()


def groups_of(texts: Sequence[str]) -> list[set[str]]:
    keys = {asked(text).prompt_key: text for text in texts}
    found = prompt_groups([asked(text) for text in texts])
    return [{keys[key] for key in found if found[key] == group} for group in dict.fromkeys(found.values())]


def test_groups_are_connected_components_whatever_the_order():
    chain = [LONG]
    for place in (5, 15, 25, 35, 45, 55):
        chain.append(" ".join(word if i != place else "changed" for i, word in enumerate(chain[-1].split())))
    assert similarity(chain[0], chain[-1]) < 0.6
    assert similarity(chain[0], chain[1]) > 0.75
    texts = [*chain, "What is 2+2?", "what is 2+2", "What is 2-2?"]
    expected = [set(chain), {"What is 2+2?", "what is 2+2"}, {"What is 2-2?"}]
    assert sorted(map(sorted, groups_of(texts))) == sorted(map(sorted, expected))
    for seed in range(5):
        mixed = random.Random(seed).sample(texts, len(texts))
        assert prompt_groups([asked(text) for text in mixed]) == prompt_groups([asked(text) for text in texts])


def test_a_record_knows_what_each_prompt_was_used_for_and_holds_no_text(tmp_path):
    rated, compared, other = asked(LONG), asked("Which is better?"), asked("Neither of them.")
    groups = prompt_groups([rated, compared])
    seen = SeenPrompts.of({"ratings": [rated, rated], "pairs": [compared, rated]}, groups)
    seen.save(tmp_path)
    assert LONG[:20].encode() not in (tmp_path / FILE).read_bytes()
    read = SeenPrompts.load(str(tmp_path))
    again = asked(LONG.upper().replace(" ", ", ") + "?")
    assert read.find([rated, compared, other, again]).tolist() == [3, 2, 0, 3]
    assert read.count() == {"prompts": 2, "ratings": 1, "pairs": 2, "fine-tuning": 0} and not read.partial
    both = read + SeenPrompts.of({"fine-tuning": [other]}, prompt_groups([other]))
    assert both.find([other, compared]).tolist() == [4, 2]
    assert read.prompt_groups([again])[again.prompt_key][:8] == groups[rated.prompt_key][:8], "in the same fold"


def test_a_record_of_version_0_1_is_matched_by_content_keys():
    prompts = [asked("one"), asked("two")]
    keys = np.array([list(bytes.fromhex(prompt.prompt_key)[:8]) for prompt in prompts], np.uint8)
    old = SeenPrompts.of_arrays({"prompts": keys})
    assert old.find([*prompts, asked("three")]).tolist() == [4, 4, 0] and len(old) == 2
    assert (old + SeenPrompts.of({"pairs": [prompts[0]]}, prompt_groups(prompts))).find(prompts).tolist() == [6, 4]


def test_a_model_without_a_record_is_partly_known_and_a_damaged_one_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert SeenPrompts.load(str(tmp_path)).partial
    write_arrays(tmp_path / FILE, {"sketches": np.zeros((2, 72), np.uint8), "roles": np.zeros(1, np.uint8)})
    with pytest.raises(CheckpointError, match=r"seen_prompts\.safetensors: damaged record"):
        SeenPrompts.load(str(tmp_path))
    SeenPrompts(partial=True).save(tmp_path)
    assert not (tmp_path / FILE).exists()
