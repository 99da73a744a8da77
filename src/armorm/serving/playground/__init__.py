"""The playground: a page on which a person sees why, and tries what other weights would do (`armorm serve --ui`).

weighing.py    scored responses under other weights, without the model
pictures.py    results as HTML
files.py       rows of an uploaded file as prompts and responses
page.py        the Gradio page
mount.py       the page inside the server: its key, its bounds, nothing from other hosts
"""
