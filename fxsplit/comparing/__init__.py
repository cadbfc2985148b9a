"""Runs of several training methods, held against each other: arms, budgets, statistics, verdicts, reports."""
