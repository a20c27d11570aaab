"""Inspections as text, HTML, pictures and JSON."""
