"""Words of options: what several commands say in their help, and what they read."""

METHOD = (
    "A name that `foveate list` shows, or a JSON file. Given several times, methods act together, "
    "in the order of the stream."
)
KEEP = (
    "Share `0.25`, count per image `64`, or schedule `0.5,0.25,0.125`. Of a method that drops "
    "several times, one number is the mean over the layers after its first drop; without it, the "
    "published schedule holds. With several methods: one for each, in their order."
)
SETTING = (
    "A hyper-parameter, `field=value`, or `method.field=value` of one of several methods; may be "
    "repeated."
)
MAX_PIXELS = "Most pixels of an image; by default Pillow's limit, 178,956,970."
RANDOM = "random:"
"""Before the name of a model with random weights, in `foveate bench --speed`."""
