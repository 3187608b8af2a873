"""Files: reading, writing, images, and quoting what they hold in messages."""
