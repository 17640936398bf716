"""The demo: `tokred demo`, a Gradio page on which the bundled models are reduced (others where the hub is reached).

`models` keeps what is loaded, `classify`, `ask`, `recall` and `codes` are the jobs (no Gradio in them), `page` is the
page, `server` starts it.
"""
