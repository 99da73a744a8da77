"""`armorm serve`: the reward model behind HTTP."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from armorm.cli.score import DeviceOption, DtypeOption, ModelOption
from armorm.embedded import EMBEDDED_REWARD_MODEL, tokenizer_path
from armorm.errors import CheckpointError, MissingExtraError

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_WARM_UP = [{"role": "user", "content": "Are you there?"}, {"role": "assistant", "content": "Yes."}]


def serve(
    model: ModelOption = EMBEDDED_REWARD_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8008,
    api_key_env: Annotated[
        Optional[str], typer.Option(metavar="NAME", help="Environment variable that holds the key clients must show.")
    ] = None,
    name: Annotated[Optional[str], typer.Option(help="How the model is called in answers.")] = None,
    policy_tokenizer: Annotated[
        Optional[str],
        typer.Option(
            help="Folder or hub id of the tokenizer whose template wrote the texts, where it is no known one."
        ),
    ] = None,
    rendered_turns: Annotated[
        str,
        typer.Option(
            help="Rendered text with several assistant turns: refuse it; read it as a single turn, whose response "
            "holds all that follows; or believe it as multi turns."
        ),
    ] = "refuse",
    normalize: Annotated[bool, typer.Option(help="Scores in standard deviations from the reference mean.")] = False,
    empty_score: Annotated[
        Optional[float], typer.Option(help="Score of an empty response, outside /v1/reward; refused if absent.")
    ] = None,
    batch_tokens: Annotated[Optional[int], typer.Option(help="Most tokens of a forward pass.")] = None,
    prompt_cache: Annotated[
        Optional[int],
        typer.Option(metavar="MIB", help="Memory for recent prompts' keys and values, in MiB; 0 for none."),
    ] = None,
    max_length: Annotated[Optional[int], typer.Option(help="Most tokens of a conversation.")] = None,
    max_rows: Annotated[Optional[int], typer.Option(help="Most conversations of a request.")] = None,
    max_waiting_rows: Annotated[
        Optional[int], typer.Option(help="Conversations that may wait before requests are turned away.")
    ] = None,
    max_waiting_seconds: Annotated[
        Optional[float],
        typer.Option(help="How long the model may need for what waits before requests are turned away."),
    ] = None,
    request_seconds: Annotated[Optional[float], typer.Option(help="Time limit of a request.")] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve the playground, a page at /ui.")] = False,
    score_log: Annotated[
        Optional[Path], typer.Option(help="Append the numbers of every scored row, no texts, for armorm monitor.")
    ] = None,
    log_texts: Annotated[bool, typer.Option(help="Write every scored conversation to standard error.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Serve scores, in armorm's own format and in those of OpenRLHF, verl, vLLM, SGLang, LLaMA-Factory and NIM.

    Example: `armorm serve --port 8008`, then
    `curl localhost:8008/v1/reward -d '{"prompt": "What is 2+2?", "responses": ["4"]}'`
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        extras = "serve,ui" if ui else "serve"
        raise MissingExtraError(f"serving needs {', '.join(missing)}, expected: pip install 'armorm[{extras}]'")
    if ui and find_spec("gradio") is None:
        raise MissingExtraError("the playground needs gradio, expected: pip install 'armorm[serve,ui]'")
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
        "prompt_cache": None if prompt_cache is None else prompt_cache * MEBIBYTE,
    }
    settings = ServingSettings(
        name=name or server.served_name(model),
        api_key=server.key_from_environment(api_key_env),
        rendered_turns=rendered_turns,  # type: ignore[arg-type]  # checked there
        normalize=normalize,
        empty_score=empty_score,
        max_length=max_length,
        log_texts=log_texts,
        score_log=score_log,
        ui=ui,
        **{option: value for option, value in given.items() if value is not None},
    )
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("armorm.serving").setLevel(logging.INFO if log_texts else logging.WARNING)
    with server.bound_socket(host, port) as sock:
        tokenizer = _tokenizer(policy_tokenizer)
        rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device)
        engine = ScoringEngine(rm, settings, tokenizer)
        rm.score([_WARM_UP])
        warning = server.exposure_warning(host, settings.api_key)
        if warning is not None:
            console.print(f"warning: {warning}")
        console.print(f"{settings.name} ({len(rm.objectives)} objectives) on {server.address_of(sock)}")
        if ui:
            console.print(f"the playground is at {server.address_of(sock)}/ui")
        console.print(f"POST {', '.join(ROUTES_BY_PATH)}; GET /health, /ready, /metrics, /v1/models; Ctrl-C stops it")
        server.serve(engine, sock)


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(tokenizer_path(name) or name))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: cannot be loaded as a tokenizer: {error}") from error
