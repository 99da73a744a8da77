"""Reward functions and pipeline steps in the form that trainers and data tools call.

    trl.py         `reward_funcs(model)`: one function, or one per objective
    openrlhf.py    `--remote_rm_url PATH_OF_THIS_FILE`
    verl.py        `custom_reward_function.path=... name=compute_score`
    distilabel.py  pipeline steps `ArmoRMScore`, `ArmoRMRatings`
    rewardbench.py `python -m armorm.integrations.rewardbench`
    rewards.py     common to the above: scores from a local model or a server, settings from the environment

None of them imports the library it is for, except `distilabel.py`, whose steps extend classes of distilabel.
"""
