"""Clients of servers: reward servers, vLLM's pooling server, OpenAI-compatible chat servers. They need httpx only
(`armorm[client]`), neither torch nor transformers.

    http     requests with retries, JSON responses
    reward   `armorm serve`: scores with everything that they are made of
    pooling  vLLM's `/classify` and `/pooling`: scores
    chat     `/v1/chat/completions`: texts of a language model
"""

from armorm.client.http import RewardServerError, pause
from armorm.client.pooling import PoolingClient, connect
from armorm.client.reward import AsyncRewardClient, RewardClient, ServedScores

__all__ = [
    "AsyncRewardClient",
    "PoolingClient",
    "RewardClient",
    "RewardServerError",
    "ServedScores",
    "connect",
    "pause",
]
