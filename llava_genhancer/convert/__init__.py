"""CLIP and SigLIP between three formats: transformers' folders, open_clip's, and OpenAI's state dict.

What a file does not say is asked for, never guessed from its name; what a format cannot hold is refused; every
conversion ends with both models on the same inputs.
"""
