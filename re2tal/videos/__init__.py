"""Videos and what happens in them: annotations, time, decoding, windows and the toy data set."""
