"""The sources of named models: timm, torchvision, Hugging Face and the paper, a `LIBRARY` each."""
