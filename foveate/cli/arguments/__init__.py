"""What each command takes and says of itself. What it works with is imported when it runs."""
