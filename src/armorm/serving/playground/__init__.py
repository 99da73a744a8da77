"""Web page that scores responses, shows why, and previews other objective weights (`armorm serve --ui`).

reweighting.py  scored responses under other weights, without running the model
cards.py        results as HTML
page.py         the Gradio page and its place in the server
"""
