"""The model card: what the model is, what it was trained on, what it reached, written by the run itself.

In:  the recipe, the run's metrics, the objectives.
Out: Markdown for README.md beside the model, with the front matter that hubs read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from armorm.objectives import ObjectiveSet
from armorm.training.recipe import Recipe

_CARD = """\
---
library_name: armorm
pipeline_tag: text-classification
tags: [reward-model, armorm, interpretable]
---

# {{ recipe.name }}

An interpretable reward model: {{ objectives|length }} objectives predicted from the features of
`{{ metrics.backbone.name }}`{{ ", fine-tuned with them" if metrics.backbone.finetuned else "" }}, weighed by the prompt, summed to one score.
Trained with armorm {{ metrics.armorm_version }}; recipe hash `{{ metrics.recipe.hash }}` (recipe.yaml beside this file).

```python
from armorm import ArmoRM

rm = ArmoRM.from_pretrained("PATH/TO/THIS/FOLDER")
print(rm.explain([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]))
```

## Data

{% for name, count in metrics.data.counts.items() -%}
- {{ name.replace("_", " ") }}: {{ "{:,}".format(count) }}
{% endfor -%}
{% for reason, count in metrics.data.left_out.items() -%}
- left out: {{ "{:,}".format(count) }} {{ reason }}
{% endfor -%}
{% if metrics.backbone.finetuned -%}
- the backbone was fine-tuned on {{ "{:,}".format(metrics.backbone.finetuned.rated_rows) }} rated rows\
{{ " and %s pairs"|format("{:,}".format(metrics.backbone.finetuned.pairs)) if metrics.backbone.finetuned.pairs else "" }}
{% endif -%}
- refused: {{ "{:,}".format(metrics.data.refused) }}, truncated: {{ "{:,}".format(metrics.data.truncated) }} \
of {{ "{:,}".format(metrics.data.conversations) }} distinct conversations

## Objectives

Validation is by prompt; R2 and the ridge penalty alpha come from held-out folds, the other columns from
{{ "held-out rows" if rated else "no held-out rows: none were asked for" }}.

| objective | raw range | ratings | alpha | R2 | test n | Spearman | within prompt | error (raw) |
|---|---|---|---|---|---|---|---|---|
{% for report in metrics.regression -%}
{% set o = objectives[loop.index0] %}{% set t = rated.get(report.objective, {}) -%}
| {{ o.name }}{{ " (less is better)" if o.direction == "lower" else "" }} | {{ "%.3g..%.3g"|format(o.low, o.high) }} | {{ "{:,}".format(report.ratings) }} \
| {{ "%g"|format(report.alpha) }} | {{ number(report.r2) }} | {{ t.get("n", "") }} | {{ number(t.get("spearman")) }} \
| {{ number(t.get("within_prompt")) }} | {{ number(t.get("mae")) }} |
{% endfor %}
{% if metrics.get("joint") -%}
## Ratings and pairs together

The regression heads minimise the ratings' error and {{ "%g"|format(metrics.joint.pair_weight) }} times the pair loss; chosen on held-out \
folds: pair loss {{ number(metrics.joint.losses[0], 4) }} -> {{ number(metrics.joint.losses[metrics.joint.pair_weights.index(metrics.joint.pair_weight)], 4) }}, \
mean R2 {{ number(metrics.joint.mean_r2[0]) }} -> {{ number(metrics.joint.mean_r2[metrics.joint.pair_weights.index(metrics.joint.pair_weight)]) }}.

{% endif -%}
{% if metrics.get("quantiles") -%}
## Quantiles

Share of held-out ratings below each quantile, by folds of prompts; the score does not use them.

| objective | {% for level in metrics.quantiles.levels %}{{ "%g"|format(level) }} | {% endfor %}
|---|{% for level in metrics.quantiles.levels %}---|{% endfor %}
{% for head in metrics.quantiles.heads -%}
| {{ head.objective }} | {% for share in head.below %}{{ number(share) }} | {% endfor %}
{% endfor %}
{% endif -%}
{% if metrics.debiasing -%}
## Debiasing against {{ metrics.debiasing.against }}

{{ metrics.debiasing.metric|capitalize }} correlation with the predicted {{ metrics.debiasing.against }}, {{ metrics.debiasing.level.replace("_", " ") }}, on reference data.

{% for bias, of in metrics.debiasing.biases.items() -%}
{% if metrics.debiasing.biases|length > 1 -%}
### {{ bias }}

{% endif -%}
| objective | penalty | before | after |
|---|---|---|---|
{% for name, penalty in of.penalties.items() if name not in metrics.debiasing.biases -%}
| {{ name }} | {{ number(penalty) }} | {{ number(of.before[name]) }} | {{ number(of.after[name], 4) }} |
{% endfor %}
{% endfor -%}
{% for bias, of in metrics.debiasing.get("stability", {}).items() -%}
On held-out prompts the score's correlation with {{ of.measured_by }} is {{ number(of.actual.pooled.score.after) }} \
({{ number(of.actual.pooled.score.before) }} without the transform), within prompts \
{{ number(of.actual.within_prompt.score.after) }} ({{ number(of.actual.within_prompt.score.before) }}); \
with the predicted {{ bias }} {{ number(of.predicted.pooled.score.after) }}.

{% endfor -%}
{% for warning in metrics.debiasing.warnings -%}
- {{ warning }}
{% endfor %}
{% endif -%}
## Gate

Trained on {{ "{:,}".format(metrics.gate.pairs) }} pairs, stopped by {{ "{:,}".format(metrics.gate.held_out_pairs) }} held out by prompt: \
accuracy {{ number(metrics.gate.accuracy) }} against {{ number(metrics.gate.uniform_accuracy) }} of uniform weights; \
entropy {{ number(metrics.gate.mean_entropy) }} nats of {{ number(most) }} possible.
{% if metrics.gate.collapse %}
**The gate has collapsed: {{ metrics.gate.collapse }}.** Its weights do not read the prompt.
{% endif %}
{% if metrics.evaluation.get("pairs") -%}
## Preference pairs

A tie is wrong; so is a refused pair.

| set | pairs | prompts | accuracy | uniform weights | longer response | where longer is right | where longer is wrong |
|---|---|---|---|---|---|---|---|
{% for name, f in metrics.evaluation.pairs.items() -%}
| {{ name }} | {{ "{:,}".format(f.pairs) }} | {{ "{:,}".format(f.prompts) }} | {{ number(f.accuracy) }} | {{ number(f.baselines.uniform_weights) }} \
| {{ number(f.baselines.longer_response) }} | {{ number(f.longer_right.accuracy) }} | {{ number(f.longer_wrong.accuracy) }} |
{% endfor %}
{% endif -%}
## Limits

Predicted ratings are estimates of what the raters of each source would have said; they are no better than
the figures above. Scores have no absolute meaning: compare them, or normalise by the reference mean and
standard deviation in config.json.
"""


def model_card(recipe: Recipe, metrics: Mapping[str, Any], objectives: ObjectiveSet) -> str:
    """The card of a finished run, with its real figures."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    rated = metrics["evaluation"].get("ratings", {})
    most = math.log(len(objectives))
    return environment.from_string(_CARD).render(
        recipe=recipe, metrics=metrics, objectives=list(objectives), rated=rated, number=_number, most=most
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # (no -0.000)
