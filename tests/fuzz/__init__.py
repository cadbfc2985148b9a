"""A fuzz: small models, cuts and phases drawn from a seed, held against the plain model with the same parts frozen.

    seed ──► draw ──► Case ──► source ──► model ──► trace, cut, run    ┐
                       │                    │                          ├── the same bits, or refused in words
                       │                    └──► copy, frozen by hand  ┘
                       └── shrink: the smallest case that fails in the same way

python -m tests.fuzz --count 20000 --seed 0 -j 2
"""
