"""Multiple-choice sets of sources that are not trained on."""
