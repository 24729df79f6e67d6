"""The before/after report: one HTML file that needs nothing but itself."""
