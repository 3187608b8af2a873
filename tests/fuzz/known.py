"""Faults that are known and not yet mended: while one is `True`, no cell reaches it."""

PROMPT_ENDS_IN_IMAGE = False
HIDDEN_TOKENS = False
VISION_AND_SIGNALS = False  # a method within the encoder, and one that reads its signals
MERGE_WITHOUT_REMOVAL = False  # what is merged where no image of a call loses a token
TWO_AT_ONE_PLACE = False  # of which records tell the last
