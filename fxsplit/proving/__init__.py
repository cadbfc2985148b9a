"""The executor held against the plain model, and forecasts held against what they foretell."""
