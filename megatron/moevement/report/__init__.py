"""What people look at: metrics, progress, timeline and plots."""
