"""The feature browser: pages over finished artifacts; the charts, and how text is shown on any page."""
