"""Small real tokenizers in the styles of the model families, each trained on a few sentences.

`STYLES` holds one `Style` a family: how its tokenizer is built, which token closes a prompt turn (the gate),
and what of it the tests may rely on. Chat templates are written out here, as short as the format allows.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The user asks a question and the assistant writes a short answer, as the model was told to do by the system.",
    "How do I sort a list in Python?\n\nUse sorted(numbers), or numbers.sort() where the list may change.",
    "def mean(values):\n    return sum(values) / len(values)\n\n\nprint(mean([1, 2, 3]))\n",
    "user\nassistant\nsystem\ntool\nmodel\n\nuser\n\nassistant\n\nassistant\n\nuser assistant: USER: ASSISTANT: user",
    "Why is the sky blue? Sunlight is scattered by the air; blue light more than red, 5.5 times as much.",
    'call {"name": "add", "arguments": {"first": 1, "second": 2}} and think about what it gives back',
    "Füchse jagen über dürre Wiesen. Le café est déjà fermé. 今日は天気がいい。 Привет, мир! 🎉 👍",
]
_LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Style:
    """One family of tokenizers.

    Attributes:
        name: for test ids.
        build: makes the tokenizer.
        gate: text of the token that closes the last turn before the reply.
        bos: who writes BOS: `template`, `tokenizer`, `both`, or nobody.
        exact: decoding gives back every character (byte-level vocabularies).
        forgeable: turns are marked by plain words.
        system: whether the template takes system turns.
        tools: whether the template writes tool calls.
    """

    name: str
    build: Callable[[], PreTrainedTokenizerFast]
    gate: str
    bos: str = "nobody"
    exact: bool = False
    forgeable: bool = False
    system: bool = True
    tools: bool = False

    def __repr__(self) -> str:
        return self.name


# --- vocabularies --------------------------------------------------------------------------------


def byte_level(*, words: str | None = None, nfc: bool = False, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama-3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if words is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(words), "isolated")
        bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of_words])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def byte_fallback(
    special: Sequence[str],
    normalizer: normalizers.Normalizer | None = None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
) -> Tokenizer:
    """SentencePiece-like BPE: special tokens first, then 256 byte tokens, then pieces with their merges."""
    tokenizer = Tokenizer(models.BPE())
    # In training, no piece spans two words or lines.
    lines, words = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    state = json.loads(tokenizer.to_str())
    pieces = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    state["model"] |= {
        "vocab": {token: index for index, token in enumerate(tokens)},
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
    }
    whole = Tokenizer.from_str(json.dumps(state | {"pre_tokenizer": None}))
    if normalizer is not None:
        whole.normalizer = normalizer
    if pre_tokenizer is not None:
        whole.pre_tokenizer = pre_tokenizer
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return whole


def add_bos(tokenizer: Tokenizer, bos: str) -> None:
    """Let the tokenizer itself write BOS before every text."""
    bos_id = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )


# --- families ------------------------------------------------------------------------------------


@cache
def llama3() -> PreTrainedTokenizerFast:
    """Byte-level; BOS written by the template and by the tokenizer; contents trimmed; tool calls as JSON."""
    tokenizer = byte_level(words=_LLAMA3_WORDS, ignore_merges=True)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    add_bos(tokenizer, "<|begin_of_text|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=(
            "{{- bos_token }}{%- for message in messages %}"
            "{%- set role = 'ipython' if message.role == 'tool' else message.role %}"
            "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
            "{%- if message.tool_calls %}{%- for call in message.tool_calls %}"
            '{{- \'{"name": "\' + call.function.name + \'", "parameters": \' }}'
            "{{- call.function.arguments | tojson }}{{- '}' }}{%- endfor %}"
            "{%- else %}{{- message.content | trim }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
        ),
    )


_CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '\n<tool_call>\n' }}{{- (call.function or call) | tojson }}{{- '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _chatml(template: str, *, special: bool = True, ordinary: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(words=_LLAMA3_WORDS, nfc=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in _CHATML_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    # (Naming a token as EOS would make it special.)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **({"eos_token": "<|im_end|>"} if special else {})
    )


@cache
def chatml() -> PreTrainedTokenizerFast:
    """Byte-level with NFC; no BOS; a newline after the token that ends a turn."""
    return _chatml(_CHATML)


@cache
def chatml_with_ordinary_markers() -> PreTrainedTokenizerFast:
    """ChatML as some fine-tunes add it: the turn tokens are added tokens, but not special ones."""
    return _chatml(_CHATML, special=False)


@cache
def qwen3() -> PreTrainedTokenizerFast:
    """ChatML with a `<think>` block in the last turn, always; the reasoning of earlier turns is dropped."""
    template = (
        "{%- for message in messages %}{%- if message.role == 'tool' %}"
        "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.role == 'assistant' %}"
        "{%- set reasoning = message.reasoning_content or '' %}{%- set content = message.content %}"
        "{%- if not reasoning and '</think>' in content %}"
        "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.last %}{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
        "{{- content }}{%- for call in message.tool_calls or [] %}"
        "{{- '\n<tool_call>\n' }}{{- call.function | tojson }}{{- '\n</tool_call>' }}{%- endfor %}"
        "{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
    return _chatml(template, ordinary=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"))


@cache
def gemma() -> PreTrainedTokenizerFast:
    """Byte fallback, white space by a Replace normaliser; BOS by template and tokenizer; no system turns."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = byte_fallback(special, normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    add_bos(tokenizer, "<bos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=(
            "{{- bos_token }}{%- for message in messages %}"
            "{%- if message.role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}"
            "{%- set role = 'model' if message.role == 'assistant' else message.role %}"
            "{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
        ),
    )


