"""Reward functions and pipeline steps in the form that trainers and data tools call.

None of the modules imports the library it is for, except `distilabel`, whose steps extend classes of distilabel.
"""
