"""Reward functions and pipeline steps in the form that trainers and data tools call, and a plugin for vLLM.

Modules that extend a class of a library import it (`distilabel`, `openrlhf_agent`, `verl_manager`, `vllm_model`,
`vllm_requests`); no other does.
"""
