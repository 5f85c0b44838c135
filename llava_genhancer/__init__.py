"""Better eyes for LLaVA: generative post-training of CLIP-like vision towers (GenHancer, arXiv 2503.19480)."""

__version__ = "0.1.0"
