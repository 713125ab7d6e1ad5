"""adq: quantization-aware training with adaptive codebooks and mixed precision (arXiv 2510.19760)."""
