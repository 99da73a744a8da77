"""Ray Serve: several replicas of a reward server behind one address.

    serve run armorm.serving.ray_serve:app model=runs/real/model replicas=2 gpus=1

In:  the name or folder of a model, how many replicas, what each gets of the machine, settings of the server.
Out: a Ray Serve application: every replica is a whole server with a model and a batcher of its own, and all routes.

Ray listens on 127.0.0.1:8000 unless told otherwise (`serve start --http-host`). Requests go to the replica with the
shorter queue, so a group's responses may be computed by several of them. A key is read by each replica from the
environment variable that `api_key_env` names.
"""

from __future__ import annotations

from typing import Any, Union

from pydantic import BaseModel, ConfigDict

from armorm.embedded import EMBEDDED_REWARD_MODEL
from armorm.errors import MissingExtraError
from armorm.serving.settings import ServingSettings

_MOST_REQUESTS = 1024  # under way in one replica; beyond it Ray keeps them waiting


class Arguments(BaseModel):
    """What `serve run` is given as name=value.

    Attributes:
        model: name, folder or hub id.
        replicas: servers.
        gpus, cpus: that each gets.
        dtype, device: as for `ArmoRM.from_pretrained`.
        api_key_env: environment variable that holds the key clients must show.
        settings: other settings of each server, as in `ServingSettings`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = EMBEDDED_REWARD_MODEL
    replicas: int = 1
    gpus: float = 0
    cpus: float = 1
    dtype: str = "auto"
    device: str = "auto"
    api_key_env: Union[str, None] = None
    settings: dict[str, Any] = {}


def app(arguments: Arguments) -> Any:
    """The application.

    Raises:
        MissingExtraError: where Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError:
        raise MissingExtraError("replicas need Ray Serve, expected: pip install 'ray[serve]'") from None

    def build() -> Any:  # (in the replica)
        from armorm.reward_model import ArmoRM
        from armorm.serving.app import make_app
        from armorm.serving.engine import Scorer
        from armorm.serving.server import key_from_environment, served_name

        settings = ServingSettings(
            **{"name": served_name(arguments.model), **arguments.settings},
            api_key=key_from_environment(arguments.api_key_env),
        )
        rm = ArmoRM.from_pretrained(arguments.model, dtype=arguments.dtype, device=arguments.device)
        return make_app(Scorer(rm, settings))

    deployment = serve.deployment(
        name="armorm",
        num_replicas=arguments.replicas,
        max_ongoing_requests=_MOST_REQUESTS,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
    )(serve.ingress(build)())
    return deployment.bind()
