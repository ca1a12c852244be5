"""Colours, once: the pictures are drawn in the light ones, and a page may name them all anew for the dark."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "card": "#f8f9fb",
    "line": "#e3e6ec",
    "ink": "#1d2433",
    "muted": "#636e83",
    "blue": "#2b6cde",
    "orange": "#cf6a12",
    "red": "#cb3a34",
    "green": "#1f8a5b",
}

DARK = {
    "paper": "#12151c",
    "card": "#191d26",
    "line": "#2c323f",
    "ink": "#e6e9f0",
    "muted": "#98a2b6",
    "blue": "#6ea3ff",
    "orange": "#f2a65a",
    "red": "#ff7b72",
    "green": "#56c596",
}
