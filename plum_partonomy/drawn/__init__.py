"""The drawn miniature: objects with parts, drawn with exact masks."""
