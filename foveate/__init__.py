"""foveate: faster vision-language models by removing the visual tokens they do not need."""
