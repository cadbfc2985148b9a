"""Text to nn.Module: where models come from, their ends changed, and inputs that suit them."""
