"""What was kept, and where it lies in the images."""
