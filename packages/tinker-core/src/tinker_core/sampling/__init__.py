"""What samplers of every engine have in common: checks of requests, stop rules, draws, and answers about prompts.

`checking` and `stopping` need no torch; `drawing` and `scoring` do.
"""
