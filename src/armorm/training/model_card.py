"""Model card of a trained or extended model: Markdown with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined

from armorm.explain.explanation import approximate_sentence
from armorm.heads.uncertainty import TOLERANCE
from armorm.objectives import ObjectiveSet

_SHOWN_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CARD = """\
---
library_name: armorm
pipeline_tag: text-classification
tags: [reward-model, armorm, interpretable]
{{ index }}---

# {{ name }}

{% set extended = metrics.get("extended") -%}
{% if extended -%}
The interpretable reward model `{{ extended["from"] }}` with more objectives or ratings: {{ objectives|length }} objectives in all. \
New objectives: {{ extended.objectives|join(", ") or "none" }}; additional ratings of: {{ extended.more_ratings|join(", ") or "none" }}. \
The other objectives are unchanged.
{% else -%}
An interpretable reward model: {{ objectives|length }} objectives are predicted from the hidden states of `{{ metrics.backbone.name }}`\
{{ " (fine-tuned with them)" if metrics.backbone.finetuned else "" }}, weighted by a gate that reads the prompt, and summed to one score.
Trained with armorm {{ metrics.armorm_version }}; recipe hash `{{ metrics.recipe.hash }}` (see recipe.yaml in this folder).
{% endif %}
```python
from armorm import ArmoRM

rm = ArmoRM.from_pretrained("PATH/TO/THIS/FOLDER")
print(rm.explain([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]))
```

## Data

{% if extended -%}
- rated rows: {{ "{:,}".format(metrics.data.rated_train) }} for training, {{ "{:,}".format(metrics.data.rated_test) }} held out
- preference pairs: {{ "{:,}".format(metrics.data.pairs) }}
{% else -%}
{% for count_name, count in metrics.data.counts.items() -%}
- {{ count_name.replace("_", " ") }}: {{ "{:,}".format(count) }}
{% endfor -%}
{% for reason, count in metrics.data.left_out.items() -%}
- excluded: {{ "{:,}".format(count) }} {{ reason }}
{% endfor -%}
{% if metrics.backbone.finetuned -%}
- the backbone was fine-tuned on {{ "{:,}".format(metrics.backbone.finetuned.rated_rows) }} rated rows\
{{ " and %s pairs"|format("{:,}".format(metrics.backbone.finetuned.pairs)) if metrics.backbone.finetuned.pairs else "" }}
{% endif -%}
- {{ "{:,}".format(metrics.data.conversations) }} distinct conversations, of which {{ "{:,}".format(metrics.data.truncated) }} were truncated; \
{{ "{:,}".format(metrics.data.refused) }} more were rejected
{% endif -%}
{% set seen = metrics.data.get("seen") -%}
{% if seen -%}
- prompts seen in training: {{ "{:,}".format(seen.prompts) }}\
{% for role, count in seen.items() if role != "prompts" and count %}{{ " (" if loop.first else ", " }}{{ role }} {{ "{:,}".format(count) }}{{ ")" if loop.last }}{% endfor %}; \
their hashes are in seen_prompts.safetensors, and `armorm evaluate` leaves them out
{% endif %}
## Objectives

All splits are by prompt. R2 and the ridge penalty alpha come from cross-validation\
{{ ". On held-out rows: Spearman correlation of predicted and given ratings, accuracy between responses to one prompt, and mean absolute error in raw units" if rated else "; held-out rows were not evaluated" }}.

| objective | raw range | ratings | alpha | R2 | held-out rows | Spearman | within prompt | error |
|---|---|---|---|---|---|---|---|---|
{% for report in metrics.regression -%}
{% set o = by_name[report.objective] %}{% set t = rated.get(report.objective, {}) -%}
| {{ o.name }}{{ " (less is better)" if o.direction == "lower" else "" }} | {{ "%.3g..%.3g"|format(o.low, o.high) }} | {{ "{:,}".format(report.ratings) }} \
| {{ "%g"|format(report.alpha) }} | {{ number(report.r2) }} | {{ t.get("n", "") }} | {{ number(t.get("spearman")) }} \
| {{ number(t.get("within_prompt")) }} | {{ number(t.get("mae")) }} |
{% endfor %}
{% for report in metrics.regression if report.rater_weights -%}
- {{ report.objective }}: rows weighted by the spread of their raters, weights {{ number(report.rater_weights[0]) }} to {{ number(report.rater_weights[1]) }}
{% endfor %}
{% if metrics.data.get("constructs") -%}
## Constructed objectives

