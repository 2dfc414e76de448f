"""The verdict: accuracy, AD/AI, source reliance, and their intervals."""
