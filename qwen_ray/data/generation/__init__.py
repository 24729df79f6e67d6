"""Questions that a served model writes about passages, and how they are checked."""
