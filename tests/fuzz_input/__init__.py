"""A fuzz of what people hand in: recipes, plan files, command lines, images, each valid until a mutation damages it.

    seed ──► valid ──► mutate: keys, types, ranges, structure, bytes ──► fxsplit ──┬── done
                                                                                   ├── refused in a sentence
                                                                                   └── failed: anything else

Anything else is an exception that is not ours, a traceback, the word "unexpected", a sentence of more than 500
characters or one that a terminal would obey, or something written before it was refused.

python -m tests.fuzz_input recipes --count 10000 --seed 0        (or: plans, commands, images)
"""
