"""`armorm serve`: a reward model behind an HTTP API."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Option

from armorm.cli.options import DeviceOption, DtypeOption, ModelOption, Place, ReasoningOption
from armorm.errors import CheckpointError, MissingExtraError
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.progress import say

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_WARM_UP = [{"role": "user", "content": "Are you there?"}, {"role": "assistant", "content": "Yes."}]


def serve(
    model: ModelOption = DEFAULT_REWARD_MODEL,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port; 0 selects a free one.")] = 8008,
    api_key_env: Annotated[str | None, Option(metavar="NAME", help="Environment variable with the API key.")] = None,
    name: Annotated[str | None, Option(help="Model name in responses (default: from --model).")] = None,
    policy_tokenizer: Annotated[
        str | None,
        Option(help="Tokenizer whose chat template rendered the texts that clients send, if it is not recognised."),
    ] = None,
    rendered_turns: Annotated[
        str,
        Option(
            help="Rendered texts with several assistant turns: refuse them, read them as single (the response is all "
            "from the first assistant turn on), or trust them as multi."
        ),
    ] = "refuse",
    normalize: Annotated[
        bool, Option(help="Standardise scores by the reference data; a request to /v1/reward may say otherwise.")
    ] = False,
    reasoning: ReasoningOption = None,
    empty_score: Annotated[float | None, Option(help="Score of an empty response (default: rejected).")] = None,
    ui: Annotated[bool, Option("--ui", help="Also serve the playground at /ui.")] = False,
    ratings: Annotated[
        Path | None,
        Option(help="With --ui: ratings given in the playground are appended to this file (on this machine only)."),
        Place.FILE,
    ] = None,
    score_log: Annotated[
        Path | None, Option(help="Log file of the scores (no texts), for `armorm monitor`."), Place.FILE
    ] = None,
    log_texts: Annotated[bool, Option(help="Log every scored conversation.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "all",
    batch_tokens: Annotated[int | None, Option(help="Maximum tokens per forward pass.")] = None,
    prompt_cache: Annotated[int | None, Option(metavar="MIB", help="Prompt (KV) cache size; 0 disables it.")] = None,
    max_length: Annotated[int | None, Option(help="Maximum tokens per conversation.")] = None,
    max_rows: Annotated[int | None, Option(help="Maximum conversations per request.")] = None,
    max_waiting_rows: Annotated[int | None, Option(help="Maximum conversations in the queue.")] = None,
    max_waiting_seconds: Annotated[float | None, Option(help="Maximum estimated waiting time in the queue.")] = None,
    request_seconds: Annotated[float | None, Option(help="Time limit of a request.")] = None,
    allowed_hosts: Annotated[
        str | None, Option(metavar="NAME,NAME", help="Host names to answer besides those of this machine.")
    ] = None,
    allowed_origins: Annotated[
        str | None, Option(metavar="URL,URL", help="Sites whose pages may send requests (CORS; default: none).")
    ] = None,
    header_seconds: Annotated[float | None, Option(help="Time limit of a request's headers.")] = None,
    body_idle_seconds: Annotated[float | None, Option(help="Longest time without a byte of a body.")] = None,
    keep_alive_seconds: Annotated[float | None, Option(help="How long an idle connection stays open.")] = None,
    max_connections: Annotated[int | None, Option(help="Maximum open connections.")] = None,
    shutdown_seconds: Annotated[float | None, Option(help="Time for accepted requests after SIGTERM.")] = None,
) -> None:
    """Serve scores over HTTP, in armorm's format and those of OpenRLHF, verl, vLLM, SGLang, LLaMA-Factory and NIM.

    Example: `armorm serve --port 8008`, then
    `curl localhost:8008/v1/reward --json '{"prompt": "What is 2+2?", "responses": ["4"]}'`
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        extras = "serve,ui" if ui else "serve"
        raise MissingExtraError(f"serving needs {', '.join(missing)}, expected: pip install 'armorm[{extras}]'")
    if ui and find_spec("gradio") is None:
        raise MissingExtraError("the playground needs gradio, expected: pip install 'armorm[serve,ui]'")
    from armorm.serving.hosts import is_local

    if ratings is not None and not (ui and is_local(host)):
        expected = "expected --ui, and --host 127.0.0.1: whoever opens the page could write to the file"
        raise BadParameter(f"--ratings: {expected}")
    from armorm.reward_model import ArmoRM
    from armorm.serving import server
    from armorm.serving.engine import ScoringEngine
    from armorm.serving.protocols import ROUTES_BY_PATH
    from armorm.serving.settings import MEBIBYTE, ServingSettings

    given: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "max_rows": max_rows,
        "max_waiting_rows": max_waiting_rows,
        "max_waiting_seconds": max_waiting_seconds,
        "request_seconds": request_seconds,
        "allowed_hosts": _list(allowed_hosts),
        "allowed_origins": _list(allowed_origins),
        "header_seconds": header_seconds,
        "body_idle_seconds": body_idle_seconds,
        "keep_alive_seconds": keep_alive_seconds,
        "max_connections": max_connections,
        "shutdown_seconds": shutdown_seconds,
        "prompt_cache": None if prompt_cache is None else prompt_cache * MEBIBYTE,
    }
    settings = ServingSettings(
        name=name or server.served_name(model),
        api_key=server.key_from_environment(api_key_env),
        rendered_turns=rendered_turns,  # type: ignore[arg-type]  # validated by ServingSettings
        normalize=normalize,
        empty_score=empty_score,
        max_length=max_length,
        log_texts=log_texts,
        score_log=score_log,
        ui=ui,
        ratings=ratings,
        **{option: value for option, value in given.items() if value is not None},
    )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("armorm.serving").setLevel(logging.INFO if log_texts else logging.WARNING)
    if device.startswith("ray"):
        raise BadParameter("--devices: on Ray, expected serve run armorm.serving.ray_serve:app (docs/serving.md)")
    with server.bound_socket(host, port) as sock:
        tokenizer = _tokenizer(policy_tokenizer)
        rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device, reasoning=reasoning)  # type: ignore[arg-type]
        engine = ScoringEngine(rm, settings, tokenizer)
        rm.score([_WARM_UP])
        for warning in server.exposure_warnings(host, settings):
            say(f"warning: {warning}")
        say(f"{settings.name} ({len(rm.objectives)} objectives) on {server.address_of(sock)}")
        if ui:
            say(f"playground: {server.address_of(sock)}/ui")
        say(f"POST {', '.join(ROUTES_BY_PATH)}; GET /, /docs, /health, /ready, /metrics, /v1/models; Ctrl-C stops it")
        server.serve(engine, sock)


def _list(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    from armorm.backbone.locate import backbone_path

    try:
        return AutoTokenizer.from_pretrained(backbone_path(name))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: cannot be loaded as a tokenizer: {error}") from error
