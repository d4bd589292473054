"""The stories: an audit from capture to guard, as functions read top to bottom, and the page it ends in."""
