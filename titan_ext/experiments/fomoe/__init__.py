"""FoMoE (arXiv 2606.19025) at a small size: experts shared out over sites against experts held by all."""
