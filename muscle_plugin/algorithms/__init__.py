"""Algorithms: the MUSCLE mixin and how it is composed with USB's classes."""
