"""Reward functions and pipeline steps in the form that trainers and data tools call.

Modules that extend a class of a library import it (`distilabel`, `openrlhf_agent`, `verl_manager`); no other does.
"""
