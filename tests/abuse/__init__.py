"""Files that no reader should trust, by what is wrong with them: (bytes, words of the refusal)."""
