"""Plots of the quality lab."""
from __future__ import annotations
def draw(folder): pass
