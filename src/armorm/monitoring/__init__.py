"""Monitoring: is a policy under training learning the task, or learning the reward model?

log.py         the log of scored samples: written by scorers, read here
blocks.py      samples to blocks of steps: means, spread, slope on length
scan.py        growth over every interval of blocks, and how large it gets by chance
detection.py   the rules: growth through one objective, through length, into the unknown; where each began
outcome.py     everything that was found, as plain values
terminal.py    the same for a terminal
page.py        the same as one HTML file
"""
