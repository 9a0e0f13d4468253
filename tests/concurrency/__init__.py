"""Many tasks in several processes on the same sessions."""
