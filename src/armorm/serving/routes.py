"""The scoring routes: which path is read how, and what goes in and out.

In:  nothing. Out: `ROUTES`.

vLLM and SGLang share the path `/classify`: a body with `text` is SGLang's, one with `input` or `messages` vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving import answers
from armorm.serving.protocols import armorm as native
from armorm.serving.protocols import llamafactory, nim, openrlhf, sglang, vllm
from armorm.serving.protocols.base import Exchange, Read

_MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
_PROMPT = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
_RENDERED = f"{_PROMPT}4<|im_end|>"


def read_classify(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request on the path that vLLM and SGLang share."""
    if "text" in body and "input" not in body and "messages" not in body:
        return sglang.read_classify(body, reader)
    return vllm.read_classify(body, reader)


class Route(NamedTuple):
    """A scoring route.

    Attributes:
        path: of the route.
        read: reads a body.
        forms: what a body may be.
        answers: what an answer may be.
        summary: one sentence.
        example: a body.
    """

    path: str
    read: Read
    forms: tuple[type[BaseModel], ...]
    answers: tuple[Any, ...]
    summary: str
    example: dict[str, Any]


ROUTES: tuple[Route, ...] = (
    Route(
        "/v1/reward",
        native.read,
        (native.RewardRequest,),
        (answers.RewardAnswer,),
        "Scores with everything they are made of.",
        {"conversations": [_MESSAGES], "normalize": False},
    ),
    Route(
        "/get_reward",
        openrlhf.read,
        (openrlhf.GetRewardRequest,),
        (answers.GetRewardAnswer,),
        "OpenRLHF's remote reward model.",
        {"query": [_RENDERED], "prompts": [_PROMPT], "labels": [None]},
    ),
    Route(
        "/classify",
        read_classify,
        (vllm.PoolingRequest, sglang.ClassifyRequest),
        (answers.ClassifyAnswer, answers.EmbeddedTexts),
        "vLLM's or SGLang's classification.",
        {"input": _RENDERED, "activation": False},
    ),
    Route(
        "/pooling",
        vllm.read_pooling,
        (vllm.PoolingRequest,),
        (answers.PoolingAnswer,),
        "vLLM's pooling.",
        {"messages": _MESSAGES},
    ),
    Route(
        "/score",
        vllm.read_score,
        (vllm.ScoreRequest,),
        (answers.ScoreAnswer,),
        "vLLM's score of text pairs.",
        {"text_1": "What is 2+2?", "text_2": ["4", "5"]},
    ),
    Route(
        "/v1/embeddings",
        sglang.read_embeddings,
        (sglang.EmbeddingsRequest,),
        (answers.EmbeddingsAnswer,),
        "SGLang's reward, as verl calls it.",
        {"input": [_RENDERED]},
    ),
    Route(
        "/v1/score/evaluation",
        llamafactory.read,
        (llamafactory.ScoreEvaluationRequest,),
        (answers.ScoreEvaluationAnswer,),
        "LLaMA-Factory's scores.",
        {"messages": [_RENDERED]},
    ),
    Route(
        "/v1/chat/completions",
        nim.read,
        (nim.ChatCompletionRequest,),
        (answers.ChatCompletion,),
        "NIM's reward format.",
        {"messages": _MESSAGES},
    ),
)