Labels made by a rule from replies of the named sets and edits of them. Accuracy: between rows of one held-out prompt with different labels; neither these prompts nor the texts that were inserted occur in training.

| objective | label | made from | training rows | test rows | pairs | accuracy |
|---|---|---|---|---|---|---|
{% for report in metrics.data.constructs -%}
{% set measured = metrics.evaluation.constructs[report.objective] -%}
| {{ report.objective }} | {{ report.rule }} | {{ report.sources|join(", ") }} | {{ "{:,}".format(report.train) }} | {{ "{:,}".format(report.test) }} | {{ "{:,}".format(measured.pairs) }} | {{ number(measured.accuracy) }} |
{% endfor %}
{% endif -%}
{% if metrics.get("joint") -%}
{% set chosen = metrics.joint.pair_weights.index(metrics.joint.pair_weight) -%}
## Joint training on ratings and pairs

The reward heads minimise the squared error of the ratings plus {{ "%g"|format(metrics.joint.pair_weight) }} times the pair loss. On held-out \
folds: pair loss {{ number(metrics.joint.losses[0], 4) }} -> {{ number(metrics.joint.losses[chosen], 4) }}, \
mean R2 {{ number(metrics.joint.mean_r2[0]) }} -> {{ number(metrics.joint.mean_r2[chosen]) }}.

{% endif -%}
{% if metrics.get("quantiles") -%}
## Quantiles

Share of held-out ratings below each predicted quantile, by cross-validation; quantiles do not change the score.

| objective | {% for level in metrics.quantiles.levels %}{{ "%g"|format(level) }} | {% endfor %}
|---|{% for level in metrics.quantiles.levels %}---|{% endfor %}
{% for head in metrics.quantiles.heads -%}
| {{ head.objective }} | {% for share in head.below %}{{ number(share) }} | {% endfor %}
{% endfor %}
{% endif -%}
{% if approximate -%}
## Uncertainty

{{ approximate }}

{% endif -%}
{% if metrics.get("debiasing") -%}
## Debiasing against {{ metrics.debiasing.against }}

{{ metrics.debiasing.metric|capitalize }} correlation with the predicted {{ metrics.debiasing.against }} on reference data, {{ metrics.debiasing.level.replace("_", " ") }}, before and after debiasing.

{% for bias, of in metrics.debiasing.biases.items() -%}
{% if metrics.debiasing.biases|length > 1 -%}
### {{ bias }}

{% endif -%}
{% set held = metrics.debiasing.get("stability", {}).get(bias) -%}
| objective | penalty | before | after |{{ " held-out rows, predicted | held-out rows, " + held.measured_by + " |" if held }}
|---|---|---|---|{{ "---|---|" if held }}
{% for objective, penalty in of.penalties.items() if objective not in metrics.debiasing.biases -%}
| {{ objective }} | {{ number(penalty) }} | {{ number(of.before[objective]) }} | {{ number(of.after[objective], 4) }} |\
{% if held %} {{ number(held.predicted.pooled.objectives[objective].after) }} | {{ number(held.actual.pooled.objectives[objective].after) }} |{% endif %}
{% endfor %}
{% endfor -%}
{% for bias, of in metrics.debiasing.get("stability", {}).items() -%}
On held-out prompts the score's correlation with {{ of.measured_by }} is {{ number(of.actual.pooled.score.after) }} \
({{ number(of.actual.pooled.score.before) }} without debiasing), within prompts \
{{ number(of.actual.within_prompt.score.after) }} ({{ number(of.actual.within_prompt.score.before) }}); \
with the predicted {{ bias }} it is {{ number(of.predicted.pooled.score.after) }}.

