"""Policy x state."""
