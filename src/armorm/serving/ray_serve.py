"""Ray Serve: several replicas of a reward server behind one address.

    serve run armorm.serving.ray_serve:app model=runs/real/model replicas=2 gpus=1

Every replica is a complete server with its own model and batcher, and all routes. Ray listens on 127.0.0.1:8000 by
default (`serve start --http-host`). Requests go to the replica with the shorter queue, so the responses of one group
may be computed by several replicas. Each replica reads the API key from the environment variable `api_key_env`.
"""

from __future__ import annotations

from typing import Any, Union

from pydantic import BaseModel, ConfigDict

from armorm.errors import MissingExtraError
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.serving.settings import ServingSettings

_MOST_REQUESTS = 1024  # in flight in one replica; Ray queues further ones


class Arguments(BaseModel):
    """Arguments of `serve run`, as name=value; dtype and device as for `ArmoRM.from_pretrained`."""

    model_config = ConfigDict(extra="forbid")

    model: str = DEFAULT_REWARD_MODEL
    replicas: int = 1
    gpus: float = 0  # of each replica
    cpus: float = 1
    dtype: str = "auto"
    device: str = "auto"
    api_key_env: Union[str, None] = None  # environment variable with the key that clients must present
    settings: dict[str, Any] = {}  # other `ServingSettings` of each replica


def app(arguments: Arguments) -> Any:
    """The Ray Serve application."""
    try:
        from ray import serve
    except ImportError:
        raise MissingExtraError("replicas need Ray Serve, expected: pip install 'ray[serve]'") from None

    def build() -> Any:  # runs in the replica
        from armorm.reward_model import ArmoRM
        from armorm.serving.app import make_app
        from armorm.serving.engine import ScoringEngine
        from armorm.serving.server import key_from_environment, served_name

        settings = ServingSettings(
            **{"name": served_name(arguments.model), **arguments.settings},
            api_key=key_from_environment(arguments.api_key_env),
        )
        rm = ArmoRM.from_pretrained(arguments.model, dtype=arguments.dtype, device=arguments.device)
        return make_app(ScoringEngine(rm, settings), settings.allowed_hosts)

    deployment = serve.deployment(
        name="armorm",
        num_replicas=arguments.replicas,
        max_ongoing_requests=_MOST_REQUESTS,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
    )(serve.ingress(build)())
    return deployment.bind()
