"""Integrations: reward functions in the form that trainers call.

    trl.py        `reward_funcs(model)`: one function, or one for each objective
    openrlhf.py   `--remote_rm_url PATH_OF_THIS_FILE`
    verl.py       `custom_reward_function.path=... name=compute_score`
    distilabel.py steps of a pipeline: `ArmoRMScore`, `ArmoRMRatings`
    source.py     where the scores come from: a model in this process, or a server

None of them imports the trainer it is for; `distilabel.py` imports distilabel, whose classes its steps extend.
"""