{% endfor -%}
{% for warning in metrics.debiasing.warnings -%}
- {{ warning }}
{% endfor %}
{% endif -%}
## Gate

{% if metrics.gate -%}
{% set gate = metrics.gate -%}
Trained on {{ "{:,}".format(gate.pairs) }} preference pairs, with {{ "{:,}".format(gate.held_out_pairs) }} held out by prompt: \
{{ "{:,}".format(gate.stopping_pairs) }} for early stopping, {{ "{:,}".format(gate.calibration_pairs) }} for calibration\
{{ " (the same, because they are few: the accuracy is optimistic)" if gate.stopping_pairs == gate.held_out_pairs else "" }}. \
On the latter: accuracy {{ number(gate.accuracy) }} ({{ number(gate.uniform_accuracy) }} with uniform weights). \
Logit scale {{ number(gate.logit_scale) }}\
{% if gate.calibration %}, fitted on {{ "{:,}".format(gate.calibration.prompts) }} prompts with a relative standard error of \
{{ number(gate.calibration.scale_error, 2) }}; its expected accuracy is {{ number(gate.calibration.expected_accuracy) }}{% endif %}. \
Mean entropy of the gating weights {{ number(gate.mean_entropy) }} nats of at most {{ number(max_entropy) }}.
{% if weights %}
Mean weights over the prompts of held-out pairs, and the reliability that they are discounted by (to the power \
{{ "%g"|format(gate.get("exponent", 0)) }}): s^2 / (s^2 + e^2), with s the standard deviation of the ratings that is predicted on \
held-out folds, and e the standard error of a reward, over the training prompts; both on the 0-1 scale of rewards.

| objective | weight | reliability | R2 | s | e |
|---|---|---|---|---|---|
{% for weight, o in weights -%}
| {{ o.name }} | {{ number(weight, 4) }} | {{ number(o.reliability.value) }} | {{ number(o.reliability.r2) }} \
| {{ number(o.reliability.signal_variance ** 0.5) }} \
| {{ number(o.reliability.epistemic_variance ** 0.5) if o.reliability.epistemic_variance is not none else "unknown" }} |
{% endfor %}
{% endif -%}
{% if metrics.gate.get("weak") %}
{{ weak_sentence(metrics.gate.weak) }}
{% endif -%}
{% if metrics.gate.collapse %}
**The gate has collapsed: {{ metrics.gate.collapse }}.** Its weights ignore the prompt.
{% endif %}
{% else -%}
{{ "No new preference pairs: the new objectives get a constant share of the weight." if extended \
else "No preference pairs: the objectives are weighted by their reliability, whatever the prompt." }}

{% endif -%}
{% if metrics.evaluation.get("pairs") -%}
## Preference pairs

Accuracy on held-out pairs; ties and rejected pairs count as wrong.

| set | pairs | prompts | accuracy | uniform weights | longer response | where longer is right | where longer is wrong |
|---|---|---|---|---|---|---|---|
{% for set_name, f in metrics.evaluation.pairs.items() -%}
| {{ set_name }} | {{ "{:,}".format(f.pairs) }} | {{ "{:,}".format(f.prompts) }} | {{ number(f.accuracy) }} | {{ number(f.baselines.uniform_weights) }} \
| {{ number(f.baselines.longer_response) }} | {{ number(f.longer_right.accuracy) }} | {{ number(f.longer_wrong.accuracy) }} |
{% endfor %}
{% endif -%}
## Limitations

Predicted ratings estimate what the raters of each source would have given, and are only as good as the metrics above.
{%- if metrics.data.get("constructs") %}
Constructed objectives are labelled by a rule, not by people: they know the contrasts of that rule.
{%- endif %}
Scores have no absolute meaning: compare them with each other, or normalise them.
{% if reference.get("score_std") -%}
## Score scale

