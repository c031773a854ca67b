"""A language model as judge of answers: five metrics, alone and in pairs, with what the judge itself is worth."""
