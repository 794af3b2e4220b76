"""Drawn miniatures: objects with parts and exact masks."""