Normalised scores are standard deviations from the mean of {{ "{:,}".format(reference.rows) }} reference responses \
(digest `{{ reference.digest }}`): (score - {{ number(reference.score_mean, 4) }}) / {{ number(reference.score_std, 4) }}. \
`rm.score(..., normalize=True)`, `armorm score --normalize` and `armorm serve --normalize` return them. A threshold on \
this scale holds for other versions of the model with the same reference digest; one on raw scores does not.

| percentage of reference responses that score lower | 5 | 25 | 50 | 75 | 95 |
|---|---|---|---|---|---|
| normalised score |{% for value in quantiles %} {{ "%+.2f"|format(value) }} |{% endfor %}
{% endif -%}
"""


def model_card(
    name: str, metrics: Mapping[str, Any], objectives: ObjectiveSet, reference: Mapping[str, Any] | None = None
) -> str:
    """The card of a finished run.

    Args:
        metrics: contents of metrics.json, of `train` or of `extend`.
        reference: of the model's config (`ArmoRM.reference`), for the scale of normalised scores.
    """
    audited = (metrics.get("uncertainty") or {}).get("objectives", {})
    bounds = {name: entry["error_bound"] for name, entry in audited.items() if entry["error_bound"] > TOLERANCE}
    mean_weights = (metrics.get("gate") or {}).get("mean_weights") or []
    weights = sorted(zip(mean_weights, objectives, strict=False), key=lambda pair: -pair[0])
    index = model_index(name, metrics["evaluation"])
    environment = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    return environment.from_string(_CARD).render(
        name=name,
        metrics=metrics,
        objectives=list(objectives),
        by_name={objective.name: objective for objective in objectives},
        rated=metrics["evaluation"].get("ratings", {}),
        number=_number,
        weights=[(weight, objective) for weight, objective in weights if objective.reliability],
        weak_sentence=weak_sentence,
        approximate=approximate_sentence(bounds) if bounds else "",
        max_entropy=math.log(len(objectives)),
        reference=reference or {},
        quantiles=_normalised_quantiles(reference or {}),
        index=yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True, width=1000) if index else "",
    )


def model_index(name: str, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results on held-out rows in the form that the Hub reads (`model-index`); empty without any.

    Args:
        evaluation: of metrics.json.
    """
    results = []
    for dataset, figures in (evaluation.get("pairs") or {}).items():
        results += _result(
            "Preference pairs",
            dataset,
            "accuracy",
            f"Accuracy, {figures['pairs']:,} held-out pairs",
            figures["accuracy"],
        )
    for objective, figures in (evaluation.get("ratings") or {}).items():
        title = f"Spearman correlation, {figures['n']:,} held-out rows"
        results += _result("Rating prediction", objective, "spearmanr", title, figures.get("spearman"))
    return [{"name": name, "results": results}] if results else []


def _result(task: str, dataset: str, metric: str, title: str, value: float | None) -> list[dict[str, Any]]:
    """One result, or none for a metric without a value."""
    if value is None or not math.isfinite(value):
        return []
    return [
        {
            "task": {"type": "text-classification", "name": task},
            "dataset": {"type": dataset, "name": dataset},
            "metrics": [{"type": metric, "value": round(float(value), 4), "name": title}],
        }
    ]


def _normalised_quantiles(reference: Mapping[str, Any]) -> list[float]:
    """Normalised scores at `_SHOWN_QUANTILES` of the reference responses; empty without reference."""
    if not reference.get("score_std"):
        return []
    held = np.array(reference["score_quantiles"])
    found = np.interp(_SHOWN_QUANTILES, np.linspace(0, 1, len(held)), held)
    shown: list[float] = ((found - reference["score_mean"]) / reference["score_std"]).tolist()
    return shown


def weak_sentence(weak: Mapping[str, Any]) -> str:
    """What `GateReport.weak` says, as a sentence."""
    sets = ", ".join(weak["sets"])
    return (
        f"Weak pairs ({weak['pairs']:,} of {sets}) are {'used' if weak['used'] else 'not used'}: on the validation "
        f"prompts of the other sets the loss is {weak['loss_with']:.4f} with them and {weak['loss_without']:.4f} without."
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # (no -0.000)
