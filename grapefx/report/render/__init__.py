"""Renders a report as text, as an HTML page, or its graph as a drawing; reads records only."""
