"""Audits: what a reward model goes by, beyond how often it is right."""
