"""Monitoring of an RL run: does the score grow through one objective, through length, or out of distribution?"""
