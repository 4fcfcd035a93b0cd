"""An OpenAI-compatible server: an engine that computes the rows of many requests together, and the web application in front of it.

`engine` and `schedule` know nothing of HTTP; `app`, `guard` and `server` need the extra `serve`.
"""
