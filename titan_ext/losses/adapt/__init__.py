"""ADAPT (arXiv 2605.05227): samples weigh by how close the model finds them to anchors."""

from titan_ext.losses.adapt.loss import Adapt

__all__ = ["Adapt"]
