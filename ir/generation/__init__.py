"""Generation of text: the record of a cached decoder, its runners, and the driver over them."""