@cache
def mistral() -> PreTrainedTokenizerFast:
    """Byte fallback with Metaspace; the system turn stands inside the last user turn; EOS after a reply."""
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
    tokenizer = byte_fallback(special, None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    add_bos(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "{%- set system = messages[0].content if messages[0].role == 'system' else '' %}"
            "{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}"
            "{%- set plain = turns | rejectattr('role', 'equalto', 'tool') | rejectattr('tool_calls') | list %}"
            "{%- for message in plain %}{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{- raise_exception('conversation roles must alternate user/assistant/user/assistant') }}"
            "{%- endif %}{%- endfor %}"
            "{%- set last_user = (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}"
            "{{- bos_token }}{%- for message in turns %}{%- if message.role == 'user' %}"
            "{%- if message == last_user and system %}{{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}"
            "{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}"
            "{%- elif message.role == 'tool' %}"
            "{{- '[TOOL_RESULTS] {\"content\": ' + message.content | tojson + '}[/TOOL_RESULTS]' }}"
            "{%- elif message.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in message.tool_calls %}"
            "{{- call.function | tojson }}{{- '' if loop.last else ', ' }}{%- endfor %}{{- ']' + eos_token }}"
            "{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"
        ),
    )


@cache
def phi3() -> PreTrainedTokenizerFast:
    """Byte fallback with Prepend; turn tokens swallow white space on their right; EOS ends a finished dialogue."""
    start = ("<unk>", "<s>", "</s>", "<|endoftext|>")
    turns = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = byte_fallback(start, normalizer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in start])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=True) for token in turns])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=(
            "{%- for message in messages %}"
            "{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"
        ),
    )


@cache
def unigram() -> PreTrainedTokenizerFast:
    """Unigram with its special tokens as pieces of the vocabulary; BOS by the tokenizer, not by the template."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=list(string.printable.strip()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    add_bos(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "{%- for message in messages %}{{- '<|' + message.role + '|>' + message.content + eos_token }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
        ),
    )


@cache
def neox() -> PreTrainedTokenizerFast:
    """Byte-level with runs of spaces as added tokens that are not special; BOS and EOS are one token."""
    tokenizer = byte_level()
    special = ["<|endoftext|>", "<|prompter|>", "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(" " * width, normalized=True) for width in range(8, 1, -1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=(
            "{%- for message in messages %}"
            "{%- set role = 'prompter' if message.role == 'user' else message.role %}"
            "{{- '<|' + role + '|>' + message.content + eos_token }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
        ),
    )


@cache
def vicuna() -> PreTrainedTokenizerFast:
    """Turns marked by plain words; BOS by the tokenizer, not by the template."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    add_bos(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{%- for message in messages %}{%- if message.role == 'system' %}{{- message.content + '\n\n' }}"
            "{%- elif message.role == 'user' %}{{- 'USER: ' + message.content + ' ' }}"
            "{%- else %}{{- 'ASSISTANT: ' + message.content + eos_token }}{%- endif %}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
        ),
    )


STYLES = [
    Style("llama3", llama3, "<|eot_id|>", bos="both", exact=True, tools=True),
    Style("chatml", chatml, "<|im_end|>", exact=True, tools=True),
    Style("chatml_with_ordinary_markers", chatml_with_ordinary_markers, "<|im_end|>", exact=True, tools=True),
    Style("qwen3", qwen3, "<|im_end|>", exact=True, tools=True),
    Style("gemma", gemma, "<end_of_turn>", bos="both", system=False),
    Style("mistral", mistral, "[/INST]", bos="both", tools=True),
    Style("phi3", phi3, "<|end|>"),
    Style("unigram", unigram, "</s>", bos="tokenizer"),
    Style("neox", neox, "<|endoftext|>", exact=True),
    Style("vicuna", vicuna, ":", bos="tokenizer", exact=True, forgeable=True),
]
